"""The book itself: chapters, badges, the README, and the direction of imports."""

import ast
import base64
import json
import re
import subprocess
import sys
from itertools import pairwise
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import tables  # noqa: E402

PAGES = [*ROOT.glob("[!_]*.md"), *(ROOT / "nbs").rglob("*.md")]
BOOK = sorted((ROOT / "nbs").glob("*.ipynb"))
REFERENCE = sorted((ROOT / "nbs" / "reference").glob("*.ipynb"))
CHAPTERS = BOOK + REFERENCE
TUTORIALS = sorted((ROOT / "nbs" / "tutorials").glob("*.ipynb"))
FACTS = ConfigParser(delimiters=["="])
FACTS.read(ROOT / "settings.ini", encoding="utf-8")
FACTS = FACTS["DEFAULT"]
# A module may import modules of a lower floor, and of its own room.
FLOORS = {
    "errors": 0,
    "compat": 0.5,  # stands on errors
    "show": 0,
    "families.base": 0.5,
    "settings": 1,
    "models": 1,
    "data": 2,
    "families": 3,
    "lora": 3,
    "plan": 4,
    "quant": 5,
    "scripts": 5,
    "train": 6,
    "debug": 7,
    "checkpoint": 7,
    "evaluate": 8,
    "job": 9,
    "study": 9,
    "tour": 9,
    "cli": 10,
}


def cells(path, kind):
    return [
        "".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind
    ]


