"""What tensors are called. PEFT and transformers give the names, on several families; by hand stands only what
they once wrote and do not any more."""

import pytest
import torch
from families import tiny_model
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from vlm_lora_lab.models.files import stored_in
from vlm_lora_lab.models.names import PREFIX, StoredNames, TensorName, places_of, plain_name
from vlm_lora_lab.models.parts import layout_of
from vlm_lora_lab.models.published import on_meta

WRAPPED = {
    "LoRA": {"target_modules": ["q_proj", "v_proj"]},
    "DoRA, and the connector in full": {
        "target_modules": ["q_proj"],
        "use_dora": True,
        "modules_to_save": ["connector"],
    },
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "DoRA on embeddings": {"target_modules": ["embed_tokens"], "use_dora": True},
    "a bias of LoRA": {"target_modules": ["q_proj"], "lora_bias": True},
    "head and embeddings in full": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}
FAMILIES = ("minicpmv-2.6", "qwen2_5_vl", "llava")


def wrapped(family, adapter="default", **options):
    model = tiny_model(family)
    if "modules_to_save" in options:
        connector = layout_of(model).connector[0].rpartition(".")[2]
        options["modules_to_save"] = [connector if m == "connector" else m for m in options["modules_to_save"]]
    return model, get_peft_model(model, LoraConfig(r=2, **options), adapter_name=adapter)


@pytest.mark.parametrize("adapter", ["default", "second"])
@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("family", FAMILIES)
def test_names_lead_from_the_wrapped_model_to_the_bare_one_and_to_peft_s_file(family, kind, adapter):
    bare = {n for n, _ in tiny_model(family).named_parameters(remove_duplicate=False)}
    _, model = wrapped(family, adapter, **WRAPPED[kind])
    live = dict(model.named_parameters(remove_duplicate=False))
    said = {n: TensorName.of(n) for n in live}
    assert {t.plain for t in said.values() if not t.lora} == bare
    assert {t.plain for t in said.values() if t.lora} <= bare | {f"{t.module}.bias" for t in said.values() if t.lora}
    keys = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    trained = {n: t for n, t in said.items() if t.lora or t.held == "modules_to_save"}
    assert {t.saved for t in trained.values()} == set(keys) and {t.adapter for t in trained.values()} == {adapter}
    for n, t in trained.items():  # and it is the same tensor
        assert torch.equal(keys[t.saved], live[n]), n
    for key in keys:  # a file has no adapter's name in it, and says the same
        again = TensorName.of(key)
        assert (again.saved, again.adapter) == (key, "")
        assert (again.module, again.tensor, again.lora) in {(t.module, t.tensor, t.lora) for t in trained.values()}


def test_what_peft_copies_and_what_it_leaves_is_told_apart():
    _, model = wrapped("minicpmv-2.6", target_modules=["embed_tokens", "q_proj"], modules_to_save=["connector"])
    said = {n: TensorName.of(n) for n, _ in model.named_parameters()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, t in said.items() if t.lora or t.held == "modules_to_save"} == trained
    frozen = {id(p) for p in model.base_model.model.resampler.original_module.parameters()}
    assert {n for n, t in said.items() if t.original} == {n for n, p in model.named_parameters() if id(p) in frozen}
    beside = {n for n, t in said.items() if t.base_weight}
    assert beside == {n for n in said if n.endswith(".base_layer.weight")}
    written = get_peft_model_state_dict(model, save_embedding_layers=True)  # PEFT's save_pretrained: the embedding, too
    copies = [TensorName.of(k) for k in written if TensorName.of(k).base_weight]
    assert [(c.plain, c.saved) for c in copies] == [
        ("llm.model.embed_tokens.weight", PREFIX + "llm.model.embed_tokens.base_layer.weight")
    ]


def test_two_adapters_are_told_apart():
    _, model = wrapped("minicpmv-2.6", "first", target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=3, target_modules=["v_proj"]))
    for adapter, layer in (("first", "q_proj"), ("second", "v_proj")):
        mine = [t for n, _ in model.named_parameters() if (t := TensorName.of(n)).adapter == adapter]
        assert {t.module.rpartition(".")[2] for t in mine} == {layer}
        assert {t.saved for t in mine} == set(get_peft_model_state_dict(model, adapter_name=adapter))


