"""The site: the notebooks of nbs/ with the outputs they keep, nothing run.

`python -m sphinx -W -c docs nbs _docs/html` builds it."""

import re
import sys
from configparser import ConfigParser
from pathlib import Path

here = Path(__file__).parent
sys.path.insert(0, str(here))  # chapters.py, which reads a notebook, and tables.py, which makes the tables
facts = ConfigParser(delimiters=["="])
facts.read(here.parent / "settings.ini", encoding="utf-8")
facts = facts["DEFAULT"]

project, author, version, release = facts["title"], facts["author"], facts["version"], facts["version"]
copyright = facts["copyright"]
extensions = ["myst_nb", "sphinx_external_toc", "sphinx_reredirects", "chapters", "tables"]
external_toc_path = str(here / "_toc.yml")
exclude_patterns = ["**/.ipynb_checkpoints", "vlm_lora_lab_demo"]
suppress_warnings = ["etoc.glob"]  # a part of the book without chapters is left out
add_module_names = False


def old_names():
    "The table at the end of CONTRIBUTING.md: old name of a chapter -> its page."
    for line in (here.parent / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        was, _, now = line.removeprefix("| ").partition(" | ")
        for old in re.findall(r"`(\d\d_[\w.]+)`", was):
            found = re.match(r"`([\w./]+)` \|$", now)
            yield old, found[1] if found else f"reference/{old.partition('_')[2]}"


redirects = {old: f"{page}.html" for old, page in old_names()}

nb_execution_mode = "off"
nb_custom_formats = {
    ".ipynb": ["chapters.read", {"front": facts["title"]}],
    ".zh": ["chapters.read_chinese", {"front": facts["title"]}],
}
nb_ipywidgets_js = {}  # a widget without a kernel is dead; its table is shown instead
nb_mime_priority_overrides = [("html", "text/html", 0), ("html", "image/png", 1)]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = facts["title"]
html_baseurl = f"{facts['doc_host']}{facts['doc_baseurl']}/"
html_static_path = [str(here / "_static")]
html_css_files = ["site.css"]
html_favicon = str(here / "_static" / "favicon.svg")
html_copy_source = False
html_math_renderer = "mathml"  # from chapters.py: browsers draw it themselves, nothing is fetched
html_theme_options = {
    "source_repository": facts["git_url"],
    "source_branch": facts["branch"],
    "source_directory": "nbs/",
}
