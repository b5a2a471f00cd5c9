"""Which of two chapters is better, for a reader who does not know whose they are?

    python docs/blind/blind.py pair OURS THEIRS FOLDER --seed 7 --name "Their Book"     two notebooks or Markdown files
    python docs/blind/blind.py count FOLDER FOLDER …                                    when the forms are filled in

`pair` writes A.txt and B.txt, in an order that the seed decides: text, code and printed outputs, without links,
badges, names and pictures (a picture's words stay, where it has some). form.md is for the reader, who gets these three
files; key.json says which is which, and stays with you. `count` reads forms and keys, and says how often ours was
preferred and what each got on average."""

import argparse
import json
import random
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
QUESTIONS = {
    "problem": "A problem of mine stands at the beginning, and is solved at the end.",
    "pace": "Nothing comes before I need it, and nothing is told twice.",
    "exactness": "What is said is shown, with numbers that I could check.",
    "surprise": "I learned something that I would have bet against.",
    "pictures": "Pictures explain what words cannot (judge by what is said of them).",
    "doing": "I get to do something, and to find out whether I did it right.",
    "english": "The sentences are plain, and each says one thing.",
}
FORM = """# A or B?

Read A.txt and B.txt, in this order. Nothing but a number or a letter goes between the brackets.

| from 1 (no) to 10 (yes) | A | B |
|---|---|---|
{rows}

Which would you send to a friend who has this problem? [ ]

Why, in a sentence or two:
"""


def own_names():
    "What gives this project away."
    facts = ConfigParser(delimiters=["="])
    facts.read(ROOT / "settings.ini", encoding="utf-8")
    name = facts["DEFAULT"]["lib_name"]
    return [name, name.replace("_", "-"), name.replace("_", " ")]


def _cell(cell):
    "A cell as text: what it says, and what it printed."
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    if cell["cell_type"] != "code" or re.search(r"^#\| *hide$", source, re.M) or "google.colab" in source:
        return ""
    alt = re.search(r"^#\| *fig-alt: *(.+)$", source, re.M)
    parts = ["\n".join("    " + line for line in source.splitlines() if not line.startswith("#|"))]
    for output in cell["outputs"]:
        data = output.get("data", {})
        if "image/png" in data or "image/jpeg" in data or "image/svg+xml" in data:
            parts.append(f"[picture: {alt[1]}]" if alt else "[picture]")
        elif told := "".join(output.get("text", data.get("text/plain", ""))):
            parts.append("\n".join("    > " + line for line in told.splitlines()))
    return "\n\n".join(parts)


def plain(
    path: Path,  # a notebook or a Markdown file
    names: list[str],  # to take out, in any case
):  # its text
    "A chapter without what tells whose it is. Raises `ValueError` for a file that is no chapter."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        try:
            text = "\n\n".join(filter(None, map(_cell, json.loads(text)["cells"])))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is no notebook that can be read") from None
    elif path.suffix != ".md":
        raise ValueError(f"{path} is neither .ipynb nor .md")
    text = re.sub(r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)", "", text)  # badges
    text = re.sub(r"!\[([^\]]*)\]\([^)]*\)", lambda m: f"[picture: {m[1]}]" if m[1] else "[picture]", text)
    text = re.sub(
        r"<img[^>]*?(?:alt=\"([^\"]*)\")?[^>]*>", lambda m: f"[picture: {m[1]}]" if m[1] else "[picture]", text
    )
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"https?://\S+", "[link]", text)
    for name in sorted(names, key=len, reverse=True):
        text = re.sub(re.escape(name), "[name]", text, flags=re.I)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def pair(
    ours: Path,
    theirs: Path,
    folder: Path,  # must not hold a pair yet
    seed: int,
    names: list[str],  # of theirs: title, authors, package
):
    "Write the pair, the form and the key."
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "key.json").exists():
        raise ValueError(f"{folder} holds a pair already; name another folder")
    texts = {side: plain(path, [*own_names(), *names]) for side, path in (("ours", ours), ("theirs", theirs))}
    order = ["ours", "theirs"]
    random.Random(seed).shuffle(order)
    for letter, side in zip("AB", order):
        (folder / f"{letter}.txt").write_text(texts[side], encoding="utf-8")
    rows = "\n".join(f"| {key}: {asked} | [ ] | [ ] |" for key, asked in QUESTIONS.items())
    (folder / "form.md").write_text(FORM.format(rows=rows), encoding="utf-8")
    key = dict(zip("AB", order)) | {"ours": str(ours), "theirs": str(theirs), "seed": seed}
    (folder / "key.json").write_text(json.dumps(key, indent=1), encoding="utf-8")


def answers(
    folder: Path,
):  # which side was preferred, and question -> points of ours and of theirs
    "A form that was filled in. Raises `ValueError` for one that was not."
    key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    text = (folder / "form.md").read_text(encoding="utf-8")
    chosen = re.search(r"friend.*\[ *([AB]) *\]", text)
    points = {}
    for question in QUESTIONS:
        row = re.search(rf"^\| {question}:.*\| *\[ *(\d+) *\] *\| *\[ *(\d+) *\] *\|$", text, re.M)
        if row is None or not all(1 <= int(n) <= 10 for n in row.groups()):
            raise ValueError(f"{folder / 'form.md'} has no two numbers from 1 to 10 for {question!r}")
        of = dict(zip((key["A"], key["B"]), map(int, row.groups())))
        points[question] = (of["ours"], of["theirs"])
    if chosen is None:
        raise ValueError(f"{folder / 'form.md'} does not say A or B at its end")
    return key[chosen[1]], points


def count(folders: list[Path]):
    "How often ours was preferred, with Wilson's 95 % interval, and the points of each."
    found = [answers(folder) for folder in folders]
    n = len(found)
    from vlm_lora_lab.evaluate.scores import ExactMatch  # with PyTorch, which a pair does not need

    print("ours preferred:", ExactMatch(sum(side == "ours" for side, _ in found), n))
    print("| | ours | theirs |\n|---|---:|---:|")
    for question in QUESTIONS:
        ours, theirs = (sum(points[question][side] for _, points in found) / n for side in (0, 1))
        print(f"| {question} | {ours:.1f} | {theirs:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    does = parser.add_subparsers(dest="does", required=True)
    made = does.add_parser("pair")
    for name in ("ours", "theirs", "folder"):
        made.add_argument(name, type=Path)
    made.add_argument("--seed", type=int, required=True)
    made.add_argument("--name", action="append", default=[], help="what gives the other chapter away; more than once")
    does.add_parser("count").add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args()
    try:
        if given.does == "pair":
            pair(given.ours, given.theirs, given.folder, given.seed, given.name)
            print(f"{given.folder}: give A.txt, B.txt and form.md to a reader, and keep key.json")
        else:
            count(given.folders)
    except (ValueError, OSError) as e:  # also of JSON and of UTF-8
        sys.exit(str(e))


if __name__ == "__main__":
    main()
