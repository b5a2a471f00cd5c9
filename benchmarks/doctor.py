"""What does `NanDoctor` cost while all is well? Steps with and without it in turns (with, without, without, with), in
one run of the Trainer.

python benchmarks/doctor.py --steps 400

Each pair of neighbouring steps gives a ratio; printed are the median and its bootstrap interval (95 %). On a machine
that others use as well, --cpu-time counts the processor's time instead of the clock's, with all arms at once."""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from itertools import pairwise

import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

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
    def __init__(self, now):
        self.seconds, self.now = [], now

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.now() - self.start)


def ratios(plan, policy, batch_size, steps, now=now):
    torch.manual_seed(0)
    model, tokenizer = load_vlm("lab"), load_tokenizer("lab")
    processor = Processor.of(model.config, tokenizer)
    model = apply_plan(model, plan)
    clock = Clock(now)
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


def look(name, plan, now=now):
    """One decoder layer and one layer of the tower of MiniCPM-V 2.6 at their real widths: a step, the watch over it and
    a look at its weights, in turns."""
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
    doctor, state = NanDoctor(), TrainerState()
    doctor.trained = list(trained.values())
    doctor._open(model, None, state, None)
    doctor.handles[0].remove()  # called below instead, on the clock
    times = []
    for _ in range(6):
        marks = [now()]
        doctor.on_step_begin(None, state, None)
        doctor._before(batch)
        marks.append(now())
        model(**batch).loss.backward()
        marks.append(now())
        doctor.on_pre_optimizer_step(None, state, None, model, optimizer)
        marks.append(now())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(now())
        assert not not_finite(trained)
        marks.append(now())
        before, passes, after, update, seen = (b - a for a, b in pairwise(marks))
        times.append((passes + update, before + after, seen))
    step, watch, seen = (statistics.median(t) for t in zip(*times[1:]))
    return [
        name,
        f"{sum(p.numel() for p in trained.values()):,}",
        f"{1000 * step:.0f}",
        f"{1000 * watch:.1f}",
        f"{watch / step:.2%}",
        f"{1000 * seen:.1f}",
        f"{seen / step:.2%}",
        f"{seen / step / 10:.2%}",
    ]


FULL = TuningPlan(*["full"] * 5)
ARMS = {  # plan in words, policy -> what `ratios` takes
    ("LoRA and resampler, batch 8", "stop"): (TuningPlan(vision="lora"), "stop", 8),
    ("everything in full, batch 8", "stop"): (FULL, "stop", 8),
    ("LoRA and resampler, batch 8", "rollback"): (TuningPlan(vision="lora"), "rollback", 8),
    ("LoRA and resampler, batch 1", "stop"): (TuningPlan(vision="lora"), "stop", 1),
}
LOOKS = {"LoRA rank 16 and connector": TuningPlan(), "everything in full": FULL}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that is shared: all arms at once")
    given = parser.parse_args()
    timer = time.process_time if given.cpu_time else now
    says = f", CPU time, load {os.getloadavg()[0]:.0f}" if given.cpu_time else ""
    print(f"{device()}, {given.steps} steps in turns, lab model{says}")
    with ProcessPoolExecutor(len(ARMS), multiprocessing.get_context("spawn")) as pool:
        apply = pool.map if given.cpu_time else map
        found = list(apply(ratios, *zip(*((*arm, given.steps, timer) for arm in ARMS.values()))))
        looks = list(apply(look, *zip(*((*arm, timer) for arm in LOOKS.items()))))
    rows = []
    for (name, policy), (values, step) in zip(ARMS, found):
        low, high = interval(values)
        rows.append([name, policy, f"{1000 * step:.1f}", f"{statistics.median(values):.3f}", f"{low:.3f} … {high:.3f}"])
    table(["plan", "policy", "step without it, ms", "ratio", "95 % interval"], rows)
    print(
        "\nAt real widths: the watch over each step; and a look at all trained weights, as after a step that is logged"
    )
    head = ["trained", "weights", "step, ms", "watch, ms", "share of a step", "look, ms", "share of a step"]
    table([*head, "every tenth step"], looks)


if __name__ == "__main__":
    main()
