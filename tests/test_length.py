"""A stopped or finished run goes on to another length: its rates are those of an unbroken run of that length, nothing
that is done is undone, and no other change slips in."""

import json
import math
import re
import shutil
import signal

import pytest
import torch
from test_identity import data  # noqa: F401
from transformers import TrainerCallback

from vlm_lora_lab.checkpoint.save import read_provenance
from vlm_lora_lab.cli import main
from vlm_lora_lab.data.batch import Processor, Samples
from vlm_lora_lab.data.records import read_conversations, samples_folder
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.train.run import Schedule, fit, last_checkpoint, steps_done, steps_of
from vlm_lora_lab.train.watch import LivePlot

FLAGS = ["--batch-size", "2", "--save-every", "1", "--rank", "2", "--vision-cache", "off", "--no-four-bit"]


class Rates(TrainerCallback):
    "What each step is taken with, group by group."

    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.seen[state.global_step + 1] = [g["lr"] for g in optimizer.param_groups]


def run(folder, rows=8, resume=False, say=print, **schedule):
    torch.manual_seed(0)
    model, rates = apply_plan(load_vlm("lab"), TuningPlan(rank=2)), Rates()
    samples = Samples(
        read_conversations(samples_folder() / "handwriting" / "train.json")[:rows],
        Processor.of(model.config, load_tokenizer("lab")),
    )
    done = fit(
        model,
        samples,
        Schedule(batch_size=4, save_every=1, **schedule),
        folder,
        resume=resume,
        log_every=1,
        callbacks=[rates],
        say=say,
    )
    return done, rates.seen


@pytest.mark.parametrize(
    "first, then",
    [
        ({"max_steps": 2}, {"max_steps": 6}),
        ({"epochs": 1}, {"epochs": 3}),
        ({"max_steps": 2, "warmup": 0.5}, {"max_steps": 6, "warmup": 0.5}),
    ],
)
def test_the_rates_of_a_longer_run_are_those_of_an_unbroken_one(first, then, tmp_path):
    said = []
    run(tmp_path / "cut", **first)
    done, rates = run(tmp_path / "cut", resume=True, say=said.append, **then)
    _, whole = run(tmp_path / "whole", **then)
    assert done.steps == 6 and rates == {step: whole[step] for step in (3, 4, 5, 6)}  # equal as numbers, of all groups
    assert len(said) == 1 and "Planned for 2 steps, and 2 are done; now it is 6" in said[0], said
    old, new = map(float, re.search(r"of step 3 goes from (\S+) to (\S+) \(peak 0.0002\)", said[0]).groups())
    assert old == 0 and new == pytest.approx(max(whole[3]), rel=1e-2) and "reaches 0 after step 6" in said[0]


def test_a_run_of_the_same_length_says_nothing(tmp_path):
    said = []
    _, whole = run(tmp_path / "run", max_steps=4)
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    done, rates = run(tmp_path / "run", resume=True, max_steps=4, say=said.append)
    assert done.steps == 4 and rates == {4: whole[4]} and not said


@pytest.mark.parametrize(
    "rows, schedule",
    [(9, {"epochs": 2.5}), (1, {"epochs": 0.1}), (9, {"epochs": 1, "accumulation": 2}), (7, {"max_steps": 3})],
)
def test_steps_are_counted_as_the_trainer_counts_them(rows, schedule, tmp_path):
    done, _ = run(tmp_path / "run", rows, **schedule)
    planned = Schedule(batch_size=4, **schedule)
    assert steps_of(planned, rows) == done.steps
    assert steps_done(last_checkpoint(tmp_path / "run")) == (done.steps, done.steps)
    assert steps_of(planned, rows, processes=2) <= done.steps


def finished(data, out, steps=2):
    assert (
        main(["train", "--data", str(data / "train.json"), "--output", str(out), "--max-steps", str(steps), *FLAGS])
        == 0
    )
    return out


def resume(out, *more):
    return main(["train", "--resume", "--output", str(out), *more])


