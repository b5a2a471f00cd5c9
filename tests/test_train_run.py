"""The engine: tokens weigh the same however they are batched, a batch that does not fit is named, and keys that are not
known have a nearest one."""

import json
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from families import batch_of, tiny_model
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.batch import Processor, Samples
from vlm_lora_lab.data.drawn import Drawn
from vlm_lora_lab.data.records import read_conversations, samples_folder
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.job import Job
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.train.run import PartTrainer, Schedule, WeightsLost, fit
from vlm_lora_lab.train.watch import LivePlot


class Gradients(TrainerCallback):
    "What reaches the optimizer, and the loss that is logged."

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.log = {**getattr(self, "log", {}), **logs}


def assert_one_step(one, many):
    assert one.log["loss"] == pytest.approx(many.log["loss"], rel=1e-5) and one.log["grad_norm"] == pytest.approx(
        many.log["grad_norm"], rel=1e-4
    )
    assert one.grads.keys() == many.grads.keys() and len(one.grads) > 10
    for name, g in one.grads.items():
        torch.testing.assert_close(
            many.grads[name], g, rtol=1e-3, atol=1e-6 * float(g.abs().max()) + 1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_accumulated_batches_make_the_step_of_one_batch(tmp_path):
    "Answers of different length in each batch: a mean of means would weigh their tokens differently."
    seen = []
    for size, accumulation in ((12, 1), (3, 4)):
        torch.manual_seed(0)
        model = apply_plan(load_vlm("lab"), TuningPlan())
        data, told = Samples(Drawn(0, 12), Processor.of(model.config, load_tokenizer("lab"))), Gradients()
        labels = [sum(t != -100 for t in data[i]["labels"]) for i in range(12)]
        assert len(set(labels)) > 2
        fit(
            model,
            data,
            Schedule(max_steps=1, batch_size=size, accumulation=accumulation),
            tmp_path / f"{size}",
            callbacks=[told],
            save=False,
            log_every=1,
        )
        seen.append(told)
    assert_one_step(*seen)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_accumulated_batches_make_the_step_of_one_batch_for_transformers_models(family, tmp_path):
    torch.manual_seed(0)
    given = {k: v[:1] for k, v in batch_of(family, tiny_model(family)).items() if k in ("input_ids", "attention_mask")}
    rows = []
    seen = []
    given["input_ids"][given["input_ids"] == 300] = 5  # no picture, and no place for one
    for i in range(4):
        labels = given["input_ids"].clone()
        labels[:, 2 + i :] = -100
        rows.append(given | {"labels": labels})
    for size, accumulation in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model, told = apply_plan(tiny_model(family), TuningPlan(connector="freeze")), Gradients()
        arguments = TrainingArguments(
            tmp_path / f"{size}",
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=True,
        )

        def collate(rs):
            return {k: torch.cat([r[k] for r in rs]) for k in rs[0]}

        PartTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, full_rate=1e-4, callbacks=[told]
        ).train()
        seen.append(told)
    assert_one_step(*seen)


HUNGRY = """
    import resource, sys, torch
    from transformers import TrainerCallback
    from vlm_lora_lab.data.batch import Processor, Samples
    from vlm_lora_lab.data.drawn import Drawn
    from vlm_lora_lab.errors import InputError
    from vlm_lora_lab.models.load import load_tokenizer, load_vlm
    from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
    from vlm_lora_lab.train.run import OutOfMemory, Schedule, fit

    class Full(TrainerCallback):
        "After two steps this process gets no more memory."
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + 2**25, resource.RLIM_INFINITY))
                self.hog = []
                try:
                    while True:
                        self.hog.append(torch.empty(2**23, dtype=torch.uint8))
                except RuntimeError:
                    del self.hog[-2:]

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = apply_plan(load_vlm("lab"), TuningPlan())
    data = Samples(Drawn(0, 256), Processor.of(model.config, load_tokenizer("lab")))
    size, again = int(sys.argv[2]), sys.argv[3] == "again"
    schedule = Schedule(max_steps=4, batch_size=size, accumulation=64 // size, save_every=1)
    try:
        fit(model, data, schedule, sys.argv[1], resume=again, callbacks=[] if again or size < 64 else [Full()])
    except OutOfMemory as e:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        sys.exit(f"told: {e}")
    torch.save({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, sys.argv[1] + "/end.pt")
"""


