"""Every benchmark runs, at sizes that prove nothing; and RESULTS.md is what run.py makes of what they printed."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
TINY = {
    "startup.py": ("--runs", "2"),
    "loss.py": ("--tokens", "128", "--words", "4000", "--share", "0.25", "--rounds", "1"),
    "step.py": ("--tiny", "--batches", "2", "--epochs", "2", "--only", "picture"),
    "gpu.py": ("--tiny", "--steps", "3", "--only", "minicpmv-2.6"),
    "doctor.py": ("--steps", "16"),
    "data.py": ("--rows", "8", "--rounds", "1", "--step", "0", "--many", "200"),
}


def runner():
    spec = importlib.util.spec_from_file_location("run", FOLDER / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(file, *options, **kwargs):
    return subprocess.run(
        [sys.executable, str(FOLDER / file), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        **kwargs,
    )


LONG = ("data.py", "doctor.py", "gpu.py", "step.py")  # over half a minute each


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, marks=pytest.mark.slow if f in LONG else ()) for f in TINY],
)
def test_it_runs_and_prints_a_table(file):
    done = run(file, *TINY[file])
    assert done.returncode == 0, done.stderr
    tables = [t.strip().splitlines() for t in re.findall(r"(?:^\|.*\|\n?)+", done.stdout, re.M)]
    assert tables and all(len(t) > 2 for t in tables), done.stdout
    assert all(line.count(" | ") == t[0].count(" | ") for t in tables for line in t[2:])


def test_no_benchmark_is_left_out():
    scripts = {p.name for p in FOLDER.glob("*.py")} - {"common.py", "run.py"}
    assert scripts == set(TINY) == {command[0] for _, command in runner().BENCHMARKS.values()}


def test_the_results_are_rendered_and_not_typed():
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))
    assert runner().render(results) == (FOLDER / "RESULTS.md").read_text(encoding="utf-8")
    assert set(results) <= set(runner().BENCHMARKS)


def test_results_of_one_machine_are_folded_into_anothers(tmp_path):
    mine, theirs = tmp_path / "results.json", tmp_path / "gpu.json"
    entry = {
        "date": "2026-01-01",
        "seconds": 1,
        "machine": "A, 2 cores",
        "versions": "torch 1",
        "command": "python benchmarks/loss.py",
        "text": "| a |\n| --- |\n| 1 |",
    }
    mine.write_text(json.dumps({"loss": entry, "data": entry}))
    theirs.write_text(json.dumps({"gpu": entry | {"machine": "B, 16 cores", "text": "fast"}}))
    done = run("run.py", "--results", str(mine), "--fold", str(theirs))
    text = (tmp_path / "RESULTS.md").read_text()
    assert done.returncode == 0 and set(json.loads(mine.read_text())) == {"loss", "data", "gpu"}
    assert (
        "Machine: A, 2 cores." in text
        and "On another machine: B, 16 cores." in text
        and "fast" in text
        and "Not run yet." in text
    )


def test_an_unknown_benchmark_is_named_and_nothing_is_written(tmp_path):
    done = run("run.py", "lossy", "--results", str(tmp_path / "results.json"))
    assert done.returncode == 2 and "no benchmark is called lossy" in done.stderr and not list(tmp_path.iterdir())


def test_a_card_that_is_not_there_is_said():
    done = run("gpu.py")
    assert done.returncode == 1 and "no CUDA card here" in done.stderr
