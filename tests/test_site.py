"""The site as a reader meets it: on a phone and at a desk, by day and by night, without a network.

`VLM_LORA_LAB_SITE` names a folder with a built site; without it the site is built here, if Sphinx is at hand."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest

from real import real

ROOT = Path(__file__).parent.parent
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
CHAPTERS = sorted(
    p.relative_to(ROOT / "nbs").with_suffix("").as_posix()
    for p in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)
LOOKED_AT = (
    "pages/chapters",  # tables
    "35_plan.unfreeze",  # figures and long lines
    "reference/plan.explorer",  # HTML with colours of its own
)
CI = "CI" in os.environ
browser_needed = pytest.mark.skipif(not CHROMIUM.exists() and not CI, reason=f"no {CHROMIUM}; CI does not skip this")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder with the built pages."
    if given := os.environ.get("VLM_LORA_LAB_SITE"):
        return Path(given)
    if not (find_spec("sphinx") and find_spec("myst_nb")) and not CI:
        pytest.skip("no Sphinx: pip install -c constraints.txt -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site") / "html"
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "-c", "docs", "nbs", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


class Page(HTMLParser):
    "What a page points to, the names that can be pointed to, and what its code cells show."

    def __init__(self, text):
        super().__init__()
        self.links = []
        self.loads = []
        self.names = set()
        self.code = ""
        self.depth = 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        at = dict(attributes)
        self.names |= {at["id"]} if at.get("id") else set()
        if tag == "a" and at.get("href"):
            self.links.append(at["href"])
        if tag in ("img", "script", "iframe") and at.get("src"):
            self.loads.append(at["src"])
        if tag == "link" and at.get("href") and at.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(at["href"])
        self.depth += tag == "pre"

    def handle_endtag(self, tag):
        self.depth -= tag == "pre"

    def handle_data(self, data):
        if self.depth:
            self.code += data


@pytest.fixture(scope="module")
def pages(site):
    return {
        p.relative_to(site).as_posix(): Page(p.read_text(encoding="utf-8"))
        for p in site.rglob("*.html")
        if "_static" not in p.parts
    }


def test_every_chapter_has_a_page_in_the_menu(pages):
    for name in CHAPTERS:
        assert f"{name}.html" in pages, name
    menu = {urldefrag(link)[0] for link in pages["index.html"].links}
    assert {f"{name}.html" for name in CHAPTERS} - menu == {"index.html"}


def test_links_resolve_and_nothing_is_loaded_from_elsewhere(pages, site):
    seen = 0
    for name, page in pages.items():
        for link in page.links + page.loads:
            if re.match(r"[a-z]+:", link):
                assert link not in page.loads or link.startswith("data:"), f"{name} loads {link}"
                continue
            path, anchor = urldefrag(urljoin(f"/{name}", link))
            path = unquote(path).lstrip("/").split("?")[0]
            assert (site / path).is_file(), f"{name}: {link}"
            if anchor and path in pages:
                assert unquote(anchor) in pages[path].names, f"{name}: {link}"
            seen += 1
    assert seen > 1000


def test_an_old_address_leads_to_the_chapter_that_took_its_place(pages, site):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    old = set(re.findall(r"`(\d\d_[\w.]+)`", text.rpartition("\n## ")[2])) - set(CHAPTERS)
    assert len(old) > 110
    for name in old:
        [target] = re.findall(r'http-equiv="refresh" content="0; url=([^"]+)"', (site / f"{name}.html").read_text())
        assert target.removesuffix(".html") in CHAPTERS, (name, target)


def test_the_machinery_of_notebooks_stays_behind_the_scenes(pages):
    for name, page in pages.items():
        assert not re.search(r"^#\|", page.code, re.M) and not re.search(r"google\.colab.+sys\.modules", page.code), (
            name
        )
    assert (
        "TuningPlan" in pages["25_plan.html"].code
        and "assert answer == question.answer" not in pages["index.html"].code
    )


def leads_to(pages, name):
    "Pages that a page has a link to, in its text or in the menu."
    return {urldefrag(urljoin(f"/{name}", link))[0].lstrip("/") for link in pages[name].links}


def test_an_issue_is_two_clicks_from_its_answer(pages, site):
    assert "pages/issues.html" in leads_to(pages, "index.html")
    text = (site / "pages" / "issues.html").read_text(encoding="utf-8").split("<article")[1].split("</article>")[0]
    rows = [re.findall(r'href="([^"]+)"', row) for row in re.findall(r"<tr.*?</tr>", text, re.S)[1:]]
    assert len(rows) > 22
    for issue, first, *_ in rows:
        answer = urldefrag(urljoin("/pages/issues.html", first))[0].lstrip("/")
        assert issue in pages[answer].links, f"{answer} has no word on {issue}"


def test_the_front_page_leads_to_every_name_and_to_the_other_language(pages):
    assert {"genindex.html", "py-modindex.html", "index_zh.html"} <= leads_to(pages, "index.html")
    assert "index.html" in leads_to(pages, "index_zh.html")


@pytest.mark.parametrize("folder", ["pages", "pages/zh"])
def test_the_tables_are_made_and_lead_to_every_chapter_claim_and_public_name(pages, site, folder):
    import vlm_lora_lab

    def rows(name):
        text = (site / folder / f"{name}.html").read_text(encoding="utf-8")
        return re.findall(r"<tr.*?</tr>", text.split("<article")[1].split("</article>")[0], re.S)

    listed = "".join(rows("chapters"))
    told = {p.stem: f"{p.stem}.html" for p in (ROOT / "nbs" / "zh").glob("*.zh")} if folder == "pages/zh" else {}
    places = {name: told.get(name.rpartition("/")[2], f"{name}.html") for name in CHAPTERS if name != "index"}
    assert [name for name, place in places.items() if place not in listed] == []
    assert len(rows("claims")) == 30 and all(".html" in row for row in rows("claims")[1:])
    assert "check-data" in "".join(rows("use"))
    named = "".join(rows("python"))
    for name, module in vlm_lora_lab.PUBLIC.items():
        assert f"#vlm_lora_lab.{module}.{name}" in named, name


def test_every_exported_name_has_an_entry_with_its_comments(pages, site):
    sys.path.insert(0, str(ROOT))
    from vlm_lora_lab._modidx import d

    names = {
        name
        for module in d["syms"].values()
        for name in module
        if not any(part.startswith("_") for part in name.removeprefix("vlm_lora_lab.").split("."))
    }
    missing = names - set().union(*(page.names for page in pages.values()))
    assert len(names) > 300 and not missing, sorted(missing)[:10]
    assert (
        "not wrapped; the meta device is enough"
        in (site / "reference/plan.preview.html").read_text(encoding="utf-8").split('id="reference"')[1]
    )


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address(site):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(browser, address):
    "Open a page; complaints are what its console, its scripts and its requests had to say."
    contexts, complaints = [], []

    def open_tab(page, width=1280, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        new = contexts[-1].new_page()
        new.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        new.on("pageerror", lambda e: complaints.append(str(e)))
        new.on("requestfailed", lambda r: complaints.append(f"failed: {r.url}"))
        new.on(
            "request",
            lambda r: None if r.url.startswith((address, "data:")) else complaints.append(f"from elsewhere: {r.url}"),
        )
        new.set_default_timeout(60_000)
        new.goto(f"{address}/{page}")
        return new

    yield open_tab
    for context in contexts:
        context.close()
    assert complaints == []


LUMINANCE = """e => {
    const [r, g, b] = getComputedStyle(e).{what}.match(/[\\d.]+/g).map(Number);
    return (r * 299 + g * 587 + b * 114) / 255000
}"""


@browser_needed
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_three_pages_fit_and_can_be_read(tab, width, scheme, tmp_path):
    keep = Path(os.environ.get("KEEP_SCREENSHOTS", tmp_path))
    for name in LOOKED_AT:
        page = tab(f"{name}.html", width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than the window"
        blocks = ", ".join(f"article {e}" for e in ("h1", "p", "li", ".cell", "table", "img", "pre"))
        outside = f"""w => [...document.querySelectorAll('{blocks}')]
            .filter(e => !e.parentElement.closest('.output, table, pre, .highlight'))
            .filter(e => e.getBoundingClientRect().right > w + 1).map(e => e.outerHTML.slice(0, 80))"""
        assert page.evaluate(outside, width) == [], name
        assert (
            page.evaluate(
                "[...document.images].filter(i => i.complete && i.naturalWidth == 0 && i.loading != 'lazy').map(i => "
                "i.src)"
            )
            == []
        )
        ink = page.locator("article p").first.evaluate(LUMINANCE.replace("{what}", "color"))
        paper = page.locator("body").evaluate(LUMINANCE.replace("{what}", "backgroundColor"))
        assert (ink < 0.3 and paper > 0.9) if scheme == "light" else (ink > 0.6 and paper < 0.2), (ink, paper)
        picture = keep / f"{name.replace('/', '.')}-{width}-{scheme}.png"
        page.screenshot(path=picture, full_page=True)
        assert picture.stat().st_size > 20_000


AXE = """async () => (await axe.run(document, {resultTypes: ["violations"]})).violations
    .filter(v => ["serious", "critical"].includes(v.impact))
    .map(v => [v.id, v.nodes.length, v.nodes[0].html.slice(0, 200), v.nodes[0].failureSummary].join(" | "))"""


@browser_needed
@pytest.mark.skipif(real("axe.min.js") is None, reason="python tests/real.py fetches axe")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index", *LOOKED_AT, "05_vlm", "75_compare", "index_zh"])
def test_axe_finds_nothing_serious(tab, name, scheme):
    page = tab(f"{name}.html", 390, scheme)
    page.add_script_tag(content=real("axe.min.js").decode("utf-8"))
    assert page.evaluate(AXE) == []


def test_a_picture_is_told_in_words(site):
    for name in CHAPTERS:
        if not name.startswith("tutorials/"):
            pictures = re.findall(r"<img [^>]*_images[^>]*>", (site / f"{name}.html").read_text(encoding="utf-8"))
            told = [re.search(r'alt="([^"]*)"', p)[1] for p in pictures]
            assert not [alt for alt in told if len(alt) < 40 or alt.startswith("_images")], (name, told)


@browser_needed
def test_search_finds_the_resampler(tab):
    page = tab("search.html?q=resampler")
    found = page.locator("#search-results ul.search li a")
    found.first.wait_for()
    page.wait_for_function("() => /found \\d+ pages?/.test(document.querySelector('#search-results').innerText)")
    targets = {urldefrag(a.get_attribute("href"))[0].split("?")[0] for a in found.all()}
    # by title, and by what they say
    assert {"30_models.resampler.html", "35_plan.unfreeze.html", "reference/models.qwenvl.html"} <= targets and len(
        targets
    ) > 10


@browser_needed
def test_a_reader_goes_from_chapter_to_chapter_and_formulas_are_drawn(tab):
    page = tab("reference/plan.preview.html", 390)
    page.locator("article a", has_text="25").first.click()
    page.wait_for_url("**/25_plan.html")
    assert page.locator("h1").inner_text().startswith("The plan")
    page = tab("10_lora.linear.html", 390)
    assert page.locator("math").count() > 3 and page.locator("math").first.bounding_box()["width"] > 5
