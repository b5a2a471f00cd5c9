"""A tiny random model and a batch with a picture for every family the package knows; used by several tests.

Each is the stand-in of a published checkpoint (`standins.py`): every field of its config.json but sizes and the ids of
a smaller vocabulary is the published one. What is altered on top, so that pictures are small, stands in `ALTERED` and
`SMALL_PICTURES`."""

import json
import shutil
import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path

import torch
from standins import random_weights, stand_in
from transformers import AutoModelForImageTextToText

from vlm_lora_lab.models.minicpmv import MiniCPMV, MiniCPMVConfig
from vlm_lora_lab.models.published import model_config
from vlm_lora_lab.models.qwenvl import QwenVL

OURS = {
    "minicpmv-2.0": "openbmb/MiniCPM-V-2",
    "minicpmv-2.5": "openbmb/MiniCPM-Llama3-V-2_5",
    "minicpmv-2.6": "openbmb/MiniCPM-V-2_6",
    "minicpmv-4.0": "openbmb/MiniCPM-V-4",
    "minicpmv-4.5": "openbmb/MiniCPM-V-4_5",
    "minicpmo-2.6": "openbmb/MiniCPM-o-2_6",
    "qwen": "Qwen/Qwen-VL-Chat",
}
NATIVE = {
    "minicpmv4_6": "openbmb/MiniCPM-V-4.6",
    "minicpmv4_7": "openbmb/MiniCPM-V-4.7-1B",
    "qwen2_vl": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen3_vl": "Qwen/Qwen3-VL-2B-Instruct",
    "idefics2": "HuggingFaceM4/idefics2-8b",
    "idefics3": "HuggingFaceM4/Idefics3-8B-Llama3",
    "smolvlm": "HuggingFaceTB/SmolVLM-256M-Instruct",
    "llava": "llava-hf/llava-1.5-7b-hf",
    "llava_onevision": "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
    "internvl": "OpenGVLab/InternVL3-1B-hf",
    "gemma3": "google/gemma-3-4b-it",
    "paligemma": "google/paligemma-3b-pt-224",
}
STAND_INS = OURS | NATIVE  # family -> the published checkpoint that its stand-in is like
FAMILIES = [*STAND_INS]
# What differs from the published files besides sizes: pictures of 4 x 4 patches where a tower knows one size only, and
# 16 vectors or fewer of each.
ALTERED = {
    **{f: {"query_num": 16} for f in OURS},
    "qwen": {"visual": {"image_size": 56, "n_queries": 16}},
    "smolvlm": {"model_type": "smolvlm"},  # SmolVLM2's class, on SmolVLM's file
    "llava": {"vision_config": {"image_size": 56}, "image_seq_length": 16},
    "llava_onevision": {"vision_config": {"image_size": 56}, "image_grid_pinpoints": [[56, 56], [112, 56]]},
    "internvl": {"vision_config": {"image_size": [56, 56]}, "image_seq_length": 4},
    "gemma3": {"vision_config": {"image_size": 56}, "mm_tokens_per_image": 4},
    "paligemma": {"vision_config": {"image_size": 56, "num_image_tokens": 16}, "text_config": {"num_image_tokens": 16}},
}


@cache
def _place():
    "A folder that goes when Python ends."
    return tempfile.TemporaryDirectory(prefix="stand_ins_")


def made(name, seed=0, dtype=None):
    "The stand-in of a published checkpoint, made once in a session; to be read, or copied."
    return _made(name, seed, dtype)


@cache
def _made(name, seed, dtype):
    return stand_in(
        name, Path(_place().name) / f"{name.rpartition('/')[2]}-{seed}-{dtype}", small=True, seed=seed, dtype=dtype
    )


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
    "qwen2_vl": {"min_pixels": 56 * 56, "max_pixels": 112 * 112},
    "qwen2_5_vl": {"min_pixels": 56 * 56, "max_pixels": 112 * 112},
    "qwen3_vl": {"size": {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}},
    "minicpmv4_6": {"scale_resolution": 112, "max_slice_nums": 4},
    "minicpmv4_7": {"scale_resolution": 112, "max_slice_nums": 4},
}


