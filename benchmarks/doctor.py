"""What does `NanDoctor` cost while all is well? Steps with and without it in turns (with, without, without, with), in
one run of the Trainer.

python benchmarks/doctor.py --steps 400

Each pair of neighbouring steps gives a ratio; printed are the median and its bootstrap interval (95 %)."""

import argparse
import statistics
import tempfile
from copy import deepcopy

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from common import device, interval, now, table
from vlm_lora_lab.data.batch import Collator, Processor, Samples
from vlm_lora_lab.data.drawn import Drawn
from vlm_lora_lab.debug.nan import NanDoctor
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.models.minicpmv import MiniCPMV
from vlm_lora_lab.models.precision import not_finite
from vlm_lora_lab.models.published import PUBLISHED, model_config
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

TURNS = (True, False, False, True)


class InTurns(NanDoctor):
    "The doctor, present in some steps and gone in others, hooks and all."

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.again = lambda: self._open(kwargs["model"], kwargs["train_dataloader"], state, args)

    def on_step_begin(self, args, state, control, **kwargs):
        self.present = TURNS[state.global_step % 4]
        self.again() if self.present else self.close()
        super().on_step_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.present:
            super().on_pre_optimizer_step(args, state, control, **kwargs)


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(now() - self.start)


def ratios(plan, policy, batch_size, steps):
    torch.manual_seed(0)
    model, tokenizer = load_vlm("lab"), load_tokenizer("lab")
    processor = Processor.of(model.config, tokenizer)
    model = apply_plan(model, plan)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=1e-5,
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            save_strategy="no",
            logging_strategy="no",
            logging_nan_inf_filter=False,
            dataloader_pin_memory=False,
        )
        data = Samples(Drawn(0, batch_size * 8, "number"), processor)
        trainer = Trainer(
            model,
            args,
            train_dataset=data,
            data_collator=Collator(tokenizer.pad_token_id),
            callbacks=[InTurns(policy), clock],
        )
        trainer.callback_handler.callbacks = [
            c for c in trainer.callback_handler.callbacks if type(c).__name__ != "PrinterCallback"
        ]
        trainer.train()
    t = clock.seconds[8:]  # warm
    pairs = [(t[i], t[i + 1]) if TURNS[(i + 8) % 4] else (t[i + 1], t[i]) for i in range(0, len(t) - 1, 2)]
    return [a / b for a, b in pairs], statistics.median(b for _, b in pairs)


def look(name, plan):
    """One decoder layer and one layer of the tower of MiniCPM-V 2.6 at their real widths: a step and a look at its
    weights, in turns."""
    values = deepcopy(PUBLISHED["openbmb/MiniCPM-V-2_6"].config) | {"num_hidden_layers": 1, "vocab_size": 4096}
    values["vision_config"] |= {"num_hidden_layers": 1}
    torch.manual_seed(0)
    model = apply_plan(MiniCPMV(model_config(values)).float(), plan).train()
    ids = torch.randint(3, 4000, (1, 512))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
        "pixel_values": torch.randn(2, 3, 14, 1024 * 14),
        "tgt_sizes": torch.tensor([[32, 32]] * 2),
        "image_bound": torch.tensor([[0, 2, 66], [0, 100, 164]]),
    }
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5)
    steps = []
    looks = []
    for _ in range(6):
        start = now()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        middle = now()
        assert not not_finite(trained)
        steps.append(middle - start)
        looks.append(now() - middle)
    step, seen = statistics.median(steps[1:]), statistics.median(looks[1:])
    return [
        name,
        f"{sum(p.numel() for p in trained.values()):,}",
        f"{1000 * step:.0f}",
        f"{1000 * seen:.1f}",
        f"{seen / step:.2%}",
        f"{seen / step / 10:.2%}",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    print(f"{device()}, {steps} steps in turns, lab model")
    rows = []
    full = TuningPlan(*["full"] * 5)
    for name, plan, policy, batch in (
        ("LoRA and resampler, batch 8", TuningPlan(vision="lora"), "stop", 8),
        ("everything in full, batch 8", full, "stop", 8),
        ("LoRA and resampler, batch 8", TuningPlan(vision="lora"), "rollback", 8),
        ("LoRA and resampler, batch 1", TuningPlan(vision="lora"), "stop", 1),
    ):
        values, step = ratios(plan, policy, batch, steps)
        low, high = interval(values)
        rows.append([name, policy, f"{1000 * step:.1f}", f"{statistics.median(values):.3f}", f"{low:.3f} … {high:.3f}"])
    table(["plan", "policy", "step without it, ms", "ratio", "95 % interval"], rows)
    print("\nLooking at all trained weights, as after each step that is logged: share of a step of the same shape")
    table(
        ["trained", "weights", "step, ms", "look, ms", "share of a step", "every tenth step"],
        [look(*arm) for arm in (("LoRA rank 16 and connector", TuningPlan()), ("everything in full", full))],
    )
