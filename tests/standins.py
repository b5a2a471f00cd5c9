"""A small random checkpoint like each published one of `vlm_lora_lab/models/published.json`.

Widths, depths and numbers of heads are smaller; every other field of config.json is the published one. `SIZES` lists
what may differ, and `tests/test_standins.py` holds every stand-in to it. The weights lie in several shards, in the
published types, under the published names."""

import json
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from real import real
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import MiniCPMV4_6ImageProcessorPil

from vlm_lora_lab.checkpoint.merge import _Shard
from vlm_lora_lab.checkpoint.save import fingerprint
from vlm_lora_lab.errors import write_json
from vlm_lora_lab.models.files import INDEX
from vlm_lora_lab.models.load import lab_folder
from vlm_lora_lab.models.published import PUBLISHED, model_class, model_config, on_meta
from vlm_lora_lab.families.base import family_named, is_ours
from vlm_lora_lab.models.tokenizer import QWEN_SPECIAL, version_of
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

TOKENIZERS = Path(__file__).parent / "golden" / "tokenizer"
# What may differ from the published config.json; * stands for the whole of a list.
SIZES = {
    "language": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "kv_channels",
        "dim_model_base",
        "query_pre_attn_scalar",
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "rope_scaling.mrope_section",
        "rope_parameters.mrope_section",
        "rope_scaling.long_factor",
        "rope_scaling.short_factor",
    ),
    "vision": (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "depth",
        "embed_dim",
        "num_heads",
        "out_hidden_size",
        "fullatt_block_indexes",
        "deepstack_visual_indexes",
        "projection_dim",
        "width",
        "layers",
        "heads",
        "output_dim",
    ),
    "perceiver": ("hidden_size", "num_key_value_heads", "resampler_n_heads", "resampler_head_dim", "resampler_depth"),
    "top": ("insert_layer_id", "hidden_size", "num_hidden_layers", "projection_dim"),
    "added": ("architectures", "auto_map"),  # published.json leaves them out
    "timm": ("vision_config",),  # 2.0 names its tower and gives no sizes
}
IDS = (
    "vocab_size",
    "_vocab_size",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "vision_token_id",
    "image_token_index",
    "video_token_index",
    "boi_token_index",
    "eoi_token_index",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "image_start_id",
)  # and these, in a smaller vocabulary

