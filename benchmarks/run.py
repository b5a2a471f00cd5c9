"""Runs the benchmarks one after the other, each in a process of its own, and writes what they print into RESULTS.md.

    python benchmarks/run.py              all of them
    python benchmarks/run.py loss step-page      these; the others stay as they were
    python benchmarks/run.py gpu --results gpu.json      on a machine with a CUDA card
    python benchmarks/run.py --fold gpu.json      and here: take over what was measured there

`results.json` beside this file keeps every benchmark's output with its machine, versions and date; RESULTS.md is made
from it and never edited."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

HERE = Path(__file__).parent
BENCHMARKS = {  # name: (title, command)
    "startup": ("Start-up", ["startup.py", "--runs", "20"]),
    "step-picture": (
        "A training step: a picture a row",
        ["step.py", "--only", "picture", "--batches", "5", "--epochs", "3"],
    ),
    "step-page": ("A training step: a page a row", ["step.py", "--only", "page", "--batches", "4", "--epochs", "3"]),
    "step-checkpointing": (
        "A training step with gradient checkpointing",
        ["step.py", "--only", "picture", "--checkpointing", "--batches", "4", "--epochs", "3"],
    ),
    "step-lab": ("A training step of the lab model", ["step.py", "--only", "lab", "--batches", "12", "--epochs", "3"]),
    "step-qwen": (
        "A training step beside TRL: Qwen2.5-VL",
        ["step.py", "--only", "qwen", "--batches", "3", "--epochs", "2"],
    ),
    "step-smolvlm": (
        "A training step beside TRL: SmolVLM",
        ["step.py", "--only", "smolvlm", "--batches", "3", "--epochs", "3"],
    ),
    "loss": ("The loss of a long conversation", ["loss.py", "--rounds", "4"]),
    "data": ("Preparing rows", ["data.py", "--rounds", "2"]),
    "doctor": ("What the doctor costs", ["doctor.py", "--steps", "240", "--cpu-time"]),
    "gpu": ("Published shapes on a GPU", ["gpu.py"]),
}
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "tokenizers", "numpy", "vlm_lora_lab")


def machine():
    "What it was run on, without names of hosts or folders."
    try:
        cpu = next(
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    except (FileNotFoundError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.system()}"


def versions():
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            pass
    return ", ".join(found)


def has_gpu():
    import torch

    return torch.cuda.is_available()


def run(name):
    "One benchmark's output, and what it was made on."
    title, command = BENCHMARKS[name]
    if name == "gpu" and not has_gpu():
        return None
    start = time.perf_counter()
    done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{name} failed: python benchmarks/{' '.join(command)}")
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - start),
        "machine": machine(),
        "versions": versions(),
        "command": f"python benchmarks/{' '.join(command)}",
        "text": done.stdout.strip(),
    }


def render(results):
    "RESULTS.md."
    lines = [
        "# Results",
        "",
        "Made by `python benchmarks/run.py`, never by hand. What is compared, how and why is at the top of each "
        "script. Ratios come from one interleaved run;"
        " under 1 is faster (or smaller) than the other.",
    ]
    common = max(
        {(r["machine"], r["versions"]) for r in results.values()},
        key=[(r["machine"], r["versions"]) for r in results.values()].count,
        default=None,
    )
    if common:
        lines += ["", f"Machine: {common[0]}.", "", f"Versions: {common[1]}."]
    for name, (title, _) in BENCHMARKS.items():
        lines += ["", f"## {title}", ""]
        if name not in results:
            lines.append("Not run: no GPU at hand." if name == "gpu" else "Not run yet.")
            continue
        r = results[name]
        lines.append(f"`{r['command']}`, {r['date']}, {r['seconds']} s")
        if (r["machine"], r["versions"]) != common:
            lines += ["", f"On another machine: {r['machine']}. {r['versions']}."]
        lines += ["", r["text"]]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"one of {', '.join(BENCHMARKS)}; none: all")
    parser.add_argument("--results", type=Path, default=HERE / "results.json", help="where outputs are kept")
    parser.add_argument("--fold", type=Path, help="outputs of another machine, to be taken over")
    o = parser.parse_args()
    if unknown := set(o.names) - set(BENCHMARKS):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(BENCHMARKS)}")
    results = json.loads(o.results.read_text(encoding="utf-8")) if o.results.exists() else {}
    if o.fold:
        results |= json.loads(o.fold.read_text(encoding="utf-8"))
    for name in o.names or ([] if o.fold else BENCHMARKS):
        print(f"{name} …", file=sys.stderr, flush=True)
        if found := run(name):
            results[name] = found
        o.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    o.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    o.results.with_name("RESULTS.md" if o.results.name == "results.json" else f"{o.results.stem}.md").write_text(
        render(results), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
