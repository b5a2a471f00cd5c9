"""Models that are not registered, taken apart by their structure; the table of all classes of transformers is
`tests/CLASSES.md`."""

import pytest
from classes import BROKEN, LOAD, REFUSED, TABLE, WORKS, kinds, repaired, table, told

from vlm_lora_lab.models.parts import infer_layout
from vlm_lora_lab.models.published import on_meta


@pytest.mark.parametrize(
    "kind, vision, connector",
    [
        # patches of 768 numbers, whose side no field tells
        ("kosmos-2.5", ("vision_model",), ("image_to_text_projection",)),
        ("muse_glimmer", ("model.vision_tower",), ("model.vision_adapter", "model.vision_projection")),
        ("nemotron_h_omni", ("vision_model",), ("multi_modal_projector",)),  # it does not say which module is its head
        ("molmo2", ("model.vision_tower",), ("model.multi_modal_projector",)),
        ("llama4", ("vision_model",), ("multi_modal_projector",)),
        ("lfm2_vl", ("model.vision_tower",), ("model.multi_modal_projector",)),
        ("ernie4_5_vl_moe", ("model.vision_tower",), ("model.resampler_model",)),
        ("qwen3_5", ("model.visual",), ("model.visual.merger",)),
    ],
)
def test_linear_layers_that_read_patches_and_mergers_inside_a_tower(kind, vision, connector):
    layout = infer_layout(on_meta(repaired(kind)))
    assert layout.vision == vision and layout.connector == connector


@pytest.mark.parametrize(
    "kind, why",
    [
        ("muse_spark", "'model.audio_tower' is no connector"),
        ("mistral4", "no convolution outside its language model"),
        ("idefics", "no convolution outside its language model"),
        ("t5gemma2", "has its own list of layers"),
    ],
)
def test_what_cannot_be_told_apart_is_refused_in_a_sentence(kind, why):
    what, said = told(kind)
    assert what == REFUSED and why in said and "\n" not in said


def test_the_table_lists_every_class_and_its_counts_are_its_rows():
    rows = [line.split(" | ") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    assert sorted(r[0].removeprefix("| ") for r in rows) == sorted(kinds())
    for what in (LOAD, WORKS, REFUSED, BROKEN):
        assert f"{sum(r[1] == what for r in rows)} {what}" in TABLE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_table_is_what_is_measured():
    assert table() == TABLE.read_text(encoding="utf-8")
