"""Asking during training changes nothing; what was seen is in the log, in TensorBoard's files and in the report."""

import json
import signal
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.batch import Processor, Samples
from vlm_lora_lab.data.drawn import HELD_OUT, Drawn
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.evaluate.ask import generate_answers
from vlm_lora_lab.evaluate.scores import ExactMatch
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.train.run import Schedule, fit, last_checkpoint
from vlm_lora_lab.train.watch import LivePlot, Watch, tensorboard, training_curve


def test_a_run_learns_the_same_whether_it_is_asked_or_not(tmp_path):
    few = [Drawn(HELD_OUT, 8)[i] for i in range(8)]
    ends = []
    asked = []
    for way in ("silent", "asked"):
        torch.manual_seed(0)
        model = apply_plan(load_vlm("lab", four_bit=True), TuningPlan(dropout=0.1))
        processor = Processor.of(model.config, load_tokenizer("lab"))

        def ask(model):
            asked.append(generate_answers(model, processor, few))
            torch.rand(7)  # somebody who asks may draw random numbers
            return {"exact": ExactMatch.of(asked[-1], few).rate}

        run = fit(
            model,
            Samples(Drawn(0, 64), processor),
            Schedule(max_steps=6, batch_size=4),
            tmp_path / way,
            Samples(few, processor),
            evaluate_every=2,
            ask=ask if way == "asked" else None,
            save=False,
        )
        assert [r["step"] for r in run.history if "eval_exact" in r] == ([2, 4, 6] if way == "asked" else [])
        ends.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    assert len(asked) == 3 and all(torch.equal(ends[0][n], p) for n, p in ends[1].items())
    assert generate_answers(model, processor, few) == asked[-1]  # the last questions met the model as it is now


def test_a_job_asks_logs_and_reports(tmp_path):
    data = samples_folder() / "handwriting"
    records = json.loads((data / "test.json").read_text())[:6]
    (tmp_path / "test.json").write_text(json.dumps(records))
    flags = [
        "--data",
        str(data / "validation.json"),
        "--eval-data",
        str(tmp_path / "test.json"),
        "--image-root",
        str(data),
    ]
    flags += [
        "--max-steps",
        "4",
        "--batch-size",
        "4",
        "--questions",
        "4",
        "--every",
        "2",
        "--tensorboard",
        "--metric",
        "cer",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["train", *flags]) == 0
    watched = json.loads((tmp_path / "out" / "report.json").read_text())["watched"]
    assert [w["step"] for w in watched] == [2, 4] and all(
        0 <= w["cer_low"] <= w["cer"] <= w["cer_high"] and w["loss"] > 0 for w in watched
    )
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 5)) for e in events.Scalars("eval/cer")] == [
        (w["step"], round(w["cer"], 5)) for w in watched
    ]


def test_a_resumed_run_takes_back_what_it_repeats(tmp_path):
    for begin, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        writer = tensorboard(tmp_path, begin).tb_writer
        for step in steps:
            writer.add_scalar("loss", 10 * begin + step, step)
        writer.close()
    assert [(e.step, e.value) for e in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")] == [
        (1, 1),
        (2, 2),
        (3, 23),
        (4, 24),
    ]


def test_without_tensorboard_there_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        tensorboard(tmp_path)


def test_a_job_without_tensorboard_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    data = samples_folder() / "handwriting" / "validation.json"
    assert main(["train", "--data", str(data), "--tensorboard", "--output", str(tmp_path / "out")]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--every", "2"], ["--questions", "7"]])
def test_what_would_be_watched_of_nothing_is_refused(flags, tmp_path, capsys):
    data = samples_folder() / "handwriting" / "validation.json"
    assert main(["train", "--data", str(data), *flags, "--output", str(tmp_path / "out")]) == 2
    assert "there is no evaluation data" in capsys.readouterr().err


def test_whoever_asks_to_stop_does_not_wait_for_questions(tmp_path):
    class Tired(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                signal.raise_signal(signal.SIGTERM)

    asked, model = [], apply_plan(load_vlm("lab"), TuningPlan())
    samples = Samples(Drawn(0, 32), Processor.of(model.config, load_tokenizer("lab")))
    run = fit(
        model,
        samples,
        Schedule(max_steps=6, batch_size=4),
        tmp_path,
        samples,
        evaluate_every=2,
        ask=lambda m: asked.append(m) or {},
        callbacks=[Tired()],
    )
    assert run.stopped and run.steps == 2 and not asked and last_checkpoint(tmp_path).name == "checkpoint-2"
    assert not any("eval_loss" in row for row in run.history)


@pytest.mark.parametrize("when", ["asking before", "asking", "asking after"])
def test_questions_that_do_not_fit_get_a_sentence_and_cost_nothing_that_was_learned(
    when, tmp_path, monkeypatch, capsys
):
    from vlm_lora_lab import job

    def scarce(model, processor, conversations, batch_size, desc=""):
        if desc == when:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.32 GiB.")
        return generate_answers(model, processor, conversations, batch_size)

    monkeypatch.setattr(job, "generate_answers", scarce)
    data = samples_folder() / "handwriting"
    (tmp_path / "test.json").write_text(json.dumps(json.loads((data / "test.json").read_text())[:4]))
    flags = [
        "--data",
        str(data / "validation.json"),
        "--eval-data",
        str(tmp_path / "test.json"),
        "--image-root",
        str(data),
        "--max-steps",
        "2",
        "--every",
        "1",
        "--batch-size",
        "4",
    ]
    status, said = main(["train", *flags, "--output", str(tmp_path / "out")]), capsys.readouterr()
    if when == "asking after":
        assert (
            status == 0
            and "the adapter is saved all the same" in said.out
            and (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
        )
        assert "exact_match" not in json.loads((tmp_path / "out" / "report.json").read_text())
    else:
        assert status == 2 and "out of memory while 4 questions were asked" in said.err and "batch_size 2" in said.err


def test_outside_of_a_notebook_the_plot_is_quiet(capsys):
    LivePlot().on_log(None, None, None)
    assert capsys.readouterr().out == ""


def test_the_curve_shows_what_was_asked():
    history = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "eval_loss": 1.5},
        {"step": 2, "eval_exact": 0.5, "eval_exact_low": 0.2, "eval_exact_high": 0.8},
    ]
    fig = training_curve(history)
    assert len(fig.axes) == 2 and [line.get_label() for line in fig.axes[1].lines] == ["exact"]
    assert len(training_curve(history[:2]).axes) == 1


@pytest.mark.parametrize("values", [{"questions": -1}, {"every": 1.5}, {"tensorboard": 1}])
def test_what_cannot_be_watched_is_said(values):
    with pytest.raises(InputError, match=f"watch, {next(iter(values))}"):
        Watch.of(values)