def test_lora_inside_of_a_module_whose_parameter_has_lora():
    model = get_peft_model(
        tiny_model("minicpmv-2.6"),
        LoraConfig(r=2, target_modules=["kv_proj", "out_proj"], target_parameters=["resampler.attn.in_proj_weight"]),
    )
    said = [TensorName.of(n) for n, _ in model.named_parameters()]
    assert {t.plain for t in said if not t.lora} == {n for n, _ in tiny_model("minicpmv-2.6").named_parameters()}
    assert {t.saved for t in said if t.lora} == set(get_peft_model_state_dict(model))
    deep = [t for t in said if t.around == "resampler.attn" and t.lora]
    assert {t.module for t in deep} == {"resampler.attn.out_proj"} and len(deep) == 2


def test_wrappers_around_the_model_do_not_count():
    _, model = wrapped("minicpmv-2.6", target_modules=["q_proj"], modules_to_save=["resampler"])
    names = [n for n, _ in model.named_parameters()]

    class Parallel(nn.Module):  # names as DistributedDataParallel has them, without its processes
        def __init__(self, module):
            super().__init__()
            self.module = module

    compiled = [n for n, _ in torch.compile(model).named_parameters()]
    assert compiled[0].startswith("_orig_mod.")
    inside = torch.compile(model.base_model.model.resampler)
    model.base_model.model.resampler = inside
    for others in (compiled, [n for n, _ in Parallel(model).named_parameters()], [f".{n}" for n in names]):
        assert [TensorName.of(n) for n in others] == [TensorName.of(n) for n in names]


@pytest.mark.parametrize(
    "old, new",
    [  # as older versions of PEFT, and scripts that save a state dictionary, wrote them
        ("x.lora_magnitude_vector.default", "x.lora_magnitude_vector.default.weight"),
        ("x.lora_magnitude_vector", "x.lora_magnitude_vector.weight"),
        ("module.base_model.model.x.lora_A.default.weight", "x.lora_A.default.weight"),
        (".base_model.model.resampler.modules_to_save.default.query", "resampler.modules_to_save.default.query"),
    ],
)
def test_names_of_older_versions_mean_the_same(old, new):
    assert TensorName.of(old) == TensorName.of(new)


@pytest.mark.parametrize(
    "name, plain",
    [
        ("llm.lm_head", "llm.lm_head"),  # modules, too
        ("lm_head", "lm_head"),
        ("base_model.model.resampler.modules_to_save.default", "resampler"),
        ("base_model.model.resampler.original_module", "resampler"),
        ("base_model.model.x.q_proj.base_layer", "x.q_proj"),
        ("encoder.module.weight", "encoder.module.weight"),  # a model's own word
        ("lora_scale", "lora_scale"),
        ("base_layer.weight", "base_layer.weight"),
    ],
)
def test_modules_and_words_of_the_model_s_own(name, plain):
    assert plain_name(name) == plain


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "llava", "internvl", "minicpmv4_6", "idefics3"])
def test_names_on_disk_are_those_that_transformers_loads(family, tmp_path):
    "Each tensor that it saved lies, by our names, where it loads it; values decide."
    model = tiny_model(family)
    torch.manual_seed(0)
    for p in model.parameters():
        p.data.normal_()
    model.save_pretrained(tmp_path)
    stored, state = stored_in(tmp_path), model.state_dict()
    names = StoredNames(on_meta(tmp_path), stored)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    assert set(names.in_model) == set(stored) and set(names.in_files) >= set(state) - tied
    from safetensors import safe_open

    for old, new in names.in_model.items():
        with safe_open(stored[old].file, framework="pt") as f:
            assert torch.equal(f.get_tensor(old), state[new]), (old, new)
        assert places_of(old, state) in ([new], [])  # beginnings alone lead nowhere else
    for head in tied & set(state):  # not in the file; written under this name, it would be found
        again = StoredNames(on_meta(tmp_path), {names.to_store(head): state[head]})
        assert list(again.in_model.values()) == [head]


def test_one_name_with_two_places_is_left_to_the_caller():
    assert places_of("language_model.a", {"a", "model.language_model.a"}) == ["a", "model.language_model.a"]
    assert places_of("resampler.query", {"a"}) == []
