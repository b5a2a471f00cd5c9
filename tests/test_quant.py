"""NF4 against bitsandbytes, what goes into 4 bit and what does not, and the numbers that each card computes in."""

import math

import bitsandbytes as bnb
import pytest
import torch
from families import FAMILIES, batch_of, tiny_config, tiny_model
from peft import prepare_model_for_kbit_training
from torch import nn
from transformers import BitsAndBytesConfig

from vlm_lora_lab.data.batch import Processor, Samples
from vlm_lora_lab.data.drawn import Drawn
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import check_nf4, lab_folder, load_tokenizer, load_vlm, nf4_config, packable
from vlm_lora_lab.models.minicpmv import MiniCPMV
from vlm_lora_lab.models.parts import layout_of, linear_layers
from vlm_lora_lab.models.precision import GENERATIONS, precision_for, precision_of
from vlm_lora_lab.models.published import PUBLISHED, on_meta
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.plan.preview import Preview
from vlm_lora_lab.quant.nf4 import NF4, bits_per_weight, dynamic_levels, nf4_levels
from vlm_lora_lab.quant.policy import (
    BARE,
    IN_FULL,
    PAINT,
    Packing,
    Weights,
    four_bit_bytes,
    plan_bytes,
    plan_picture,
    read_bare,
    upcast_bytes,
)
from vlm_lora_lab.train.run import Schedule, fit

F = bnb.functional
KINDS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((64, 64), (130, 70), (7, 9), (3, 1), (256, 513), (1,), (65,))


def quantised(w, double):
    return F.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=double)


# --- NF4 ---


def test_levels_are_those_of_bitsandbytes():
    assert torch.equal(nf4_levels(), F.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(dynamic_levels(), F.create_dynamic_map())


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_scales_and_weights_are_those_of_bitsandbytes(shape, dtype):
    w = (torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape))) * 0.02).to(dtype)
    mine, (theirs, state) = NF4.of(w, double=False), quantised(w, False)
    assert torch.equal(mine.packed, theirs.view(-1)) and torch.equal(mine.scales, state.absmax)
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes would compile its path for odd shapes, for 20 seconds
        assert torch.equal(mine.dequantize().to(dtype), F.dequantize_4bit(theirs, state))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_double_quantisation_is_read_as_bitsandbytes_reads_it(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    theirs, state = quantised(w, True)
    same = NF4(theirs.view(-1), state.absmax, w.shape, 64, state.state2.absmax, state.offset)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(same.dequantize(), F.dequantize_4bit(theirs, state))


def test_double_quantisation_is_written_as_bitsandbytes_writes_it_but_where_two_levels_are_as_good():
    w = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(2))
    mine, (theirs, state) = NF4.of(w), quantised(w, True)
    assert (
        torch.equal(mine.packed, theirs.view(-1))
        and torch.equal(mine.outer, state.state2.absmax)
        and torch.equal(mine.mean, state.offset)
    )
    differ = mine.scales != state.absmax
    value = (NF4.of(w, double=False).scales - mine.mean) / mine.outer.repeat_interleave(256)
    off = [(value - dynamic_levels()[codes.long()]).abs() for codes in (mine.scales, state.absmax)]
    assert differ.float().mean() < 5e-3 and (off[1] - off[0])[differ].min() > -1e-6 and (off[1] - off[0]).max() < 5e-5
    apart = (
        dynamic_levels()[mine.scales.long()] - dynamic_levels()[state.absmax.long()]
    ).abs().max() * mine.outer.max()
    assert (mine.dequantize() - F.dequantize_4bit(theirs, state)).abs().max() <= 1.001 * apart


def test_what_is_already_on_the_levels_does_not_move():
    once = NF4.of(torch.randn(64, 64), double=False)
    again = NF4.of(once.dequantize(), double=False)
    assert torch.equal(once.packed, again.packed) and torch.equal(once.dequantize(), again.dequantize())


def test_zeros_come_back_as_zeros():
    w = torch.randn(4, 64)
    w[1], w[2, ::2] = 0, 0
    back = NF4.of(w, double=False).dequantize()
    assert (back[1] == 0).all() and (back[2, ::2] == 0).all() and back[0].any()


@pytest.mark.parametrize(
    "bad",
    [torch.tensor([1.0, math.nan]), torch.tensor([math.inf]), torch.arange(4), torch.empty(0)],
    ids=["nan", "inf", "integers", "empty"],
)
def test_what_cannot_be_quantised_is_refused(bad):
    with pytest.raises(InputError, match="finite"):
        NF4.of(bad)


