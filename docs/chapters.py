"""Read a chapter for the site: without directives, hidden cells and Colab's install cell; with a reference of what it
exports."""

import ast
import io
import posixpath
import re
import tokenize

import nbformat
from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

import translate

LINK = re.compile(r"\]\(([^)\s]+)\)")
BADGE = re.compile(r"\[!\[[^\]]*\]\([^)]*\)\]\((https://colab\.research[^)]*)\)")
CHAPTER = re.compile(r"\]\(([\w./]+)\.ipynb")
PRAGMA = re.compile(r"(?:fmt|noqa|type)\b")


def read(text, front, minutes="About {} minutes.", reference=True):
    "From the text of a notebook to the notebook that the site shows; front is the title of the front page."
    notebook = nbformat.reads(text, as_version=4)
    module, exported, shown = None, [], []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = BADGE.sub(r"[Open in Colab](\1)", cell.source)  # a badge would be fetched from elsewhere
        elif cell.cell_type == "code":
            lines = cell.source.splitlines()
            said = {line[2:].strip().split(":")[0].split()[0]: line for line in lines if re.match(r"#\|\s*\S", line)}
            cell.source = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
            if "default_exp" in said:
                module = said["default_exp"].split()[-1]
            if "export" in said:
                exported.append(cell.source)
            if "hide" in said or not cell.source or ("eval" in said and "google.colab" in cell.source):
                continue
            for data in (output.get("data", {}) for output in cell.outputs):
                if "text/markdown" in data:  # its links are left as they are, and a chapter is a page here
                    data["text/markdown"] = CHAPTER.sub(r"](\1.html", data["text/markdown"])
            if "fig-alt" in said:
                cell.metadata["mystnb"] = {"image": {"alt": said["fig-alt"].partition(":")[2].strip()}}
            cell.metadata["tags"] = sorted({"export", "slow", "gpu"} & set(said))
        shown.append(cell)
    if module and reference and (described := "\n\n".join(_reference("\n\n".join(exported)))):
        title = f"## Reference\n\n```{{py:module}} vlm_lora_lab.{module}\n:synopsis: {_promise(shown)}\n```\n\n"
        shown.append(
            nbformat.v4.new_markdown_cell(
                f"{title}What this chapter exports, as `vlm_lora_lab.{module}`:\n\n{described}"
            )
        )
    elif shown[0].source.startswith(f"# {front}\n"):
        shown.append(
            nbformat.v4.new_markdown_cell(
                "## Reference\n\n{ref}`Every function and class <genindex>` · {ref}`every module <modindex>`"
            )
        )
    notebook.cells = shown
    if minutes and not shown[0].source.startswith(f"# {front}\n"):
        shown[0].source = re.sub(
            r"^(> .+)$", rf"\1\n\n{minutes.format(_minutes(shown))}", shown[0].source, count=1, flags=re.M
        )
    return notebook


