"""Install the wheel in fresh environments and use it there: each Python of settings.ini that is found, with the lowest
and the newest releases it admits.

    python tests/matrix.py                          all of it; writes tests/MATRIX.md
    python tests/matrix.py --only 3.11              one Python, or one row: 3.11-lowest; the table's other rows stay
    python tests/matrix.py --tests                  only print which tests it runs, for pytest

lowest       the bounds themselves of torch, transformers and peft in settings.ini; everything else as pip resolves it
newest       what `pip install` takes today
constraints  constraints.txt, on the Python that it was made on

In each environment: pip check, --version, twenty steps of the demo, and tests that run against the installed package,
in a folder where there is no checkout. pip's own configuration decides where packages come from; on Linux without a
card, an index with CPU builds of torch saves gigabytes for each row."""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from configparser import ConfigParser
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "MATRIX.md"
BOUND = ("torch", "transformers", "peft")
SHOWN = (*BOUND, "accelerate", "bitsandbytes", "huggingface_hub")
# Private parts of other libraries, models, data, plans, training, saving and merging, for every family: what changes
# first when a library changes.
TESTS = (
    "compat",
    "families",
    "golden_minicpmv",
    "golden_qwenvl",
    "train_families",
    "checkpoint",
    "lora_linear",
    "plan",
    "tokenizer",
    "data_batch",
    "data_native",
    "train_loss",
    "train_cache",
    "train_run",
    "stages",
    "debug_nan",
    "merge_stream",
)
HEAD = ["Python", "versions", *SHOWN, "install", "pip check", "--version", "demo", "tests", "minutes", "commit", "date"]


def settings():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    return cfg["DEFAULT"]


