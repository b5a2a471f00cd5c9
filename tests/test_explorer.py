"""What the plan explorer shows: looks and lines to copy. Its fields are moved in `test_widgets.py`."""

import re
import subprocess
import sys
import time
from shlex import split

import pytest

from vlm_lora_lab.cli import main
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.plan.explorer import MARKS, Look, PlanExplorer
from vlm_lora_lab.plan.tuning import TuningPlan

MODEL = "openbmb/MiniCPM-V-2_6"


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(connector="lora", rank=8, alpha=8),
        dict(targets=["q_proj", "v_proj"], variant="dora", dropout=0.05),
        dict(lora_plus=16, vision="full(lr=1e-05)"),
        dict(language="lora(rank=8) on 0-15, full on 16-23", connector="lora(targets=kv_proj+in_proj_weight)"),
    ],
)
def test_the_lines_to_copy_give_what_is_shown(options, capsys):
    look = Look.at("lab" if "on 0-15" not in str(options) else MODEL, **options)
    assert eval(look.python) == look.preview.plan == TuningPlan.of(options)
    assert main(split(look.command)[1:]) == 0
    assert capsys.readouterr().out.strip() == repr(look.preview).strip()
    assert look.python in repr(look) and look.command in repr(look)


def test_bars_are_shares():
    look = Look.at(MODEL, language="lora on 0-15, full on 16-27", vision="lora")
    total = {word: sum(part[word] for part in look.under) for word in MARKS}
    assert sum(total.values()) == sum(r[2] for r in look.preview.rows) and all(total.values())
    widths = [int(w) for w in re.findall(r"width:(\d+)px", look._repr_html_())]
    # two columns of 130 pixels, rounded, and three pixels for what is nearly nothing
    assert abs(sum(widths) - 260) < 20
    text = repr(look)
    assert all(mark in text for mark, _ in MARKS.values()) and "80.6%" in text


def test_what_is_typed_is_shown_as_it_is():
    look = Look.at("<b>x</b>", rank=4)
    assert (
        look.preview is None and "&lt;b&gt;x&lt;/b&gt;" in look._repr_html_() and "<b>x</b>" not in look._repr_html_()
    )
    assert "Did you mean openbmb/MiniCPM-V-2_6" in Look.at("openbmb/minicpm-v-26").error


def test_options_that_make_no_plan_are_raised_and_others_are_explained():
    with pytest.raises(InputError, match="rank is 0"):
        PlanExplorer(rank=0)
    assert "is no linear layer" in repr(PlanExplorer("Qwen/Qwen-VL", targets=("q_proj",)))


def test_ipywidgets_are_imported_with_the_first_widget():
    code = (
        "import sys, vlm_lora_lab.plan.explorer as e; assert 'ipywidgets' not in sys.modules and "
        "e._empty.cache_info().currsize == 0; e.PlanExplorer('lab'); assert 'ipywidgets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_change_is_faster_than_a_finger():
    Look.at("Qwen/Qwen3-VL-8B-Instruct")
    took = []
    for rank in (4, 8, 16):
        start = time.process_time()
        Look.at("Qwen/Qwen3-VL-8B-Instruct", vision="lora", connector="lora", rank=rank)._repr_html_()
        took.append(time.process_time() - start)
    assert min(took) < 0.3
