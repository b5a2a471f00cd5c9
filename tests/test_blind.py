"""The blind comparison of chapters, as its two commands are typed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ROOT / "nbs" / "10_lora.linear.ipynb"


def blind(*args):
    return subprocess.run(
        [sys.executable, ROOT / "docs" / "blind" / "blind.py", *args], capture_output=True, text=True, encoding="utf-8"
    )


@pytest.fixture
def theirs(tmp_path):
    file = tmp_path / "theirs.md"
    file.write_text(
        "# LoRA by Famous Book\n\n[![badge](b.svg)](https://x.org)\n\nSee [the paper](https://arxiv.org/abs/1) "
        "and ![a curve](c.png).\n\n    x = 1\n",
        encoding="utf-8",
    )
    return file


def filled(folder, letter, a, b):
    form = (folder / "form.md").read_text(encoding="utf-8")
    form = form.replace("| [ ] | [ ] |", f"| [{a}] | [{b}] |").replace("problem? [ ]", f"problem? [{letter}]")
    (folder / "form.md").write_text(form, encoding="utf-8")


def test_a_pair_hides_whose_it_is_and_its_forms_are_counted(tmp_path, theirs):
    orders = []
    for seed in range(6):
        folder = tmp_path / str(seed)
        done = blind("pair", OURS, theirs, folder, "--seed", str(seed), "--name", "famous book")
        assert done.returncode == 0, done.stderr
        key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
        orders.append(key["A"])
        texts = {key[letter]: (folder / f"{letter}.txt").read_text(encoding="utf-8") for letter in "AB"}
        assert texts["theirs"] == "# LoRA by [name]\n\nSee the paper and [picture: a curve].\n\n    x = 1\n"
        assert not re.search(r"vlm.lora.lab|https?://|google.colab|base64", texts["ours"], re.I)
        pictures = OURS.read_text(encoding="utf-8").count("#| fig-alt")
        assert len(re.findall(r"^\[picture: .{40,}\]$", texts["ours"], re.M)) == pictures > 3
        assert "    > " in texts["ours"]
        # the reader likes ours best, except in the last pair
        best = "A" if (key["A"] == "ours") == (seed < 5) else "B"
        filled(folder, best, 9 if best == "A" else 4, 9 if best == "B" else 4)
    assert set(orders) == {"ours", "theirs"}
    counted = blind("count", *(tmp_path / str(seed) for seed in range(6)))
    assert counted.stdout.splitlines()[0] == "ours preferred: 83.3% (5 of 6; 95 % interval 44% to 97%)"
    assert "| pace | 8.2 | 4.8 |" in counted.stdout


def test_what_is_wrong_is_said_in_a_line(tmp_path, theirs):
    assert blind("pair", OURS, theirs, tmp_path / "p", "--seed", "1").returncode == 0
    other = tmp_path / "theirs.docx"
    other.write_bytes(b"PK\x03\x04")
    broken = tmp_path / "broken.ipynb"
    broken.write_text("{")
    for args, says in (
        (("count", tmp_path / "p"), "no two numbers from 1 to 10 for 'problem'"),
        (("count", tmp_path / "nowhere"), "nowhere"),
        (("pair", OURS, theirs, tmp_path / "p", "--seed", "2"), "holds a pair already"),
        (("pair", OURS, other, tmp_path / "q", "--seed", "2"), "neither .ipynb nor .md"),
        (("pair", OURS, broken, tmp_path / "q", "--seed", "2"), "broken.ipynb"),
    ):
        done = blind(*args)
        assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    filled(tmp_path / "p", "A", 11, 3)
    assert "from 1 to 10" in blind("count", tmp_path / "p").stderr
