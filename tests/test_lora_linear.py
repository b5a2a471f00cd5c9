"""LoRA from scratch, held to PEFT's: the same bits in float32, and a close look at every other case."""

import copy
import math

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from vlm_lora_lab.errors import InputError
from vlm_lora_lab.lora.linear import LoRALinear, adapter_state, add_lora, load_adapter_state
from vlm_lora_lab.models.load import load_vlm
from vlm_lora_lab.models.parts import linear_layers
from vlm_lora_lab.models.published import on_meta

WIDE, OUT = 64, 96


def one_layer(kind, bias):
    "A model of one linear layer named `fc`."
    torch.manual_seed(3)
    fc = nn.Linear(WIDE, OUT, bias=bias)
    if kind == "bfloat16":
        fc = fc.bfloat16()
    if kind == "nf4":
        four = bnb.nn.Linear4bit(
            WIDE, OUT, bias=bias, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True
        )
        four.load_state_dict(fc.state_dict())
        fc = four.to("cpu")
        assert fc.weight.dtype == torch.uint8 and fc.weight.quant_state is not None
        fc.support_avx512bf16_for_cpu = False
    return nn.Sequential().append(nn.Identity()).append(fc)


def twins(kind="float32", bias=True, rank=4, alpha=12, dropout=0.0, stabilized=False):
    "The same layer under our LoRA and under PEFT's, from the same seed."
    base = one_layer(kind, bias)
    base.is_loaded_in_4bit = kind == "nf4"
    torch.manual_seed(0)
    ours = add_lora(copy.deepcopy(base), ["1"], rank, alpha, dropout, stabilized)
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, use_rslora=stabilized, target_modules=["1"])
    theirs = get_peft_model(base, config)
    return ours, theirs, theirs.base_model.model[1]


def same_adapters(ours, theirs):
    mine, truth = adapter_state(ours), get_peft_model_state_dict(theirs)
    assert set(mine) == set(truth)
    return all(torch.equal(mine[n], truth[n]) for n in truth)


def train(model, steps, dropout_seed=7):
    torch.manual_seed(dropout_seed)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for _ in range(steps):
        x, goal = torch.randn(2, 10, WIDE, generator=generator), torch.randn(2, 10, OUT, generator=generator)
        y = model.train()(x)
        loss = (y - goal).square().mean()
        loss.backward()
        seen += [y.detach(), loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["float32", "nf4"])
def test_start_answers_gradients_and_weights_are_peft_s_bits(kind, bias, dropout, stabilized):
    ours, theirs, layer = twins(kind, bias, dropout=dropout, stabilized=stabilized)
    assert type(layer).__name__ == ("Linear4bit" if kind == "nf4" else "Linear") and hasattr(layer, "lora_A")
    assert same_adapters(ours, theirs), "the start"
    assert ours[1].scale == layer.scaling["default"]
    mine, truth = train(ours, 4), train(theirs, 4)
    assert len(mine) == len(truth) == 4 * (2 + 2)
    assert all(torch.equal(a, b) for a, b in zip(mine, truth))
    assert same_adapters(ours, theirs) and ours[1].up.weight.abs().max() > 0
    x = torch.randn(5, WIDE)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_merged_and_unmerged_weights_are_peft_s_bits(kind, bias):
    ours, theirs, layer = twins(kind, bias)
    with torch.no_grad():
        ours[1].up.weight.normal_()
    assert not set_peft_model_state_dict(theirs, adapter_state(ours)).unexpected_keys
    dtype, origin = ours[1].base.weight.dtype, ours[1].base.weight.clone()
    ours[1].merge()
    theirs.merge_adapter()
    assert ours[1].base.weight.dtype == dtype and not torch.equal(ours[1].base.weight, origin)
    assert torch.equal(ours[1].base.weight, layer.base_layer.weight)
    x = torch.randn(5, WIDE, dtype=dtype)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    ours[1].unmerge()
    theirs.unmerge_adapter()
    if kind == "float32":
        assert torch.equal(ours[1].base.weight, layer.base_layer.weight)
    # PEFT rounds what it subtracts to 16 bit first, we round the difference alone; both stay near the original
    step = 2 ** (-23 if kind == "float32" else -8)
    torch.testing.assert_close(ours[1].base.weight, origin, rtol=0, atol=4 * step * ours[1].delta.abs().max().item())


def test_over_a_whole_16_bit_base_the_answers_are_peft_s_bits_and_lora_stays_in_32():
    ours, theirs, _ = twins("bfloat16")
    with torch.no_grad():
        ours[1].up.weight.normal_()
    set_peft_model_state_dict(theirs, adapter_state(ours))
    x = torch.randn(40, WIDE, dtype=torch.bfloat16)
    y = ours(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, theirs(x))
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}


