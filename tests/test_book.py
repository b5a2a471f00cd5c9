"""The book itself: chapters, badges, the README, and the direction of imports."""

import ast
import base64
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHAPTERS = sorted((ROOT / "nbs").glob("*.ipynb"))
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
    "flags": 5,
    "quant": 5,
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
        assert link == badge(path.name)
        assert f"pip install -q git+{FACTS['git_url']}" in cells(path, "code")[0], (
            "a reader on Colab must get the package"
        )
    exports = [m[1] for c in cells(path, "code") if (m := re.search(r"^#\| default_exp (\S+)", c, re.M))]
    if path.stem != "index":
        assert exports == [path.stem.split("_", 1)[1]]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_a_chapter_keeps_its_outputs_and_none_is_an_error(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    outputs = [o for c in notebook["cells"] if c["cell_type"] == "code" for o in c["outputs"]]
    assert outputs and path.stat().st_size < 400_000
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not re.search(r"site-packages|(?<![\w.])/(root|home|tmp)/", json.dumps(outputs)), "a path of a machine"


def test_the_readme_lists_every_chapter_with_its_badge():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in CHAPTERS:
        if path.stem != "index":
            assert f"(nbs/{path.name})" in readme, path.name
    for link in re.findall(r"https://colab\.research[^)]*?\.ipynb", readme):
        path = link.rpartition("/nbs/")[2]
        assert link == badge(path) and (ROOT / "nbs" / path).is_file()
    for link in re.findall(r"\]\(((?!http|#)[^)]+)\)", readme) + re.findall(r'src="((?!http)[^"]+)"', readme):
        assert (ROOT / link).exists(), link


def test_an_issue_s_first_chapter_speaks_of_it():
    rows = re.findall(
        r"^\| \[[^\]]*#\d+\]\((https://github\.com/[^)]+)\) \|.*?\| \[\d\d\]\(([^)]+)\)",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.M,
    )
    silent = [(issue, path) for issue, path in rows if issue not in "\n".join(cells(ROOT / path, "markdown"))]
    assert len(rows) > 20 and not silent, silent


def test_the_readme_s_links_to_the_site_are_made_from_the_settings():
    for name in ("README.md", "README.zh.md"):
        links = re.findall(r"https://[\w.-]+\.github\.io[^)]*", (ROOT / name).read_text(encoding="utf-8"))
        assert links and all(link.startswith(f"{FACTS['doc_host']}{FACTS['doc_baseurl']}/") for link in links), links


def test_the_readme_s_picture_is_the_chapter_s():
    notebook = json.loads((ROOT / "nbs" / "41_quant.policy.ipynb").read_text(encoding="utf-8"))
    [drawn] = [
        o["data"]["image/png"]
        for c in notebook["cells"]
        if "plan_picture(real" in "".join(c["source"])
        for o in c["outputs"]
        if "data" in o
    ]
    assert base64.b64decode(drawn) == (ROOT / "nbs" / "images" / "plan.png").read_bytes(), (
        "copy the chapter's figure to nbs/images/plan.png"
    )


def test_the_readme_shows_the_plan_as_it_is():
    from vlm_lora_lab.models.load import load_vlm
    from vlm_lora_lab.plan.tuning import PlanTable, apply_plan
    from vlm_lora_lab.tour import DEMO_PLAN

    table = repr(PlanTable.of(apply_plan(load_vlm("lab", four_bit=True), DEMO_PLAN), DEMO_PLAN))
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), table


def test_the_index_lists_every_chapter():
    text = "\n".join(cells(ROOT / "nbs" / "index.ipynb", "markdown"))
    for path in CHAPTERS:
        assert path.stem == "index" or f"({path.name})" in text, path.name


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


def test_readme_index_and_runner_list_every_tutorial():
    import run_tutorials

    readme, index = (
        (ROOT / "README.md").read_text(encoding="utf-8"),
        "\n".join(cells(ROOT / "nbs" / "index.ipynb", "markdown")),
    )
    names = {p.stem for p in TUTORIALS}
    assert len(names) == 7 and names == set(run_tutorials.TUTORIALS)
    for name in names:
        assert (
            f"(nbs/tutorials/{name}.ipynb)" in readme
            and badge(f"tutorials/{name}.ipynb") in readme
            and f"(tutorials/{name}.ipynb)" in index
        ), name


def test_the_readme_s_python_runs(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", readme, re.S)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


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


def test_versions_agree():
    import vlm_lora_lab

    assert vlm_lora_lab.__version__ == FACTS["version"]
    assert f"## {FACTS['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_readme_names_every_family():
    from vlm_lora_lab.families.base import families

    table = (ROOT / "README.md").read_text().split("## Models")[1].split("##")[0]
    assert {t for f in families() for t in f.model_types if f"`{t}`" not in table} == set()
