"""Spoil adapters, indexes and configurations in seeded ways, and look at them with the commands that people give
strangers' folders to.

    python tests/fuzz.py                 5,000 spoilt folders; writes tests/FUZZ.md
    python tests/fuzz.py --count 200     fewer, nothing written; --seed 7 others

A folder that ends in a traceback, takes over ten seconds, or changes a file outside of the output folder is named with
its number: `python tests/fuzz.py --only 1234` makes that one again and says what was done to it."""

import argparse
import contextlib
import io
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "FUZZ.md"
LIMIT = 10  # seconds for one command
STRANGE = [
    None,
    True,
    -1,
    0,
    2**63,
    1e308,
    float("nan"),
    "",
    "\x00",
    "\ud800",
    "../../etc/passwd",
    "http://127.0.0.1:9/x",
    "((a|b|[a-z.])+)+!",
    "(",
    ".*",
    [],
    {},
    [[]],
    [None, 3, "q_proj"],
    {"": 1},
    {"((a+)+)+!": 2},
    "x" * 10_000,
    list(range(10_000)),
]
KINDS = (torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float64, torch.float16)


def originals(folder):
    "A sealed adapter, the same as PEFT writes it, and a whole model."
    from vlm_lora_lab.checkpoint.save import save_adapter
    from vlm_lora_lab.models.load import lab_folder, load_tokenizer, load_vlm
    from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

    torch.manual_seed(0)
    plan = TuningPlan(connector="full", rank=2)
    model = apply_plan(load_vlm("lab"), plan)
    save_adapter(model, folder / "adapter", plan, "lab", load_tokenizer("lab"), False)
    (folder / "plain").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "adapter" / name, folder / "plain")
    shutil.copytree(lab_folder(), folder / "model")
    return [folder / name for name in ("adapter", "plain", "model")]


def spoil_json(g, file):
    "A value, a key or the text itself becomes another."
    values = json.loads(file.read_text(encoding="utf-8"))
    how = g.choice(["value", "value", "value", "key", "gone", "text", "deep"])
    at = values
    while isinstance(at, dict) and at:
        key = g.choice(sorted(at))
        if not isinstance(at[key], dict) or not at[key] or g.random() < 0.5:
            break
        at = at[key]
    if how == "text" or not isinstance(at, dict) or not at:
        text = bytearray(file.read_bytes())
        for _ in range(g.randrange(1, 4)):
            text[g.randrange(len(text))] = g.randrange(256)
        file.write_bytes(bytes(text))
        return f"{file.name}: bytes"
    strange = g.choice(STRANGE)
    if how == "gone":
        del at[key]
    elif how == "key":
        at[f"{key}{g.choice(['', 'x', ' ', chr(0)])}"] = strange
    elif how == "deep":
        file.write_text(json.dumps(values)[:-1] + f', "deep": {"[" * 3000}{"]" * 3000}' + "}", encoding="utf-8")
        return f"{file.name}: nested deeply"
    else:
        at[key] = strange
    file.write_text(json.dumps(values), encoding="utf-8")
    return f"{file.name}: {key} {how} {str(strange)[:40]!r}"


def spoil_tensors(g, file):
    "A tensor becomes another, or the file's header lies."
    if g.random() < 0.4:
        data = bytearray(file.read_bytes())
        length = struct.unpack("<Q", data[:8])[0]
        how = g.choice(["length", "header", "cut", "byte"])
        if how == "length":
            data[:8] = struct.pack("<Q", g.choice([0, 1, length + 8, 2**31, 2**62, 10**8]))
        elif how == "header":
            data[8 + g.randrange(length)] = g.randrange(256)
        elif how == "byte":
            data[g.randrange(len(data))] = g.randrange(256)
        file.write_bytes(bytes(data[: g.randrange(len(data))] if how == "cut" else data))
        return f"{file.name}: {how}"
    tensors = load_file(file)
    name = g.choice(sorted(tensors))
    tensor = tensors.pop(name)
    how = g.choice(["kind", "nan", "row", "empty", "renamed", "gone", "scalar", "huge name"])
    kind = g.choice(KINDS)
    new = {
        "kind": {name: tensor.to(kind)},
        "nan": {name: tensor * float("nan")},
        "row": {name: tensor[:1].clone()},
        "empty": {name: tensor[:0].clone()},
        "renamed": {g.choice(["x." + name, name + "!", "base_model.model." + name, name.upper()]): tensor},
        "gone": {},
        "scalar": {name: torch.zeros(())},
        "huge name": {"n" * 100_000: tensor},
    }[how]
    save_file(tensors | new, file, metadata={"format": "pt"})
    return f"{file.name}: {name} {how} {kind if how == 'kind' else ''}"