def test_under_autocast_the_answers_are_peft_s_bits():
    ours, theirs, _ = twins()
    train(ours, 2)
    set_peft_model_state_dict(theirs, adapter_state(ours))
    x = torch.randn(9, WIDE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = ours.eval()(x), theirs.eval()(x)
    assert y.dtype == z.dtype and torch.equal(y, z)


@pytest.mark.parametrize("four_bit", [False, True])
def test_the_whole_lab_model_trains_to_peft_s_bits(four_bit):
    names = linear_layers(load_vlm("lab"))["language"]
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=names)
    ids = torch.arange(20, 100).view(2, 40)
    losses, models = [], []
    for wrap in (lambda m: add_lora(m, names, 8, 16, 0.1), lambda m: get_peft_model(m, config)):
        torch.manual_seed(0)
        models.append(wrap(load_vlm("lab", four_bit=four_bit)))
        optimizer = torch.optim.AdamW([p for p in models[-1].parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            loss = models[-1].train()(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == losses[3:] and losses[2] < losses[0]
    assert same_adapters(*models)


def test_the_start_changes_nothing_and_the_first_gradient_of_a_is_zero():
    torch.manual_seed(0)
    base = nn.Linear(WIDE, OUT)
    layer, x = LoRALinear(copy.deepcopy(base), 4, 8), torch.randn(7, WIDE)
    assert torch.equal(layer(x), base(x))
    layer(x).square().sum().backward()
    assert (
        not layer.down.weight.grad.any()
        and layer.up.weight.grad.any()
        and layer.base.weight.grad is None
        and layer.base.bias.grad is None
    )
    assert layer.down.weight.abs().max() <= WIDE**-0.5 and layer.down.weight.std() > 0.5 * WIDE**-0.5


@pytest.mark.parametrize("shape", [(WIDE,), (0, WIDE), (3, WIDE), (2, 3, 4, WIDE)])
def test_inputs_of_any_number_of_dimensions(shape):
    layer = LoRALinear(nn.Linear(WIDE, OUT), 4, 8)
    nn.init.normal_(layer.up.weight)
    x = torch.randn(*shape)
    torch.testing.assert_close(
        layer(x), x @ (layer.base.weight + layer.delta).T + layer.base.bias, rtol=1e-4, atol=1e-4
    )


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(5, 4), 2, 3).double()
    nn.init.normal_(layer.up.weight)
    x = torch.randn(3, 5, dtype=torch.double, requires_grad=True)

    def run(x, a, b):
        return torch.func.functional_call(layer, {"down.weight": a, "up.weight": b}, x)

    assert torch.autograd.gradcheck(run, (x, layer.down.weight, layer.up.weight))


def test_the_scale():
    assert (
        LoRALinear(nn.Linear(8, 8), 4, 8).scale == 2
        and LoRALinear(nn.Linear(8, 8), 16, 8, rank_stabilized=True).scale == 2
    )
    assert LoRALinear(nn.Linear(8, 8), 2, 3, rank_stabilized=True).scale == 3 / math.sqrt(2)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(rank=0), "rank is 0"),
        (dict(rank=1.5), "rank is 1.5"),
        (dict(rank=True), "rank is True"),
        (dict(alpha=0), "alpha is 0"),
        (dict(alpha=math.nan), "alpha is nan"),
        (dict(alpha="16"), "alpha is '16'"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(dropout=-0.1), "dropout is -0.1"),
        (dict(base=nn.Conv1d(4, 4, 1)), "Conv1d is no linear layer"),
        (dict(base=nn.MultiheadAttention(8, 2).out_proj), "never calls it"),
        (dict(base=LoRALinear(nn.Linear(8, 8), 2, 2)), "LoRALinear is no linear layer"),
    ],
)
def test_what_cannot_work_is_refused(settings, message):
    with pytest.raises(InputError, match=message) as caught:
        LoRALinear(**dict(base=nn.Linear(8, 8), rank=4, alpha=8) | settings)
    assert caught.value.where and caught.value.remedy


def four_bit_in_16_bit_storage():
    layer = bnb.nn.Linear4bit(
        WIDE, OUT, compute_dtype=torch.float32, quant_type="nf4", quant_storage=torch.bfloat16
    ).to("cpu")
    assert layer.weight.is_floating_point()  # looks like a whole weight
    return layer


def float8():
    layer = nn.Linear(WIDE, OUT)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return layer


