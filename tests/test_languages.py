"""What is said in two languages says the same: the same chapters, links, commands and pictures, in the same order."""

import json
import re
from pathlib import Path

import pytest

from vlm_lora_lab.study.claims import Ledger

ROOT = Path(__file__).parent.parent
TWINS = {"README.zh.md": "README.md", "index_zh.md": "index.ipynb"}  # Chinese -> English; they stand in the same folder


def text_of(name):
    "A page as Markdown; of a notebook what a reader sees, without outputs."
    path = ROOT / name if (ROOT / name).exists() else ROOT / "nbs" / name
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    return "\n\n".join(s if kind == "markdown" else f"```python\n{s}\n```" for kind, s in cells if "#| hide" not in s)


def chapters(text):
    "Rows of the chapter table: number and file of each, with the whole row."
    rows = [
        line
        for line in text.splitlines()
        if re.match(r"\| (\[?\d\d|\[)", line) and ".ipynb" in line and "/issues/" not in line
    ]
    return [
        ("".join(re.findall(r"\d\d", row)[:1]), re.search(r"\(((?:nbs/)?[\w./]+\.ipynb)\)", row)[1], row)
        for row in rows
    ]


def links(text):
    """Addresses in order.

    The two languages name each other where the other names it; places inside a page have names of their own."""
    found = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", re.sub(r"```.*?```", "", text, flags=re.S))
    twins = {
        **TWINS,
        **{f"nbs/{k}": f"nbs/{v}" for k, v in TWINS.items()},
        "README.md": "README.md",
        "index.ipynb": "index.ipynb",
    }
    return ["#" if link.startswith("#") else twins.get(link, link) for link in (a or b for a, b in found)]


def blocks(text):
    "Code blocks; what a shell comment says may be said in either language."
    return [
        (kind, re.sub(r"[ \t]+# .*", "", code) if kind == "sh" else code)
        for kind, code in re.findall(r"```(\w*)\n(.*?)```", text, re.S)
    ]


@pytest.mark.parametrize("chinese, english", TWINS.items())
def test_both_languages_list_the_same_chapters(chinese, english):
    here, there = chapters(text_of(chinese)), chapters(text_of(english))
    assert len(there) > 45
    missing = [row for _, file, row in there if file not in {f for _, f, _ in here}]
    assert not missing, f"{chinese} lacks these rows; translate them and put them in their place:\n" + "\n".join(
        missing
    )
    surplus = [row for _, file, row in here if file not in {f for _, f, _ in there}]
    assert not surplus, f"{english} does not have these rows of {chinese}:\n" + "\n".join(surplus)
    assert [c[:2] for c in here] == [c[:2] for c in there]


@pytest.mark.parametrize("chinese, english", TWINS.items())
def test_both_languages_link_to_the_same_places_in_the_same_order(chinese, english):
    here, there = links(text_of(chinese)), links(text_of(english))
    for n, (a, b) in enumerate(zip(here, there)):
        assert a == b, f"link {n}: {chinese} has {a}, {english} has {b}"
    assert len(here) == len(there) > 50, f"from here on only one has links: {here[len(there) :] or there[len(here) :]}"


@pytest.mark.parametrize("chinese, english", TWINS.items())
def test_both_languages_give_the_same_commands_and_headings(chinese, english):
    assert blocks(text_of(chinese)) == blocks(text_of(english)) and len(blocks(text_of(english))) >= 2

    def levels(text):
        return re.findall(r"^(#+) ", re.sub(r"```.*?```", "", text, flags=re.S), re.M)

    assert levels(text_of(chinese)) == levels(text_of(english))

    def rows(text):
        return [len(table.strip().splitlines()) for table in re.findall(r"(?:^\|.*\n)+", text + "\n", re.M)]

    assert rows(text_of(chinese)) == rows(text_of(english)), "rows of tables"


@pytest.mark.parametrize("chinese, english", TWINS.items())
def test_each_language_leads_to_the_other_at_the_top(chinese, english):
    def top(name):
        return "\n".join(text_of(name).splitlines()[:8])

    assert f"]({english})" in top(chinese) and f"]({chinese})" in top(english)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_places_inside_a_readme_exist(name):
    text = text_of(name)
    headings = {
        re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^#+ (.+)", text, re.M)
    }
    inside = re.findall(r"\]\(#([^)]+)\)", text)
    assert inside and set(inside) <= headings, headings


def test_the_chinese_is_chinese():
    for name in TWINS:
        plain = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text_of(name), flags=re.S)
        assert len(re.findall(r"[\u4e00-\u9fff]", plain)) > 1000 and not re.search(
            r"[\u4e00-\u9fff][,;:!?](?=[\u4e00-\u9fff])", plain
        ), name
        for _, _, row in chapters(text_of(name)):
            assert re.search(r"[\u4e00-\u9fff]", row), f"not translated: {row}"


def test_the_chinese_index_gives_the_ledger_s_verdicts():
    words = {"confirmed": "成立", "refuted": "不成立", "depends": "视情况"}
    found = dict(
        re.findall(r"^\| (C\d+) \| .* \| (\S+) \| \[", (ROOT / "nbs" / "index_zh.md").read_text(encoding="utf-8"), re.M)
    )
    assert found == {name: words[entry.verdict.word] for name, entry in Ledger.read().entries.items()}
