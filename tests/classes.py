"""Which of transformers' image-text classes are taken apart by their structure: built without weights, from their own
defaults.

python tests/classes.py print the table, and write it to tests/CLASSES.md

The defaults of some classes contradict themselves (a vision tower that writes wider vectors than its language model
reads), or leave the vision tower out; `repaired` and `GIVEN` say what is changed then. `tests/test_classes.py` holds
some of them, and under `-m slow` the whole table."""

import sys
from collections import Counter
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from vlm_lora_lab.errors import InputError
from vlm_lora_lab.families.base import families_of
from vlm_lora_lab.models.parts import PARTS, count, infer_layout
from vlm_lora_lab.models.published import UNUSABLE, on_meta
from vlm_lora_lab.plan.tuning import TuningPlan
from vlm_lora_lab.plan.preview import Preview

TABLE = Path(__file__).parent / "CLASSES.md"
GIVEN = {  # model_type -> what its defaults leave out
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}, "audio_config": None},
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False}},
    "qwen2_vl": {"vision_config": {"hidden_size": 8192}},
}
WORKS = "taken apart"
LOAD = "registered"
REFUSED = "refused"
BROKEN = "not built"


def kinds():
    "The `model_type` of every class that transformers calls image-text-to-text."
    return [k for k in CONFIG_MAPPING if CONFIG_MAPPING[k] in AutoModelForImageTextToText._model_mapping]


def repaired(kind):
    "The default configuration of a class, with a vision tower that writes what its language model reads."
    config = CONFIG_MAPPING[kind](**GIVEN.get(kind, {}))
    vision, text = getattr(config, "vision_config", None), config.get_text_config()
    if kind not in GIVEN and getattr(vision, "out_hidden_size", None) and getattr(text, "hidden_size", None):
        vision.out_hidden_size = text.hidden_size
    return config


def told(kind):
    "What becomes of a class, and a sentence or the names of its parts."
    try:
        model = on_meta(repaired(kind))
    except (InputError, *UNUSABLE) as e:
        return BROKEN, " ".join(str(e).split()).removeprefix(
            "configuration: no model can be built from this configuration: "
        ).partition(". Compare")[0]
    try:
        known = families_of(kind)
        layout = known[0].layout if known else infer_layout(model)
        total = count(model)
        Preview.of(model, TuningPlan())
    except InputError as e:
        return REFUSED, str(e).partition("could not be told apart: ")[2].partition(". Register")[0] or str(e)
    where = "; ".join(f"{p}: {', '.join(getattr(layout, p))}" for p in PARTS if total[p])
    return (LOAD if families_of(kind) else WORKS), where


def table():
    "Every class, as Markdown, with the counts above it."
    rows = {kind: told(kind) for kind in kinds()}
    number = Counter(what for what, _ in rows.values())
    lines = [
        "# transformers' image-text classes, taken apart",
        "",
        "Made by `python tests/classes.py`: each class is built without weights from its defaults, and the default "
        "plan is previewed on it.",
        "`registered`: a line of the package says where its parts are. `not built`: its defaults contradict themselves "
        "or need another library; a real configuration may do.",
        "",
        f"{len(rows)} classes: " + ", ".join(f"{number[k]} {k}" for k in (LOAD, WORKS, REFUSED, BROKEN)) + ".",
        "",
        "| model_type | what becomes of it | parts, or why not |",
        "|---|---|---|",
    ]
    return (
        "\n".join(
            [*lines, *(f"| {kind} | {what} | {why.replace('|', ' ')} |" for kind, (what, why) in sorted(rows.items()))]
        )
        + "\n"
    )


if __name__ == "__main__":
    made = table()
    TABLE.write_text(made, encoding="utf-8")
    sys.stdout.write(made)
