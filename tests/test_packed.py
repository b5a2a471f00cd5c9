"""LoRA on `in_proj_weight`, the matrix that belongs to no layer: trained, saved, reloaded, merged, refused."""

import copy
import warnings

import pytest
import torch
from families import batch_of, tiny_model
from peft import PeftModel
from test_rules import step
from torch import nn

from vlm_lora_lab.checkpoint.merge import merge_adapter, same_model, save_merged
from vlm_lora_lab.checkpoint.save import load_adapter, save_adapter
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.models.parts import VLM, count, mixed_precision
from vlm_lora_lab.plan.tuning import (
    TuningPlan,
    apply_plan,
    fold_lora,
    lora_layers,
    no_false_warning,
)
from vlm_lora_lab.plan.preview import Preview

ALL = "lora(rank=4, targets=kv_proj+out_proj+in_proj_weight)"
ALONE = "lora(rank=4, targets=in_proj_weight)"  # a rank of its own, which PEFT warns of without cause
FAMILIES = ["minicpmv-2.0", "minicpmv-2.6", "minicpmv-4.5", "qwen"]


class Packed(nn.MultiheadAttention):
    "PyTorch's own attention in the place of ours, as in the published MiniCPM-V 2.0 and 4.5."

    def forward(self, query, key, value, mask):
        return super().forward(query.expand(len(key), -1, -1), key, value, key_padding_mask=~mask, need_weights=False)[
            0
        ]


def with_pytorchs(family):
    model = tiny_model(family)
    model.resampler.attn, ours = Packed(64, 4, batch_first=True), model.resampler.attn
    model.resampler.attn.load_state_dict(ours.state_dict())
    return model


def logits(model, batch):
    with torch.no_grad(), mixed_precision(model):
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits


