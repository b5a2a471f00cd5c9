"""A tiny random model and a batch with a picture for every family the package knows; used by several tests."""

import json
import shutil
import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from standins import stand_in
from transformers import AutoConfig, AutoModelForImageTextToText

from vlm_lora_lab.models.minicpmv import MiniCPMV, MiniCPMVConfig
from vlm_lora_lab.models.published import model_config
from vlm_lora_lab.models.qwenvl import QwenVL

TEXT = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=320,
    max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2,
)  # fmt: skip
EYES = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
QWEN = dict(image_token_id=300, video_token_id=301, vision_start_token_id=302, vision_end_token_id=303)
SIGLIP = dict(model_type="siglip_vision_model", vision_use_head=False, **EYES)

NATIVE = {
    "minicpmv4_6": dict(text_config=dict(model_type="qwen3_5_text", linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
                                         linear_value_head_dim=16, **TEXT | dict(num_hidden_layers=4)), vision_config=EYES, insert_layer_id=0, image_token_id=300),
    "minicpmv4_7": dict(text_config=dict(model_type="qwen3_5_text", linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
                                         linear_value_head_dim=16, **TEXT | dict(num_hidden_layers=4)), vision_config=EYES, insert_layer_id=0, image_token_id=300,
                        image_start_id=301, image_end_id=302, slice_start_id=303, slice_end_id=304, newline_id=305),
    "qwen2_vl": dict(text_config=dict(**TEXT, rope_parameters=MROPE), vision_config=dict(depth=2, embed_dim=32, hidden_size=64, num_heads=4, patch_size=14, mlp_ratio=2), **QWEN),
    "qwen2_5_vl": dict(text_config=dict(**TEXT, rope_parameters=MROPE), **QWEN,
                       vision_config=dict(depth=2, hidden_size=32, out_hidden_size=64, intermediate_size=48, num_heads=4, patch_size=14, fullatt_block_indexes=[1], window_size=56)),
    "qwen3_vl": dict(text_config=dict(**TEXT, rope_parameters=MROPE), **QWEN,
                     vision_config=dict(depth=3, hidden_size=32, out_hidden_size=64, intermediate_size=48, num_heads=4, patch_size=16,
                                        deepstack_visual_indexes=[0, 1], num_position_embeddings=16)),
    "idefics2": dict(text_config=dict(model_type="mistral", **TEXT), vision_config=EYES, image_token_id=300,
                     perceiver_config=dict(hidden_size=64, resampler_n_latents=4, resampler_depth=2, resampler_n_heads=4, num_key_value_heads=2, resampler_head_dim=16)),
    "idefics3": dict(text_config=dict(model_type="llama", **TEXT), vision_config=EYES, scale_factor=2, image_token_id=300),
    "smolvlm": dict(text_config=dict(model_type="llama", **TEXT), vision_config=EYES, scale_factor=2, image_token_id=300),
    "llava": dict(text_config=dict(model_type="llama", **TEXT), vision_config=dict(model_type="clip_vision_model", **EYES), image_token_id=300),
    "llava_onevision": dict(text_config=dict(model_type="qwen2", **TEXT), vision_config=SIGLIP, image_token_id=300, image_grid_pinpoints=[[56, 56], [112, 56]]),
    "internvl": dict(text_config=dict(model_type="qwen2", **TEXT), vision_config=EYES | dict(image_size=[56, 56], patch_size=[14, 14]), image_token_id=300,
                     tie_word_embeddings=False),
    "gemma3": dict(text_config=dict(model_type="gemma3_text", **TEXT), vision_config=SIGLIP, mm_tokens_per_image=4, image_token_id=300),
    "paligemma": dict(text_config=dict(model_type="gemma", **TEXT), vision_config=SIGLIP, projection_dim=64, image_token_id=300),
}  # fmt: skip
MINICPMV = dict(TEXT, query_num=16, resampler_num_heads=4, vision_config=EYES)
OURS = {
    "minicpmv-2.0": dict(MINICPMV, model_type="minicpmv", scale_emb=12, dim_model_base=16, vision_config=EYES | dict(num_hidden_layers=3)),
    "minicpmv-2.5": dict(MINICPMV, model_type="minicpmv", version="2.5"),
    "minicpmv-2.6": dict(MINICPMV, model_type="minicpmv", version=2.6),
    "minicpmv-4.0": dict(MINICPMV, model_type="minicpmv", version=4.0, rope_theta=10000.0,
                         rope_scaling=dict(rope_type="longrope", factor=1.0, long_factor=[1.5] * 8, short_factor=[1.1] * 8, original_max_position_embeddings=256)),
    "minicpmv-4.5": dict(MINICPMV, model_type="minicpmv", version=4.5),
    "minicpmo-2.6": dict(MINICPMV, model_type="minicpmo", version="2.6"),
    "qwen": dict(model_type="qwen", vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, kv_channels=16, intermediate_size=96,
                 max_position_embeddings=128, seq_length=128, initializer_range=0.2, no_bias=True, tie_word_embeddings=False,
                 visual=dict(image_size=56, patch_size=14, width=32, layers=2, heads=4, mlp_ratio=2.0, output_dim=64, n_queries=16, image_start_id=300)),
}  # fmt: skip
FAMILIES = [*OURS, *NATIVE]