def badge(name):
    return f"https://colab.research.google.com/github/{FACTS['user']}/{FACTS['repo']}/blob/{FACTS['branch']}/nbs/{name}"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_opens_with_title_promise_and_its_own_module(path):
    first = cells(path, "markdown")[0]
    assert re.match(r"# .+\n\n> .+", first), "title and one-line promise"
    for link in re.findall(r"https://colab\.research[^)]*?\.ipynb", first):
        assert link == badge(path.relative_to(ROOT / "nbs").as_posix())
        assert f"pip install -q git+{FACTS['git_url']}" in cells(path, "code")[0], (
            "a reader on Colab must get the package"
        )
    code = cells(path, "code")
    module = [m[1] for c in code if (m := re.search(r"^#\| default_exp (\S+)", c, re.M))]
    if path.stem != "index":  # a number on the shelf of the book, none on that of the reference
        name = re.fullmatch(r"\d\d_(.+)" if path in BOOK else r"(\D.+)", path.stem)[1]
        assert tables.name_of(path) == name
        assert module == [name] * any(re.search(r"^#\| export$", c, re.M) for c in code), "no module without exports"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_keeps_its_outputs_and_none_is_an_error(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    outputs = [o for c in notebook["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert outputs and path.stat().st_size < 400_000
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not re.search(r"site-packages|(?<![\w.])/(root|home|tmp)/", json.dumps(outputs)), "a path of a machine"


def test_the_tables_name_every_chapter_and_tutorial_with_promise_and_badge():
    for made, paths in ((tables.chapters, BOOK), (tables.reference, REFERENCE), (tables.tutorials, TUTORIALS)):
        rows = made(tables.ENGLISH, "nbs/").splitlines()[2:]
        assert len(rows) == len([p for p in paths if p.stem != "index"]) > 6
        for path, row in zip([p for p in paths if p.stem != "index"], rows):
            title, promise = re.match(r"# (.+)\n\n> (.+)", cells(path, "markdown")[0]).groups()
            where = path.relative_to(ROOT).as_posix()
            assert f"[{title}]({where}) | {promise} |" in row and badge(where.removeprefix("nbs/")) in row


def test_the_table_of_claims_says_what_the_ledger_says():
    from vlm_lora_lab.study.claims import Ledger

    entries, rows = Ledger.read().entries, tables.claims(tables.ENGLISH, "").splitlines()[2:]
    assert len(rows) == len(entries) > 25
    for entry, row in zip(entries.values(), rows):
        cells_of_row = [entry.claim.id, entry.claim.said, entry.verdict.word, entry.claim.model]
        assert row.startswith("| " + " | ".join(cells_of_row) + " | ") and f"({entry.claim.chapter}.ipynb)" in row


def test_the_table_of_commands_is_the_parser_s():
    shown = re.findall(r"^\| `([\w-]+)` \| \S", tables.commands(tables.ENGLISH, ""), re.M)
    assert {"demo", "train", "check-data", "rescue"} < set(shown) and len(shown) > 14


def test_the_chinese_tables_are_translated_and_no_word_is_left_over():
    words = tables.CHINESE
    modules = {tables.name_of(p) for p in CHAPTERS if p.stem != "index"}
    assert set(words["chapters"]) <= modules
    assert set(words["tutorials"]) <= {p.stem for p in TUTORIALS}
    assert set(words["claims"]) <= {row[0] for row in tables.ledger()}
    assert set(words["commands"]) <= set(re.findall(r"`([\w-]+)`", tables.commands(tables.ENGLISH, "")))
    assert set(words["heads"]) == set(tables.MADE)
    for name, made in tables.MADE.items():
        rows = made(words, "").splitlines()[2:]
        chinese = [row for row in rows if re.search(r"[\u4e00-\u9fff]", row)]
        assert len(chinese) > len(rows) / 2, f"most of the table of {name} is not translated: see docs/zh.yml"


def test_the_readme_is_short_and_holds_one_test_command():
    for name in ("README.md", "README.zh.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert len(text.encode()) < 12_000
        assert len(re.findall(r"^python -m pip install .*&& pytest$", text, re.M)) == 1
        assert re.search(rf"^git clone {re.escape(FACTS['git_url'])} && cd {FACTS['repo']}$", text, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"https://colab\.research[^)]*?\.ipynb", text):
        path = link.rpartition("/nbs/")[2]
        assert link == badge(path) and (ROOT / "nbs" / path).is_file()
    for link in re.findall(r"\]\(((?!http|#)[^)]+)\)", text) + re.findall(r'src="((?!http)[^"]+)"', text):
        assert (page.parent / link.partition("#")[0]).exists(), link
    here = f"{FACTS['git_url']}/blob/{FACTS['branch']}/"
    for link in re.findall(rf"{re.escape(FACTS['git_url'])}/blob/[^)\s]+", text):
        assert link.startswith(here) and (ROOT / link.removeprefix(here)).exists(), link


def test_an_issue_s_first_chapter_speaks_of_it():
    page = ROOT / "nbs" / "pages" / "issues.md"
    rows = re.findall(
        r"^\| \[[^\]]*#\d+\]\((https://github\.com/[^)]+)\) \|.*?\| \[[^\]]+\]\(([^)]+)\) ?[,|]",
        page.read_text(encoding="utf-8"),
        re.M,
    )
    silent = [(issue, path) for issue, path in rows if issue not in "\n".join(cells(page.parent / path, "markdown"))]
    assert len(rows) > 20 and not silent, silent


def test_links_to_the_site_are_made_from_the_settings():
    site, seen = f"{FACTS['doc_host']}{FACTS['doc_baseurl']}/", 0
    for page in PAGES:
        for link in re.findall(r"https://[\w.-]+\.github\.io[^)]*", page.read_text(encoding="utf-8")):
            assert link.startswith(site), link
            assert (ROOT / "nbs" / link.removeprefix(site).replace(".html", ".md")).exists(), link
            seen += 1
    assert seen > 8


def outputs_of(path):
    return [o for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", ())]


def test_the_readme_s_result_and_picture_are_the_tour_s():
    outputs = outputs_of(ROOT / "nbs" / "00_tour.ipynb")
    [said] = [text for o in outputs if "30% old samples" in (text := "".join(o.get("text", "")))]
    rows = re.findall(
        r"^(0|30)% old samples, (\w+) *: before ([\d.]+)%, after ([\d.]+)%, ([\d.]+)%, ([\d.]+)%$", said, re.M
    )
    for name in ("README.md", "README.zh.md"):
        part = (ROOT / name).read_text(encoding="utf-8").split("\n## ")[1]
        for share, kind, before, *after in rows:
            low, high = sorted(after, key=float)[:: len(after) - 1]
            if (share, kind) != ("30", "handwriting"):  # "gains as much"
                assert re.search(rf"{low} (to|到) {high} %", part) and f"{before} %" in part, (name, kind)
    pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    assert base64.b64decode(pictures[-1]) == (ROOT / "nbs" / "images" / "result.png").read_bytes(), (
        "copy the chapter's last figure to nbs/images/result.png"
    )


def verdicts_of(text):
    "Items of a README that give a verdict: claim, verdict, and every number behind it."
    items = re.findall(r"^- \*\*.*?[(（](C\d+)[)）][:：] ?([^.*。]+)[.。]\*\* (.*)$", text, re.M)
    return [(claim, word, re.findall(r"\d+(?:\.\d+)?", rest)) for claim, word, rest in items]


def test_the_readme_s_verdicts_are_the_ledger_s():
    from vlm_lora_lab.study.claims import Ledger
    from vlm_lora_lab.study.experiments import EXPERIMENTS, results

    entries = Ledger.read().entries
    rates = {"C24": {entries["C24"].numbers["rate"]}}
    for claim, experiment in (("C29", "resampler"), ("C14", "exclusive")):
        arms = EXPERIMENTS[experiment]().arms
        factors = {name: results(experiment).of("pictures", name, "factor").mean for name in arms}
        rates[claim] = {r * factors[n] for n, arm in arms.items() for r in (arm.rate, arm.full_rate)}
    english, chinese = (
        verdicts_of((ROOT / name).read_text(encoding="utf-8")) for name in ("README.md", "README.zh.md")
    )
    assert [claim for claim, *_ in english] == ["C29", "C14", "C24"]
    for (claim, word, numbers), (same, translated, others) in zip(english, chinese, strict=True):
        verdict = entries[claim].verdict
        assert word == verdict.word and claim == same and translated == tables.CHINESE["verdicts"][word]
        assert sorted(numbers) == sorted(others)
        measured = set(re.findall(r"\d+(?:\.\d+)?", verdict.effect))
        unknown = {n for n in numbers if n not in measured and not any(abs(float(n) - r) < 1e-9 for r in rates[claim])}
        assert unknown == set() and len(numbers) >= 2, claim


def test_the_page_on_use_shows_the_plan_as_it_is():
    from vlm_lora_lab.models.load import load_vlm
    from vlm_lora_lab.plan.tuning import PlanTable, apply_plan
    from vlm_lora_lab.tour import DEMO_PLAN

    table = repr(PlanTable.of(apply_plan(load_vlm("lab", four_bit=True), DEMO_PLAN), DEMO_PLAN))
    assert table in (ROOT / "nbs" / "pages" / "use.md").read_text(encoding="utf-8"), table


def test_readme_and_index_show_the_same_path():
    def path(text):
        "The chapters of the numbered list, in order."
        found = re.findall(r"\[([^\]]+)\]\((?:nbs/)?([^)]+)\)", "\n".join(re.findall(r"^\d\. .*", text, re.M)))
        return [(label.strip("`"), name) for label, name in found]

    index = "\n".join(cells(ROOT / "nbs" / "index.ipynb", "markdown"))
    texts = [(ROOT / n).read_text(encoding="utf-8") for n in ("README.md", "README.zh.md", "nbs/index_zh.md")]
    assert len(path(index)) > 12 and all(path(text) == path(index) for text in texts)
    assert any("lora.linear" in name for _, name in path(index)[:3]), "LoRA is met within the first three chapters"
    for label, name in path(index):
        assert name.rpartition("/")[2].startswith(label) and (ROOT / "nbs" / name).is_file()
    names = [name for _, name in path(index)]
    assert names[:-3] == [p.name for p in BOOK if p.stem != "index"], "the path is the book, and three steps more"
    for name, following in pairwise([ROOT / "nbs" / n for n in names]):
        title, link = re.match(r"\*\*Next:\*\* \[(.+)\]\(([^)]+)\), .+\.$", cells(name, "markdown")[-1]).groups()
        assert (name.parent / link).resolve() == following.resolve()
        assert cells(following, "markdown")[0].startswith(f"# {title}\n")


def test_every_figure_is_told_in_words(tmp_path):
    sheet = tmp_path / "figures.html"
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "figures.py", sheet], capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert sheet.read_text(encoding="utf-8").count("<img alt=") == 3 * int(done.stdout.split()[0]) > 400


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_opens_with_title_promise_and_badge_and_exports_nothing(path):
    first, code = cells(path, "markdown")[0], cells(path, "code")
    assert re.match(r"# .+\n\n> .+", first) and re.findall(r"https://colab\.research[^)]*?\.ipynb", first) == [
        badge(f"tutorials/{path.name}")
    ]
    assert code[0].startswith("#| eval: false") and f"pip install -q git+{FACTS['git_url']}" in code[0]
    assert (
        not [c for c in code if re.search(r"^#\| (default_exp|export)", c, re.M)]
        and sum("assert" in c for c in code) >= 4
    )
    outputs = json.dumps(
        [c["outputs"] for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    )
    assert "VLM_LORA_LAB_STAND_IN" not in outputs and not re.search(
        r"site-packages|(?<![\w.])/(root|home|tmp)/", outputs
    )
    for link in re.findall(r"\]\(((?!http)[^)]+\.ipynb)\)", "\n".join(cells(path, "markdown"))):
        assert (path.parent / link).is_file(), link


def test_the_runner_knows_every_tutorial():
    import run_tutorials

    names = {p.stem for p in TUTORIALS}
    assert len(names) == 7 and names == set(run_tutorials.TUTORIALS)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_a_tutorial_shows_the_run_of_a_day(path):
    assert re.search(r"\*\*What you see\*\* was printed on 20\d\d-\d\d-\d\d", cells(path, "markdown")[0])
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        last = "".join(cell["source"]).strip().splitlines()[-1]
        if cell["cell_type"] == "code" and (last.startswith("print(") or re.fullmatch(r"\w+", last)):
            assert cell["outputs"], (
                f"cell {cell['id']} shows nothing: python tests/run_tutorials.py --write {path.stem}"
            )


def test_a_rerun_of_a_tutorial_is_held_against_what_it_shows():
    from run_tutorials import printed

    def said(text):
        return [{"output_type": "stream", "name": "stdout", "text": [text]}]

    shown = said("loss 1.25 -> 0.5e-3, kept\n+3.0 (-1.0 to +7.0)  2 : 1")
    assert printed(shown) == printed(said("loss 1.25 ->  0.5e-3, kept +3.0 (-1.0 to +7.0) 2 : 1"))
    assert printed(shown) != printed(again := said("loss 0.75 -> 0.1, kept +0.0  0 : 0"))
    assert printed(shown, varies=True) == printed(again, varies=True)
    assert printed(shown, varies=True) != printed(said("loss 0.75 -> 0.1, lost +0.0  0 : 0"), varies=True)


@pytest.mark.parametrize("page", ["README.md", "nbs/pages/python.md"])
def test_a_page_s_python_runs(page, tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rates = [float(r) for r in re.findall(r"([\d.]+)% \(\d+ of 200", result.stdout)]
    if page == "README.md":
        assert len([line for line in code.splitlines() if line]) <= 8
        assert len(rates) == 2 and rates[1] > rates[0] + 20, result.stdout  # it trains, and gains
        assert (tmp_path / "runs" / "first" / "adapter").is_dir()
    else:
        assert len(rates) == 1


def imports(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    here = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert "*" not in [a.name for a in node.names], f"{path}: import *"
            name = (here[: len(here) - node.level + 1] if node.level else ()) + tuple((node.module or "").split("."))
            if name[0] == "vlm_lora_lab" and len(name) > 1 and name[1]:
                yield ".".join(name[1:])


def room(module):
    "The room that a module stands in: a module with a floor of its own, or its package."
    return module if module in FLOORS else module.partition(".")[0]


def test_arrows_run_one_way():
    package, seen = ROOT / "vlm_lora_lab", 0
    for path in package.rglob("*.py"):
        module = ".".join(path.relative_to(package).with_suffix("").parts)
        for other in imports(path) if module not in ("__init__", "_modidx", "__main__") else ():
            assert room(other) == room(module) or FLOORS[room(other)] < FLOORS[room(module)], (
                f"{module} imports {other}"
            )
            seen += 1
    assert seen > 40


def test_importing_the_package_stays_light():
    loaded = subprocess.run(
        [sys.executable, "-c", "import vlm_lora_lab, sys; print(*sys.modules)"], capture_output=True, text=True
    ).stdout.split()
    assert "vlm_lora_lab" in loaded and "torch" not in loaded and "transformers" not in loaded


def test_public_names_come_when_asked_for_and_are_what_their_modules_say():
    import vlm_lora_lab

    assert 12 <= len(vlm_lora_lab.PUBLIC) <= 20 and set(vlm_lora_lab.__all__) <= set(dir(vlm_lora_lab))
    for name, module in vlm_lora_lab.PUBLIC.items():
        there = import_module(f"vlm_lora_lab.{module}")
        assert name in there.__all__ and getattr(there, name).__module__ == there.__name__, (
            f"{module} defines no {name}"
        )
        if name != "train":
            assert getattr(vlm_lora_lab, name) is getattr(there, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        vlm_lora_lab.nothing  # noqa: B018


@pytest.mark.parametrize("first", ["", "import vlm_lora_lab.train.run; ", "from vlm_lora_lab.job import train; "])
def test_train_can_be_called_whatever_was_imported_first(first):
    code = f"{first}from vlm_lora_lab import InputError, Job, train; assert train.__name__ == 'vlm_lora_lab.train'\n"
    code += "try: train(Job('nothing.json', 'nowhere'))\nexcept InputError as e: print(e)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "nothing.json" in result.stdout, result.stderr


def test_versions_agree():
    import vlm_lora_lab

    assert vlm_lora_lab.__version__ == FACTS["version"]
    assert f"## {FACTS['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_page_on_models_names_every_family():
    from vlm_lora_lab.families.base import families

    table = (ROOT / "nbs" / "pages" / "models.md").read_text(encoding="utf-8")
    assert {t for f in families() for t in f.model_types if f"`{t}`" not in table} == set()
