"""Plans, their audit, and what PEFT makes of them."""

import re

import pytest
import torch

from vlm_lora_lab.data.batch import Processor
from vlm_lora_lab.data.drawn import draw
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.evaluate.ask import generate_answers
from vlm_lora_lab.models.load import load_vlm, load_tokenizer
from vlm_lora_lab.models.names import plain_name
from vlm_lora_lab.models.parts import PARTS, count, layout_of
from vlm_lora_lab.plan.tuning import PlanTable, TuningPlan, apply_plan, audit

PLANS = [
    TuningPlan(),
    TuningPlan(connector="lora"),
    TuningPlan(connector="freeze", targets=("q_proj", "v_proj")),
    TuningPlan(vision="lora", connector="full"),
    TuningPlan(vision="full", connector="full"),
    TuningPlan(embeddings="full", head="full"),
    TuningPlan(embeddings="lora", head="lora"),
    TuningPlan(language="freeze", connector="full", vision="lora"),
    TuningPlan(language="freeze", connector="full"),
]


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("plan", PLANS, ids=lambda p: "-".join(p.words.values()))
def test_a_plan_trains_what_it_says_and_nothing_else(plan, four_bit):
    torch.manual_seed(0)
    if four_bit and "lora" not in plan.words.values():
        with pytest.raises(InputError, match="no part gets LoRA"):
            apply_plan(load_vlm("lab", four_bit=True), plan)
        return
    model = apply_plan(load_vlm("lab", four_bit=four_bit), plan)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.randint(20, 400, (2, 30))
    batch = dict(
        input_ids=ids,
        labels=ids,
        pixel_values=torch.randn(1, 3, 8, 12 * 8),
        tgt_sizes=torch.tensor([[3, 4]]),
        image_bound=torch.tensor([[0, 2, 18]]),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # LoRA's first matrix only moves once the second has left zero
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    part_of = layout_of(model).part_of
    moved = {part_of(n) for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {part for part, word in plan.words.items() if word != "freeze"}
    for name, p in model.named_parameters():
        if not torch.equal(p, before[name]):
            word = plan.words[part_of(name)]
            assert (".lora_" in name) if word == "lora" else ".lora_" not in name, name


def test_full_training_needs_no_wrapper_and_refuses_four_bit():
    full = TuningPlan(*["full"] * 5)
    model = apply_plan(load_vlm("lab"), full)
    assert count(model) == count(model, trainable=True)
    with pytest.raises(InputError, match="4 bit"):
        apply_plan(load_vlm("lab", four_bit=True), full)


def test_tune_llm_with_lora_cannot_be_written():
    """A parameter has one word: whatever is said of it, the last rule counts, and the model holds either LoRA or a copy
    that is trained, never both."""
    model = apply_plan(load_vlm("lab"), TuningPlan(language="lora, full on 3-4", connector="freeze"))
    lora = {plain_name(n) for n, p in model.named_parameters() if ".lora_" in n}
    full = {
        plain_name(n).rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n
    }
    assert lora and full and not lora & full
    assert {int(re.search(r"layers.(\d+)", n)[1]) for n in lora} == {0, 1, 2} and {
        int(re.search(r"layers.(\d+)", n)[1]) for n in full
    } == {3, 4}


def test_lora_never_reaches_the_resampler_by_accident():
    model = apply_plan(load_vlm("lab"), TuningPlan(connector="freeze", targets=("v_proj",)))
    assert isinstance(model.base_model.model.resampler.kv_proj, torch.nn.Linear)  # a substring would have hit it
    assert not any("resampler" in n for n, p in model.named_parameters() if p.requires_grad)


def test_the_audit_sees_both_directions_and_16_bit():
    model, plan = apply_plan(load_vlm("lab"), TuningPlan()), TuningPlan()
    base = model.base_model.model
    base.vpm.post_layernorm.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="vpm.post_layernorm.weight is trained under the word 'freeze'"):
        audit(model, plan)
    base.vpm.post_layernorm.weight.requires_grad_(False)
    audit(model, plan)
    base.resampler.modules_to_save["default"].half()
    with pytest.raises(RuntimeError, match="trained in torch.float16"):
        audit(model, plan)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: "-".join(p.words.values()))
def test_trainables_are_float32_in_a_16_bit_model_that_still_runs(plan):
    model = apply_plan(load_vlm("lab", dtype=torch.bfloat16), plan)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    processor = Processor.of(model.config, load_tokenizer("lab"))
    assert len(generate_answers(model, processor, [draw(0, "number"), draw(1, "pair")], max_new_tokens=4)) == 2


def test_counts_are_of_true_weights_not_of_packed_bytes():
    assert count(load_vlm("lab")) == count(load_vlm("lab", four_bit=True))
    model = apply_plan(load_vlm("lab"), TuningPlan())
    rows = {r[0]: r for r in PlanTable.of(model, TuningPlan()).rows}
    assert rows["connector"][2] == rows["connector"][3] and rows["vision"][3] == 0 and list(rows) == list(PARTS)