@pytest.mark.parametrize("line", [ALL, ALONE], ids=["all", "alone"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_was_promised_moves_and_it_comes_back(family, dtype, line, tmp_path):
    base = tiny_model(family).to(dtype)
    plan = TuningPlan(connector=line, language="freeze", rank=8, alpha=16, variant="rslora")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # also the false one of PEFT
        model = apply_plan(copy.deepcopy(base).train(), plan)
    assert {r[0]: r[3] for r in Preview.of(base, plan).rows} == count(model, trainable=True)
    assert {m.r["default"] for m in model.modules() if hasattr(m, "lora_A")} == {4}
    batch = batch_of(family, model)
    # an autocast around it is another sum
    assert torch.equal(logits(model, batch), logits(base, batch)) or dtype == torch.bfloat16
    promised = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(promised) == (6 if line == ALL else 2)
    with mixed_precision(model):
        assert step(model.train(), batch, plan) == promised
    trained = logits(model, batch)
    assert not torch.equal(trained, logits(base, batch))
    # plain PEFT reloads it; in 16 bit it would round LoRA, which is why load_adapter does not leave it at that
    if dtype == torch.float32:
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        with no_false_warning():
            again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert torch.equal(logits(again, batch), trained)
        folded = fold_lora(again)
        torch.testing.assert_close(logits(folded, batch), trained, rtol=1e-4, atol=1e-4)
        assert set(dict(base.named_parameters())) == set(dict(folded.named_parameters()))


@pytest.mark.parametrize(
    "four_bit, dtype",
    [(False, torch.float32), (True, torch.float32), (False, torch.bfloat16)],
    ids=["whole", "nf4", "bf16"],
)
def test_saved_reloaded_and_merged_by_our_own_means(four_bit, dtype, tmp_path):
    torch.manual_seed(0)
    plan = TuningPlan(connector=ALL, rank=8, alpha=16)
    model = apply_plan(load_vlm("lab", four_bit=four_bit, dtype=dtype), plan)
    ids = torch.randint(20, 400, (2, 30))
    batch = dict(
        input_ids=ids,
        labels=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(1, 3, 8, 12 * 8),
        tgt_sizes=torch.tensor([[3, 4]]),
        image_bound=torch.tensor([[0, 2, 18]]),
    )
    with mixed_precision(model):
        moved = step(model.train(), batch, plan)
    assert "base_model.model.resampler.attn.lora_B.default.weight" in moved
    folder = save_adapter(model, tmp_path / "adapter", plan, "lab", load_tokenizer("lab"), four_bit)
    again = load_adapter(folder, model=load_vlm("lab", four_bit=four_bit, dtype=dtype))
    assert torch.equal(logits(again, batch), logits(model, batch))
    if dtype == torch.float32:
        merged = load_vlm(save_merged(merge_adapter(folder), tmp_path / "merged", "lab"))
        assert same_model(model, again, merged, batch).ok


def test_pytorchs_own_attention_is_reached_by_its_parameter_and_refused_by_its_out_proj(tmp_path):
    base = with_pytorchs("minicpmv-2.6")
    assert VLM.of(base).packed["connector"] == ["resampler.attn.in_proj_weight"]
    with pytest.raises(
        InputError,
        match="out_proj is no linear layer there that is called .*borrows the weight of "
        "resampler.attn.out_proj.*Choose among kv_proj, in_proj_weight",
    ):
        lora_layers(base, TuningPlan(connector=ALL))
    plan = TuningPlan(connector="lora(targets=kv_proj+in_proj_weight)", language="freeze")
    model = apply_plan(copy.deepcopy(base), plan)
    batch = batch_of("minicpmv-2.6", model)
    assert step(model.train(), batch, plan) == {n for n, p in model.named_parameters() if p.requires_grad}
    trained = logits(model, batch)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(again, batch), trained)
    torch.testing.assert_close(logits(fold_lora(again), batch), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(connector=ALONE, dropout=0.05), "dropout: 0.05.*Write dropout: 0"),
        (dict(connector=ALONE, variant="dora"), "variant: dora"),
        (dict(connector=ALONE, variant="pissa"), "variant: pissa"),
        (dict(connector=f"{ALONE}, full on out_proj"), "another rule speaks of resampler.attn.out_proj.weight"),
        (
            dict(connector=f"full, {ALONE} on in_proj_weight"),
            "Give all of resampler.attn one rule, such as: lora.targets=in_proj_weight. on attn",
        ),
        (dict(vision="lora(targets=in_proj_weight)"), "in_proj_weight is no linear layer there"),
        (dict(connector="lora(targets=in_proj)"), "Choose among kv_proj, out_proj, in_proj_weight"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_write(options, message):
    with pytest.raises(InputError, match=message):
        lora_layers(tiny_model("minicpmv-2.6"), TuningPlan(**options))


def test_the_remedy_of_a_refusal_works():
    plan = TuningPlan(connector="full, lora(targets=in_proj_weight) on attn", language="freeze")
    # a bare parameter beside modules with another word: nothing that PEFT could keep
    with pytest.raises(InputError, match="query"):
        apply_plan(tiny_model("minicpmv-2.6"), plan)
    model = apply_plan(
        tiny_model("minicpmv-2.6"),
        TuningPlan(connector="full on kv_proj, lora(targets=in_proj_weight) on attn", language="freeze"),
    )
    assert {n.rpartition("resampler.")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "kv_proj.modules_to_save.default.weight",
        "attn.lora_A.default.weight",
        "attn.lora_B.default.weight",
    }


def test_the_word_lora_says_what_it_does_not_reach():
    seen = Preview.of(tiny_model("minicpmv-2.6"), TuningPlan(connector="lora"))
    assert set(seen.bare) == {
        "resampler.query",
        "resampler.proj",
        "resampler.attn.in_proj_weight",
    } and "name in_proj_weight as a target" in repr(seen)
    assert set(Preview.of(tiny_model("minicpmv-2.6"), TuningPlan(connector=ALL)).bare) == {
        "resampler.query",
        "resampler.proj",
    }
    assert not Preview.of(tiny_model("minicpmv-2.6"), TuningPlan()).bare