@pytest.mark.parametrize("base", [lambda: one_layer("nf4", True)[1], four_bit_in_16_bit_storage, float8])
def test_merging_onto_few_levels_is_refused_and_changes_nothing(base):
    layer = LoRALinear(base(), 4, 8)
    before = layer.base.weight.detach().clone().view(torch.uint8)
    with pytest.raises(InputError, match="Dequantise the base first"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.base.weight.view(torch.uint8), before)


def test_a_sum_that_is_not_finite_is_refused_and_changes_nothing():
    for dtype, value in ((torch.float32, math.nan), (torch.float16, 1e5)):
        layer = LoRALinear(nn.Linear(8, 8).to(dtype), 2, 2)
        before = layer.base.weight.clone()
        nn.init.constant_(layer.up.weight, value)
        nn.init.ones_(layer.down.weight)
        with pytest.raises(InputError, match="NaN or infinity"):
            layer.merge()
        assert not layer.merged and torch.equal(layer.base.weight, before)


def test_merge_and_unmerge_are_asked_for_once_each():
    layer = LoRALinear(nn.Linear(8, 8), 2, 2)
    with pytest.raises(InputError, match="is not merged"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(InputError, match="is merged"):
        layer.merge()
    layer.unmerge()
    assert not layer.merged


def test_a_merged_layer_is_not_trained_in_silence():
    layer, x = LoRALinear(nn.Linear(8, 8), 2, 2), torch.randn(3, 8)
    layer.merge()
    with pytest.raises(InputError, match="unmerge"):
        layer.train()(x)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    layer.unmerge()
    layer.train()(x)


def test_adapters_go_to_peft_and_come_back():
    ours, theirs, _ = twins("float32", True)
    train(ours, 3)
    assert list(adapter_state(ours)) == ["base_model.model.1.lora_A.weight", "base_model.model.1.lora_B.weight"]
    assert not set_peft_model_state_dict(theirs, adapter_state(ours)).unexpected_keys
    back = add_lora(one_layer("float32", True), ["1"], 4, 12)
    load_adapter_state(back, get_peft_model_state_dict(theirs))
    x = torch.randn(5, WIDE)
    assert (
        torch.equal(back(x), ours(x)) and torch.equal(theirs(x), ours(x)) and not torch.equal(ours(x), ours[1].base(x))
    )


def test_an_adapter_of_another_model_is_refused_and_changes_nothing():
    model = add_lora(one_layer("float32", True), ["1"], 4, 8)
    state, before = adapter_state(model), {n: t.clone() for n, t in adapter_state(model).items()}
    a, b = state
    for wrong in (
        {a: state[a] + 1},
        state | {"base_model.model.2.lora_A.weight": state[a]},
        {a: state[a] + 1, b: state[b][:, :2]},
    ):
        with pytest.raises(InputError, match="disagree in 1 tensors"):
            load_adapter_state(model, wrong)
    model[1].merge()
    with pytest.raises(InputError, match="unmerge"):
        load_adapter_state(model, before)
    assert all(torch.equal(t, before[n]) for n, t in adapter_state(model).items())
    with pytest.raises(InputError, match="no LoRA"):
        adapter_state(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "names, message",
    [
        (["2"], "no layer '2'"),
        ([""], "no layer ''"),
        ([], r"names is \[\]"),
        ("1", "names is '1'"),
        (["1", "0"], "Identity is no linear layer"),
    ],
)
def test_add_lora_refuses_names_and_changes_nothing(names, message):
    model = one_layer("float32", True)
    with pytest.raises(InputError, match=message):
        add_lora(model, names, 4, 8)
    assert type(model[1]) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_add_lora_once_and_no_deeper():
    model = add_lora(one_layer("float32", True), ["1", "1"], 4, 8)
    assert type(model[1].base) is nn.Linear
    with pytest.raises(InputError, match="1 has LoRA already"):
        add_lora(model, ["1.base"], 4, 8)


def test_exact_names_never_mean_the_resampler():
    model = load_vlm("lab")
    names = [n for n in linear_layers(model)["language"] if n.endswith(".v_proj")]
    add_lora(model, names, 4, 8)
    assert type(model.resampler.kv_proj) is nn.Linear
    assert {
        n.rpartition(".down")[0] or n.rpartition(".up")[0] for n, p in model.named_parameters() if p.requires_grad
    } == set(names)


def test_the_real_shapes_on_the_meta_device():
    model = on_meta("openbmb/MiniCPM-V-2_6")
    names = [n for n in linear_layers(model)["language"] if ".layers.0." in n]
    add_lora(model, names, 64, 64)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert {p.device.type for p in model.parameters()} == {"meta"} and len(trained) == 2 * len(names) == 14
    assert sum(trained.values()) == 64 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944))
