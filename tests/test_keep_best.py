"""`--keep best` ends with the weights of the best evaluation, `--patience` stops when none is better; both survive a
stop and a resume."""

import json
import math
import signal

import pytest
import torch
from safetensors.torch import load_file

from vlm_lora_lab.checkpoint.save import read_provenance
from vlm_lora_lab.cli import main
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.job import Job
from vlm_lora_lab.train.run import Best
from vlm_lora_lab.train.watch import LivePlot

HANDWRITING = samples_folder() / "handwriting"
FLAGS = [
    "--batch-size",
    "2",
    "--rank",
    "2",
    "--vision-cache",
    "off",
    "--connector",
    "freeze",
    "--no-four-bit",
    "--every",
    "2",
    "--save-every",
    "3",
    "--warmup",
    "0",
    "--learning-rate",
    "0.01",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "Training rows that are learned by heart, and others to be asked: their loss rises soon."
    place = tmp_path_factory.mktemp("rows")
    for name, split, n in (("train", "train", 4), ("test", "test", 6)):
        rows = json.loads((HANDWRITING / f"{split}.json").read_text())[:n]
        (place / f"{name}.json").write_text(json.dumps([r | {"image": str(HANDWRITING / r["image"])} for r in rows]))
    return ["--data", str(place / "train.json"), "--eval-data", str(place / "test.json"), "--allow-outside"]


def train(files, out, *flags):
    return main(
        [
            "train",
            *files,
            "--output",
            str(out),
            *FLAGS,
            *([] if "--max-steps" in flags else ["--max-steps", "8"]),
            *flags,
        ]
    )


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(a, b):
    a, b = weights(a), weights(b)
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("measure", ["loss", "cer"])
def test_the_best_state_becomes_the_adapter_and_the_last_one_stays_beside(measure, files, tmp_path, capsys):
    how = ["--questions", "0"] if measure == "loss" else ["--metric", "cer"]
    assert train(files, tmp_path / "run", "--keep", "best", *how) == 0
    said, report = capsys.readouterr().out, json.loads((tmp_path / "run" / "report.json").read_text())
    kept = report["kept"]
    values = {v["step"]: v["value"] for v in kept["values"]}
    assert set(values) == {2, 4, 6, 8} and values == {row["step"]: row[measure] for row in report["watched"]}
    losses = {row["step"]: row["loss"] for row in report["watched"]}
    # of equals the lower loss
    assert (
        kept["step"] == min(values, key=lambda s: (values[s], losses[s], s))
        and kept["of_steps"] == 8
        and kept["higher_is_better"] is False
    )
    checkpoints = tmp_path / "run" / "checkpoints"
    assert (
        equal(tmp_path / "run" / "adapter", checkpoints / f"checkpoint-{kept['step']}")
        and (checkpoints / "checkpoint-8").is_dir()
    )
    assert len(list(checkpoints.glob("checkpoint-*"))) <= 2
    if kept["step"] != 8:
        assert not equal(tmp_path / "run" / "adapter", checkpoints / "checkpoint-8") and "The last state is" in said
    words = "loss on the evaluation data" if measure == "loss" else "cer on 6 questions"
    ties = "" if measure == "loss" else " (of equal ones, the lower loss)"
    assert (
        f"{words}, lower is better{ties}; the best becomes the adapter" in said
        and f"Kept: step {kept['step']} of 8, the best of 4 evaluations ({words}" in said
    )
    assert read_provenance(tmp_path / "run" / "adapter")["metrics"]["kept"]["step"] == kept["step"]


def test_the_loss_of_a_run_that_learns_by_heart_is_best_in_the_middle_or_this_test_says_nothing(files, tmp_path):
    assert train(files, tmp_path / "run", "--keep", "best", "--questions", "0") == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["kept"]["step"] < 8


def test_without_keep_nothing_changes(files, tmp_path, capsys):
    assert train(files, tmp_path / "run", "--questions", "0") == 0
    assert (
        "kept" not in json.loads((tmp_path / "run" / "report.json").read_text())
        and "Kept:" not in capsys.readouterr().out
    )
    assert train(files, tmp_path / "best", "--questions", "0", "--keep", "best") == 0
    # whether the best is kept does not change what is learned
    assert equal(tmp_path / "run" / "checkpoints" / "checkpoint-8", tmp_path / "best" / "checkpoints" / "checkpoint-8")


def test_patience_stops_and_says_so(files, tmp_path, capsys):
    assert train(files, tmp_path / "run", "--questions", "0", "--patience", "1", "--max-steps", "40") == 0
    said, report = capsys.readouterr().out, json.loads((tmp_path / "run" / "report.json").read_text())
    kept = report["kept"]
    assert kept["stopped_early"] and report["steps"] < 40 and kept["step"] == report["steps"] == kept["best_step"] + 2
    assert "stopped early: 1 evaluations in a row were no better" in said.replace("It stopped", "stopped")
    assert equal(tmp_path / "run" / "adapter", tmp_path / "run" / "checkpoints" / f"checkpoint-{report['steps']}")
    both = tmp_path / "both"
    assert train(files, both, "--questions", "0", "--patience", "1", "--keep", "best", "--max-steps", "40") == 0
    kept = json.loads((both / "report.json").read_text())["kept"]
    assert kept["step"] == kept["best_step"] and equal(
        both / "adapter", both / "checkpoints" / f"checkpoint-{kept['step']}"
    )


@pytest.mark.parametrize(
    "stop", [1, 3, 4, 7]
)  # the run ends a step later: at an evaluation, at the best, in between, at the very end
def test_a_stop_and_a_resume_change_nothing(stop, files, tmp_path, monkeypatch):
    class Stops(LivePlot):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == stop:
                signal.raise_signal(signal.SIGTERM)

    how = ["--questions", "0", "--keep", "best", "--patience", "3"]
    assert train(files, tmp_path / "whole", *how) == 0
    with monkeypatch.context() as patch:
        patch.setattr("vlm_lora_lab.job.LivePlot", Stops)
        assert train(files, tmp_path / "cut", *how) == 130
    assert main(["train", "--resume", "--output", str(tmp_path / "cut")]) == 0
    whole, cut = (json.loads((tmp_path / n / "report.json").read_text())["kept"] for n in ("whole", "cut"))
    # also where the stop left an evaluation out
    assert whole == cut and equal(tmp_path / "whole" / "adapter", tmp_path / "cut" / "adapter")
    last = f"checkpoint-{whole['of_steps']}"
    assert equal(tmp_path / "whole" / "checkpoints" / last, tmp_path / "cut" / "checkpoints" / last)


def test_a_run_that_ended_by_patience_and_was_cut_before_its_report_does_not_go_on(files, tmp_path):
    how = ["--questions", "0", "--patience", "1", "--max-steps", "40"]
    assert train(files, tmp_path / "run", *how) == 0
    before = json.loads((tmp_path / "run" / "report.json").read_text())
    (tmp_path / "run" / "report.json").unlink()
    assert main(["train", "--resume", "--output", str(tmp_path / "run")]) == 0
    after = json.loads((tmp_path / "run" / "report.json").read_text())
    assert after["steps"] == before["steps"] and after["kept"] == before["kept"]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--keep", "best"], "keep: best needs evaluations"),
        (["--patience", "2"], "patience: 2 needs evaluations"),
        (["--keep", "first"], "keep"),
        (["--patience", "-1"], "patience"),
        (["--patience", "1.5"], "patience"),
        (["--keep", "best", "--eval-data", "x.json"], "no word on how often"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_train_and_doctor(flags, says, files, tmp_path, capsys):
    data = files[:2]
    for command in ("train", "doctor"):
        assert main([command, *data, "--output", str(tmp_path / "run"), *flags]) == 2
        assert says in "".join(capsys.readouterr()) and not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="stages"):
        Job.of(
            {
                "data": "a",
                "output": "b",
                "eval_data": "c",
                "watch": {"every": 2, "keep": "best"},
                "stages": [{"plan": {}, "steps": 2}, {"plan": {}, "steps": 2}],
            }
        )


def test_a_best_checkpoint_that_is_gone_is_a_sentence(files, tmp_path, capsys, monkeypatch):
    import shutil

    class Removes(LivePlot):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                shutil.rmtree(tmp_path / "run" / "checkpoints" / f"checkpoint-{state.best_global_step}")

    with monkeypatch.context() as patch:
        patch.setattr("vlm_lora_lab.job.LivePlot", Removes)
        assert train(files, tmp_path / "run", "--keep", "best", "--questions", "0") == 2
    said = capsys.readouterr().err
    assert "its checkpoint is gone" in said and "checkpoint-8" in said and "Traceback" not in said


@pytest.mark.parametrize("higher", [True, False])
def test_what_is_no_number_is_never_the_best(higher):
    best = Best("exact", higher)
    assert (
        not best.beats(math.nan, None)
        and not best.beats(math.inf, 1.0)
        and best.beats(0.5, None)
        and not best.beats(0.5, 0.5)
    )
    assert best.beats(0.6, 0.5) == higher and best.beats(0.4, 0.5) == (not higher)


def test_a_run_that_lost_patience_goes_on_with_more_of_it(files, tmp_path, capsys):
    how = ["--questions", "0", "--patience", "1", "--max-steps", "12"]
    assert train(files, tmp_path / "run", *how) == 0
    first = json.loads((tmp_path / "run" / "report.json").read_text())
    assert first["kept"]["stopped_early"] and first["steps"] < 12
    assert main(["train", "--resume", "--output", str(tmp_path / "run")]) == 2
    assert f"train --resume --output {tmp_path / 'run'} --patience 4" in capsys.readouterr().err
    assert main(["train", "--resume", "--output", str(tmp_path / "run"), "--patience", "0"]) == 0
    assert train(files, tmp_path / "whole", "--questions", "0", "--max-steps", "12") == 0
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == 12 and equal(
        tmp_path / "run" / "adapter", tmp_path / "whole" / "adapter"
    )
    assert (
        main(["train", "--resume", "--output", str(tmp_path / "run")]) == 2
        and "stopped early" not in capsys.readouterr().err
    )
