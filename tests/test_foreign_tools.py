"""What TRL, LLaMA-Factory and ms-swift themselves wrote: our commands come to the logits that the tool's model had in
memory, or refuse with a reason, or name what is lost. The files in tests/foreign/ were made by foreign_tools.py."""

import json
import shutil
from fnmatch import fnmatchcase

import foreign_tools as ft
import pytest
from safetensors import safe_open
from safetensors.torch import load_file

FOLDERS = sorted(f.parent for f in ft.FIXTURES.glob("*/*/told.safetensors"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    home, made = tmp_path_factory.mktemp("bases"), {}

    def base(name):
        if name not in made:
            made[name] = ft.base_of(name, home / name), ft.picture(name, home)
        return made[name]

    return base


def _name(folder):
    return f"{folder.parent.name}/{folder.name}"


def _cases():
    for folder in FOLDERS:
        reason = ft.known(_name(folder))
        marks = [pytest.mark.xfail(reason=reason, strict=True)] if reason else []
        yield pytest.param(folder, id=_name(folder), marks=marks)


@pytest.mark.parametrize("folder", _cases())
def test_what_a_tool_wrote_is_read_as_its_own_model_was(folder, bases, tmp_path):
    with safe_open(folder / "told.safetensors", "pt") as f:
        about = f.metadata()
    base, image = bases(about["base"])
    assert ft.weights_of(base) == about["weights"], "another base than the fixture's: run foreign_tools.py --keep"
    told = load_file(folder / "told.safetensors")
    written = shutil.copytree(folder / "written", tmp_path / "written")
    seen = ft.hold(written, base, image, told["logits"], None, tmp_path)
    assert not ft.wrong(seen), seen
    for words in ft.refused(seen).values():
        assert ". " in words and not words.startswith("Traceback"), words  # what was found; what to do


def test_the_judge_can_find_fault():
    fine = {"inspect": (0, None, ""), "rescue": (0, 3e-6, "")}
    assert not ft.wrong(fine) and ft.verdict(fine) == "equal"
    assert "0.14 off" in ft.verdict(fine | {"rescue": (0, 0.14, "")})
    assert ft.verdict(fine | {"rescue": (1, 0.14, "LOST: head")}) == "named: LOST: head"
    assert "traceback" in ft.verdict(fine | {"inspect": (3, None, "KeyError: r")})
    assert ft.verdict({"inspect": (0, None, ""), "rescue": (2, None, "no. Do this")}) == "refused: no. Do this"
    assert "inspect: error" in ft.verdict(fine | {"inspect": (2, None, "error: lost")})
    assert "ask: said" in ft.verdict(fine | {"ask": (0, 1.0, "said 'a', the tool 'b'")})
    twice = "a has another value in b.safetensors than in b.safetensors. Remove the file that is older"
    assert "compared with itself" in ft.verdict({"inspect": (0, None, ""), "rescue": (2, None, twice)})
    assert "nan" in ft.verdict(fine | {"merge": (0, float("nan"), "")})


def test_the_fixtures_are_small_and_the_table_is_made_of_the_rows():
    sizes = {f: sum(g.stat().st_size for g in f.rglob("*") if g.is_file()) for f in FOLDERS}
    assert sizes and max(sizes.values()) < 320_000 and sum(sizes.values()) < 3_000_000
    rows = json.loads(ft.ROWS.read_text())
    assert "\n".join(ft.page(rows)) + "\n" == ft.TABLE.read_text()
    assert all(r["moved"] > 10 * ft.EQUAL for r in rows if r["trained"])  # else nothing is shown by what is equal
    wrong = {f"{r['tool']}/{r['recipe']}-{r['base']}" for r in rows if r["verdict"].startswith("WRONG")}
    failed = {f"{r['tool']}/{r['recipe']}-{r['base']}" for r in rows if r["verdict"].startswith("the tool itself")}
    assert not list(ft.news(rows))
    for names, table in ((wrong, ft.KNOWN), (failed, ft.NOT_TRAINED)):
        assert all(any(fnmatchcase(n, pattern) for n in names) for pattern in table)
    every = {(t, r, b) for t in ft.RECIPES for r in ft.RECIPES[t] for b in ft.bases_of(t, r)}
    assert {(r["tool"], r["recipe"], r["base"]) for r in rows} == every


def test_what_nobody_knew_ends_the_script_with_status_1():
    row = {"tool": "trl", "recipe": "llm", "base": "qwen2_vl-tied", "verdict": "equal"}
    assert not list(ft.news([row, row | {"recipe": "lora-head", "verdict": "the tool itself: ValueError"}]))
    for verdict in ("WRONG: merge: logits 0.3 off", "the tool itself: TypeError"):
        assert list(ft.news([row | {"verdict": verdict}])) == ["trl/llm-qwen2_vl-tied"]


def test_the_script_teaches(capsys):
    with pytest.raises(SystemExit):
        ft.options(["--help"])
    said = capsys.readouterr().out
    assert all(w in said for w in ("--tool", "--recipe", "--keep", "lora_llm", "FOREIGN.md"))
