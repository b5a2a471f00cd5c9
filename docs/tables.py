"""The tables of the site, made when it is built: chapters, tutorials, claims, commands, public names.

A page asks for one by a directive, `{made} chapters`; `python docs/tables.py chapters` prints it. Everything in them is
said elsewhere: in the first cell of a notebook, in the ledger that study.claims shows, in the parser of the commands,
in the docstring of a name. Chinese words for it stand in zh.yml; what has none there is shown in English."""

import ast
import json
import os
import posixpath
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
NBS, PACKAGE = ROOT / "nbs", ROOT / "vlm_lora_lab"
sys.path.insert(0, str(ROOT))

import vlm_lora_lab  # noqa: E402

HEADS = {
    "chapters": ["", "chapter", "what you will know", ""],
    "reference": ["module", "chapter", "what you will know", ""],
    "tutorials": ["tutorial", "what it shows", "model", "card (predicted)", "chapters", ""],
    "claims": ["", "it is said that", "verdict", "measured on", "tested in"],
    "commands": ["command", "what it does"],
    "names": ["name", "what it is"],
}
ENGLISH = {"heads": HEADS} | {k: {} for k in ("chapters", "tutorials", "claims", "verdicts", "commands", "names")}
CHINESE = yaml.safe_load((ROOT / "docs" / "zh.yml").read_text(encoding="utf-8"))


def _cells(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def _source(path, pattern):
    "What the first code cell with a pattern says; None: there is none."
    found = (re.search(pattern, "".join(c["source"]), re.M) for c in _cells(path) if c["cell_type"] == "code")
    return next((m[1] for m in found if m), None)


def name_of(path):
    "The module that a chapter exports; of one that exports nothing, its own name without the number."
    return _source(path, r"^#\| default_exp (\S+)") or re.sub(r"^\d\d_", "", path.stem)


def _opening(path):
    "The first cell, and the title and the promise that it begins with."
    first = "".join(_cells(path)[0]["source"])
    return first, *re.match(r"# (.+)\n\n> (.+)", first).groups()


def _colab(path):
    facts = ConfigParser(delimiters=["="])
    facts.read(ROOT / "settings.ini", encoding="utf-8")
    where = f"{facts['DEFAULT']['user']}/{facts['DEFAULT']['repo']}/blob/{facts['DEFAULT']['branch']}"
    return f"[Colab](https://colab.research.google.com/github/{where}/{path.relative_to(ROOT).as_posix()})"


def notebooks(shelf=""):
    "The chapters of the book, by number; of the reference, by module; or the tutorials. The preface is none of them."
    return sorted((p for p in (NBS / shelf).glob("*.ipynb") if p.stem != "index"), key=lambda p: p.name)


def table(head, rows):
    "A table in Markdown."
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def chapters(words, up, shelf=""):
    "Every chapter of the book with its promise."
    rows = []
    for path in notebooks(shelf):
        _, title, promise = _opening(path)
        name = name_of(path)
        title, promise = words["chapters"].get(name, (title, promise))
        rows.append(
            [f"`{name}`" if shelf else path.name[:2], f"[{title}]({_place(path, words, up)})", promise, _colab(path)]
        )
    return table(words["heads"]["reference" if shelf else "chapters"], rows)


def _place(path, words, up):
    "A notebook, or the chapter in the language of the words, where it was translated."
    told = NBS / "zh" / f"{path.stem}.zh"
    return f"{up}{(told if words is CHINESE and told.exists() else path).relative_to(NBS).as_posix()}"


def reference(words, up):
    "Every chapter of the reference with its promise."
    return chapters(words, up, "reference")


def tutorials(words, up):
    "Every tutorial with its promise, its model, the card that it asserts to be enough, and chapters that it names."
    rows = []
    for path in notebooks("tutorials"):
        _, title, promise = _opening(path)
        title, promise = words["tutorials"].get(path.stem, (title, promise))
        text = "\n".join("".join(c["source"]) for c in _cells(path) if c["cell_type"] == "markdown")
        named = sorted(set(re.findall(r"\[(\d\d|`[\w.]+`)\]\(\.\./([^)]+)\)", text)))
        named = ", ".join(f"[{n}]({up}{link})" for n, link in named)
        link = _place(path, words, up)
        model, card = _source(path, r'^MODEL\b.*?= "([^"]+)"'), _source(path, r'cards\.fits\("(\w+)"\)')
        rows.append([f"[{title}]({link})", promise, f"`{model}`", card or "CPU", named, _colab(path)])
    return table(words["heads"]["tutorials"], rows)


def ledger():
    "The rows of the ledger as its chapter shows it: id, claim, verdict, measured, interval, seeds, model, where."
    outputs = [o for c in _cells(NBS / "reference" / "study.claims.ipynb") for o in c.get("outputs", ())]
    text = "\n".join("".join(o.get("data", {}).get("text/markdown", "")) for o in outputs)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if re.match(r"\| C\d+ ", line)]
    return [[cell.strip().replace(r"\|", "|") for cell in row] for row in rows]


def claims(words, up):
    "Every claim with its verdict, the model that it was measured on, and the chapter that measures it."
    rows = []
    for name, said, verdict, *_, model, where in ledger():
        word = re.match(r"\*\*(\w+)\*\*", verdict)[1]
        label, link = re.match(r"(\[.+?\])\((.+?)\)", where).groups()
        chapter = f"{label}({up}{posixpath.normpath(f'reference/{link}')})"
        rows.append([name, words["claims"].get(name, said), words["verdicts"].get(word, word), model, chapter])
    return table(words["heads"]["claims"], rows)


def commands(words, up):
    "Every command with what its parser says of it."
    shown = subprocess.run(
        [sys.executable, "-m", "vlm_lora_lab", "--help"],
        env=os.environ | {"COLUMNS": "500", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = re.findall(r"^ {4}(\S+)\s+(\S.*)$", shown, re.M)
    return table(words["heads"]["commands"], [[f"`{n}`", words["commands"].get(n, said)] for n, said in rows])


def _first_line(module, name):
    "The first sentence of the docstring of a function or class."
    source = (PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = next(node for node in ast.parse(source).body if isinstance(node, kinds) and node.name == name)
    return " ".join(re.split(r"(?<=\.)\s", ast.get_docstring(found))[0].split())


def names(words, up):
    "Every public name with the first sentence of its docstring and a link to its entry in the reference."
    rows = [
        [f"{{py:obj}}`{name} <vlm_lora_lab.{module}.{name}>`", words["names"].get(name, _first_line(module, name))]
        for name, module in vlm_lora_lab.PUBLIC.items()
    ]
    return table(words["heads"]["names"], rows)


MADE = {f.__name__: f for f in (chapters, reference, tutorials, claims, commands, names)}


def setup(app):
    from sphinx.util.docutils import SphinxDirective

    class Made(SphinxDirective):
        "A table of this module, in the language of its page."

        required_arguments = 1

        def run(self):
            page = self.env.docname
            words = CHINESE if "/zh/" in f"/{page}" else ENGLISH
            self.env.note_reread()  # it depends on files that Sphinx does not watch
            return self.parse_text_to_nodes(MADE[self.arguments[0]](words, "../" * page.count("/")))

    app.add_directive("made", Made)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    print(MADE[sys.argv[1]](CHINESE if "zh" in sys.argv[2:] else ENGLISH, "nbs/"))
