"""A run that goes on from an adapter starts with exactly its weights, trains at least what it holds, and says where it
came from."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_identity import data  # noqa: F401

from vlm_lora_lab.checkpoint.save import (
    ancestry,
    check_start,
    load_adapter,
    plan_of,
    read_provenance,
    save_adapter,
    start_from,
)
from vlm_lora_lab.cli import main
from vlm_lora_lab.data.batch import Processor
from vlm_lora_lab.data.drawn import Drawn
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.job import Job
from vlm_lora_lab.models.files import save_vlm
from vlm_lora_lab.models.load import lab_folder, load_tokenizer, load_vlm
from vlm_lora_lab.models.published import on_meta
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.quant.policy import Packing
from vlm_lora_lab.train.identity import STARTED, file_sha256
from vlm_lora_lab.train.watch import LivePlot

FLAGS = ["--max-steps", "2", "--batch-size", "2", "--save-every", "1"]


def stirred(plan, folder, four_bit=False):
    "An adapter whose every trained number was moved."
    torch.manual_seed(0)
    model = apply_plan(
        load_vlm("lab", four_bit=four_bit, whole=Packing.of(on_meta("lab"), plan).whole if four_bit else ()), plan
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.02)
    return save_adapter(model, folder, plan, "lab", load_tokenizer("lab"), four_bit)


def logits(model):
    processor = Processor.of(model.config, load_tokenizer("lab"))
    batch = processor.collate([processor(c) for c in Drawn(0, 3)])
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


@pytest.mark.parametrize(
    "plan, wider, four_bit",
    [
        (TuningPlan(), TuningPlan(), True),
        (TuningPlan(rank=4, variant="dora"), TuningPlan(rank=4, variant="dora", vision="lora"), False),
        (
            TuningPlan(rank=4, variant="rslora", connector="freeze"),
            TuningPlan(rank=4, variant="rslora", connector="full", head="full"),
            True,
        ),
        (
            TuningPlan(rank=4, variant="pissa", connector="freeze"),
            TuningPlan(rank=4, variant="pissa", connector="freeze"),
            False,
        ),
        (
            TuningPlan(language="lora(rank=4) on 0-1", connector="full on kv_proj", embeddings="lora"),
            TuningPlan(
                language="lora(rank=4) on 0-1", connector="full", vision="full on 2", embeddings="lora", dropout=0.1
            ),
            False,
        ),
    ],
)
def test_before_the_first_step_the_model_answers_as_the_adapter_does(plan, wider, four_bit, tmp_path):
    folder = stirred(plan, tmp_path / "adapter", four_bit)
    known = read_provenance(folder)
    check_start(on_meta("lab"), folder, known, wider)
    torch.manual_seed(1)
    whole = Packing.of(on_meta("lab"), wider).whole if four_bit else ()
    model = apply_plan(load_vlm("lab", four_bit=four_bit, whole=whole), wider)
    base = load_vlm("lab", four_bit=four_bit, whole=whole)
    before = logits(model)
    assert start_from(model, folder) == len(load_file(folder / "adapter_model.safetensors"))
    theirs = logits(load_adapter(folder, model=base))
    assert not torch.allclose(before, theirs, atol=1e-2)
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=0 if plan.variant != "pissa" else 1e-5)


@pytest.mark.parametrize(
    "plan, message",
    [
        (TuningPlan(rank=8), "has rank 16 and alpha 32, and the plan says 8"),
        (TuningPlan(alpha=1), "and the plan says 16 and 1"),
        (TuningPlan(variant="dora"), "the adapter is lora, and the plan says variant: dora"),
        (TuningPlan(connector="freeze"), "in full, and the plan does not train it in full"),
        (TuningPlan(connector="lora"), "in full, and the plan does not train it in full"),
        (TuningPlan(language="lora on 0"), "and the plan has none there"),
        (TuningPlan(targets=("q_proj",)), "and the plan has none there"),
        (TuningPlan(language="full", vision="lora"), "and the plan has none there"),
    ],
)
def test_a_plan_that_contradicts_the_adapter_is_refused_with_the_way_to_go(plan, message, tmp_path):
    folder = stirred(TuningPlan(), tmp_path / "adapter")
    with pytest.raises(InputError) as e:
        check_start(on_meta("lab"), folder, read_provenance(folder), plan)
    assert (
        message in str(e.value)
        and f"vlm-lora-lab merge {folder} --output {folder}-merged, then vlm-lora-lab train --model {folder}-merged"
        in str(e.value)
    )


class Begins(LivePlot):
    "Remembers the model as it is before the first step."

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        Begins.seen = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_from_one_job_to_the_next_and_its_resume(data, tmp_path, capsys, monkeypatch):
    """In 4 bit, with more parts, other data, and a stop; the line of ancestors is in the provenance, and the first
    adapter need not be there any more."""
    first, second, third = (tmp_path / n for n in ("first", "second", "third"))
    assert (
        main(
            [
                "train",
                "--data",
                str(data / "train.json"),
                "--output",
                str(first),
                *FLAGS,
                "--rank",
                "2",
                "--connector",
                "freeze",
            ]
        )
        == 0
    )
    rows = json.loads((data / "train.json").read_text())[2:]
    (data / "new.json").write_text(json.dumps(rows))
    go_on = [
        "train",
        "--from-adapter",
        str(first / "adapter"),
        "--data",
        str(data / "new.json"),
        "--output",
        str(second),
        *FLAGS,
    ]
    assert main(["doctor", *go_on[1:], "--connector", "full"]) in (0, 1), capsys.readouterr()
    assert not second.exists()
    with monkeypatch.context() as patch:
        patch.setattr("vlm_lora_lab.job.LivePlot", Begins)
        assert main([*go_on, "--connector", "full"]) == 0
    said = capsys.readouterr().out
    was = load_file(first / "adapter" / "adapter_model.safetensors")
    assert f"Starting from {len(was)} tensors of {first / 'adapter'}." in said
    seen = {n.replace(".default", ""): p for n, p in Begins.seen.items()}
    assert all(torch.equal(seen[k], t) for k, t in was.items()) and len(seen) > len(was)
    known = read_provenance(second / "adapter")
    assert known["four_bit"] and plan_of(second / "adapter", known) == TuningPlan(rank=2, connector="full")
    parent = known["from_adapter"]
    assert parent["sha256"] == file_sha256(first / "adapter" / "adapter_model.safetensors") and parent["folder"] == str(
        first / "adapter"
    )
    assert (
        parent["data"] == {str(data / "train.json"): file_sha256(data / "train.json")}
        and parent["steps"] == 2
        and parent["from_adapter"] is None
    )
    assert ancestry(second / "adapter", known)["from_adapter"] == parent
    shutil.move(first, tmp_path / "away")
    assert main(["train", "--resume", "--output", str(second), "--max-steps", "3"]) == 0  # its checkpoint holds all
    assert (
        read_provenance(second / "adapter")["from_adapter"] == parent
        and json.loads((second / "job.json").read_text())[STARTED]["ancestor"] == parent
    )
    checkpoint = sorted((second / "checkpoints").glob("checkpoint-*"))[-1]  # without a seal, and said so
    assert (
        main(
            [
                "train",
                "--from-adapter",
                str(checkpoint),
                "--data",
                str(data / "new.json"),
                "--output",
                str(third),
                *FLAGS,
            ]
        )
        == 0
    )
    assert read_provenance(third / "adapter")["from_adapter"]["folder"] == str(checkpoint)


def test_what_cannot_be_gone_on_from_is_refused_by_doctor_and_train(data, tmp_path, capsys):
    folder = stirred(TuningPlan(rank=4), tmp_path / "adapter")
    stages = tmp_path / "stages.yaml"
    stages.write_text("[{plan: {language: lora}, steps: 1}]")
    spoilt = tmp_path / "spoilt"
    shutil.copytree(folder, spoilt)
    file = spoilt / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    whole = tmp_path / "whole"
    other = tmp_path / "other"
    save_vlm(load_vlm("lab"), whole, lab_folder())
    model = load_vlm("lab")
    with torch.no_grad():
        model.llm.model.norm.weight.view(-1)[0] += 1
    save_vlm(model, other, lab_folder())
    for flags, message in [
        (["--from-adapter", str(folder), "--rank", "8"], "vlm-lora-lab merge"),
        (["--from-adapter", str(folder), "--stages", str(stages)], "stages begin with LoRA of their own"),
        (["--from-adapter", str(spoilt)], "adapter_model.safetensors has the right size, but other bytes"),
        (["--from-adapter", str(folder), "--model", str(other)], "this adapter was trained on another base"),
        (["--from-adapter", str(whole)], str(whole)),
        (["--from-adapter", str(tmp_path / "nowhere")], "nowhere"),
    ]:
        for command in ("train", "doctor"):
            assert (
                main([command, "--data", str(data / "train.json"), "--output", str(tmp_path / "out"), *flags]) == 2
            ), flags
            said = capsys.readouterr()
            assert message in said.out + said.err and "Traceback" not in said.err, (flags, said)
    assert not (tmp_path / "out").exists()


def test_a_job_takes_over_what_it_does_not_say_itself(tmp_path):
    folder = stirred(TuningPlan(rank=4, connector="freeze"), tmp_path / "adapter")
    job = Job.of({"data": "d.json", "output": "o", "from_adapter": str(folder), "plan": {"vision": "lora"}})
    assert (
        job.plan == TuningPlan(rank=4, connector="freeze", vision="lora")
        and job.four_bit is False
        and job.model == "lab"
    )
    assert Job.of({"data": "d.json", "output": "o", "from_adapter": str(folder), "four_bit": True}).four_bit is True
    with pytest.raises(InputError, match="from_adapter"):
        Job.of({"data": "d.json", "output": "o", "from_adapter": 3})
