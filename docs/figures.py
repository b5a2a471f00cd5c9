"""All figures on one sheet, as the chapters keep them, the book first: by day, by night and as wide as a phone.

    python docs/figures.py _docs/figures.html

The sheet is a page of its own, with nothing beside it. Under each figure stand its chapter and the words that a reader
gets who cannot see it; a figure without such words ends the command with status 1."""

import html
import json
import re
import sys
from pathlib import Path

NBS = Path(__file__).parent.parent / "nbs"
ALT = re.compile(r"^#\| fig-alt: *(.+)$", re.M)
STYLE = """
body { font: 14px/1.4 sans-serif; margin: 1rem } section { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0 }
figure { margin: 0; padding: 8px; border: 1px solid #bbb; max-width: 620px } figcaption { max-width: 600px }
img { max-width: 100% } .night { background: #131416 } .phone { max-width: 360px }
.none { color: #b00; font-weight: bold }
"""


def figures(
    folder: Path = NBS,  # of chapters
):  # (chapter, number of the cell, alt text or None, PNG in base64)
    "What the chapters of a folder keep as pictures, in the order of reading."
    for path in sorted(folder.rglob("*.ipynb"), key=lambda p: (p.parent != folder, p)):
        if ".ipynb_checkpoints" in path.parts:
            continue
        for n, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            said = ALT.search("".join(cell["source"]))
            for output in cell.get("outputs", ()):
                if png := output.get("data", {}).get("image/png"):
                    yield (
                        path.relative_to(folder).with_suffix("").as_posix(),
                        n,
                        said and said[1].strip(),
                        "".join(png).replace("\n", ""),
                    )


COPY = """<script>
document.querySelectorAll("[data-of]").forEach(i => i.src = document.getElementById(i.dataset.of).src)
</script>"""


def sheet(
    found,  # as `figures` yields them
):  # the page
    "Each figure three times: on white, on the site's dark ground, 360 pixels wide."
    rows = [f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Figures</title><style>{STYLE}</style>']
    for i, (chapter, n, alt, png) in enumerate(found):
        words = html.escape(alt) if alt else '<span class="none">no alt text</span>'
        img = f'<img alt="{html.escape(alt or "")}"'
        shown = f'<figure>{img} id="f{i}" src="data:image/png;base64,{png}"></figure>'
        shown += "".join(f'<figure class="{how}">{img} data-of="f{i}"></figure>' for how in ("night", "phone"))
        rows.append(f"<h2>{chapter}, cell {n}</h2><section>{shown}</section><p>{words}</p>")
    return "".join(rows) + COPY


def main():
    found = list(figures())
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(sheet(found), encoding="utf-8")
    bare = [f"{chapter}, cell {n}" for chapter, n, alt, _ in found if not alt]
    print(f"{len(found)} figures of {len({f[0] for f in found})} chapters: {out}")
    sys.exit(f"without `#| fig-alt: …`: {'; '.join(bare)}" if bare else 0)


if __name__ == "__main__":
    main()