# Chat templates as transformers' families have them, with the answers marked, so that transformers itself can say which
# tokens they are.
VISION_TEMPLATE = (  # Qwen2-VL and later: a picture in brackets, wherever it stands among the texts
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration "
    "%}\n"
    "{% elif m.content is string %}{{ m.content }}<|im_end|>\n"
    "{% else %}{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% "
    "else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# MiniCPM-V 4.6: parts on lines of their own, no thoughts but in the last answer, and a block for them there, if empty
THINKING_TEMPLATE = (
    "{% macro said(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{{ '<|image_pad|>' if part.type == 'image' else part.text }}{{ '' if loop.last else '\n' }}{% endfor %}{% endif "
    "%}{% endmacro %}"
    "{% for m in messages %}{% set text = said(m.content) | trim %}{% if m.role == 'assistant' %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1] | trim if '</think>' in text else '' %}"
    "<|im_start|>assistant\n{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ "
    "text.split('</think>')[-1] | trim }}<|im_end|>\n"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{{ '<think>\n' if enable_thinking | default(false) "
    "else '<think>\n\n</think>\n\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Account:
    "What a stand-in has in common with the model of its name."

    name: str
    real: tuple[str, ...]
    shrunk: tuple[str, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Words:
    "The special tokens of a published tokenizer, at their ids, and how its files present them."

    special: dict[str, int]
    size: int  # tokens of the published tokenizer; the embedding may have more rows
    roles: dict[str, str]
    template: str | None = None
    base: str = "qwen"  # whose splitting: "qwen" or "llama3"
    cls: str = "PreTrainedTokenizerFast"
    missing: tuple[str, ...] = field(default=())


def may_differ(name, small=False):
    "The paths in a config.json at which a stand-in may have another value."
    values = PUBLISHED[name].config
    nested = "text_config" in values
    paths = {f"text_config.{p}" if nested else p for p in SIZES["language"]} | {
        f"vision_config.{p}" for p in SIZES["vision"]
    }
    paths |= (
        {f"visual.{p}" for p in SIZES["vision"]}
        | {f"perceiver_config.{p}" for p in SIZES["perceiver"]}
        | set(SIZES["top"])
        | set(SIZES["added"])
    )
    if "scale_emb" in values:
        paths |= set(SIZES["timm"])
    # its file of ranks holds no spare words
    small = small or (values["model_type"] == "qwen" and not real("qwen.tiktoken"))
    return paths | (
        {p for i in IDS for p in (i, f"text_config.{i}", f"vision_config.{i}", f"visual.{i}")} if small else set()
    )


def differences(published, mine, path=""):
    "The paths at which two configurations have different values."
    if not (isinstance(published, dict) and isinstance(mine, dict)):
        return [] if published == mine and type(published) is type(mine) else [path]

    def inner(key):
        return f"{path}.{key}" if path else key

    gone = object()
    return [
        p
        for key in sorted({*published, *mine})
        for p in differences(published.get(key, gone), mine.get(key, gone), inner(key))
    ]


def _spread(values, n):
    "So many of a list, at even distances."
    return [values[i * (len(values) - 1) // (n - 1)] for i in range(n)]


def _in_proportion(parts, total):
    "Whole numbers in the proportion of `parts` that sum to `total`."
    exact = [p * total / sum(parts) for p in parts]
    result = [int(e) for e in exact]
    for i in sorted(range(len(parts)), key=lambda i: result[i] - exact[i])[: total - sum(result)]:
        result[i] += 1
    return result


# a whole turn of a pattern of layers, or one layer more than the vision tower reaches into; others: 2
LAYERS = {"gemma3_text": 6, "qwen3_5_text": 4, "qwen3_vl_text": 4}


def _language(section, full):
    "Smaller sizes for the fields of a language model; `full` knows what the file leaves to the class."
    hidden, heads = 64, 4
    width = (
        getattr(full, "head_dim", None)
        or getattr(full, "kv_channels", None)
        or full.hidden_size // full.num_attention_heads
    ) * full.num_attention_heads
    # as wide together as the model, wider, or less
    head = 16
    if width != full.hidden_size:
        head = 32 if width > full.hidden_size else 8
    new = {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": LAYERS.get(full.model_type, 2)}
    new["intermediate_size"] = max(16, round(hidden * full.intermediate_size / full.hidden_size / 16) * 16)
    kv = getattr(full, "num_key_value_heads", None)
    if kv:
        new["num_key_value_heads"] = (
            heads if kv == full.num_attention_heads else max(1, heads * kv // full.num_attention_heads)
        )
    if "head_dim" in section or (
        hasattr(full, "head_dim") and type(full)(hidden_size=hidden, num_attention_heads=heads).head_dim != head
    ):
        new["head_dim"] = head
    for key, value in {
        "kv_channels": head,
        "query_pre_attn_scalar": head,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }.items():
        if key in section:
            new[key] = value
    if "dim_model_base" in section:
        new["dim_model_base"] = round(section["dim_model_base"] * hidden / full.hidden_size)
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(rope := section.get(key), dict):
            turned = int(head * rope.get("partial_rotary_factor", 1)) // 2
            new[key] = rope | {k: _spread(rope[k], turned) for k in ("long_factor", "short_factor") if k in rope}
            new[key] |= {k: _in_proportion(rope[k], turned) for k in ("mrope_section",) if k in rope}
    return new


def _vision(section, full, hidden=64):
    "Smaller sizes for a vision tower."
    new = {}
    width = 32 if {"depth", "width"} & set(section) else 48  # four heads, each a multiple of four wide
    for key in ("hidden_size", "embed_dim", "width"):
        if key in section:
            new[key] = width
    if "embed_dim" in section:  # Qwen2-VL's hidden_size is that of the language model
        new["hidden_size"] = hidden
    for key, value in {
        "num_attention_heads": 4,
        "num_heads": 4,
        "heads": 4,
        "num_hidden_layers": 3,
        "layers": 3,
        "depth": 4,
        "out_hidden_size": hidden,
        "output_dim": hidden,
        "fullatt_block_indexes": [1, 3],
        "deepstack_visual_indexes": [0, 1, 2],
    }.items():
        if key in section:
            new[key] = value
    if "intermediate_size" in section:
        new["intermediate_size"] = round(width * section["intermediate_size"] / section["hidden_size"] / 4) * 4
    if "projection_dim" in section and section["projection_dim"] != 768:
        new["projection_dim"] = hidden
    return new


def shrunk(name):
    "The config.json of a published checkpoint with smaller sizes."
    values = deepcopy(PUBLISHED[name].config)
    full = model_config(PUBLISHED[name].config)
    text = full.get_text_config()
    if "text_config" in values:
        values["text_config"] |= _language(values["text_config"], text)
    else:
        values |= _language(values, text)
    if "scale_emb" in values:
        sizes = full.vision_config.to_dict()
        tower = {
            k: sizes[k]
            for k in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "image_size",
                "patch_size",
                "hidden_act",
            )
        }
        values["vision_config"] = tower | _vision(tower, None)
    else:
        key = "visual" if "visual" in values else "vision_config"
        values[key] |= _vision(values[key], None)
    if "perceiver_config" in values:
        values["perceiver_config"] |= {
            "hidden_size": 64,
            "num_key_value_heads": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 24,
            "resampler_depth": 2,
        }
    if "insert_layer_id" in values:
        values["insert_layer_id"] = 1
    if values["model_type"] == "paligemma":
        values |= {
            k: v for k, v in {"hidden_size": 64, "projection_dim": 64, "num_hidden_layers": 2}.items() if k in values
        }
    return values | ARCHITECTURES(values)


def ARCHITECTURES(values):
    "The classes that the file names; upstream's own are named and never run."
    kind = values["model_type"]
    if kind == "qwen":
        return {
            "architectures": ["QWenLMHeadModel"],
            "auto_map": {
                "AutoConfig": "configuration_qwen.QWenConfig",
                "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
            },
        }
    if kind in ("minicpmv", "minicpmo"):
        cls, module = ("MiniCPMV", "modeling_minicpmv") if kind == "minicpmv" else ("MiniCPMO", "modeling_minicpmo")
        return {
            "architectures": [cls],
            "auto_map": {
                "AutoConfig": f"configuration_minicpm.{cls}Config",
                "AutoModel": f"{module}.{cls}",
                "AutoModelForCausalLM": f"{module}.{cls}",
            },
        }
    return {"architectures": [model_class(model_config(values)).__name__]}


# Special tokens at their published ids: the hub's tokenizer_config.json of each, as far as ../shared's notes or the
# package's own table know it.
def _series(first, *names):
    return {n: first + i for i, n in enumerate(names)}


TAGS = (
    "<image>",
    "</image>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<quad>",
    "</quad>",
    "<point>",
    "</point>",
    "<slice>",
    "</slice>",
)
GROUNDING = (
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
)
SIGHT = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TURNS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TOOLS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
THINKS = ("<tool_response>", "</tool_response>", "<think>", "</think>")
ORDINARY = {*TOOLS, *THINKS}  # tokens of their own that are text all the same
QWEN_ROLES = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}


# Llama 3's special tokens in the order of their ids, from 128000 on.
LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
)


def _spare(first, last):
    return {f"<|reserved_special_token_{i - first}|>": i for i in range(first, last)}


def words(name):
    "What is known of the tokenizer of a published checkpoint."
    values = PUBLISHED[name].config
    kind, rows = values["model_type"], model_config(values).get_text_config().vocab_size
    plain = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind in ("minicpmv", "minicpmo"):
        return _minicpm_words(version_of(values), rows)
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        special = _series(
            151643, *TURNS, *GROUNDING, *SIGHT, *{"qwen2_vl": (), "qwen2_5_vl": TOOLS}.get(kind, (*TOOLS, *THINKS))
        )
        return Words(special, max(special.values()) + 1, QWEN_ROLES, VISION_TEMPLATE, cls="Qwen2Tokenizer")
    if kind in ("minicpmv4_6", "minicpmv4_7"):
        special = (
            _series(248044, *TURNS, *GROUNDING, *SIGHT)
            | _series(248068, "<think>", "</think>")
            | _series(248070, "<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")
        )
        return Words(
            special,
            rows,
            QWEN_ROLES,
            THINKING_TEMPLATE,
            missing=(
                "the vocabulary",
                "the ids of <think>, <image>, <slice> and <image_id>",
                "the text of the chat template",
            ),
        )
    if kind == "llava":
        return Words(
            _series(0, "<unk>", "<s>", "</s>") | _series(32000, "<image>", "<pad>"),
            32002,
            plain | {"pad_token": "<pad>"},
            missing=("the vocabulary of Llama 2", "the chat template"),
        )
    if kind == "llava_onevision":
        return Words(_series(151643, *TURNS, "<image>", "<video>"), 151648, QWEN_ROLES, missing=("the chat template",))
    if kind == "internvl":
        special = _series(151643, *TURNS, *GROUNDING, *SIGHT, *TOOLS) | _series(
            151665, "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"
        )
        return Words(
            special,
            rows,
            QWEN_ROLES,
            missing=("the chat template", "<video>, which has the id 151674 there, and no row"),
        )
    if kind == "gemma3":
        special = (
            _series(0, "<pad>", "<eos>", "<bos>", "<unk>")
            | _series(105, "<start_of_turn>", "<end_of_turn>")
            | _series(255999, "<start_of_image>", "<end_of_image>")
        )
        roles = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
        return Words(special | {"<image_soft_token>": 262144}, 262145, roles, missing=("the chat template",))
    if kind == "paligemma":
        special = (
            _series(0, "<pad>", "<eos>", "<bos>", "<unk>")
            | {"<image>": 257152}
            | {f"<loc{i:04}>": 256000 + i for i in range(1024)}
            | {f"<seg{i:03}>": 257024 + i for i in range(128)}
        )
        return Words(
            special,
            257153,
            {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
            missing=("the vocabulary", "a chat template: it has none"),
        )
    if kind == "idefics2":
        special = _series(0, "<unk>", "<s>", "</s>") | _series(
            32000, "<fake_token_around_image>", "<image>", "<end_of_utterance>"
        )
        return Words(
            special, rows, plain | {"pad_token": "<unk>"}, missing=("the vocabulary of Mistral", "the chat template")
        )
    if rows > 128000:  # Idefics 3, on Llama 3
        special = _series(128000, *LLAMA3) | _series(
            128256, "<fake_token_around_image>", "<image>", "<end_of_utterance>"
        )
        roles = {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "pad_token": "<|reserved_special_token_0|>",
        }
        return Words(special, rows, roles, base="llama3", missing=("the chat template",))
    special = _series(0, *TURNS) | {"<image>": values["image_token_id"]}
    return Words(
        special,
        rows,
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        missing=("the vocabulary of SmolLM2", "the chat template"),
    )


def _minicpm_words(version, rows):
    if version == "2.5":
        special = _series(128000, *LLAMA3[:2], "<unk>", *LLAMA3[3:10], *TAGS, *LLAMA3[22:])
        return Words(
            special,
            rows,
            {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "unk_token": "<unk>", "pad_token": "!"},
            base="llama3",
        )
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    if version == "4.5":
        special = {"<unk>": 128244} | _series(
            151643, *TURNS, *GROUNDING, *SIGHT, *TOOLS, *THINKS, *TAGS, "<image_id>", "</image_id>"
        )
        return Words(special | _spare(151683, rows), family_named("4.5").id_count, roles)
    if version == "4.0":
        special = (
            _series(0, "<unk>", "<s>", "</s>")
            | _series(101, *TAGS, "<image_id>", "</image_id>")
            | _series(73440, "<|im_end|>", "<|im_start|>")
        )
        return Words(
            special,
            rows,
            roles | {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"},
            missing=("the vocabulary of MiniCPM4", "the ids of <image_id>"),
        )
    special = {"<unk>": 128244} | _series(151643, *TURNS, *TAGS, "<image_id>", "</image_id>")
    return Words(
        special | _spare(151660, rows),
        rows,
        roles,
        missing=("the names of the tokens for speech", "its own preprocessor_config.json: 2.6's")
        if version == "o-2.6"
        else (),
    )


@cache
def _base(kind, small=False):
    """A byte-level tokenizer.json without its special tokens, and its words in the order of their ids; the real one
    where it is at hand."""
    ours = lab_folder() / "tokenizer.json" if kind == "qwen" else TOKENIZERS / "minicpmv25" / "tokenizer.json"
    text = None if small else real({"qwen": "qwen3.json", "llama3": "llama3.json"}[kind])
    data = json.loads(text or ours.read_text(encoding="utf-8"))
    own = {t["content"] for t in data["added_tokens"]}
    return data, [t for t, _ in sorted(data["model"]["vocab"].items(), key=lambda item: item[1]) if t not in own]


def has_real_words(known):
    """Whether the real words of a published tokenizer are at hand: its special tokens then stand behind them, or are
    among them."""
    words = real({"qwen": "qwen3.json", "llama3": "llama3.json"}[known.base])
    if words is None:
        return False
    vocab = _base(known.base)[0]["model"]["vocab"]
    return all(i >= len(vocab) or vocab.get(t) == i for t, i in known.special.items())


def tokenizer_json(known, small=False):
    """The content of tokenizer.json: common words first, then words that no text becomes, and every special token at
    its published id (small: one behind the other)."""
    genuine = not small and has_real_words(known)
    data, common = deepcopy(_base(known.base, not genuine))
    if small:
        ids = {t: len(common) + i for i, t in enumerate(sorted(known.special, key=known.special.get))}
        vocab = {t: i for i, t in enumerate(common)} | ids
    else:
        ids, taken = dict(known.special), set(known.special.values())
        free = [i for i in range(known.size) if i not in taken]
        vocab = dict(zip(common, free)) | {f"Ġw{i}": i for i in free[len(common) :]}
        vocab = (data["model"]["vocab"] if genuine else vocab) | ids
    data["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
    data["added_tokens"] = [_added(t) | {"id": i} for t, i in sorted(ids.items(), key=lambda item: item[1])]
    data["post_processor"] = None
    return data


def _added(token):
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": token not in ORDINARY,
    }


def _write(folder, name, values):
    (folder / name).write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")


def _tokenizer_files(name, folder, small):
    "Write the tokenizer; published id -> id here, and the number of tokens."
    values = PUBLISHED[name].config
    version = version_of(values) if is_ours(values) else None
    if version in ("2.0", "qwenvl"):
        source = TOKENIZERS / {"2.0": "minicpmv20", "qwenvl": "qwenvl"}[version]
        for file in source.iterdir():
            if file.name != "cases.json":
                (folder / file.name).write_bytes(file.read_bytes())
        if version == "qwenvl" and not small and (ranks := real("qwen.tiktoken")):
            (folder / "qwen.tiktoken").write_bytes(ranks)
            return {}, family_named("qwenvl").id_count
        if version == "2.0":
            return {i: i for i in range(113)}, 0
        count = len((source / "qwen.tiktoken").read_text().split("\n")) - 1
        return {151643 + i: count + i for i in range(len(QWEN_SPECIAL))}, count + len(QWEN_SPECIAL)
    known = words(name)
    data = tokenizer_json(known, small)
    _write(folder, "tokenizer.json", data)
    listed = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in data["added_tokens"]}
    more = [t["content"] for t in data["added_tokens"] if t["special"] and t["content"] not in known.roles.values()]
    config = {
        "added_tokens_decoder": listed,
        "additional_special_tokens": more,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": known.cls,
    } | known.roles
    if version:
        config |= {
            "auto_map": {"AutoTokenizer": [None, "tokenization_minicpmv_fast.MiniCPMVTokenizerFast"]},
            "tokenizer_class": "MiniCPMVTokenizerFast",
        }
    if known.template:
        config["chat_template"] = known.template
    _write(folder, "tokenizer_config.json", config)
    return {known.special[t["content"]]: t["id"] for t in data["added_tokens"]}, max(
        data["model"]["vocab"].values()
    ) + 1


def _renumber(values, ids, rows):
    "Special ids and rows of a smaller vocabulary."

    def new(key, value):
        if isinstance(value, list):
            return [new(key, v) for v in value]
        if value is None or key not in IDS:
            return value
        if "vocab_size" in key:
            return rows
        return ids.get(value, value if value < rows else 0)

    return {
        k: _renumber(v, ids, rows) if isinstance(v, dict) and k not in ("audio_config",) else new(k, v)
        for k, v in values.items()
    }


CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def _minicpm_pictures(values):
    version = {"2.5": "2.5"}.get(str(values["version"]), 2.6)
    cls = "MiniCPMV" if values["model_type"] == "minicpmv" else "MiniCPMO"
    return {
        "image_processor_type": "MiniCPMVImageProcessor",
        "processor_class": f"{cls}Processor",
        "max_slice_nums": 9,
        "scale_resolution": 448,
        "patch_size": 14,
        "image_feature_size": values["query_num"],
        "im_start": "<image>",
        "im_end": "</image>",
        "slice_start": "<slice>",
        "slice_end": "</slice>",
        "unk": "<unk>",
        "im_id_start": "<image_id>",
        "im_id_end": "</image_id>",
        "slice_mode": True,
        "norm_mean": [0.5] * 3,
        "norm_std": [0.5] * 3,
        "version": version,
        "use_image_id": version == 2.6,
        "auto_map": {
            "AutoProcessor": "processing_minicpmv.MiniCPMVProcessor",
            "AutoImageProcessor": "image_processing_minicpmv.MiniCPMVImageProcessor",
        },
    }


def _qwen_pictures(kind):
    newer = kind == "qwen3_vl"
    limits = {"min_pixels": 3136, "max_pixels": 12845056}
    if newer:
        limits = {"size": {"longest_edge": 16777216, "shortest_edge": 65536}}
    processor = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}.get(kind, "Qwen3VLProcessor")
    return limits | {
        "patch_size": 16 if newer else 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3 if newer else CLIP_MEAN,
        "image_std": [0.5] * 3 if newer else CLIP_STD,
        "image_processor_type": "Qwen2VLImageProcessorFast" if newer else "Qwen2VLImageProcessor",
        "processor_class": processor,
    }


def _picture_files(values, folder):
    "What the published preprocessor_config.json says, for the families whose pictures are prepared here."
    kind = values["model_type"]
    if kind in ("minicpmv", "minicpmo") and values.get("version"):
        _write(folder, "preprocessor_config.json", _minicpm_pictures(values))
    if kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        _write(folder, "preprocessor_config.json", _qwen_pictures(kind))
    if kind in ("minicpmv4_6", "minicpmv4_7"):
        MiniCPMV4_6ImageProcessorPil(patch_size=14).save_pretrained(folder)


def random_weights(model):
    "Nothing is left at zero, so that every part matters; sums keep their size."
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
            elif "embed" in name or "wte" in name or "position" in name or "query" in name:
                p.normal_(0, 0.3)
            else:
                p.normal_(0, p[0].numel() ** -0.5)
    return model


def stored_dtype(name, values):
    "In which weights lie on the disk; MiniCPM-Llama3-V 2.5 has 32 bit there, whatever its file says."
    if values.get("version") == "2.5" and values["model_type"] == "minicpmv":
        return torch.float32
    return getattr(torch, values.get("torch_dtype") or values.get("dtype") or "bfloat16")


def _kept_whole(name):
    "Qwen3.5's linear attention keeps these two in 32 bit."
    return name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))


def _shards(folder, values, dtype, shards):
    "The published names, in several files with an index."
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    # transformers 5 leaves a level out when it saves
    if values["model_type"] in ("llava", "llava_onevision", "gemma3", "paligemma"):
        tensors = {n.replace("vision_tower.", "vision_tower.vision_model.", 1): t for n, t in tensors.items()}
    tensors = {n: t if _kept_whole(n) or not t.is_floating_point() else t.to(dtype) for n, t in tensors.items()}
    if values["model_type"] == "minicpmo":  # its voice stays on the disk
        tensors |= {
            "apm.conv1.weight": torch.randn(32, 80, 3).to(dtype),
            "audio_projection_layer.linear1.weight": torch.randn(64, 32).to(dtype),
            "tts.projector.linear1.weight": torch.randn(32, 64).to(dtype),
        }
    names = sorted(tensors)
    parts = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    where = {}
    for i, part in enumerate(parts):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n].contiguous() for n in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    _write(
        folder,
        "model.safetensors.index.json",
        {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where},
    )


def stand_in(
    name,  # one of `PUBLISHED`
    folder,  # is made
    small=False,  # a vocabulary of a few hundred words: special ids differ then, and everything is faster
    shards=2,
    seed=0,
    dtype=None,  # of the weights on the disk; None: the published one
):
    "Write a small random checkpoint like the published one; returns its folder, see `account_of` for what is like it."
    folder = Path(folder)
    folder.mkdir(parents=True)
    values = shrunk(name)
    ids, rows = _tokenizer_files(name, folder, small)
    if small or (values["model_type"] == "qwen" and not real("qwen.tiktoken")):
        values = _renumber(values, ids, rows or 1024)
        if "text_config" in values:  # some files leave the rows to the class
            values["text_config"]["vocab_size"] = rows
    _picture_files(values, folder)
    torch.manual_seed(seed)
    config = model_config(values)
    model = random_weights(model_class(config)(config).float())
    model.save_pretrained(folder, max_shard_size="50GB")
    _write(folder, "config.json", values)
    text = values.get("text_config", {})
    ends = {k: values.get(k, text.get(k)) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write(folder, "generation_config.json", {k: v for k, v in ends.items() if v is not None})
    _shards(folder, values, dtype or stored_dtype(name, PUBLISHED[name].config), shards)
    return folder


def account_of(name, small=False):
    "What a stand-in has in common with the model of its name."
    values = PUBLISHED[name].config
    fewer = small or (values["model_type"] == "qwen" and not real("qwen.tiktoken"))
    known = None if values["model_type"] == "qwen" or "scale_emb" in values else words(name)
    kept = (
        "every field of config.json but sizes",
        "types and names of the tensors",
        *(() if fewer else ("special ids", "rows of the embeddings")),
    )
    missing = known.missing if known else ()
    words_at_hand = not small and (has_real_words(known) if known else not fewer and "scale_emb" not in values)
    unreal = () if words_at_hand else ("real words: a few hundred short ones, and others that no text becomes",)
    return Account(
        name, kept, tuple(sorted(set(differences(values, shrunk(name))) - set(SIZES["added"]))), (*missing, *unreal)
    )


def weights_besides_embeddings(folder):
    "How many numbers the files hold, without the rows of a vocabulary."
    count = Counter()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, framework="pt") as f:
            for n in f.keys():
                count["vocabulary" if any(w in n for w in ("embed_tokens", "lm_head", "wte")) else "other"] += (
                    torch.Size(f.get_slice(n).get_shape()).numel()
                )
    return count["other"]


def noise_checkpoint(
    folder: str | Path,  # must exist
    values: dict,  # of a config.json
    plan: TuningPlan,
    four_bit: bool = True,  # what the adapter says of its training
    shards: int = 4,
) -> tuple[Path, Path]:  # folder of a base, folder of an adapter for it
    "Weights of noise in the shapes of a configuration, for measuring; nothing of that size is held."
    base, adapter, noise = Path(folder) / "base", Path(folder) / "adapter", 0.02 * torch.randn(2**20)
    base.mkdir()
    adapter.mkdir()
    write_json(base / "config.json", values)
    state = {n: (torch.bfloat16, tuple(t.shape)) for n, t in on_meta(values).state_dict().items()}
    room, weight_map = sum(torch.Size(s).numel() for _, s in state.values()) / shards, {}
    for i, n in enumerate(state):
        weight_map[n] = min(shards - 1, int(sum(torch.Size(s).numel() for _, s in list(state.values())[:i]) / room))
    model = apply_plan(on_meta(values), plan)
    model.active_peft_config.save_pretrained(adapter)
    learned = {
        n: (torch.float32, tuple(t.shape))
        for n, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    files = {
        base / f"model-{i + 1:05}-of-{shards:05}.safetensors": {n: state[n] for n, k in weight_map.items() if k == i}
        for i in range(shards)
    }
    for file, entries in {**files, adapter / "adapter_model.safetensors": learned}.items():
        shard = _Shard(file, [(n, *e) for n, e in entries.items()])
        for kind, shape in entries.values():
            for left in range(torch.Size(shape).numel(), 0, -len(noise)):
                shard.add(noise[:left].to(kind))
        shard.close()
    write_json(
        base / INDEX,
        {
            "metadata": {},
            "weight_map": {n: f"model-{k + 1:05}-of-{shards:05}.safetensors" for n, k in weight_map.items()},
        },
    )
    write_json(adapter / "plan.json", plan.to_dict())
    write_json(
        adapter / "provenance.json",
        {"base": str(base), "base_fingerprint": fingerprint(base), "four_bit": four_bit, "versions": {}},
    )
    return base, adapter
