"""How long does `vlm-lora-lab --help` take? The console script, as a shell starts it.

python benchmarks/startup.py --runs 20"""

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import interval, met, table

LIMIT = 0.5  # seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    script = shutil.which("vlm-lora-lab", path=str(Path(sys.executable).parent)) or shutil.which("vlm-lora-lab")
    if not script:
        sys.exit("vlm-lora-lab is not installed: pip install -e .")
    took = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        said = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
        took.append(time.perf_counter() - start)
        assert "train" in said
    first, took = took[0], took[1:]
    low, high = interval(took)
    table(
        ["vlm-lora-lab --help", "median, s", "95 % interval", "slowest", "target", "met"],
        [
            [
                f"{runs} runs, after a first one of {first:.2f} s",
                f"{statistics.median(took):.3f}",
                f"{low:.3f} … {high:.3f}",
                f"{max(took):.3f}",
                f"< {LIMIT} s",
                met(statistics.median(took) < LIMIT),
            ]
        ],
    )


if __name__ == "__main__":
    main()
