"""The loss of one long conversation: plain (all logits at once) against chapter 50's (only where there are labels, a piece at a time).

    python benchmarks/loss.py --tokens 2048 --words 151666 --width 64

Memory: each way in a process of its own. The peak of its resident memory is set back just before the step (`/proc/self/clear_refs`), so that what was
imported or allocated before does not count; the first step of the process is the one that is measured. On a GPU, torch's own peak.
Time: both ways in turns in one process (a, b, b, a); each pair of neighbours gives a ratio; printed are the median and its bootstrap interval (95 %)."""

import argparse
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from vlm_lora_lab.train.loss import label_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def plain(hidden, labels, head):
    return ForCausalLMLoss(head(hidden), labels, vocab_size=head.out_features)


WAYS = {"plain": plain, "here": label_loss}


def problem(args):
    "A head, the states that it is given, and labels at the end of the row, where answers stand."
    torch.manual_seed(0)
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    head = nn.Linear(args.width, args.words, bias=False, device=DEVICE, dtype=kind).requires_grad_(args.head == "full")
    hidden = torch.randn(1, args.tokens, args.width, device=DEVICE, dtype=kind)
    labels = torch.randint(0, args.words, (1, args.tokens), device=DEVICE)
    labels[:, : round(args.tokens * (1 - args.share))] = -100
    return hidden, labels, head


def step(way, hidden, labels, head):
    head.zero_grad()
    x = hidden.detach().requires_grad_()
    loss = WAYS[way](x, labels, head)
    loss.backward()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return loss.item(), x.grad


def resident(field):
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)).split()[1]) * 1024


def memory(args, way):
    "The peak of this process over one step, in bytes above where it started."
    given = problem(args)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(way, *given)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step(way, *given)
    return resident("VmHWM") - before


def interval(values, rounds=2000):
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(rounds))
    return medians[int(0.025 * rounds)], medians[int(0.975 * rounds)]


def times(args):
    given, seconds = problem(args), {way: [] for way in WAYS}
    (a, ga), (b, gb) = step("plain", *given), step("here", *given)
    assert abs(a - b) <= 1e-5 * abs(a) and (ga - gb).norm() <= (1e-5 if args.dtype == "float32" else 2e-2) * ga.norm()
    for turn in range(args.rounds):
        for way in list(WAYS) if turn % 2 else list(WAYS)[::-1]:
            start = time.perf_counter()
            step(way, *given)
            seconds[way].append(time.perf_counter() - start)
    return [h / p for h, p in zip(seconds["here"], seconds["plain"])], statistics.median(seconds["plain"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--words", type=int, default=151_666)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--share", type=float, help="of tokens with a label; default: 0.1, 0.25 and 1 in turn")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--head", choices=("frozen", "full"), default="frozen")
    parser.add_argument("--rounds", type=int, default=8, help="of both ways, for the times")
    parser.add_argument("--memory", choices=tuple(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(memory(args, args.memory))
        sys.exit()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}, {args.tokens} tokens, {args.words} words, width {args.width}, {args.dtype}, head {args.head}")
    print(f"{'labels':>7}{'plain, MB':>11}{'here, MB':>10}{'memory':>8}{'plain, s':>10}{'time':>7}  95 % interval")
    for share in [args.share] if args.share else (0.1, 0.25, 1.0):
        args.share = share
        same = [f"--{k}={getattr(args, k)}" for k in ("tokens", "words", "width", "share", "dtype", "head")]
        p, h = (int(subprocess.run([sys.executable, __file__, f"--memory={way}", *same], capture_output=True, text=True, check=True).stdout) for way in WAYS)
        ratios, seconds = times(args)
        low, high = interval(ratios)
        print(f"{share:7.0%}{p / 1e6:11.0f}{h / 1e6:10.0f}{h / p:8.1%}{seconds:10.2f}{statistics.median(ratios):7.2f}  {low:.2f} … {high:.2f}", flush=True)