def test_bits_per_weight_are_what_memory_shows():
    assert round(bits_per_weight(), 4) == 4.127
    for block, double in ((64, True), (64, False), (128, True)):
        assert NF4.of(torch.randn(1024, 1024), block, double).nbytes * 8 / 2**20 == pytest.approx(
            bits_per_weight(block, double), abs=1e-3
        )


@pytest.mark.parametrize("shape", [(64, 64), (128, 80), (33, 7), (1000, 130), (2, 1)], ids=str)
def test_bytes_of_a_layer_are_those_that_bitsandbytes_keeps(shape):
    p = bnb.nn.Params4bit(torch.randn(shape), quant_type="nf4", compress_statistics=True).to("cpu")
    state = p.quant_state
    assert four_bit_bytes(math.prod(shape)) == sum(
        t.numel() * t.element_size() for t in (p, state.absmax, state.offset, state.code, state.state2.absmax)
    )


# --- what goes into 4 bit ---


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_packs_its_decoder_and_reads_no_weight_behind_a_layers_back(family):
    model = tiny_model(family)
    packing, layout = Packing.of(model, TuningPlan()), layout_of(model)
    assert packing.take and {layout.part_of(n) for n in packing.take} == {"language"}
    assert set(packing.take) | set(packing.keep) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {n for n, why in packing.keep.items() if why == IN_FULL} == {
        n for n in packing.keep if layout.part_of(n) == "connector"
    }
    assert set(read_bare(model, batch_of(family, model))) & set(packing.take) == set()


def test_a_weight_that_is_read_behind_a_layers_back_is_found_and_kept_whole():
    model = on_meta("lab")
    attention = nn.MultiheadAttention(8, 2, device="meta")
    # a plain one, as in MiniCPM-V's own code; bitsandbytes would take it
    attention.out_proj = nn.Linear(8, 8, device="meta")
    model.llm.model.layers[0].extra = attention
    name = "llm.model.layers.0.extra.out_proj"
    assert Packing.of(model, TuningPlan()).keep[name] == BARE
    assert f"{name}$".replace(".", "\\.") in nf4_config(model, torch.float32).llm_int8_skip_modules


@pytest.mark.parametrize("family", ["minicpmv-2.6", "qwen", "qwen2_5_vl", "idefics3", "gemma3"])
def test_what_is_loaded_takes_the_bytes_that_were_predicted(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    empty, plan = on_meta(tiny_config(family)), TuningPlan()
    packing = Packing.of(empty, plan)
    model = load_vlm(tmp_path, four_bit=True, dtype=torch.bfloat16, whole=packing.whole)
    measured = Weights.of(model)
    assert measured.rows == Weights.predicted(empty, torch.bfloat16, packing.take).rows
    assert {n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)} == set(packing.take)
    before = measured.nbytes
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert Weights.of(model).nbytes - before == upcast_bytes(empty, packing.take) > 0


def test_a_plan_with_layers_in_full_trains_them_in_a_4_bit_model():
    plan = TuningPlan(language="lora(rank=4) on 0-2, full on 3-4")
    packing = Packing.of(on_meta("lab"), plan)
    model = apply_plan(load_vlm("lab", four_bit=True, whole=packing.whole), plan)
    assert not any(".layers.3." in n or ".layers.4." in n for n in packing.take)
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == len(packing.take) == 21


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (dict(language="full", vision="lora"), "nothing is left"),
        (dict(language="freeze"), "no part gets LoRA"),
        (dict(variant="pissa"), "PiSSA"),
        (dict(language="full"), "no part gets LoRA"),
    ],
)
def test_contradictions_are_said_before_loading(plan, message):
    with pytest.raises(InputError, match=message):
        Packing.of(on_meta("openbmb/MiniCPM-V-2_6"), TuningPlan(**plan))


def test_pissa_on_layers_that_stay_whole_is_no_contradiction():
    assert Packing.of(on_meta("lab"), TuningPlan(vision="lora", language="freeze", variant="pissa")).take


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (["visual"], "no module 'visual'"),
        (["layers"], "such as llm.model.layers"),
        (["llm.model.layers"], "nothing is left"),
    ],
)
def test_a_name_that_keeps_nothing_whole_is_an_error(whole, message):
    with pytest.raises(InputError, match=message):
        load_vlm("lab", four_bit=True, whole=whole)


def test_a_layer_that_the_file_holds_in_4_bit_cannot_be_asked_for_whole(tmp_path):
    load_vlm("lab", four_bit=True).save_pretrained(tmp_path)
    assert check_nf4(load_vlm(tmp_path))
    with pytest.raises(InputError, match="stored in 4 bit and should be whole"):
        load_vlm(tmp_path, whole=["llm.model.layers.4"])