def native_folder(family, folder, seed=0, dtype=None):
    "The stand-in of a family that can be trained from files, with a limit of few pixels."
    shutil.copytree(made(STAND_INS[family], seed, dtype), folder)
    return written(folder, "preprocessor_config.json", SMALL_PICTURES[family])


@cache
def _values(family):
    return altered(json.loads((made(STAND_INS[family]) / "config.json").read_text()), ALTERED.get(family, {}))


def tiny_values(family, **changes):
    "The content of a tiny model's config.json, with explicit changes on top."
    return altered(_values(family), changes)


def tiny_config(family, **changes):
    return model_config(tiny_values(family, **changes))


def tiny_model(family, seed=0, **changes):
    "A small random model in which nothing is left at zero, so that every part matters."
    config = tiny_config(family, **changes)
    torch.manual_seed(seed)
    if family in OURS:
        model = MiniCPMV(config) if isinstance(config, MiniCPMVConfig) else QwenVL(config)
    else:
        model = AutoModelForImageTextToText.from_config(config)
    return random_weights(model.float())


def _pictures(family, model):
    "What the family's model wants to see of one picture, and how many tokens it becomes."
    g = torch.Generator().manual_seed(1)

    def rand(*shape):
        return torch.randn(*shape, generator=g)

    if family in ("minicpmv4_6", "minicpmv4_7"):
        return dict(pixel_values=rand(1, 3, 14, 16 * 14), target_sizes=torch.tensor([[4, 4]])), 1
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        patch = 16 if family == "qwen3_vl" else 14
        return dict(pixel_values=rand(16, 3 * 2 * patch**2), image_grid_thw=torch.tensor([[1, 4, 4]])), 4
    if family == "idefics2":
        return dict(pixel_values=rand(1, 1, 3, 56, 56)), 64
    if family in ("idefics3", "smolvlm"):  # two groups of patches on a side
        config = tiny_config(family)
        side = 2 * config.scale_factor * config.vision_config.patch_size
        return dict(pixel_values=rand(1, 1, 3, side, side)), 4
    if family == "llava_onevision":
        return dict(pixel_values=rand(1, 3, 3, 56, 56), image_sizes=torch.tensor([[112, 56]])), 16 + 8 * 4 + 8
    return dict(pixel_values=rand(1, 3, 56, 56)), {"llava": 16, "internvl": 4, "gemma3": 4, "paligemma": 16}[family]


def batch_of(family, model):
    "One row with one picture and some text, ready for the model in training mode."
    g = torch.Generator().manual_seed(0)
    if family in OURS:
        ids = torch.randint(3, 290, (1, 28), generator=g)
        pixels = (1, 3, 56, 56) if family == "qwen" else (1, 3, 14, 12 * 14)
        batch = dict(
            input_ids=ids, pixel_values=torch.randn(pixels, generator=g), image_bound=torch.tensor([[0, 2, 18]])
        )
        if family != "qwen":
            batch["tgt_sizes"] = torch.tensor([[4, 3]])
        return batch | {
            "labels": torch.where(torch.arange(28) >= 20, ids, -100),
            "attention_mask": torch.ones_like(ids),
        }
    pictures, tokens = _pictures(family, model)
    ids = torch.randint(3, 290, (1, tokens + 12), generator=g)
    place = tiny_config(family).image_token_id
    ids[:, 2 : 2 + tokens] = place
    batch = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.where(torch.arange(ids.shape[1]) >= tokens + 4, ids, -100),
        **pictures,
    )
    if family in ("gemma3", "paligemma", "minicpmv4_7", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        batch["token_type_ids" if family in ("gemma3", "paligemma") else "mm_token_type_ids"] = (ids == place).long()
    return batch
