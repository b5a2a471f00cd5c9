"""Logits only where there are labels: the same loss and the same gradients, in every family, whatever the head, and
never silently another one."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, batch_of, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GemmaConfig, PaliGemmaForConditionalGeneration, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from vlm_lora_lab.data.batch import Collator, Processor, Samples
from vlm_lora_lab.data.records import read_conversations, samples_folder
from vlm_lora_lab.debug.nan import NanDoctor, NonFiniteStep
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.train.loss import NotComputed, Promise, label_loss, label_only
from vlm_lora_lab.train.run import PartTrainer, Schedule, fit

PIECE = 320 * 3  # three tokens at a time


def step(model, batch, **kwargs):
    "Loss and gradients of one call."
    model.zero_grad()
    torch.manual_seed(0)
    out = model(**batch, **kwargs)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(found, expected, bound=1e-6):
    assert abs(found[0] - expected[0]) <= bound * abs(expected[0])
    assert found[1].keys() == expected[1].keys()
    largest = max(g.norm() for g in expected[1].values())
    for n, g in expected[1].items():
        assert (found[1][n] - g).norm() <= bound * max(10 * g.norm(), largest), n


def compare(model, batch, bound=1e-6, **kwargs):
    expected = step(model, batch, **kwargs)
    with label_only(model, PIECE):
        found = step(model, batch, **kwargs)
    same(found, expected, bound)
    return expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_loss_and_gradients(family):
    model = tiny_model(family).train()
    batch = batch_of(family, model)
    assert (batch["labels"] != -100).sum() > 4  # more than one piece
    compare(model, batch, num_items_in_batch=torch.tensor(13))
    with label_only(model, PIECE):
        out = model(**batch)
        assert out.logits is None and model(**{k: v for k, v in batch.items() if k != "labels"}).logits is not None
    torch.testing.assert_close(model(**batch).loss, out.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ("frozen", "lora", "full", "lora and soft-capping"))
@pytest.mark.parametrize("family", ("minicpmv-2.0", "minicpmv-2.6", "qwen", "gemma3"))
def test_a_head_under_peft(family, kind):
    model = tiny_model(family)
    head = "llm.lm_head" if "minicpm" in family else "lm_head"
    layers = r".*(q_proj|c_attn)" if kind in ("frozen", "full") else rf"{head}|.*(q_proj|c_attn)"
    settings = LoraConfig(target_modules=layers, modules_to_save=[head] if kind == "full" else None, r=4)
    model = get_peft_model(model, settings).train()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    batch, cap = batch_of(family, model), kind.endswith("capping") and family == "gemma3"
    if cap:
        model.config.get_text_config().final_logit_softcapping = 5.0
    expected = compare(model, batch)
    assert kind == "frozen" or any(head in n for n in expected[1])


def test_the_noise_of_a_piece_is_drawn_once():
    "Dropout on the head's input: a piece that is computed again must see the same noise, or its gradient is another's."
    torch.manual_seed(0)
    head, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 50)), torch.randn(1, 12, 16, requires_grad=True)
    head.out_features, labels = 50, torch.randint(0, 50, (1, 12))
    grads = []
    for at_once in (50 * 4, 50 * 4):
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(label_loss(x, labels, head, at_once=at_once), x)[0])
    assert torch.equal(*grads)
    torch.manual_seed(1)
    drawn = [F.dropout(piece, 0.5) for piece in x[0, :-1].split(4)]
    known = torch.autograd.grad(F.cross_entropy(head[1](torch.cat(drawn)), labels[0, 1:]), x)[0]
    torch.testing.assert_close(grads[0], known)


def test_soft_capping_and_scaling_are_kept():
    config = tiny_config("paligemma")
    config.text_config = GemmaConfig(**{k: v for k, v in config.text_config.to_dict().items() if k != "model_type"})
    # logits of weights as small as the published ones begin with are small
    config.text_config.final_logit_softcapping = 0.1
    torch.manual_seed(0)
    model = PaliGemmaForConditionalGeneration(config).float().train()
    batch = batch_of("paligemma", model)
    loss = compare(model, batch)[0]
    config.text_config.final_logit_softcapping = None
    if "softcapping" in inspect.getsource(PaliGemmaForConditionalGeneration.forward):  # not in transformers 5.20
        assert abs(model(**batch).loss - loss) > 1e-3  # it matters
    old = tiny_model("minicpmv-2.0")
    assert old.config.logits_scaling not in (0, 1)


@pytest.mark.parametrize("dtype, bound", ((torch.bfloat16, 2e-2), (torch.float16, 4e-3)))
def test_sixteen_bits_differ_by_their_rounding(dtype, bound):
    model = tiny_model("minicpmv-2.6").to(dtype)
    batch = batch_of("minicpmv-2.6", model)
    compare(model, batch | {"pixel_values": batch["pixel_values"].to(dtype)}, bound)


def test_labels_that_are_shifted_already_and_other_words_for_nothing():
    torch.manual_seed(0)
    head = nn.Linear(8, 40)
    x = torch.randn(2, 9, 8)
    labels = torch.randint(0, 40, (2, 9))
    for kwargs in (
        dict(shift_labels=labels),
        dict(ignore_index=3),
        dict(num_items_in_batch=7),
        dict(num_items_in_batch=torch.tensor(7)),
    ):
        torch.testing.assert_close(
            label_loss(x, labels, head, at_once=80, **kwargs), ForCausalLMLoss(head(x), labels, 40, **kwargs)
        )
    with pytest.raises(ValueError, match="8 tokens.*9 labels"):
        label_loss(x[:1, :8], labels[:1], head, shift_labels=labels[:1])


def test_a_batch_without_labels_is_what_it_was():
    model = tiny_model("minicpmv-2.6")
    batch = batch_of("minicpmv-2.6", model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with label_only(model):
        assert model(**batch).loss.isnan()
    loss, grads = compare(model, batch, num_items_in_batch=5)
    assert loss == 0 and "llm.lm_head.weight" in grads and not any(g.any() for g in grads.values())


class Odd(nn.Module):
    "A model after its head."

    def __init__(self, between=lambda x: x, own=None):
        super().__init__()
        self.config = tiny_config("llava")
        self.between = between
        self.own = own
        self.emb, self.lm_head = nn.Embedding(50, 16), nn.Linear(16, 50)

    @property
    def loss_function(self):
        return self.__dict__.get("_loss_function", ForCausalLMLoss)

    @loss_function.setter
    def loss_function(self, value):
        self.__dict__["_loss_function"] = value

    def forward(self, input_ids, labels=None):
        logits = self.between(self.lm_head(self.emb(input_ids)))
        return {"loss": self.own(logits, labels) if self.own else self.loss_function(logits, labels, 50)}


STEPS = (
    lambda x: x - x.mean(-1, keepdim=True),
    lambda x: torch.softmax(x, -1),
    lambda x: x[:, :-1],
    lambda x: x * torch.ones(5, 1),
    lambda x: torch.tanh(x) @ torch.eye(50),
    lambda x: x.view(-1, 50),
    lambda x: F.dropout(x, 0.1),
    lambda x: torch.zeros(1, 5, 50),
)


@pytest.mark.parametrize("k", range(len(STEPS)))
def test_a_step_that_is_not_understood_is_refused(k):
    ids = torch.arange(5)[None]
    model = Odd(STEPS[k])
    with label_only(model), pytest.raises((InputError, TypeError)):
        model(input_ids=ids, labels=ids)
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__


def test_a_loss_of_its_own_is_refused():
    ids = torch.arange(5)[None]
    mean = Odd(own=lambda logits, labels: F.cross_entropy(logits[0], labels[0]))
    with label_only(mean), pytest.raises(InputError):
        mean(input_ids=ids, labels=ids)
    forgetful = Odd(own=lambda logits, labels: torch.zeros(()))
    with label_only(forgetful), pytest.raises(InputError, match="way of its own"):
        forgetful(input_ids=ids, labels=ids)
    other = tiny_model("llava")
    other.loss_function = lambda *a, **k: torch.zeros(())
    with pytest.raises(InputError, match="LlavaForConditionalGeneration has a loss of its own"), label_only(other):
        pass
    good = Odd(between=lambda x: torch.tanh(x / 3) * 3.0)
    plain = good(input_ids=ids, labels=ids)["loss"]
    with label_only(good, 100):
        torch.testing.assert_close(good(input_ids=ids, labels=ids)["loss"], plain)


def test_nothing_is_left_behind_whatever_happens():
    model = tiny_model("llava")
    before, was = dict(model.__dict__), inspect.signature(model.forward)
    batch = batch_of("llava", model)
    with pytest.raises(KeyError), label_only(model):
        assert inspect.signature(model.forward) == was
        with label_only(model):  # within itself: one stand-in
            model(**batch)
        assert "forward" in model.__dict__
        with pytest.raises(ValueError):
            model(**batch | {"labels": batch["labels"][:, :-1]})
        model(**{k: v for k, v in batch.items() if k != "labels"}).logits.sum()  # an error woke nobody
        raise KeyError
    assert model.__dict__.keys() == before.keys() and "forward" not in model.lm_head.__dict__


def test_a_copy_made_inside_is_a_model_of_its_own():
    model = tiny_model("minicpmv-2.6")
    batch = batch_of("minicpmv-2.6", model)
    with label_only(model):
        twin = copy.deepcopy(model)
        for p in twin.parameters():
            p.data.mul_(0.5)
        loss = model(**batch).loss
        assert abs(twin(**batch).loss - loss) > 1e-3
    assert twin.llm.lm_head.forward.module is twin.llm.lm_head
    torch.testing.assert_close(model(**batch).loss, loss, rtol=1e-6, atol=0)


def test_a_promise_says_what_was_wanted_of_it():
    promise = Promise(torch.zeros(1, 4, 8), nn.Linear(8, 30))
    assert promise.shape == (1, 4, 30) and not hasattr(promise, "dtype")
    with pytest.raises(NotComputed, match="argmax.*without labels"):
        promise.argmax(-1)


@pytest.fixture
def lab():
    torch.manual_seed(0)
    model, tokenizer = apply_plan(load_vlm("lab").float(), TuningPlan()), load_tokenizer("lab")
    rows = read_conversations(samples_folder() / "handwriting" / "train.json")
    return model, Samples(rows[:24], Processor.of(model.config, tokenizer))


class Plain(PartTrainer):
    "What it is compared with."

    train = PartTrainer.__mro__[1].train


def test_fit_never_makes_logits_and_trains_as_before(lab, tmp_path, monkeypatch):
    model, samples = lab
    rows = []
    model.get_base_model().llm.lm_head.register_forward_hook(
        lambda m, a, out: rows.append(len(out) if isinstance(out, torch.Tensor) else None)
    )
    schedule = Schedule(max_steps=3, batch_size=4, accumulation=2, learning_rate=1e-3)
    held = Samples(samples.conversations[:8], samples.processor)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    found = fit(model, samples, schedule, tmp_path / "a", evaluation=held, log_every=1, save=False)
    assert {type(r) for r in rows} == {type(None), int}
    labels = max(
        sum((torch.tensor(samples[i]["labels"]) != -100).sum().item() for i in chosen)
        for chosen in torch.arange(24).split(4)
    )
    assert max(r for r in rows if r) <= labels * 2 and any("eval_loss" in h for h in found.history)
    for n, p in model.named_parameters():
        if n in weights:
            p.data.copy_(weights[n])
    monkeypatch.setattr("vlm_lora_lab.train.run.PartTrainer", Plain)
    del rows[:]
    plain = fit(model, samples, schedule, tmp_path / "b", log_every=1, save=False)
    assert None not in rows  # with all logits
    torch.testing.assert_close(found.losses, plain.losses, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        [h["grad_norm"] for h in found.history if "loss" in h],
        [h["grad_norm"] for h in plain.history if "loss" in h],
        rtol=1e-4,
        atol=0,
    )


def test_an_evaluation_that_wants_logits_is_refused(lab, tmp_path):
    model, samples = lab
    args = TrainingArguments(
        tmp_path, use_cpu=True, report_to="none", label_names=["labels"], remove_unused_columns=False
    )
    trainer = PartTrainer(model=model, args=args, data_collator=Collator(0), full_rate=1e-3)
    with pytest.raises(InputError, match="prediction_loss_only"):
        trainer.evaluate(samples)


def test_the_doctor_names_what_the_head_did(lab, tmp_path):
    "A head whose logits are infinite: found in the head, through the pieces."
    model, samples = lab
    model.get_base_model().llm.lm_head.weight.data[7] = torch.inf
    with pytest.raises(NonFiniteStep) as caught:
        fit(
            model,
            samples,
            Schedule(max_steps=2, batch_size=2),
            tmp_path,
            save=False,
            callbacks=[NanDoctor(folder=tmp_path / "nan", say=lambda line: None)],
        )
    assert caught.value.diagnosis.cause == "corrupt weights" and (caught.value.folder / "replay.py").is_file()
    assert "forward" not in model.get_base_model().llm.__dict__
