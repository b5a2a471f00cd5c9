"""Train, be killed, go on: a run that is killed again and again at random moments, in children of one process that has
imported everything.

python tests/killed.py FOLDER KILLS SEED

Prints one line of JSON for each child, and at the end whether model and optimizer are those of a run that nobody
killed."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from vlm_lora_lab.data.batch import Processor, Samples
from vlm_lora_lab.data.drawn import Drawn
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.train.run import Schedule, fit, last_checkpoint

SAVE_EVERY = 3


class Told(TrainerCallback):
    "Writes each step that is done to a file, past all buffers of this process."

    def __init__(self, path):
        self.file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def on_train_begin(self, args, state, control, **kwargs):
        os.write(self.file, f"begin {state.global_step}\n".encode())

    def on_step_end(self, args, state, control, **kwargs):
        os.write(self.file, f"step {state.global_step}\n".encode())


def run(folder, steps, told):
    "A run from where `folder` stands, to the end."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = apply_plan(load_vlm("lab"), TuningPlan(rank=4, dropout=0.1))
    samples = Samples(Drawn(0, 4 * steps), Processor.of(model.config, load_tokenizer("lab")))
    schedule = Schedule(max_steps=steps, batch_size=4, save_every=SAVE_EVERY)
    fit(model, samples, schedule, folder, resume=last_checkpoint(folder) is not None, desc="", callbacks=[Told(told)])


def child(folder, steps, told):
    pid = os.fork()
    if pid:
        return pid
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        run(folder, steps, told)
    finally:
        os._exit(0 if sys.exc_info()[0] is None else 1)


def kill_and_look(folder, steps, told, patience):
    "One child, killed after `patience` seconds of training; what it did."
    told.unlink(missing_ok=True)
    stood = last_checkpoint(folder)
    pid = child(folder, steps, told)
    while not told.exists() or not told.read_text():  # it has not begun to train
        time.sleep(0.01)
    time.sleep(patience)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    lines = [line.split() for line in told.read_text().splitlines()]
    left, torn = (
        last_checkpoint(folder),
        [p.name for p in folder.glob("checkpoint-*") if not (p / "trainer_state.json").exists()],
    )

    def number(p):
        return int(p.name.split("-")[1]) if p else 0

    return {
        "from": number(stood),
        "began": int(lines[0][1]),
        "done": int(lines[-1][1]),
        "kept": number(left),
        "torn": torn,
        "killed": os.WIFSIGNALED(status),
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b


def main(place, kills, seed):
    place = Path(place)
    rng = random.Random(seed)
    steps = 6 * kills
    whole = place / "whole"
    broken = place / "broken"
    told = place / "told"
    assert os.waitpid(child(whole, steps, place / "told whole"), 0)[1] == 0
    for _ in range(kills):
        print(json.dumps(kill_and_look(broken, steps, told, rng.uniform(0, 1.2))), flush=True)
    assert os.waitpid(child(broken, steps, told), 0)[1] == 0
    ends = [last_checkpoint(p) for p in (whole, broken)]
    models = [load_file(e / "adapter_model.safetensors") for e in ends]
    optimizers = [torch.load(e / "optimizer.pt", weights_only=True) for e in ends]
    print(
        json.dumps(
            {"steps": [int(e.name.split("-")[1]) for e in ends], "model": same(*models), "optimizer": same(*optimizers)}
        ),
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