def test_the_loaded_layers_are_looked_at():
    skip = nf4_config(on_meta("lab"), torch.bfloat16).llm_int8_skip_modules
    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip)

    def load(**k):
        return MiniCPMV.from_pretrained(
            lab_folder(), dtype=torch.bfloat16, quantization_config=BitsAndBytesConfig(**nf4 | k)
        )

    double = dict(bnb_4bit_use_double_quant=True)
    assert check_nf4(load(**double, bnb_4bit_compute_dtype=torch.bfloat16), compute=torch.bfloat16)
    for options, message in (
        (double, "multiplied in torch.float32"),
        (dict(), "not NF4 with double"),
        (double | dict(bnb_4bit_quant_type="fp4"), "not NF4"),
        (double | dict(llm_int8_skip_modules=["visual"]), "should not be"),
        (dict(load_in_4bit=False, load_in_8bit=True), "not NF4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            check_nf4(load(**options), compute=torch.bfloat16)


@pytest.mark.parametrize(
    "name", [n for n in PUBLISHED if n in ("openbmb/MiniCPM-V-2_6", "Qwen/Qwen-VL", "google/gemma-3-4b-it")]
)
def test_published_shapes_are_weighed_without_their_weights(name):
    model = on_meta(name)
    take = packable(model)
    assert set(take) == set(linear_layers(model)["language"])
    four, half = Weights.predicted(model, torch.bfloat16, tuple(take)), Weights.predicted(model, torch.bfloat16)
    packed = sum(r[2] for r in four.rows if r[1] == "nf4")
    assert four.of_kind("nf4") * 8 / packed == pytest.approx(bits_per_weight(), abs=1e-3)
    assert sum(r[2] for r in four.rows) == sum(r[2] for r in half.rows) == half.nbytes // 2


# --- which numbers on which card ---


@pytest.mark.parametrize(
    ("capability", "card", "half", "scaler", "kernel"),
    [
        ((7, 0), "V100", torch.float16, True, "memory-efficient"),
        ((7, 5), "T4", torch.float16, True, "memory-efficient"),
        ((8, 0), "A100", torch.bfloat16, False, "flash"),
        ((8, 6), "RTX 3090", torch.bfloat16, False, "flash"),
        ((8, 9), "RTX 4090", torch.bfloat16, False, "flash"),
        ((8, 9), "L4", torch.bfloat16, False, "flash"),
        ((9, 0), "H100", torch.bfloat16, False, "flash"),
        ((9, 0), "H200", torch.bfloat16, False, "flash"),
        ((12, 0), "RTX 5090", torch.bfloat16, False, "flash"),
    ],
)
def test_every_row(capability, card, half, scaler, kernel):
    p = precision_for(capability)
    assert precision_for(card) == p and (p.stored, p.autocast, p.scaler, p.attention, p.trained) == (
        half,
        half,
        scaler,
        kernel,
        torch.float32,
    )


def test_the_cpu_computes_as_before():
    for on in ("cpu", torch.device("cpu"), "CPU"):
        p = precision_for(on)
        assert (p.stored, p.autocast, p.scaler, p.trained) == (torch.float32, None, False, torch.float32)
    assert load_vlm("lab").dtype == torch.float32


@pytest.mark.parametrize(
    ("capability", "bf16", "half"),
    [
        ((7, 5), False, torch.float16),
        ((8, 0), True, torch.bfloat16),
        ((9, 0), True, torch.bfloat16),
        ((9, 0), False, torch.float16),
    ],
)
def test_a_device_is_asked_and_pytorchs_word_counts(monkeypatch, capability, bf16, half):
    from contextlib import nullcontext

    def supported(including_emulation=True):
        return including_emulation or bf16  # a T4 says yes unless emulation is left out

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    assert precision_for("cuda:0").stored == half


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-80GB",
        "NVIDIA A100 80GB PCIe",
        "Tesla T4",
        "NVIDIA L4",
        "NVIDIA GeForce RTX 3090 Ti",
        "RTX 4070 Ti SUPER",
        "NVIDIA H200",
        "4090",
    ],
)
def test_names_as_drivers_write_them(name):
    assert precision_for(name).autocast == (torch.float16 if "T4" in name else torch.bfloat16)


@pytest.mark.parametrize("name", ["Voodoo", "", "T44", "RTX", "A1000000"])
def test_a_card_that_is_not_known_is_not_guessed(name):
    with pytest.raises(InputError, match="not in the table"):
        precision_for(name)


def test_cards_older_than_the_table_are_refused_and_rows_are_in_order():
    with pytest.raises(InputError, match="begin at"):
        precision_for((5, 2))
    since = [g.since for g in GENERATIONS[1:]]
    assert since == sorted(since) and all(g.source for g in GENERATIONS)


