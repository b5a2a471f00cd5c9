"""One object per LoRA variant, held against PEFT's own layers and merges; and variants registered from outside."""

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from vlm_lora_lab.checkpoint.inspect import inspect_adapter
from vlm_lora_lab.checkpoint.merge import merge_adapter
from vlm_lora_lab.checkpoint.save import load_adapter, save_adapter
from vlm_lora_lab.checkpoint.serve import export_adapter
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.lora.variants import (
    PLAIN_STARTS,
    VARIANTS,
    Variant,
    folded,
    register_variant,
    title_of,
    variant_of,
)
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.models.published import on_meta
from vlm_lora_lab.plan.explorer import PlanExplorer
from vlm_lora_lab.plan.preview import Preview
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan, lora_sizes
from vlm_lora_lab.quant.policy import plan_bytes
from vlm_lora_lab.train.stages import Stage, route

OUTSIDE = [
    Variant("updora", "orthogonal DoRA", {"use_dora": True, "init_lora_weights": "orthogonal"}),
    Variant("upright", "orthogonal LoRA", {"init_lora_weights": "orthogonal"}),
    Variant("olora", "OLoRA", {"init_lora_weights": "olora"}, takes="the first directions of its QR decomposition"),
]
EVERY = [*VARIANTS.values(), *OUTSIDE]


@pytest.fixture
def registered():
    "The registry, as it was before once the test is over."
    before = dict(VARIANTS)
    yield register_variant
    VARIANTS.clear()
    VARIANTS.update(before)


def by_peft(variant, embedding, rank=4, alpha=12):
    "A model of one layer with noise in all that is learned; PEFT's tensors by kind; its weight, once merged by PEFT."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(24, 16) if embedding else nn.Linear(24, 16))
    weight = model[0].weight.detach().clone()
    wrapped = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], **variant.peft))
    for n, p in wrapped.named_parameters():
        if ".lora_" in n:
            p.data += 0.1 * torch.randn_like(p)
    learned = {
        k.removeprefix("base_model.model.0.").removesuffix(".weight"): t.clone()
        for k, t in get_peft_model_state_dict(wrapped, save_embedding_layers=False).items()
    }
    scale = wrapped.base_model.model[0].scaling["default"]
    return weight, learned, scale, wrapped.merge_and_unload(safe_merge=True)[0].weight.detach()


@pytest.mark.parametrize("embedding", [False, True], ids=["linear", "embedding"])
@pytest.mark.parametrize("variant", EVERY, ids=lambda v: v.name)
def test_a_layer_is_folded_as_peft_folds_a_model(variant, embedding):
    if embedding and variant.moves_base:
        pytest.skip("PEFT starts embeddings with noise alone")
    weight, learned, scale, truth = by_peft(variant, embedding)
    assert set(learned) == variant.kinds(embedding) and variant.scale(12, 4) == scale
    assert variant.size(4, tuple(weight.shape), embedding) == sum(t.numel() for t in learned.values())
    before = weight.clone()
    assert torch.equal(folded(weight, variant.config(4, 12), learned, embedding), truth)
    assert torch.equal(weight, before), "the weight that was given is left alone"


def test_folding_draws_no_numbers_keeps_64_bit_and_refuses_nan():
    weight, learned, _, truth = by_peft(VARIANTS["lora"], False)
    state = torch.random.get_rng_state()
    double = folded(weight.double(), VARIANTS["lora"].config(4, 12), {k: t.double() for k, t in learned.items()})
    assert torch.equal(torch.random.get_rng_state(), state) and double.dtype == torch.float64
    torch.testing.assert_close(double, truth.double(), rtol=1e-5, atol=1e-5)
    learned["lora_B"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        folded(weight, VARIANTS["lora"].config(4, 12), learned)


@pytest.mark.parametrize("variant", EVERY, ids=lambda v: v.name)
def test_what_moves_the_base_is_what_peft_changes(variant):
    layer = nn.Sequential(nn.Linear(24, 16))
    before = layer[0].weight.detach().clone()
    wrapped = get_peft_model(layer, LoraConfig(r=4, target_modules=["0"], **variant.peft))
    assert variant.moves_base != torch.equal(wrapped.base_model.model[0].get_base_layer().weight, before)
    assert bool(variant.takes) == variant.moves_base


@pytest.mark.parametrize("start", [s for s in PLAIN_STARTS if s not in (None, "eva")])
def test_a_plain_start_leaves_the_base_and_is_no_variant(start):
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=start)
    layer = nn.Sequential(nn.Linear(24, 16))
    before = layer[0].weight.detach().clone()
    assert torch.equal(get_peft_model(layer, config).base_model.model[0].get_base_layer().weight, before)
    assert variant_of(config) is VARIANTS["lora"]


