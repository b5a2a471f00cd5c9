"""Chapters of the book in Chinese: the words of a translator between the English notebook's own code and outputs.

    python docs/translate.py 05_vlm     start or renew docs/zh/05_vlm.md; what is new or changed is put in English
    python docs/translate.py            is every translation whole and of today's English? Status 1 if not

A translation is Markdown. Each piece begins with a line `<!-- cell ID HASH -->` that names the cell of the English
notebook whose words it says, and the English that it was made from; so code and outputs stand in one place, and a
chapter that changes says which of its pieces have to be read again. `chapters.py` puts both together for the site."""

import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = Path(__file__).parent / "zh"
MARK = re.compile(r"^<!-- cell (\S+) ([0-9a-f]{8}) -->\n", re.M)


def english(
    name: str,  # of a chapter, such as 05_vlm
):  # id of a cell -> its words and their hash, in order
    "The words of a chapter."
    cells = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    said = {c["id"]: "".join(c["source"]) for c in cells if c["cell_type"] == "markdown"}
    return {id: (text, hashlib.sha256(text.encode()).hexdigest()[:8]) for id, text in said.items()}


def chinese(
    name: str,
):  # id of a cell -> its words and the hash of the English that they say
    "A translation."
    parts = MARK.split((FOLDER / f"{name}.md").read_text(encoding="utf-8"))
    return {id: (text.strip("\n"), made) for id, made, text in zip(parts[1::3], parts[2::3], parts[3::3])}


def stale(
    name: str,
):  # sentences; none: the translation is whole
    "What has to be translated, or translated again."
    ours, theirs = english(name), chinese(name)
    for id, (text, made) in ours.items():
        if id not in theirs:
            yield f"{name}: cell {id} is not there: {text[:60]!r}"
        elif theirs[id][1] != made:
            yield f"{name}: cell {id} has changed in English: {text[:60]!r}"
        elif not re.search("[\u4e00-\u9fff]", theirs[id][0]):
            yield f"{name}: cell {id} is not in Chinese: {theirs[id][0][:60]!r}"
    yield from (f"{name}: cell {id} is not in the English chapter" for id in theirs.keys() - ours.keys())


def renew(name: str):
    "Write the file of a translation: what is there and true stays, the rest is in English."
    file = FOLDER / f"{name}.md"
    there = chinese(name) if file.exists() else {}
    kept = {
        id: there[id][0] if there.get(id, ("", ""))[1] == made else text for id, (text, made) in english(name).items()
    }
    marks = {id: made for id, (_, made) in english(name).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "\n".join(f"<!-- cell {id} {marks[id]} -->\n{text}\n" for id, text in kept.items()), encoding="utf-8"
    )


def main():
    for name in sys.argv[1:]:
        renew(name)
    found = [
        line
        for file in sorted(FOLDER.rglob("*.md"))
        for line in stale(file.relative_to(FOLDER).with_suffix("").as_posix())
    ]
    print(*found, sep="\n")
    sys.exit(1 if found and not sys.argv[1:] else 0)


if __name__ == "__main__":
    main()
