"""What can be known before training: the report, the command, and the doctor inside of a job."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.batch import Collator, Processor
from vlm_lora_lab.data.drawn import Drawn
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.debug.preflight import check_longest
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.job import Job, examine, train
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

HANDWRITING = samples_folder() / "handwriting"


@pytest.fixture
def data(tmp_path):
    records = json.loads((HANDWRITING / "train.json").read_text())[:12]
    for r in records:
        Image.open(HANDWRITING / r["image"]).save(tmp_path / Path(r["image"]).name)
        r["image"] = Path(r["image"]).name
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def files(folder):
    return sorted(p for p in folder.rglob("*"))


def test_a_healthy_job_is_ok_and_nothing_is_written(data, tmp_path, capsys):
    before = files(tmp_path)
    assert main(["doctor", "--data", str(data), "--batch-size", "4"]) == 0
    out = capsys.readouterr().out
    assert (
        out.count("OK  ") == 5
        and "Nothing speaks against training" in out
        and "tensors learn" in out
        and "GiB at the peak" in out
    )
    assert files(tmp_path) == before
    report = tmp_path / "report.txt"
    config = tmp_path / "job.yaml"
    config.write_text(f"data: {data}\noutput: {tmp_path / 'out'}\nschedule: {{batch_size: 2}}\n")
    assert main(["doctor", str(config), "--report", str(report)]) == 0
    assert report.read_text().startswith("OK") and not (tmp_path / "out").exists()
    assert main(["doctor", str(config), "--report", str(report)]) == 2


def test_every_bad_row_is_named(data, tmp_path, capsys):
    records = json.loads(data.read_text())
    for i in (3, 7):
        (tmp_path / records[i]["image"]).write_bytes(b"not a picture")
    assert main(["doctor", "--data", str(data)]) == 2
    out = capsys.readouterr().out
    assert out.startswith("ERROR") and all(records[i]["image"] in out for i in (3, 7)) and "2 cannot be used" in out
    data.write_text("[")
    assert main(["doctor", "--data", str(data)]) == 2
    assert "NOT REACHED" in capsys.readouterr().out
    assert main(["doctor", "--data", str(data), "--nan", "explode"]) == 2 and main(["doctor"]) == 2


def test_a_rate_that_changes_nothing_is_a_warning_and_a_broken_model_an_error(data, tmp_path, capsys):
    folder = tmp_path / "model"
    model = load_vlm("lab")
    model.save_pretrained(folder)
    load_tokenizer("lab").save_pretrained(folder)
    assert main(["doctor", "--data", str(data), "--model", str(folder), "--learning-rate", "1.0e-13"]) == 1
    out = capsys.readouterr().out
    assert "WARNING     gradients" in out and "rounded away" in out
    weights = load_file(folder / "model.safetensors")
    name = "llm.model.layers.2.mlp.down_proj.weight"
    weights[name] = weights[name] * 1e38
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report = examine(Job(str(data), "nowhere", model=str(folder), four_bit=False))
    assert (
        report.status == 2
        and "layers.2.mlp.down_proj" in report.checks[-1].says
        and "infinity was made by mm" in report.checks[-1].says
    )


def test_a_job_that_blows_up_stops_with_a_case_and_exit_status_1(data, tmp_path, capsys):
    flags = [
        "--data",
        str(data),
        "--batch-size",
        "4",
        "--max-steps",
        "12",
        "--learning-rate",
        "1.0e30",
        "--full-learning-rate",
        "1.0e30",
        "--warmup",
        "0",
    ]
    assert main(["train", *flags, "--output", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert "The weights were lost in an earlier step, and nothing of them was saved. It showed at step" in out
    [case] = (tmp_path / "out" / "nan").iterdir()
    assert (case / "replay.py").is_file() and json.loads((case / "case.json").read_text())["rebuild"] == "base"
    assert not (tmp_path / "out" / "report.json").exists()
    # before its first checkpoint, so it may start anew
    assert main(["train", *flags, "--output", str(tmp_path / "out")]) == 1
    from vlm_lora_lab.debug.nan import replay

    assert replay(case).cause == json.loads((case / "case.json").read_text())["diagnosis"]["cause"]


def test_the_longest_batch_is_computed_as_training_computes_it():
    model = apply_plan(load_vlm("lab"), TuningPlan())
    processor = Processor.of(model.config, load_tokenizer("lab"))
    batch = Collator(processor.tokenizer.pad_token_id)([processor(Drawn(0, 8)[i]) for i in range(8)])
    called, layer = [], model.get_submodule("base_model.model.llm.model.layers.0.mlp")
    layer.register_forward_pre_hook(lambda *_: called.append(torch.is_grad_enabled()))
    assert check_longest(model, batch).verdict == "ok"
    # twice in the measured pass, twice in the one that is traced: activations were not kept
    assert called.count(True) == 4
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_skipped_steps_stand_in_the_report(data, tmp_path, monkeypatch):
    plain = Processor.__call__

    def corrupt(self, conversation, answer=True):
        row = plain(self, conversation, answer)
        if conversation.source.endswith("[5]") or conversation.id == records[5]["id"]:
            row["patches"] = [(strip / (strip * 0).sum(), size) for strip, size in row["patches"]]
        return row

    records = json.loads(data.read_text())
    monkeypatch.setattr(Processor, "__call__", corrupt)
    job = {
        "data": str(data),
        "output": str(tmp_path / "out"),
        "nan": "skip",
        "schedule": {"max_steps": 6, "batch_size": 4},
    }
    report = train(Job.of(job), say=lambda line: None)
    assert report["not_finite"] and all(
        r["cause"] == "corrupt input" and r["rows"] == [5] for r in report["not_finite"]
    )
    assert all(
        t.isfinite().all()
        for t in load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors").values()
        if t.is_floating_point()
    )
    with pytest.raises(InputError, match="Write one of stop, skip, rollback"):
        Job.of(job | {"nan": "ignore"})
    assert torch.get_num_threads() >= 1
