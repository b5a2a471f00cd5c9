"What the benchmarks share: clocks, intervals, memory, and tables in Markdown."

import random
import statistics
import time
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def now():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(f):
    start = now()
    f()
    return now() - start


def interval(values, rounds=2000):
    "Of the median, by bootstrap, 95 %."
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(rounds))
    return medians[int(0.025 * rounds)], medians[int(0.975 * rounds)]


def resident(field="VmRSS"):
    "Bytes of this process: held now, or since `clear_refs` at most (`VmHWM`)."
    return (
        int(
            next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)).split()[
                1
            ]
        )
        * 1024
    )


class Peak:
    "The peak of this process above where it started: of its resident memory, or on a GPU torch's own."

    def __init__(self):
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident()

    @property
    def nbytes(self):
        return (torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resident("VmHWM")) - self.before


def table(head, rows):
    "A Markdown table; all columns but the first to the right."
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    print("", *("| " + " | ".join(map(str, line)) + " |" for line in lines), sep="\n", flush=True)


def ratio(values, target=None):
    "Median, interval, target, and whether it is met: the last four columns of a table."
    middle, (low, high) = statistics.median(values), interval(values)
    return [
        f"{middle:.2f}",
        f"{low:.2f} … {high:.2f}",
        "" if target is None else f"≤ {target}",
        "" if target is None else met(middle <= target),
    ]


RATIO = ["ratio", "95 % interval", "target", "met"]


def met(yes):
    return "yes" if yes else "**no**"


def device():
    return torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