def spoil_folder(g, folder):
    "A file is missing, empty, a link that leaves, or one more than there should be."
    file = g.choice(sorted(p for p in folder.iterdir() if p.is_file() and not p.is_symlink()))
    how = g.choice(["gone", "empty", "link", "folder", "index", "more"])
    if how == "index":
        entries = {f"layers.{i}.weight": g.choice(["model.safetensors", "../x", "y"]) for i in range(200)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))
        return "an index that lies"
    if how == "more":
        (folder / g.choice(["pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "x.json"])).write_bytes(
            b"\x80\x04"
        )
        return "one file more"
    file.unlink()
    if how == "empty":
        file.write_bytes(b"")
    elif how == "link":
        file.symlink_to("/etc/hostname")
    elif how == "folder":
        file.mkdir()
    return f"{file.name}: {how}"


def spoil(g, folder):
    "Up to three changes; returns what was done."
    done = []
    for _ in range(g.choice([1, 1, 1, 2, 3])):
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.is_symlink())
        if not files:
            break
        way = g.choice([spoil_json, spoil_json, spoil_json, spoil_tensors, spoil_folder])
        if way is spoil_folder:
            done.append(spoil_folder(g, folder))
            continue
        ending = ".json" if way is spoil_json else ".safetensors"
        if wanted := [f for f in files if f.suffix == ending and f.stat().st_size and f.name != "tokenizer.json"]:
            try:
                done.append(way(g, file := g.choice(wanted)))
            except (ValueError, OSError, RecursionError, SafetensorError) as e:  # an earlier change broke it
                done.append(f"{file.name}: spoilt before ({type(e).__name__})")
    return done


def commands(g, folder, output):
    "The command that looks at it: inspect mostly, since people do that first."
    adapter = folder.name != "model"
    base = ["--base", "lab"]
    inspect = ["inspect", str(folder), *(base if g.random() < 0.5 else [])]
    rescue = ["rescue", str(folder), *base, *(["--output", str(output)] if g.random() < 0.5 else [])]
    merge = ["merge", str(folder), "--model", "lab", "--output", str(output)]
    export = ["export", str(folder), "--for", g.choice(["vllm", "llama.cpp", "transformers"]), str(output)]
    ask = ["ask", "What is this?", *(["--adapter", str(folder)] if adapter else ["--model", str(folder)])]
    return g.choice([inspect] * 5 + [rescue, merge, export, ask])


class TooLong(BaseException):
    pass


def _ring(*_):
    raise TooLong


def run(words):
    "Exit status of a command, or what went wrong with it."
    from vlm_lora_lab.cli import main

    signal.signal(signal.SIGALRM, _ring)
    signal.alarm(LIMIT)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return main(words)
    except TooLong:
        return f"over {LIMIT} seconds"
    except SystemExit as e:
        return f"SystemExit {e.code}: {said.getvalue()[-200:]}"
    except Exception as e:  # this is what is looked for
        return f"{type(e).__name__}: {str(e)[:200]}"
    finally:
        signal.alarm(0)


def state(folder):
    return {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in sorted(folder.rglob("*"))}


def one(number, seed, work, pristine):
    "One spoilt folder: what was done to it, the command, and how it ended."
    g = random.Random(f"{seed}/{number}")
    source = g.choice(pristine)
    place = work / "spoilt"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    folder = place / source.name
    shutil.copytree(source, folder)
    output = place / "output"
    done = spoil(g, folder)
    words = commands(g, folder, output)
    before = state(folder)
    ended = run(words)
    if state(folder) != before or {p.name for p in place.iterdir()} - {folder.name, "output"}:
        ended = "it changed files outside of the output"
    if ended not in (0, 1, 2):
        return words[0], done, str(ended)
    return words[0], done, ended


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    given = parser.parse_args()
    wrong, ends, slowest, start = [], Counter(), 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        pristine = originals(work)
        numbers = range(given.count) if given.only is None else [given.only]
        for number in numbers:
            began = time.monotonic()
            command, done, ended = one(number, given.seed, work, pristine)
            slowest = max(slowest, time.monotonic() - began)
            ends[command, ended if isinstance(ended, int) else "wrong"] += 1
            if isinstance(ended, str):
                wrong.append((number, command, done, ended))
            if given.only is not None or isinstance(ended, str):
                print(f"{number}: {command} after {'; '.join(done)}: {ended}", flush=True)
    minutes = (time.monotonic() - start) / 60
    print(f"{len(numbers)} folders in {minutes:.1f} minutes, slowest {slowest:.1f} s; {len(wrong)} went wrong")
    if given.count >= 5000 and given.only is None:
        write(given, ends, slowest, minutes, wrong)
    return bool(wrong)


def write(given, ends, slowest, minutes, wrong):
    "The table."
    from vlm_lora_lab.show import package_versions

    names = sorted({command for command, _ in ends})
    rows = [
        f"| {name} | {sum(n for (c, _), n in ends.items() if c == name)} | "
        + " | ".join(str(ends[name, end]) for end in (0, 1, 2, "wrong"))
        + " |"
        for name in names
    ]
    versions = ", ".join(f"{k} {v}" for k, v in package_versions().items())
    TABLE.write_text(
        f"# Spoilt folders\n\nMade by `python tests/fuzz.py`, never by hand: {given.count:,} adapters and models, each "
        f"with one to three changes (seed {given.seed}); {date.today()}, {versions}. {minutes:.0f} minutes, the "
        f"slowest {slowest:.1f} seconds. *Wrong* is a traceback, more than {LIMIT} seconds, or a change outside of the "
        "output folder.\n\n"
        "| command | folders | nothing wrong | warnings | refused | wrong |\n|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n",
        encoding="utf-8",
    )


if __name__ == "__main__":
    sys.exit(main())
