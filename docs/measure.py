"""What a reader meets in each chapter of the book, in numbers: `python docs/measure.py` prints a table in Markdown.

Words of text for each line of code that is not hidden; the longest cell; the most exported lines between two things to
look at; pictures; exercises, and the cells among them that say how far the reader got."""

import json
import re
from pathlib import Path

NBS = Path(__file__).parent.parent / "nbs"


def measure(
    cells: list,  # of a notebook
):  # words a line, longest cell, longest exported run, figures, exercises, checks
    "The measures of a chapter."
    words, lines, longest, run, runs, figures, checks = 0, 0, 0, 0, [0], 0, 0
    said = ""
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            words += len(source.split())
            said += source + "\n\n"
            continue
        code = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
        if re.search(r"^#\| *hide$", source, re.M) or "google.colab" in source:
            continue
        lines += len(code)
        longest = max(longest, len(code))
        figures += sum("image/png" in o.get("data", {}) for o in cell["outputs"])
        checks += bool("## Exercises" in said and cell["outputs"])  # a cell that says how far the reader got
        run = run + len(code) if re.search(r"^#\| *export", source, re.M) else 0 if cell["outputs"] else run
        runs.append(run)
    part = said.partition("## Exercises")[2].partition("## Further")[0]
    asked = re.sub(r"<details>.*?</details>", "", part, flags=re.S)
    exercises = len(re.findall(r"^\d\. ", asked, re.M))
    return f"{words / max(1, lines):.1f}", longest, max(runs), figures, exercises, checks


def main():
    print("| chapter | words a line | longest cell | exported run | figures | exercises | checked by a cell |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for path in sorted(NBS.glob("[0-9]*.ipynb")):
        found = measure(json.loads(path.read_text(encoding="utf-8"))["cells"])
        print(f"| {path.stem} | {' | '.join(map(str, found))} |")


if __name__ == "__main__":
    main()
