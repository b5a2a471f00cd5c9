"""SIGKILL at any moment: at most the work since the last checkpoint is lost, and the end is that of an unbroken run,
bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLED = Path(__file__).parent / "killed.py"


@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_where_an_unbroken_one_ends(kills, tmp_path):
    done = subprocess.run(
        [sys.executable, KILLED, tmp_path, str(kills), "7"], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *lives, end = map(json.loads, done.stdout.splitlines())
    assert len(lives) == kills and sum(life["killed"] for life in lives) >= 3
    for life in lives:
        # it went on from the newest complete checkpoint, and lost none
        assert life["began"] == life["from"] and life["kept"] >= life["from"]
        assert life["kept"] not in {int(t.split("-")[1]) for t in life["torn"]}
        assert life["done"] - life["kept"] <= 3  # saved every three steps
    assert end["steps"][0] == end["steps"][1] and end["model"] and end["optimizer"], end
    torn = sum(bool(life["torn"]) for life in lives)
    print(
        f"{kills} kills, {sum(life['killed'] for life in lives)} of a process that still ran, {torn} left a checkpoint "
        "half written"
    )
    assert torn or kills < 50  # of fifty, some must have hit the writing