def test_the_weights_of_a_model_decide():
    half = nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2))
    assert precision_of(half).autocast == torch.float16 and precision_of(half).scaler
    assert precision_of(nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2).bfloat16())).autocast == torch.bfloat16
    assert precision_of(nn.Linear(2, 2)).autocast is None


def samples():
    model, tokenizer = load_vlm("lab"), load_tokenizer("lab")
    return Samples([Drawn(0, 16)[i] for i in range(16)], Processor.of(model.config, tokenizer))


def test_training_a_model_in_bfloat16_on_a_cpu_keeps_what_is_trained_in_32_bit(tmp_path):
    model = apply_plan(load_vlm("lab", four_bit=True, dtype=torch.bfloat16), TuningPlan(rank=4, alpha=8))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = fit(
        model, samples(), Schedule(max_steps=2, batch_size=4, learning_rate=1e-3), tmp_path, log_every=1, save=False
    )
    assert all(math.isfinite(v) for v in run.losses)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(
        model.get_parameter(n).dtype == torch.float32 and model.get_parameter(n).requires_grad for n in moved
    )


def test_training_in_float16_on_a_cpu_is_refused(tmp_path):
    model = apply_plan(load_vlm("lab", dtype=torch.float16), TuningPlan(rank=4, alpha=8))
    with pytest.raises(InputError, match="float16, and training in it needs a GPU"):
        fit(model, samples(), Schedule(max_steps=1, batch_size=2), tmp_path, save=False)


@pytest.mark.parametrize("card", ["T4", "A100", "CPU"])
def test_a_step_of_q_lora_as_each_row_says_is_finite_and_an_overflow_is_left_out(card):
    p = precision_for(card)
    model = apply_plan(load_vlm("lab", four_bit=True, dtype=p.stored), TuningPlan(rank=4, alpha=8)).train()
    check_nf4(
        model.base_model.model,
        compute=p.stored,
        meant=[n for n, m in model.base_model.model.named_modules() if isinstance(m, bnb.nn.Linear4bit)],
    )
    trained = [q for q in model.parameters() if q.requires_grad]
    assert {q.dtype for q in trained} == {torch.float32}
    optimizer, scaler = (
        torch.optim.AdamW(trained, lr=1e-3),
        torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=p.scaler),
    )
    batch = {"input_ids": torch.arange(20, 40)[None], "labels": torch.arange(20, 40)[None]}

    def step(factor):
        before = [q.detach().clone() for q in trained]
        with p.context("cpu"):
            loss = model(**batch).loss
        scaler.scale(loss * factor).backward()
        scaler.unscale_(optimizer)
        finite = all(q.grad.isfinite().all() for q in trained if q.grad is not None)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return finite, any(not torch.equal(a, q) for a, q in zip(before, trained))

    assert step(1) == (True, True)
    if p.scaler:
        scale = scaler.get_scale()
        assert step(math.inf) == (False, False) and scaler.get_scale() == scale / 2
        assert step(1) == (True, True)


# --- the picture of a plan ---

PLANS = (
    TuningPlan(),
    TuningPlan(vision="lora", connector="lora", rank=4, variant="dora"),
    TuningPlan(embeddings="full", head="lora", language="lora on 0-1, full on 2"),
)


@pytest.mark.parametrize("plan", PLANS, ids=lambda p: f"{p.vision} {p.connector} {p.language}")
def test_a_plan_s_picture_shows_the_bytes_that_weights_and_preview_count(plan):
    import matplotlib.pyplot as plt

    model, whole = on_meta("lab"), sum(p.numel() for p in on_meta("lab").parameters())
    sizes = plan_bytes(model, plan)
    total = {kind: sum(size[kind] for size in sizes.values()) for kind in PAINT}
    weights = Weights.predicted(model, torch.bfloat16, Packing.of(model, plan).take)
    assert (total["frozen, 16 bit"], total["frozen, 4 bit"]) == (weights.of_kind("bfloat16"), weights.of_kind("nf4"))
    assert total["lora"] + total["full"] == Preview.of(model, plan).training_bytes and total["lora"] > 0
    unpacked = plan_bytes(model, plan, four_bit=False)
    assert sum(size["frozen, 16 bit"] for size in unpacked.values()) == 2 * whole
    figure = plan_picture(model, plan, "lab")
    drawn = sum(bar.get_width() for bar in figure.axes[0].patches if bar.get_fill()) * 2**30
    assert drawn == pytest.approx(sum(total.values()), rel=1e-6)
    words = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert words == [f"{part}\n{word}" for part, word in plan.words.items()]
    plt.close(figure)