def interpreters(wanted):
    "Python version -> its interpreter: on PATH, or one of pyenv's."
    found = {}
    for v in wanted:
        places = [
            shutil.which(f"python{v}"),
            *sorted(
                map(
                    str,
                    (Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions").glob(f"{v}.*/bin/python"),
                )
            ),
        ]
        for place in filter(None, places):
            said = subprocess.run(
                [place, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
            )
            if said.stdout.strip() == v:  # a shim of pyenv lies on PATH and starts nothing
                found[v] = place
                break
    return found


def limits(kind, cfg):
    "Lines for pip's constraint file."
    if kind == "constraints":
        return (ROOT / "constraints.txt").read_text(encoding="utf-8")
    bounds = dict(re.findall(r"(\S+?)>=([^\s,]+)", cfg["requirements"]))
    return "".join(f"{p}=={bounds[p]}\n" for p in BOUND) if kind == "lowest" else ""


class Failed(Exception):
    pass


def step(title, command, place, **more):
    "What a command printed; its last lines and `Failed` if it failed."
    start = time.perf_counter()
    print(f"  {title} …", end=" ", flush=True)
    done = subprocess.run(
        [str(c) for c in command], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )
    print(
        f"{'ok' if done.returncode == 0 else f'status {done.returncode}'}, {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    if done.returncode:
        print("".join(f"    {line}\n" for line in done.stdout.splitlines()[-40:]), flush=True)
        raise Failed(title)
    return done.stdout


def one(wheel, python, limit, place):
    "One environment: column -> what its row says."
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")} | {
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    (place / "limits.txt").write_text(limit, encoding="utf-8")
    shutil.copytree(ROOT / "tests", place / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", place)  # pytest's settings
    inside, row = place / "env" / "bin" / "python", {"install": "FAILED"}
    pip = [inside, "-m", "pip", "install", "-q", "-c", place / "limits.txt"]
    start = time.perf_counter()
    try:
        step("environment", [python, "-m", "venv", place / "env"], place)
        step("install", [*pip, wheel], place, env=environment)
        row |= {"install": "ok", "pip check": "FAILED"}
        step("pip check", [inside, "-m", "pip", "check"], place, env=environment)
        row |= {"pip check": "ok", "--version": "FAILED"}
        said = step("--version", [inside, "-m", "vlm_lora_lab", "--version"], place, env=environment)
        print("".join(f"    {line}\n" for line in said.splitlines()), end="")
        row |= {p: re.search(rf"^{p} +(\S+)", said, re.M)[1] for p in SHOWN} | {"--version": "ok", "demo": "FAILED"}
        step(
            "demo, 20 steps",
            [inside.with_name("vlm-lora-lab"), "demo", "--steps", "20", "--output", place / "demo"],
            place,
            env=environment,
        )
        same = json.loads((place / "demo" / "report.json").read_text(encoding="utf-8"))["same_model"]
        if not (same["ok"] and all(same["same_answers"].values())):
            raise Failed(f"the demo's report says {same}")
        row |= {"demo": "ok", "tests": "FAILED"}
        step("pytest", [*pip, "pytest", "scikit-learn", "tiktoken", "sentencepiece"], place, env=environment)
        where = step(
            "which package", [inside, "-c", "import vlm_lora_lab; print(vlm_lora_lab.__file__)"], place, env=environment
        )
        if not Path(where.strip()).is_relative_to(place / "env"):
            raise Failed(f"the tests would run against {where}")
        said = step(
            "tests", [inside, "-m", "pytest", "-q", *map("tests/test_{}.py".format, TESTS)], place, env=environment
        )
        row["tests"] = re.search(r"(\d+ passed.*?) in ", said)[1]
    except Failed as e:
        print(f"  FAILED: {e}", flush=True)
    minutes = f"{(time.perf_counter() - start) / 60:.1f}"
    return row | {"minutes": minutes, "commit": commit(), "date": date.today().isoformat()}


def git(*command):
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def commit():
    "What was tested; a + says that the checkout held changes, beside this table itself."
    changed = [line for line in git("status", "--porcelain").splitlines() if not line.endswith("tests/MATRIX.md")]
    return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(changed)


def build(work):
    "A wheel of what git knows and of new files, made in a copy: nothing is left in the checkout."
    for name in filter(None, git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")):
        if (ROOT / name).is_file():
            (work / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, work / "source" / name)
    step("wheel", [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", work / "dist", work / "source"], work)
    return next((work / "dist").glob("*.whl"))


def write(rows, missing):
    "The table, with the rows of an earlier one that were not run again."
    old = {}
    if TABLE.is_file():
        for line in TABLE.read_text(encoding="utf-8").splitlines():
            cells = [c.strip() for c in line.strip("|").split("|")]
            if re.match(r"\| \d", line) and len(cells) == len(HEAD):
                old[tuple(cells[:2])] = cells
    for key, row in rows.items():
        old[key] = [*key, *(row.get(c, "") for c in HEAD[2:])]
    order = sorted(
        old, key=lambda k: ([int(n) for n in k[0].split(".")], ("lowest", "newest", "constraints").index(k[1]))
    )
    lines = [
        "# Installed from the wheel",
        "",
        "Made by `python tests/matrix.py`, never by hand; what a row does stands at the top of that script.",
        "A + behind a commit says that the checkout held more than that commit.",
        "",
        f"| {' | '.join(HEAD)} |",
        "|" + " --- |" * len(HEAD),
        *(f"| {' | '.join(old[k])} |" for k in order),
    ]
    absent = [v for v in missing if not any(k[0] == v for k in old)]
    lines += ["", f"Not found on this machine: Python {', '.join(absent)}."] if absent else []
    TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", action="append", default=[], metavar="ROW", help="3.11, lowest or 3.11-lowest; repeat for several"
    )
    parser.add_argument("--tests", action="store_true", help="print the files that pytest is given, and do nothing")
    options = parser.parse_args()
    if options.tests:
        print(*map("tests/test_{}.py".format, TESTS))
        return 0
    only = options.only
    cfg = settings()
    wanted = cfg["pythons"].split()
    found = interpreters(wanted)
    made_on = re.search(r"on Python (\d+\.\d+)", limits("constraints", cfg))[1]
    keys = [
        (v, kind)
        for v in found
        for kind in ("lowest", "newest", "constraints")
        if kind != "constraints" or v == made_on
    ]
    keys = [k for k in keys if not only or {k[0], k[1], "-".join(k)} & set(only)]
    missing = [v for v in wanted if v not in found]
    if missing:
        print(f"not found: Python {', '.join(missing)}")
    if not keys:
        parser.error(
            f"--only {' '.join(only)} leaves nothing; there are {', '.join(found)}, lowest, newest, constraints"
        )
    rows = {}
    with tempfile.TemporaryDirectory() as work:
        work = Path(work).resolve()
        wheel = build(work)
        for i, (v, kind) in enumerate(keys, 1):
            print(f"[{i} of {len(keys)}] Python {v}, {kind}", flush=True)
            with tempfile.TemporaryDirectory(dir=work) as place:
                rows[v, kind] = one(wheel, found[v], limits(kind, cfg), Path(place))
            write(rows, missing)
    failed = ["-".join(k) for k, row in rows.items() if "FAILED" in row.values()]
    print(f"Written: {TABLE.relative_to(ROOT)}. " + (f"Failed: {', '.join(failed)}." if failed else "All of it works."))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
