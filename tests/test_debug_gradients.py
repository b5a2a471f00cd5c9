"""The gradient audit: six families, foreign models, and every way a tensor can miss its gradient."""

import warnings

import pytest
import torch
from families import STAND_INS, batch_of, made, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from vlm_lora_lab.checkpoint.save import save_adapter
from vlm_lora_lab.cli import main
from vlm_lora_lab.debug.gradients import audit_gradients, loss_of, undisturbed
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import load_vlm
from vlm_lora_lab.models.tokenizer import tokenizer_of
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

SIX = ["minicpmv-2.6", "qwen", "minicpmv4_6", "qwen2_5_vl", "llava", "idefics3"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 1)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.1)
        self.mode = "ok"

    def forward(self, x):
        h = self.drop(self.norm(self.a(x)))
        if self.mode == "no_grad":
            with torch.no_grad():
                d = self.b(h)
            h = h + d
        elif self.mode == "detached":
            h = h + self.b(h).detach()
        elif self.mode == "zero":
            h = h + 0 * self.b(h)
        elif self.mode == "nan":
            h = h + self.b(h * 0).pow(2).sum(-1, keepdim=True).sub(self.b.bias.pow(2).sum()).clamp(min=0).sqrt()
        elif self.mode == "ok":
            h = h + self.b(h)
        return {"loss": self.c(h.relu()).pow(2).mean()}


X = {"x": torch.randn(5, 8, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    "mode, verdict",
    [
        ("ok", None),
        ("unused", "never called"),
        ("no_grad", "cut off"),
        ("detached", "not in the loss"),
        ("zero", "zero"),
        ("nan", "not finite"),
    ],
)
def test_each_way_to_miss_a_gradient_has_its_verdict(mode, verdict):
    model = Net()
    model.mode = mode
    wrong = {r.name: r.verdict for r in audit_gradients(model, X).wrong}
    if mode == "nan":  # behind the NaN everything is lost
        assert wrong["b.weight"] == "not finite" and "c.weight" not in wrong
    else:
        assert wrong == ({} if verdict is None else {"b.weight": verdict, "b.bias": verdict})


def test_the_model_is_left_as_it_was():
    model = Net().eval()
    model.a.weight.grad = torch.ones(8, 8)
    before, noise = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    audit_gradients(model, X)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(model.a.weight.grad, torch.ones(8, 8)) and model.b.weight.grad is None
    assert (
        not model.training
        and not any(m._forward_hooks for m in model.modules())
        and torch.equal(noise, torch.get_rng_state())
    )
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        model.a.weight.data.zero_()
        1 / 0
    assert torch.equal(model.a.weight, before["a.weight"])


@pytest.mark.parametrize("family", SIX)
def test_six_families_under_lora_and_full(family):
    model = tiny_model(family)
    batch = batch_of(family, model)
    model = apply_plan(model, TuningPlan(vision="lora", rank=2))
    result = audit_gradients(model, batch, promised=lambda n: ".lora_" in n or ".modules_to_save." in n, rate=1e-4)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(r.name for r in result.rows) == sorted(trained)
    last = (
        f"vision_tower.encoder.layers.{tiny_config(family).vision_config.num_hidden_layers - 1}."
        if family == "llava"
        else ""
    )
    # LLaVA reads the last but one layer of its eyes: what is in the last is lost
    unread = [r for r in result.wrong if r.verdict == "not in the loss"]
    assert bool(unread) == (family == "llava") and all(last in r.name for r in unread), result
    rest = [r for r in result.wrong if r not in unread]  # a bias of keys has no gradient: softmax ignores it
    assert all(r.verdict == "zero" and r.name.endswith("bias") for r in rest), result
    assert result.asleep and all(".lora_A." in n for n in result.asleep)
    for r in result.rows:
        if ".lora_A." in r.name and r not in unread:
            assert r.first == 0 and r.second > 0


@pytest.mark.parametrize("family", SIX)
def test_a_batch_without_a_picture_is_told_from_a_healthy_one(family):
    model = tiny_model(family)
    batch = {k: v for k, v in batch_of(family, model).items() if k in ("input_ids", "labels", "attention_mask")}
    batch["input_ids"] = batch["input_ids"].clamp(max=290)  # no placeholder
    model = apply_plan(model, TuningPlan(vision="lora", connector="freeze", rank=2))
    try:
        wrong = audit_gradients(model, batch).wrong
    except (ValueError, TypeError):
        pytest.skip("this family does not take text alone")
    assert wrong and {r.verdict for r in wrong} <= {"never called", "zero"}
    assert all("vis" in r.name or "vpm" in r.name for r in wrong)


def test_reentrant_checkpointing_is_told_by_name():
    model = get_peft_model(tiny_model("minicpmv-2.6"), LoraConfig(target_modules=r".*\.(q_proj|k_proj)", r=2))
    batch = batch_of("minicpmv-2.6", model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = audit_gradients(model, batch).wrong
    assert {r.name for r in wrong} == {n for n, p in model.named_parameters() if p.requires_grad and ".vpm." in n}
    assert all(r.verdict == "cut off" and "use_reentrant=False" in r.remedy for r in wrong)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert audit_gradients(model, batch).ok


@pytest.mark.parametrize(
    "dtype, rate, ok",
    [
        (torch.bfloat16, 1e-6, False),
        (torch.bfloat16, 1e-2, True),
        (torch.float32, 1e-6, True),
        (torch.float16, 1e-6, False),
    ],
)
def test_rates_that_round_to_nothing(dtype, rate, ok):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1)).to(dtype)
    result = audit_gradients(model, torch.ones(2, 16, dtype=dtype), rate=rate)
    assert result.ok is ok and {r.verdict for r in result.wrong} <= {"rate too small"}
    for r in result.rows:  # against what the optimizer really does
        p = dict(model.named_parameters())[r.name]
        old = p.detach().clone()
        p.grad = torch.ones_like(p)
        torch.optim.AdamW([p], lr=rate, weight_decay=0, eps=1e-4).step()
        assert ((p != old).double().mean() >= 0.5) == (r.verdict == "trained")