def test_a_batch_that_does_not_fit_is_named_and_the_run_goes_on_in_smaller_ones(tmp_path):
    "A real limit on this process's memory."

    def call(*args):
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(HUNGRY), *args], capture_output=True, text=True, timeout=300
        )

    cut = call(str(tmp_path / "cut"), "64", "first")
    assert cut.returncode == 1, cut.stderr[-3000:]
    said = cut.stderr.partition("told: ")[2]
    assert (
        "out of memory in step 3, in a batch of 64 rows" in said
        and "pictures and slices (ids " in said
        and "Traceback" not in said
    ), cut.stderr[-2000:]
    assert "Saved up to checkpoint-2" in said and "batch_size 32 with accumulation 2" in said
    assert call(str(tmp_path / "cut"), "32", "again").returncode == 0
    assert call(str(tmp_path / "whole"), "32", "first").returncode == 0
    a, b = (torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("cut", "whole"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5)


def test_a_stopped_job_may_go_on_in_smaller_batches_of_the_same_step_and_in_no_others(tmp_path, monkeypatch):
    data, out = samples_folder() / "handwriting" / "validation.json", tmp_path / "out"
    flags = ["--data", str(data), "--max-steps", "4", "--batch-size", "4", "--save-every", "2", "--output", str(out)]

    class Tired(LivePlot):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr("vlm_lora_lab.job.LivePlot", Tired)
        assert main(["train", *flags]) == 130
    assert main(["train", "--resume", "--output", str(out), "--batch-size", "2"]) == 2  # another step
    assert main(["train", "--resume", "--output", str(out), "--batch-size", "2", "--accumulation", "2"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 4 and report["job"]["schedule"]["batch_size"] == 2
    assert json.loads((out / "job.json").read_text())["schedule"]["accumulation"] == 2


@pytest.mark.parametrize(
    "config, message",
    [
        ({"modle": "lab"}, "'modle': did you mean 'model'?"),
        ({"learning_rate": 1.0}, "It belongs into a section: schedule: {learning_rate: …}"),
        ({"schedule": {"lerning_rate": 1.0}}, "'lerning_rate': did you mean 'learning_rate'?"),
        ({"plan": {"langauge": "lora"}}, "'langauge': did you mean 'language'?"),
        ({"reading": {"worker": 1}}, "'worker': did you mean 'workers'?"),
        ({"watch": {"tensorbord": True}}, "'tensorbord': did you mean 'tensorboard'?"),
        ({"stages": [{"step": 3}]}, "'step': did you mean 'steps'?"),
        ({"zzzz": 1}, "'zzzz' is unknown. Known are data"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_valid_one(config, message, tmp_path, capsys):
    with pytest.raises(InputError) as e:
        Job.of({"data": "d.json", "output": "out", **config})
    assert message in str(e.value)
    (tmp_path / "job.json").write_text(json.dumps({"data": "d.json", "output": "out", **config}))
    assert main(["train", str(tmp_path / "job.json")]) == 2 and message in capsys.readouterr().err


def test_an_unknown_flag_is_named_with_the_nearest_valid_one(capsys):
    with pytest.raises(SystemExit) as e:
        main(["train", "--data", "d.json", "--output", "out", "--lerning-rate", "1"])
    err = capsys.readouterr().err
    assert e.value.code == 2 and "--lerning-rate: did you mean --learning-rate?" in err
    with pytest.raises(SystemExit):
        main(["estimate", "lab", "--gpus=T4"])
    assert "--gpus: did you mean --gpu?" in capsys.readouterr().err


def _spoiling(tmp_path, model, learning_rate=2e-3, **fields):
    "Three steps on four rows with a checkpoint after each."
    processor = Processor.of(model.config, load_tokenizer("lab"))
    samples = Samples(read_conversations(samples_folder() / "handwriting" / "train.json")[:4], processor)
    schedule = Schedule(max_steps=3, batch_size=4, learning_rate=learning_rate, warmup=0, save_every=1)
    return fit(model, samples, schedule, tmp_path / "run", log_every=1, **fields)


@pytest.mark.parametrize("plan, rate", [(TuningPlan(), 3e38), (TuningPlan(lora_plus=1e38), 3.0)])
def test_weights_that_a_step_spoils_are_never_written(tmp_path, plan, rate):
    torch.manual_seed(0)
    with pytest.raises(
        WeightsLost, match="after step [12] the trained weights are lost: .* Nothing of them was written"
    ):
        _spoiling(tmp_path, apply_plan(load_vlm("lab"), plan), rate, plan=plan)
    for file in (tmp_path / "run").rglob("*.safetensors"):
        assert all(t.isfinite().all() for t in load_file(file).values()), file


class _Infinite(TrainerCallback):
    "A moment of Adam's becomes infinite after the second step: the weights are numbers still."

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 2:
            next(iter(optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = float("inf")


def test_a_moment_that_is_infinite_is_not_written_and_the_last_healthy_checkpoint_is_named(tmp_path):
    torch.manual_seed(0)
    with pytest.raises(
        WeightsLost, match="the optimizer's exp_avg_sq of tensor 0.*The last healthy state is .*checkpoint-1"
    ):
        _spoiling(tmp_path, apply_plan(load_vlm("lab"), TuningPlan()), callbacks=[_Infinite()])
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-1"]