def read_chinese(text, front):
    "From a file that names a chapter to that chapter, with a translator's words between its own code and outputs."
    name = text.strip()
    notebook = nbformat.reads((translate.ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"), as_version=4)
    words = translate.chinese(name)
    for cell in notebook.cells:
        if cell.id in words:
            cell.source = LINK.sub(lambda m: f"]({_from_chinese(m[1], name)})", words[cell.id][0])
    notebook.cells[0].source += f"\n\n[English](../{name}.ipynb)"
    return read(nbformat.writes(notebook), front, "约 {} 分钟。", reference=False)


def _from_chinese(link, name):
    "A link of a chapter, from the folder of the Chinese ones; to a Chinese one where there is one."
    if re.match(r"\w+:|#|$", link):
        return link
    target, hash, place = link.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    stem = path.removesuffix(".ipynb")
    if (translate.FOLDER / f"{stem}.md").exists():
        return f"{posixpath.basename(stem)}.zh"  # its headings have names of their own
    return f"../{path}{hash}{place}"


def _minutes(cells):
    "To read what is shown: 200 words a minute, and 20 lines of code that is not exported."
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown" and "{py:" not in c.source)
    tried = (c for c in cells if c.cell_type == "code" and "export" not in c.metadata.get("tags", ()))
    return max(1, round(words / 200 + sum(len(c.source.splitlines()) for c in tried) / 20))


def _promise(cells):
    return re.search(r"^> (.+)$", cells[0].source, re.M)[1].replace("`", "")


def _reference(source):
    "A directive for each public function and class of a module's source."
    comments = _comments(source)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield _directive("function", node, comments)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            inner = [
                _directive("method", n, comments)
                for n in node.body
                if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")
            ]
            yield _directive("class", node, comments, inner)


def _comments(source):
    "line -> what is said of it: behind it, or in the lines of comment above it."
    behind, above, lines = {}, [], source.splitlines()
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type == tokenize.COMMENT and not PRAGMA.match(text := t.string.lstrip("# ")):
            if lines[t.start[0] - 1].lstrip().startswith("#"):
                above.append(text)
            else:
                behind[t.start[0]] = text
        elif above and t.type not in (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            behind.setdefault(t.start[0], " ".join(above))
            above = []
    return behind


def _directive(kind, node, comments, inner=()):
    "What Sphinx calls an object description: signature, docstring, and the trailing comments of arguments or fields."
    if kind == "class":
        made = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")]
        signature = (
            f"({_arguments(made)})" if made else "(" + ", ".join(f.target.id for f in fields) + ")" if fields else ""
        )
        rows = (
            _rows(made, comments)
            if made
            else [(f.target.id, comments.get(f.end_lineno) or comments.get(f.lineno, "")) for f in fields]
        )
        options = []
    else:
        marks = {ast.unparse(d) for d in node.decorator_list}
        options = [f":{m}:" for m in ("classmethod", "staticmethod") if m in marks]
        if "property" in marks:
            kind, signature, rows = "property", "", []
            options += [f":type: {ast.unparse(node.returns)}"] if node.returns else []
        else:
            signature, rows = f"({_arguments(node)})", _rows(node, comments)
    body = [ast.get_docstring(node) or "", "\n".join(f"- **{n}**: {c}" for n, c in rows if c), *inner]
    if kind != "class" and (given := _given(node, comments)):
        body.insert(2, f"Gives {given}" if kind != "property" else given)
    fence = "`" * (4 if inner else 3)
    return "\n".join(
        [f"{fence}{{py:{kind}}} {node.name}{signature}", *options, "", "\n\n".join(filter(None, body)), fence]
    )


def _arguments(node):
    args = ast.parse(ast.unparse(node)).body[0].args
    everything = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    for a in everything:
        a.annotation = None
    own = args.posonlyargs + args.args
    if own and own[0].arg in ("self", "cls"):
        (args.posonlyargs or args.args).pop(0)
    return ast.unparse(args)


def _rows(node, comments):
    "The arguments that stand on a line of their own, with what is said of them."
    args = node.args
    every = [*args.posonlyargs, *args.args, *filter(None, [args.vararg]), *args.kwonlyargs, *filter(None, [args.kwarg])]
    ends = {a.arg: a.end_lineno for a in every}
    for a, default in [
        *zip(reversed(args.posonlyargs + args.args), reversed(args.defaults)),
        *zip(args.kwonlyargs, args.kw_defaults),
    ]:
        ends[a.arg] = default.end_lineno if default else ends[a.arg]
    lines = list(ends.values())
    return [
        (name, comments.get(line, "")) for name, line in ends.items() if line > node.lineno and lines.count(line) == 1
    ]


def _given(node, comments):
    "What is said after the closing bracket: the result."
    last = max(
        [
            node.lineno - 1,
            *(
                line
                for _, line in [(a.arg, a.end_lineno) for a in ast.walk(node.args) if isinstance(a, ast.arg)]
                if line > node.lineno
            ),
        ]
    )
    return next((comments[line] for line in range(last + 1, node.body[0].lineno) if line in comments), "")


def _mathml(visitor, node):
    "Formulas as MathML: browsers draw it themselves, and no script is fetched."
    try:
        visitor.body.append(tex2mathml(node.astext(), as_block=node.tagname == "math_block"))
    except MathError as e:
        logging.getLogger(__name__).warning("%s: %s", node.astext(), e, location=node)
    raise SkipNode


def _reachable(app, page, template, context, tree):
    "What keyboards and screen readers need, and Sphinx and Furo leave out: focus for what scrolls, a heading's level."
    if "body" in context:
        context["body"] = re.sub(r"<(pre|table)\b(?![^>]*(?:tabindex|docutils))", r'<\1 tabindex="0"', context["body"])
    if "furo_navigation_tree" in context:
        menu = context["furo_navigation_tree"]
        context["furo_navigation_tree"] = menu.replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app):
    app.connect("html-page-context", _reachable, priority=900)  # after the theme's own
    app.add_html_math_renderer("mathml", (_mathml, None), (_mathml, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
