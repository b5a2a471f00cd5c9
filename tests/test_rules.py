"""Plans with rules for some layers of a part, over many random plans and six families."""

import random
import re

import pytest
import torch
from families import batch_of, tiny_config, tiny_model
from peft.optimizers import create_loraplus_optimizer
from transformers import TrainingArguments

from vlm_lora_lab.checkpoint.save import load_adapter, save_adapter
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.lora.variants import VARIANTS
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.models.names import plain_name
from vlm_lora_lab.models.parts import PARTS, VLM, count, layout_of, linear_layers
from vlm_lora_lab.models.published import on_meta
from vlm_lora_lab.plan.tuning import (
    Rule,
    TuningPlan,
    apply_plan,
    full_modules,
    layer_pattern,
    lora_layers,
    read_rules,
)
from vlm_lora_lab.plan.preview import Preview
from vlm_lora_lab.train.run import PartTrainer

SIX = ["minicpmv-2.0", "minicpmv-2.6", "minicpmv-4.5", "qwen", "qwen2_vl", "idefics3"]


@pytest.mark.parametrize(
    "text",
    [
        "freeze",
        "full",
        "lora",
        "lora(rank=8, lr=0.001)",
        "lora(rank=8) on 0-15, full(lr=1e-05) on 16-23",
        "lora(targets=q_proj+v_proj) on *.self_attn.*",
        "full, freeze on 3",
        "lora(rank=4, alpha=9.0) on mlp",
    ],
)
def test_rules_are_read_as_they_are_written(text):
    assert ", ".join(map(str, read_rules(text))) == text


@pytest.mark.parametrize(
    "text, message",
    [
        ("both", "'both' is not a way"),
        ("", "is not a way"),
        ("lora(rank=eight)", "rank is 'eight'"),
        ("lora(rnk=8)", "may stand: rank"),
        ("full(rank=8)", "may stand: lr"),
        ("freeze(lr=1)", "may stand: nothing"),
        ("lora(rank=-1)", "not above 0"),
        ("lora on 0-3 and 5", "is not a way"),
        ("lora(rank=8", "is not a way"),
    ],
)
def test_mistakes_in_rules(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        TuningPlan(language=text)


def test_a_rule_that_means_nothing_says_what_there_is():
    with pytest.raises(InputError, match="There are layers 0-1, with q_proj"):
        lora_layers(tiny_model("minicpmv-2.6"), TuningPlan(language="lora on 7-9"))
    with pytest.raises(InputError, match="nothing in the part 'language'.*is left for 'full on 7-9'"):
        full_modules(tiny_model("minicpmv-2.6"), TuningPlan(language="lora, full on 7-9"))
    with pytest.raises(InputError, match="mlpp"):
        lora_layers(tiny_model("minicpmv-2.6"), TuningPlan(language="lora on mlpp"))


def test_patterns_hit_what_is_meant_and_nothing_else():
    names = [f"m.layers.{i}.{k}" for i in range(30) for k in ("q_proj", "kv_proj", "v_proj")] + [
        "m.v_proj",
        "x.layers.3.v_proj",
    ]
    generator = random.Random(0)
    for _ in range(300):
        some = generator.sample(names, generator.randint(1, len(names)))
        assert {n for n in names if re.fullmatch(layer_pattern(some, names), n)} == set(some)


def random_line(part, layers, generator, packed=()):
    """One to three rules, now and then for layers by number or by name, or with targets, among them a packed
    `in_proj_weight`."""
    numbers = sorted({int(m[1]) for n in layers if (m := re.search(r"\.(\d+)\.", n))})
    rules = []
    for i in range(generator.choice([1, 1, 1, 2, 3])):
        word = generator.choice(["freeze", "lora", "lora", "full"])
        on = None
        if i or generator.random() < 0.3:
            on = str(generator.choice(numbers)) if numbers and generator.random() < 0.5 else None
            if on is None and layers:
                on = generator.choice([n.rpartition(".")[2] for n in layers])
        lora = dict(rank=generator.choice([None, 2, 5]), lr=generator.choice([None, 3e-3])) if word == "lora" else {}
        if lora and packed and generator.random() < 0.6:
            ends = sorted({n.rpartition(".")[2] for n in layers})
            lora["targets"] = ("in_proj_weight", *generator.sample(ends, generator.randint(0, len(ends))))
        rules.append(Rule(word, on, **lora))
    return ", ".join(map(str, rules))


def random_plan(model, generator):
    layers, packed = linear_layers(model), VLM.of(model).packed
    return TuningPlan(
        **{part: random_line(part, layers[part], generator, packed[part]) for part in PARTS},
        rank=generator.choice([2, 4]),
        variant=generator.choice(["lora", "lora", "rslora"]),
    )


def step(model, batch, plan):
    "Two optimizer steps; which parameters moved, and which were promised."
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):  # LoRA's first matrix only moves once the second has left zero
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