# Checkpoints that can be trained from files are stand-ins of published ones (`standins.py`): every field of theirs but sizes and the ids of a smaller vocabulary.
STAND_INS = {  # family -> the published checkpoint that its stand-in is like
    "minicpmv-2.0": "openbmb/MiniCPM-V-2", "minicpmv-2.5": "openbmb/MiniCPM-Llama3-V-2_5", "minicpmv-2.6": "openbmb/MiniCPM-V-2_6", "minicpmv-4.0": "openbmb/MiniCPM-V-4",
    "minicpmv-4.5": "openbmb/MiniCPM-V-4_5", "minicpmo-2.6": "openbmb/MiniCPM-o-2_6", "qwen": "Qwen/Qwen-VL-Chat",
    "minicpmv4_6": "openbmb/MiniCPM-V-4.6", "minicpmv4_7": "openbmb/MiniCPM-V-4.7-1B", "qwen2_vl": "Qwen/Qwen2-VL-2B-Instruct", "qwen2_5_vl": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen3_vl": "Qwen/Qwen3-VL-2B-Instruct", "idefics2": "HuggingFaceM4/idefics2-8b", "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3", "smolvlm": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "llava": "llava-hf/llava-1.5-7b-hf", "llava_onevision": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf", "internvl": "OpenGVLab/InternVL3-1B-hf",
    "gemma3": "google/gemma-3-4b-it", "paligemma": "google/paligemma-3b-pt-224",
}  # fmt: skip


@cache
def _place():
    "A folder that goes when Python ends."
    return tempfile.TemporaryDirectory(prefix="stand_ins_")


def made(name, seed=0, dtype=None):
    "The stand-in of a published checkpoint, made once in a session; to be read, or copied."
    return _made(name, seed, dtype)


@cache
def _made(name, seed, dtype):
    return stand_in(name, Path(_place().name) / f"{name.rpartition('/')[2]}-{seed}-{dtype}", small=True, seed=seed, dtype=dtype)


def altered(values, changes):
    "A configuration with other values for some of its fields, at any depth."
    values = deepcopy(values)
    for key, value in changes.items():
        values[key] = altered(values.get(key, {}), value) if isinstance(value, dict) else value
    return values


def written(folder, file, changes):
    "Change some fields of a JSON file."
    values = altered(json.loads((folder / file).read_text(encoding="utf-8")), changes)
    (folder / file).write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder


# Fewer pixels than published, so that a picture is a handful of patches.
SMALL_PICTURES = {
    "qwen2_vl": {"min_pixels": 56 * 56, "max_pixels": 112 * 112}, "qwen2_5_vl": {"min_pixels": 56 * 56, "max_pixels": 112 * 112},
    "qwen3_vl": {"size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}},
    "minicpmv4_6": {"scale_resolution": 112, "max_slice_nums": 4}, "minicpmv4_7": {"scale_resolution": 112, "max_slice_nums": 4},
}  # fmt: skip


def native_folder(family, folder, seed=0, dtype=None):
    "The stand-in of a family that can be trained from files, with a limit of few pixels."
    shutil.copytree(made(STAND_INS[family], seed, dtype), folder)
    return written(folder, "preprocessor_config.json", SMALL_PICTURES[family])


def tiny_config(family):
    return model_config(OURS[family]) if family in OURS else AutoConfig.for_model(family, **NATIVE[family])


def tiny_model(family, seed=0):
    "A small random model in which nothing is left at zero, so that every part matters."
    torch.manual_seed(seed)
    config = tiny_config(family)
    model = (MiniCPMV if isinstance(config, MiniCPMVConfig) else QwenVL)(config) if family in OURS else AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1 or not p.any():
                p.add_(0.1 * torch.randn_like(p))
    return model.float()


def _pictures(family, model):
    "What the family's model wants to see of one picture, and how many tokens it becomes."
    g = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    if family in ("minicpmv4_6", "minicpmv4_7"):
        return dict(pixel_values=rand(1, 3, 14, 16 * 14), target_sizes=torch.tensor([[4, 4]])), 1
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        patch = 16 if family == "qwen3_vl" else 14
        return dict(pixel_values=rand(16, 3 * 2 * patch**2), image_grid_thw=torch.tensor([[1, 4, 4]])), 4
    if family in ("idefics2", "idefics3", "smolvlm"):
        return dict(pixel_values=rand(1, 1, 3, 56, 56)), 4
    if family == "llava_onevision":
        return dict(pixel_values=rand(1, 3, 3, 56, 56), image_sizes=torch.tensor([[112, 56]])), 16 + 8 * 4 + 8
    return dict(pixel_values=rand(1, 3, 56, 56)), {"llava": 16, "internvl": 4, "gemma3": 4, "paligemma": 16}[family]


def batch_of(family, model):
    "One row with one picture and some text, ready for the model in training mode."
    g = torch.Generator().manual_seed(0)
    if family in OURS:
        ids = torch.randint(3, 290, (1, 28), generator=g)
        pixels = (1, 3, 56, 56) if family == "qwen" else (1, 3, 14, 12 * 14)
        batch = dict(input_ids=ids, pixel_values=torch.randn(pixels, generator=g), image_bound=torch.tensor([[0, 2, 18]]))
        if family != "qwen":
            batch["tgt_sizes"] = torch.tensor([[4, 3]])
        return batch | {"labels": torch.where(torch.arange(28) >= 20, ids, -100), "attention_mask": torch.ones_like(ids)}
    pictures, tokens = _pictures(family, model)
    ids = torch.randint(3, 290, (1, tokens + 12), generator=g)
    ids[:, 2 : 2 + tokens] = 300
    batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.where(torch.arange(ids.shape[1]) >= tokens + 4, ids, -100), **pictures)
    if family in ("gemma3", "paligemma", "minicpmv4_7", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        batch["token_type_ids" if family in ("gemma3", "paligemma") else "mm_token_type_ids"] = (ids == 300).long()
    return batch