def test_a_finished_run_goes_on_and_what_it_had_made_is_kept(data, tmp_path, capsys):
    out = finished(data, tmp_path / "out")
    first = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    assert resume(out) == 2
    said = capsys.readouterr().err
    assert "this run is finished" in said and "--max-steps N, or --epochs N" in said and "for other data" in said
    assert main(["doctor", "--resume", "--output", str(out)]) == 2 and "this run is finished" in capsys.readouterr().out
    assert resume(out, "--max-steps", "4") == 0
    said = capsys.readouterr().out
    assert (
        "Planned for 2 steps, and 2 are done; now it is 4" in said
        and "goes from 0 to" in said
        and str(out / "finished-2") in said
    )
    assert (
        json.loads((out / "report.json").read_text())["steps"] == 4
        and json.loads((out / "job.json").read_text())["schedule"]["max_steps"] == 4
    )
    assert (
        read_provenance(out / "adapter")["metrics"]["steps"] == 4
        and read_provenance(out / "finished-2" / "adapter")["metrics"]["steps"] == 2
    )
    assert (
        (out / "finished-2" / "adapter" / "adapter_model.safetensors").read_bytes()
        == first
        != (out / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    assert (
        json.loads((out / "finished-2" / "report.json").read_text())["steps"] == 2
        and (out / "finished-2" / "loss.png").is_file()
    )


def test_a_longer_run_is_the_same_run_and_nothing_else(data, tmp_path, capsys):
    out = finished(data, tmp_path / "out")
    kept = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for more, message in [
        (["--max-steps", "1"], "max_steps is 1, and 2 steps are done"),
        (["--max-steps", "-1", "--epochs", "0.5"], "epochs is 0.5, which is 1 steps, and 2 steps are done"),
        (["--max-steps", "-1", "--epochs", "1"], "this run is finished"),  # two steps by another name
        (["--epochs", "9"], "epochs was 3 and is 9, but max_steps is 2, and that decides"),
        (["--max-steps", "4", "--learning-rate", "0.1"], "'learning_rate': 0.1"),
        (["--max-steps", "4", "--rank", "4"], "'rank': 4"),
        (["--max-steps", "4", "--batch-size", "4"], "'batch_size': 4"),
    ]:
        for command in ("train", "doctor"):
            assert main([command, "--resume", "--output", str(out), *more]) == 2, more
            said = capsys.readouterr()
            assert message in said.out + said.err and "Traceback" not in said.out + said.err, (more, said)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == kept


def test_a_stopped_run_can_be_given_more_steps_or_an_early_end(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("vlm_lora_lab.job.LivePlot", _stops_at(1))
        # after the step that follows
        assert (
            main(["train", "--data", str(data / "train.json"), "--output", str(out), *FLAGS, "--max-steps", "4"]) == 130
        )
    assert (
        resume(out, "--max-steps", "1") == 2
        and "max_steps is 1, and 2 steps are done. Write --max-steps 2 to end here" in capsys.readouterr().err
    )
    assert resume(out, "--max-steps", "2") == 0
    assert "Planned for 4 steps, and 2 are done; now it is 2. The run ends here." in capsys.readouterr().out
    assert (
        json.loads((out / "report.json").read_text())["steps"] == 2
        and (out / "adapter" / "adapter_model.safetensors").is_file()
    )
    assert resume(out, "--max-steps", "-1", "--epochs", "2") == 0  # four rows, two at a time
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 4 and math.isfinite(report["loss"]["last"])


def test_a_longer_run_that_is_stopped_is_resumed_without_a_word_on_its_length(data, tmp_path, capsys, monkeypatch):
    out = finished(data, tmp_path / "out", 1)
    with monkeypatch.context() as patch:
        patch.setattr("vlm_lora_lab.job.LivePlot", _stops_at(2))
        assert resume(out, "--max-steps", "4") == 130
    assert not (out / "report.json").exists() and (out / "finished-1" / "adapter").is_dir()
    capsys.readouterr()
    assert resume(out) == 0
    assert "Planned for" not in capsys.readouterr().out and json.loads((out / "report.json").read_text())["steps"] == 4


def _stops_at(step):
    class Stops(LivePlot):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                signal.raise_signal(signal.SIGTERM)

    return Stops
