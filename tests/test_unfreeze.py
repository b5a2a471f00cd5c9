"""A snapshot sees every tensor that moved, and no other."""

import pytest
import torch
from families import batch_of, tiny_model
from test_rules import step

from vlm_lora_lab.models.names import plain_name
from vlm_lora_lab.models.parts import PARTS, layout_of
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.plan.unfreeze import Snapshot


@pytest.mark.parametrize(
    "words",
    [dict(connector="full"), dict(connector="freeze"), dict(vision="full", connector="lora", language="full")],
    ids=str,
)
@pytest.mark.parametrize("family", ["minicpmv-2.6", "qwen2_5_vl", "llava", "idefics3"])
def test_what_a_plan_trains_moves_and_the_rest_does_not(family, words):
    model = tiny_model(family)
    start = Snapshot.of(model)
    plan = TuningPlan(rank=2, **words)
    wrapped = apply_plan(model, plan)
    assert all(moved == 0 for moved, _ in start.moved(wrapped).parts.values())  # a wrapper moves nothing
    changed = {plain_name(n) for n in step(wrapped.train(), batch_of(family, wrapped), plan) if ".lora_" not in n}
    found = start.moved(wrapped)
    layout = layout_of(wrapped)
    for part in PARTS:
        assert found.parts.get(part, (0, 0))[0] == sum(layout.part_of(n) == part for n in changed), part
    assert (found.parts["connector"][0] > 0) == (words["connector"] == "full")


def test_one_bit_is_seen_and_another_model_is_refused():
    model = tiny_model("minicpmv-2.6")
    start = Snapshot.of(model)
    name, p = next((n, p) for n, p in model.named_parameters() if "resampler" in n)
    with torch.no_grad():
        p.view(-1).view(torch.int32)[0] ^= 1
    assert start.moved(model)["connector"][0] == 1, name
    assert "1 of" in repr(start.moved(model))
    with pytest.raises(ValueError, match="another model"):
        start.moved(tiny_model("llava"))
