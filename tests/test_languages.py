"""What is said in two languages says the same: the same links, commands, tables and pictures, in the same order."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import translate  # noqa: E402

TRANSLATED = sorted(p.relative_to(translate.FOLDER).with_suffix("").as_posix() for p in translate.FOLDER.rglob("*.md"))
GLOSSARY = {  # what a word is not called -> what it is called
    "家族": "系列",
    "整精度": "不量化",
    "重新采样器": "重采样器",
    "视觉编码器": "视觉塔",
    "适应器": "适配器",
    "嵌入词": "词嵌入",
    "学习速率": "学习率",
    "保留集": "留出的",
}
# Chinese -> English
TWINS = {"README.zh.md": "README.md", "nbs/index_zh.md": "nbs/index.ipynb"} | {
    p.relative_to(ROOT).as_posix(): f"nbs/pages/{p.name}" for p in sorted((ROOT / "nbs" / "pages" / "zh").glob("*.md"))
}
ENGLISH = {english: chinese for chinese, english in TWINS.items()}


def text_of(name):
    "A page as Markdown; of a notebook what a reader sees, without outputs."
    path = ROOT / name
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    cells = [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    seen = [(kind, re.sub(r"^#\|.*\n", "", s, flags=re.M)) for kind, s in cells if "#| hide" not in s]
    return "\n\n".join(s if kind == "markdown" else f"```python\n{s}\n```" for kind, s in seen)


def links(name):
    """Addresses in order; where the two languages lead to pages of their own, both count as the English one.

    Places inside a page have names of their own."""
    found = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", re.sub(r"```.*?```", "", text_of(name), flags=re.S))
    pairs = [(a or b).partition("#") for a, b in found]
    return [(_in_english(name, link) if link else "", mark) for link, mark, _ in pairs]


def _in_english(page, link):
    if link.startswith("http"):
        return link.replace("/pages/zh/", "/pages/")
    path = os.path.normpath((ROOT / page).parent / link)
    path = Path(path).relative_to(ROOT).as_posix()
    return "the other language" if path in (page, TWINS.get(page), ENGLISH.get(page)) else TWINS.get(path, path)


def blocks(text):
    "Code blocks; what a shell comment says may be said in either language."
    return [
        (kind, re.sub(r"[ \t]+# .*", "", code) if kind == "sh" else code)
        for kind, code in re.findall(r"^```([^\n`]*)\n(.*?)^```$", text, re.S | re.M)
    ]


def test_every_page_has_a_twin():
    assert {p.name for p in (ROOT / "nbs" / "pages").glob("*.md")} == {
        p.name for p in (ROOT / "nbs" / "pages" / "zh").glob("*.md")
    }
    assert len(TWINS) > 8


@pytest.mark.parametrize("chinese, english", TWINS.items())
def test_both_languages_link_to_the_same_places_in_the_same_order(chinese, english):
    here, there = links(chinese), links(english)
    for n, (a, b) in enumerate(zip(here, there)):
        assert a == b, f"link {n}: {chinese} has {a}, {english} has {b}"
    assert len(here) == len(there) > 0, f"from here on only one has links: {here[len(there) :] or there[len(here) :]}"


@pytest.mark.parametrize("chinese, english", TWINS.items())
def test_both_languages_give_the_same_commands_and_headings(chinese, english):
    assert blocks(text_of(chinese)) == blocks(text_of(english))

    def levels(text):
        return re.findall(r"^(#+) ", re.sub(r"```.*?```", "", text, flags=re.S), re.M)

    assert levels(text_of(chinese)) == levels(text_of(english))

    def rows(text):
        return [len(table.strip().splitlines()) for table in re.findall(r"(?:^\|.*\n)+", text + "\n", re.M)]

    assert rows(text_of(chinese)) == rows(text_of(english)), "rows of tables"


@pytest.mark.parametrize("chinese, english", TWINS.items())
def test_each_language_leads_to_the_other_at_the_top(chinese, english):
    for name in (chinese, english):
        top = "\n".join(text_of(name).splitlines()[:8])
        found = [_in_english(name, link) for link in re.findall(r"\]\(([^)\s]+)\)", top)]
        assert "the other language" in found, name


@pytest.mark.parametrize("name", [*TWINS, *TWINS.values()])
def test_places_inside_a_page_exist(name):
    for link, place in re.findall(r"\]\(((?!http)[^)#\s]*)#([^)]+)\)", text_of(name)):
        page = Path(os.path.normpath((ROOT / name).parent / link)) if link else ROOT / name
        found = re.findall(r"^#+ (.+)", text_of(page.relative_to(ROOT).as_posix()), re.M)
        assert place in {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in found}, (link, place)


@pytest.mark.parametrize("name", TWINS)
def test_the_chinese_is_chinese(name):
    plain = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text_of(name), flags=re.S)
    chinese, latin = re.findall(r"[\u4e00-\u9fff]", plain), re.findall(r"[A-Za-z]+", re.sub(r"<[^>]*>", "", plain))
    assert len(chinese) > max(50, len(latin))
    assert not re.search(r"[\u4e00-\u9fff][,;:!?](?=[\u4e00-\u9fff])", plain)


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_chapter_in_chinese_says_all_of_today_s_english_and_leads_to_the_same_places(name):
    assert list(translate.stale(name)) == []
    chinese, english = translate.chinese(name), translate.english(name)
    assert list(chinese) == list(english)
    for id, (text, _) in english.items():
        told = chinese[id][0]
        for what in (r"\]\(([^)\s]+)\)", r"^(#+) ", r"(\$[^$\n]+\$)", r"(<summary>|</details>)"):
            places = [re.findall(what, re.sub(r"```.*?```", "", t, flags=re.S), re.M) for t in (text, told)]
            assert places[0] == places[1], (name, id)
        code = [[re.sub(r" *#.*", "", c) for c in re.findall(r"^ *```.*?^ *```", t, re.S | re.M)] for t in (text, told)]
        assert code[0] == code[1], (name, id)


def test_the_site_has_a_page_for_each_translation():
    pages = [p.read_text(encoding="utf-8").strip() for p in sorted((ROOT / "nbs" / "zh").glob("*.zh"))]
    assert sorted(pages) == TRANSLATED and len(pages) >= 1


@pytest.mark.parametrize("wrong, right", GLOSSARY.items())
def test_the_glossary_holds(wrong, right):
    texts = {name: text_of(name) for name in TWINS} | {"docs/zh.yml": text_of("docs/zh.yml")}
    texts |= {name: (translate.FOLDER / f"{name}.md").read_text(encoding="utf-8") for name in TRANSLATED}
    assert [name for name, text in texts.items() if wrong in text] == [], f"write {right}"
