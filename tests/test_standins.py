"""Stand-ins are like the published models, but small."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from real import SOURCES, folder, real
from standins import account_of, differences, may_differ, shrunk, stand_in, stored_dtype, weights_besides_embeddings

from vlm_lora_lab.data.native import load_processor
from vlm_lora_lab.families.base import family_named, family_of
from vlm_lora_lab.models.files import stored_in
from vlm_lora_lab.models.load import check_nf4, load_tokenizer, load_vlm
from vlm_lora_lab.models.published import PUBLISHED, on_meta
from vlm_lora_lab.models.tokenizer import check_special_ids, version_of

TIED = {
    "Qwen/Qwen2-VL-2B-Instruct",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen3-VL-2B-Instruct",
    "Qwen/Qwen3-VL-4B-Instruct",
    "openbmb/MiniCPM-V-4.6",
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "google/gemma-3-12b-it",
    "google/gemma-3-4b-it",
    "google/paligemma-3b-pt-224",
    "google/paligemma2-3b-pt-224",
}
ON_DISK = {  # family -> how its published tensors begin
    "qwen2_vl": {"visual", "model.layers", "model.embed_tokens", "model.norm", "lm_head"},
    "qwen2_5_vl": {"visual", "model.layers", "model.embed_tokens", "model.norm", "lm_head"},
    "qwen3_vl": {"model.visual", "model.language_model", "lm_head"},
    "llava": {"language_model.model", "language_model.lm_head", "vision_tower.vision_model", "multi_modal_projector"},
    "llava_onevision": {
        "language_model.model",
        "language_model.lm_head",
        "vision_tower.vision_model",
        "multi_modal_projector",
        "image_newline",
    },
    "internvl": {
        "language_model.model",
        "language_model.lm_head",
        "vision_tower.embeddings",
        "vision_tower.encoder",
        "multi_modal_projector",
    },
    "gemma3": {"language_model.model", "vision_tower.vision_model", "multi_modal_projector"},
    "paligemma": {"language_model.model", "vision_tower.vision_model", "multi_modal_projector"},
    "minicpmv": {"llm", "vpm", "resampler"},
    "minicpmo": {"llm", "vpm", "resampler", "apm", "audio_projection_layer", "tts"},
    "qwen": {"transformer", "lm_head"},
}


def _real_or_skip(name):
    if real(name) is None:
        assert "VLM_LORA_LAB_REAL" not in os.environ, f"{folder()} has no {name}: run python tests/real.py"
        pytest.skip(f"{name} was not fetched: python tests/real.py")
    return real(name)


@pytest.fixture(scope="module")
def tokenizer_like(tmp_path_factory):
    "The tokenizer of a stand-in with the published number of words; each is made once."
    made = {}

    def get(name):
        if name not in made:
            made[name] = load_tokenizer(stand_in(name, tmp_path_factory.mktemp("full") / "base"))
        return made[name]

    return get


def _shape(model):
    "The names of a model's weights, whatever its depth."
    return {re.sub(r"\.\d+(?=\.|$)", ".N", n) for n in model.state_dict()}


def test_there_are_33():
    assert len(PUBLISHED) == 33 and TIED <= set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_only_sizes_differ_from_the_published_configuration(name):
    mine = shrunk(name)
    assert set(differences(PUBLISHED[name].config, mine)) <= may_differ(name)
    model, whole = on_meta(mine), on_meta(name)
    # biases, norms of heads, mergers, gates: everything that the published model has
    assert _shape(model) == _shape(whole)
    assert bool(model.all_tied_weights_keys) == bool(whole.all_tied_weights_keys) == (name in TIED)
    text = mine.get("text_config", mine)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    width = (
        int(
            (text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
            * rope.get("partial_rotary_factor", 1)
        )
        if rope
        else 0
    )
    if "mrope_section" in rope:
        assert sum(rope["mrope_section"]) == width // 2
    if "long_factor" in rope:
        published = PUBLISHED[name].config["rope_scaling"]
        assert len(rope["long_factor"]) == len(rope["short_factor"]) == width // 2
        assert (rope["long_factor"][0], rope["long_factor"][-1]) == (
            published["long_factor"][0],
            published["long_factor"][-1],
        )


def test_a_field_that_is_no_size_is_found():
    "The comparison itself: a tie, a type, a missing key."
    published = PUBLISHED["Qwen/Qwen3-VL-2B-Instruct"].config
    changed = json.loads(json.dumps(published))
    changed["text_config"]["tie_word_embeddings"] = False
    changed["vision_config"]["spatial_merge_size"] = 2.0
    del changed["image_token_id"]
    assert differences(published, changed) == [
        "image_token_id",
        "text_config.tie_word_embeddings",
        "vision_config.spatial_merge_size",
    ]
    assert not set(differences(published, changed)) & may_differ("Qwen/Qwen3-VL-2B-Instruct")


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.filterwarnings("ignore:.*stay on the disk")
def test_it_loads_whole_and_in_4_bit_with_every_tensor_in_its_place(name, tmp_path):
    base = stand_in(name, tmp_path / "base", small=True)
    assert set(differences(PUBLISHED[name].config, json.loads((base / "config.json").read_text()))) <= may_differ(
        name, small=True
    )
    assert len(list(base.glob("*.safetensors"))) == 2 and weights_besides_embeddings(base) < 3e6
    stored, kind = stored_in(base), PUBLISHED[name].config["model_type"]
    if kind in ON_DISK:
        absent = {p for p in ON_DISK[kind] if not any(n == p or n.startswith(p + ".") for n in stored)}
        assert absent <= ({"lm_head", "language_model.lm_head"} if name in TIED else set())
        assert all(any(n == p or n.startswith(p + ".") for p in ON_DISK[kind]) for n in stored)
    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    whole = {n for n in stored if n.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))}
    assert {kinds[s.dtype] for n, s in stored.items() if n not in whole} == {stored_dtype(name, PUBLISHED[name].config)}
    assert all(stored[n].dtype == "F32" for n in whole) and bool(whole) == kind.startswith("minicpmv4")
    model = load_vlm(base, dtype=torch.float32)
    assert all(p.isfinite().all() and p.any() for p in model.parameters())
    assert check_nf4(load_vlm(base, four_bit=True))


PREPARED = [n for n, p in PUBLISHED.items() if (f := family_of(p.config)) and f.eyes]


@pytest.mark.parametrize("name", PREPARED)
def test_pictures_are_prepared_as_the_files_say(name, tmp_path):
    "Patch sizes, limits and special tokens of config.json, preprocessor_config.json and the tokenizer agree."
    processor = load_processor(stand_in(name, tmp_path / "base", small=True), max_length=64)
    assert processor.grid((64, 64)) is None or processor.grid((64, 64))


def test_special_ids_are_the_published_ones(tokenizer_like):
    for name in ("openbmb/MiniCPM-Llama3-V-2_5", "openbmb/MiniCPM-V-2_6", "openbmb/MiniCPM-V-4_5"):
        tokenizer, version = tokenizer_like(name), version_of(PUBLISHED[name].config)
        assert check_special_ids(tokenizer, version)
        assert {t: tokenizer.convert_tokens_to_ids(t) for t in family_named(version).ids} == family_named(version).ids
    assert tokenizer_like("openbmb/MiniCPM-Llama3-V-2_5").pad_token == "!"
    name = "Qwen/Qwen2-VL-2B-Instruct"
    tokenizer, config = tokenizer_like(name), PUBLISHED[name].config
    assert tokenizer.convert_ids_to_tokens(
        [config["vision_start_token_id"], config["image_token_id"], config["eos_token_id"]]
    ) == ["<|vision_start|>", "<|image_pad|>", "<|im_end|>"]
    assert tokenizer("<|box_start|>(1,2)<|box_end|>")["input_ids"][0] == 151648


def test_what_is_not_real_is_said():
    assert (
        not account_of("openbmb/MiniCPM-V-4.6", small=True).real[2:]
        and "the vocabulary" in account_of("openbmb/MiniCPM-V-4.6").missing
    )
    assert "num_hidden_layers" in account_of("openbmb/MiniCPM-V-2_6").shrunk


@pytest.mark.parametrize(
    "name, source",
    [
        ("Qwen/Qwen2-VL-2B-Instruct", "qwen3.json"),
        ("openbmb/MiniCPM-V-2_6", "qwen3.json"),
        ("openbmb/MiniCPM-V-4_5", "qwen3.json"),
        ("openbmb/MiniCPM-Llama3-V-2_5", "llama3.json"),
    ],
)
def test_real_words(name, source, tokenizer_like):
    "With the real vocabulary, text becomes what the published tokenizer makes of it."
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_str(_real_or_skip(source).decode())
    tokenizer = tokenizer_like(name)
    for text in (
        "The sum is 1,234.50 €!",
        "Grüße aus 北京 — naïve café",
        "def f(x):\n    return x ** 2\n\n",
        "  two  spaces\tand a tab ",
    ):
        assert (
            tokenizer(text, add_special_tokens=False)["input_ids"] == theirs.encode(text, add_special_tokens=False).ids
        )
    assert not any("real words" in m for m in account_of(name).missing)


def test_real_ranks(tmp_path):
    "Qwen-VL with Qwen's own ranks: every field is the published one, and so is every id."
    _real_or_skip("qwen.tiktoken")
    base = stand_in("Qwen/Qwen-VL-Chat", tmp_path / "base")
    assert json.loads((base / "config.json").read_text())["vocab_size"] == 151936
    assert (
        check_special_ids(load_tokenizer(base), "qwenvl")
        and load_vlm(base).get_input_embeddings().num_embeddings == 151936
    )


def test_sources_are_pinned():
    assert (
        all(len(s.sha256) == 64 and re.search(r"\d+\.\d+\.\d+", s.package) for s in SOURCES.values())
        and Path(folder()).is_absolute()
    )
