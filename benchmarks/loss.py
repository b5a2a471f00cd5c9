"""The loss of one long conversation: plain (all logits at once) against chapter 50's (only where there are labels, a
piece at a time).

python benchmarks/loss.py --tokens 2048 --words 151666 --width 64

Memory: each way in a process of its own. The peak of its resident memory is set back just before the step
(`/proc/self/clear_refs`), so that what was imported or allocated before does not count; the first step of the process
is the one that is measured. On a GPU, torch's own peak. Time: both ways in turns in one process (a, b, b, a); each pair
of neighbours gives a ratio; printed are the median and its bootstrap interval (95 %)."""

import argparse
import statistics
import subprocess
import sys

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from common import DEVICE, Peak, device, interval, met, seconds, table
from vlm_lora_lab.train.loss import label_loss


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
    return loss.item(), x.grad


def memory(args, way):
    "The peak of this process over one step, in bytes above where it started."
    given = problem(args)
    peak = Peak()
    step(way, *given)
    return peak.nbytes


def times(args):
    given, took = problem(args), {way: [] for way in WAYS}
    (a, ga), (b, gb) = step("plain", *given), step("here", *given)
    assert abs(a - b) <= 1e-5 * abs(a) and (ga - gb).norm() <= (1e-5 if args.dtype == "float32" else 2e-2) * ga.norm()
    for turn in range(args.rounds):
        for way in list(WAYS) if turn % 2 else list(WAYS)[::-1]:
            took[way].append(seconds(lambda way=way: step(way, *given)))
    return [h / p for h, p in zip(took["here"], took["plain"])], statistics.median(took["plain"])


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
    print(
        f"{device()}, {args.tokens:,} tokens, {args.words:,} words, width {args.width}, {args.dtype}, head "
        f"{args.head}, {args.rounds} rounds"
    )
    rows = []
    for share in [args.share] if args.share else (0.1, 0.25, 1.0):
        args.share = share
        same = [f"--{k}={getattr(args, k)}" for k in ("tokens", "words", "width", "share", "dtype", "head")]
        p, h = (
            int(
                subprocess.run(
                    [sys.executable, __file__, f"--memory={way}", *same], capture_output=True, text=True, check=True
                ).stdout
            )
            for way in WAYS
        )
        ratios, usual = times(args)
        low, high = interval(ratios)
        rows.append(
            [
                f"{share:.0%}",
                f"{p / 1e6:.0f}",
                f"{h / 1e6:.0f}",
                f"{h / p:.1%}",
                "≤ 10 %",
                met(h <= p / 10),
                f"{usual:.2f}",
                f"{statistics.median(ratios):.2f}",
                f"{low:.2f} … {high:.2f}",
            ]
        )
    table(["labels", "plain, MB", "here, MB", "memory", "target", "met", "plain, s", "time", "95 % interval"], rows)