def test_the_optimizer_and_the_promise_are_held_against_the_model():
    model = Net()
    model.c.weight.requires_grad_(False)
    model.c.weight.grad = torch.ones_like(model.c.weight)
    optimizer = torch.optim.SGD([*model.a.parameters(), *model.norm.parameters(), model.c.bias], lr=0.1)
    wrong = {r.name: r.verdict for r in audit_gradients(model, X, rate=optimizer).wrong}
    assert wrong == {
        "b.weight": "not in the optimizer",
        "b.bias": "not in the optimizer",
        "c.weight": "frozen, but holds a gradient",
    }
    model.c.weight.grad = None
    wrong = {r.name: r.verdict for r in audit_gradients(model, X, promised=lambda n: n != "a.bias").wrong}
    assert wrong == {"a.bias": "trained, but not promised", "c.weight": "promised, but frozen"}


def test_losses_are_found_or_asked_for():
    model = nn.Linear(3, 2)
    assert loss_of(model, torch.ones(1, 3)).ndim == 0 and loss_of(model, (torch.ones(1, 3),)).ndim == 0
    assert audit_gradients(model, torch.ones(1, 3), loss=lambda m, b: m(b).pow(2).sum()).ok
    with pytest.raises(InputError, match="returned no loss"):
        loss_of(tiny_model("llava"), {k: v for k, v in batch_of("llava", None).items() if k != "labels"})


@pytest.mark.parametrize("family", ["minicpmv-4.0", "gemma3", "paligemma"])
def test_the_row_of_padding_has_no_gradient_and_that_is_no_fault(family, tmp_path, capsys):
    """With embeddings trained in full: the audit, the saved adapter and `inspect`, on a published configuration whose
    embedding has a row of padding."""
    base = made(STAND_INS[family])
    model = load_vlm(base, dtype=torch.float32)
    pad = model.get_input_embeddings().padding_idx
    assert pad is not None
    plan = TuningPlan(vision="freeze", connector="freeze", embeddings="full", rank=2)
    model = apply_plan(model, plan)
    ids = torch.tensor([[5, 6, 7, pad, 8, 9]])
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    if family in ("gemma3", "paligemma"):
        batch["token_type_ids"] = torch.zeros_like(ids)
    result = audit_gradients(model, batch, rate=1e-4)
    [row] = [r for r in result.rows if "embed_tokens" in r.name]
    assert row.verdict == "trained" and not [r for r in result.wrong if "embed" in r.name], result
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    before = model.get_input_embeddings().weight[pad].clone()
    for _ in range(2):
        loss_of(model.train(), batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    # as a row of a tied head it learns
    assert torch.equal(model.get_input_embeddings().weight[pad], before) != bool(model.all_tied_weights_keys)
    save_adapter(model, tmp_path / "adapter", plan, base, tokenizer_of(base), False)
    assert main(["inspect", str(tmp_path / "adapter")]) < 2, capsys.readouterr().out