@pytest.mark.parametrize("plans", [50, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", SIX)
def test_random_plans(family, plans):
    """What is applied is what was previewed and written; every tenth also trains, and exactly the promised tensors
    move."""
    generator = random.Random(family)
    applied = refused = trained = reached = 0
    template = tiny_model(family)
    state, empty = template.state_dict(), on_meta(tiny_config(family))
    while applied < plans:
        try:
            plan = random_plan(template, generator)
            seen = Preview.of(empty, plan)
        except InputError as e:
            assert e.found and e.remedy
            refused += 1
            assert refused < 2000
            continue
        model = type(template)(tiny_config(family)).float()
        model.load_state_dict(state)
        model = apply_plan(model.train(), plan)
        applied += 1
        reached += bool(getattr(model, "peft_config", None) and model.peft_config["default"].target_parameters)
        part_of = layout_of(model).part_of
        assert {r[0]: r[3] for r in seen.rows} == count(model, trainable=True), plan
        for name, p in model.named_parameters():
            word = plan.rule(part_of(name), plain_name(name)).word
            expected = ".lora_" in name if word == "lora" else word == "full" and ".original_module." not in name
            assert p.requires_grad == expected, (plan, name)
        if applied % 10 == 0:
            promised = {n for n, p in model.named_parameters() if p.requires_grad}
            moved = step(model, batch_of(family, model), plan)
            # LoRA on tokens that the batch does not hold
            unseen = {n for n in promised - moved if "embed" in n or "wte" in n}
            assert moved <= promised and promised - moved == unseen, (plan, promised ^ moved)
            trained += 1
    assert trained == plans // 10 and (reached >= plans // 20) == any(VLM.of(template).packed.values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("four_bit", [False, True], ids=["whole", "nf4"])
def test_variants_train_and_come_back(variant, four_bit, tmp_path):
    plan = TuningPlan(
        variant=variant, language="lora(rank=8) on 0-2, lora(rank=4) on 3-4", connector="full", rank=8, alpha=16
    )
    if variant == "pissa" and four_bit:
        with pytest.raises(InputError, match="PiSSA"):
            apply_plan(load_vlm("lab", four_bit=True), plan)
        return
    torch.manual_seed(0)
    model = apply_plan(load_vlm("lab", four_bit=four_bit), plan)
    assert {m.r["default"] for n, m in model.named_modules() if hasattr(m, "lora_A")} == {4, 8}
    assert {m.scaling["default"] for n, m in model.named_modules() if hasattr(m, "lora_A")} == (
        {16 / 8**0.5, 8 / 4**0.5} if variant in ("rslora", "rsdora") else {2.0}
    )
    ids = torch.randint(20, 400, (2, 30))
    step(model.train(), dict(input_ids=ids, labels=ids), plan)
    folder = save_adapter(model, tmp_path / "adapter", plan, "lab", load_tokenizer("lab"), four_bit)
    with torch.no_grad():
        torch.testing.assert_close(
            load_adapter(folder)(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_some_layers_in_full_beside_others_in_4_bit(tmp_path):
    plan = TuningPlan(language="lora on 0-2, full(lr=1e-4) on 3-4")
    with pytest.raises(InputError, match="layers.3.*is in 4 bit and should be trained in full"):
        apply_plan(load_vlm("lab", four_bit=True), plan)
    whole = full_modules(on_meta("lab"), plan)
    model = apply_plan(load_vlm("lab", four_bit=True, whole=whole), plan).train()
    ids = torch.randint(20, 400, (2, 30))
    moved = step(model, dict(input_ids=ids, labels=ids), plan)
    assert {int(re.search(r"layers\.(\d)", n)[1]) for n in moved if "llm" in n} == {0, 1, 2, 3, 4}
    folder = save_adapter(model, tmp_path / "adapter", plan, "lab", load_tokenizer("lab"), True)
    with torch.no_grad():
        assert torch.equal(load_adapter(folder)(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_learning_rates_reach_the_optimizer(tmp_path):
    plan = TuningPlan(vision="lora(lr=7e-5)", connector="full(lr=5e-4)", language="lora, full on 4", lora_plus=16)
    model = apply_plan(load_vlm("lab"), plan)
    trainer = PartTrainer(
        model=model,
        args=TrainingArguments(tmp_path, learning_rate=1e-3, use_cpu=True, report_to="none"),
        full_rate=1e-4,
        plan=plan,
    )
    found, names = {}, {id(p): n for n, p in model.named_parameters()}
    for group in trainer.create_optimizer().param_groups:
        for p in group["params"]:
            name = names[id(p)]
            kind = next((k for k in ("A", "B") if f".lora_{k}." in name), "full")
            found.setdefault((layout_of(model).part_of(name), kind), set()).add(group["lr"])
    assert found == {
        ("vision", "A"): {7e-5},
        ("vision", "B"): {16 * 7e-5},
        ("connector", "full"): {5e-4},
        ("language", "A"): {1e-3},
        ("language", "B"): {16e-3},
        ("language", "full"): {1e-4},
    }
    assert sum(len(g["params"]) for g in trainer.optimizer.param_groups) == sum(
        p.requires_grad for p in model.parameters()
    )


def test_lora_plus_is_pefts():
    plan = TuningPlan(connector="freeze", lora_plus=16)
    model = apply_plan(load_vlm("lab"), plan)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): g["lr"] for g in theirs.param_groups for p in g["params"]}
    part_of = layout_of(model).part_of
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(plan.rate(part_of(n), n, 1e-3, 1e-4) == rates[id(p)] for n, p in trained.items())