def test_a_variant_is_recognised_in_peft_s_words(registered, tmp_path):
    for variant in VARIANTS.values():
        config = LoraConfig(r=4, target_modules=["0"], **variant.peft)
        config.save_pretrained(tmp_path / variant.name)
        assert (
            variant_of(LoraConfig.from_pretrained(tmp_path / variant.name)) is variant is variant_of(config.to_dict())
        )
    assert [title_of(c) for c in ({}, {"use_dora": None}, {"use_dora": True, "use_rslora": True})] == [
        "LoRA",
        "LoRA",
        "DoRA + rsLoRA",
    ]
    assert title_of({"init_lora_weights": "pissa"}) == "LoRA, started by pissa"
    both, unknown = {"use_dora": True, "init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}
    assert variant_of(both).name == "" and variant_of(both).lengths and variant_of(both).moves_base
    assert variant_of(unknown).moves_base and not variant_of(unknown).repeatable
    for variant in OUTSIDE:
        registered(variant)
    assert variant_of(OUTSIDE[0].peft) is OUTSIDE[0]
    assert variant_of(unknown) is OUTSIDE[2] and variant_of(unknown).repeatable
    assert variant_of({"init_lora_weights": "gaussian"}) is VARIANTS["lora"]


@pytest.mark.parametrize(
    "variant, message",
    [
        (Variant("dora", "other", {"use_rslora": True}), "is taken"),
        (Variant("", "nothing"), "no name"),
        (Variant("two words", "x"), "no name"),
        (Variant("mine", "x", {"use_magic": True}), "PEFT does not take"),
        (Variant("mine", "x", {"init_lora_weights": "magic"}), "PEFT does not take|takes is ''"),
        (Variant("mine", "x", {"init_lora_weights": "olora"}), "takes is ''"),
        (Variant("mine", "x", {"use_dora": True}, takes="everything"), "takes is 'everything'"),
    ],
)
def test_what_cannot_be_registered(variant, message, registered):
    names = list(VARIANTS)
    with pytest.raises(InputError, match=message):
        registered(variant)
    assert list(VARIANTS) == names
    registered(VARIANTS["dora"])  # the same once more, as in a cell that is run again


@pytest.mark.parametrize("variant", OUTSIDE, ids=lambda v: v.name)
def test_a_variant_from_outside_trains_is_saved_loaded_merged_and_served(variant, registered, tmp_path):
    with pytest.raises(InputError, match="Write one of lora, rslora, dora, rsdora, pissa"):
        TuningPlan(variant=variant.name)
    registered(variant)
    plan = TuningPlan(variant=variant.name, connector="freeze", rank=4, alpha=8)
    torch.manual_seed(0)
    model, ids = apply_plan(load_vlm("lab", dtype=torch.float32), plan).train(), torch.randint(20, 400, (2, 30))
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3), []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] > losses[1] > losses[2]
    folder = save_adapter(model, tmp_path / "adapter", plan, "lab", load_tokenizer("lab"), False)
    with torch.no_grad():
        want = model.eval()(input_ids=ids).logits
        loaded, merged = load_adapter(folder), merge_adapter(folder)
        torch.testing.assert_close(loaded(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(merged(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
    theirs = loaded.merge_and_unload(safe_merge=True).state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in merged.state_dict().items())
    assert dict(inspect_adapter(folder).about)["variant"] == title_of(variant.peft)
    if variant.lengths:
        with pytest.raises(InputError, match="this adapter is orthogonal DoRA, which vLLM does not serve"):
            export_adapter(folder, tmp_path / "served", "vllm")
    else:
        served = export_adapter(folder, tmp_path / "served", "vllm")
        assert bool(served.merged) == variant.moves_base and all(r.ok for r in served.rules[:10]), str(served)


def test_what_a_moved_base_forbids_is_forbidden_from_outside_as_well(registered):
    registered(OUTSIDE[2])
    plan = TuningPlan(variant="olora", connector="freeze")
    with pytest.raises(InputError, match="OLoRA takes the first directions of its QR decomposition out of the base"):
        apply_plan(load_vlm("lab", four_bit=True), plan)
    with pytest.raises(
        InputError, match="next stage would meet another base. Write variant: lora, rslora, dora or rsdora"
    ):
        route(on_meta("lab"), [Stage(plan), Stage(TuningPlan())])
    with pytest.raises(InputError, match="variant: olora: PEFT adds .* variant: lora or rslora, or leave"):
        apply_plan(on_meta("lab"), TuningPlan(connector="lora(targets=in_proj_weight) on attn", variant="olora"))


def test_the_explorer_offers_what_is_registered(registered):
    registered(OUTSIDE[0])
    seen = PlanExplorer("lab", variant="updora", rank=16, alpha=16)
    assert "updora" in seen.widget.children[-2].children[3].options and "LoRA is scaled by 1" in seen._repr_html_()


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_counted_is_what_is_there_also_beside_embeddings(variant):
    plan = TuningPlan(embeddings="lora", head="lora", connector="freeze", vision="lora", rank=4, variant=variant)
    model = apply_plan(load_vlm("lab"), plan)
    there = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(lora_sizes(on_meta("lab"), plan).values()) == there == Preview.of(on_meta("lab"), plan).trained
    assert sum(s["lora"] for s in plan_bytes(on_meta("lab"), plan, four_bit=False).values()) == 16 * there
