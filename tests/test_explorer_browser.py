"""The plan explorer where it lives: in JupyterLab, in a browser, under a finger."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlm_lora_lab.errors import InputError
from vlm_lora_lab.plan.explorer import PlanExplorer
from vlm_lora_lab.models.published import on_meta
from vlm_lora_lab.plan.tuning import TuningPlan
from vlm_lora_lab.plan.preview import Preview
from vlm_lora_lab.show import readable_bytes

CHROMIUM = Path("/usr/bin/chromium")
MODEL = "openbmb/MiniCPM-V-2_6"
PATIENCE = 300_000  # milliseconds, for machines under load; an idle one needs a fraction of it
pytestmark = pytest.mark.skipif(
    not CHROMIUM.exists() and "CI" not in os.environ, reason=f"no {CHROMIUM}; CI does not skip this"
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "JupyterLab on a loopback port, with nothing of the user's; gives the notebook's address and its file."
    home = tmp_path_factory.mktemp("lab")
    code = f"from vlm_lora_lab.plan.explorer import PlanExplorer\nexplorer = PlanExplorer({MODEL!r})\nexplorer"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    cell = {"cell_type": "code", "id": "play", "metadata": {}, "source": code, "execution_count": None, "outputs": []}
    notebook = home / "root" / "play.ipynb"
    notebook.parent.mkdir()
    notebook.write_text(
        json.dumps({"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token, here = secrets.token_hex(16), Path(__file__).parent.parent
    places = {
        k: str(home / k.lower())
        for k in (
            "JUPYTER_CONFIG_DIR",
            "JUPYTER_DATA_DIR",
            "JUPYTER_RUNTIME_DIR",
            "JUPYTERLAB_SETTINGS_DIR",
            "JUPYTERLAB_WORKSPACES_DIR",
            "IPYTHONDIR",
        )
    }
    env = {
        **os.environ,
        **places,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(here), os.environ.get("PYTHONPATH")])),
        "JUPYTER_PLATFORM_DIRS": "1",
    }
    quiet = home / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    server_command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={notebook.parent}",
        f"--IdentityProvider.token={token}",
        "--LabApp.expose_app_in_browser=True",
    ]
    with open(home / "log", "wb") as log, subprocess.Popen(server_command, env=env, stdout=log, stderr=log) as server:
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, home / "log")
            yield f"http://127.0.0.1:{port}/lab/tree/{notebook.name}?token={token}", notebook
        finally:
            server.terminate()
            server.wait(30)


def _wait_for(address, server, log):
    end = time.monotonic() + PATIENCE / 1000
    while True:
        assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)  # between two questions, not in place of one


@pytest.fixture(scope="module")
def page(lab):
    "A browser with the notebook open and its cell run."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.goto(lab[0])
        page.wait_for_function(
            "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        command(page, "application:toggle-left-area")
        command(page, "notebook:run-all-cells")
        page.locator(".plan-explorer").wait_for()
        yield page
        browser.close()


def command(page, name):
    "Ask JupyterLab for something; what it answers is not waited for, nor could it be sent over."
    page.evaluate(f"() => {{ void window.jupyterapp.commands.execute('{name}') }}")


def shows(page, **options):
    "Wait until the widget shows what `Preview` computes here."
    from playwright.sync_api import expect

    seen = Preview.of(on_meta(options.pop("model", MODEL)), TuningPlan(**options))
    expect(page.locator(".plan-explorer b.trained")).to_have_text(f"{seen.trained:,}", timeout=PATIENCE)
    text = page.locator(".plan-explorer .widget-html").inner_text()
    for part, word, weights, trained, _ in seen.rows:
        assert f"{part}\t{word}\t{weights:,}" in text and f"{trained:,}" in text, (part, text)
    assert (
        f"adapter on disk {readable_bytes(seen.adapter_bytes)} · trained weights, gradients and AdamW "
        f"{readable_bytes(seen.training_bytes)}" in text
    )
    return text


def press(page, part, word):
    page.locator(f".plan-explorer .part-{part}").get_by_role("button", name=word, exact=True).click()


def write(page, label, value):
    field = page.locator(".plan-explorer .widget-inline-hbox", has_text=label).locator("input").first
    field.fill(str(value))
    field.press("Enter")


def refusal(model=MODEL, **options):
    with pytest.raises(InputError) as e:
        Preview.of(on_meta(model), TuningPlan(**options))
    return str(e.value)


def test_a_word_and_a_rank_change_the_numbers_to_what_python_computes(page):
    from playwright.sync_api import expect

    assert "resampler" in shows(page)
    press(page, "connector", "lora")
    shows(page, connector="lora")
    write(page, "rank", 64)
    text = shows(page, connector="lora", rank=64)
    assert (
        "TuningPlan(connector='lora', rank=64)" in text
        and f"vlm-lora-lab plan {MODEL} --connector lora --rank 64" in text
    )
    write(page, "rank", 0)
    expect(page.locator(".plan-explorer .widget-html")).to_contain_text(refusal(connector="lora", rank=0))
    expect(page.locator(".plan-explorer b.trained")).to_have_count(0)
    write(page, "rank", 16)
    row = page.locator(".plan-explorer .part-language input")
    row.fill("lora on 0-15, full on 16-27")
    row.press("Enter")
    shows(page, connector="lora", language="lora on 0-15, full on 16-27")
    assert page.locator(".plan-explorer .part-language").get_by_role("button", name="freeze").is_disabled()
    row.fill("")
    row.press("Enter")
    press(page, "connector", "full")
    shows(page)


def test_another_model_and_a_target_that_it_does_not_have(page):
    from playwright.sync_api import expect

    models = page.locator(".plan-explorer .widget-dropdown", has_text="model").locator("select")
    models.select_option("Qwen/Qwen-VL")
    shows(page, model="Qwen/Qwen-VL")
    write(page, "targets", "q_proj")
    expect(page.locator(".plan-explorer .widget-html")).to_contain_text(refusal("Qwen/Qwen-VL", targets=("q_proj",)))
    models.select_option(MODEL)
    shows(page, targets=("q_proj",))
    write(page, "targets", "")
    shows(page)
    assert "Traceback" not in page.locator(".jp-Notebook").inner_text()


@pytest.mark.parametrize("width", [1280, 560])
def test_the_picture_is_to_scale_and_fits(page, width, tmp_path):
    page.set_viewport_size({"width": width, "height": 1600})  # a picture shows what is in view, and all of it should be
    shows(page)
    box = page.locator(".plan-explorer")
    wide = (
        "e => [e, ...e.querySelectorAll('*')].filter(x => x.getBoundingClientRect().right > "
        "e.getBoundingClientRect().right + 1).map(x => x.outerHTML.slice(0, 80))"
    )
    assert box.evaluate(wide) == [], "it does not fit its width"
    file = Path(os.environ.get("KEEP_SCREENSHOTS", tmp_path)) / f"explorer-{width}.png"
    box.screenshot(path=file)
    pixels = np.asarray(Image.open(file).convert("RGB")).astype(int)
    assert pixels.shape[0] > 300 and 0.5 * width < pixels.shape[1] <= width
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, "blank"
    seen = Preview.of(on_meta(MODEL), TuningPlan())
    rows, every = {r[0]: r for r in seen.rows}, sum(r[2] for r in seen.rows)

    # of a bar that is 13 pixels high: its length
    def painted(rgb):
        return (abs(pixels - rgb).max(-1) <= 2).sum() / 13

    full = 130 * rows["connector"][3] / seen.trained + max(3, 130 * rows["connector"][2] / every)
    frozen = 130 * (rows["vision"][2] + rows["embeddings"][2] + rows["head"][2]) / every
    assert abs(painted((209, 96, 61)) - full) < 6, "the connector, in full"
    assert abs(painted((223, 227, 230)) - frozen) < 6, "what is frozen"


def test_what_is_saved_has_a_form_for_every_page(page, lab):
    command(page, "docmanager:save")
    page.wait_for_function("() => !window.jupyterapp.shell.currentWidget.context.model.dirty")
    [output] = json.loads(lab[1].read_text())["cells"][0]["outputs"]
    assert set(output["data"]) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    assert f"{PlanExplorer(MODEL).look.preview.trained:,}" in "".join(output["data"]["text/html"])
