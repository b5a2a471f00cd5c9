"""A tiny random model and a batch with a picture for every family the package knows; used by several tests."""

import torch
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

# Chat templates as transformers' families have them, with the answers marked, so that transformers itself can say which tokens they are.
VISION_TEMPLATE = (  # Qwen2-VL and later: a picture in brackets, wherever it stands among the texts
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% elif m.content is string %}{{ m.content }}<|im_end|>\n"
    "{% else %}{% for part in m.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING_TEMPLATE = (  # MiniCPM-V 4.6: parts on lines of their own, no thoughts but in the last answer, and a block for them there, if empty
    "{% macro said(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{{ '<|image_pad|>' if part.type == 'image' else part.text }}{{ '' if loop.last else '\n' }}{% endfor %}{% endif %}{% endmacro %}"
    "{% for m in messages %}{% set text = said(m.content) | trim %}{% if m.role == 'assistant' %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1] | trim if '</think>' in text else '' %}"
    "<|im_start|>assistant\n{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text.split('</think>')[-1] | trim }}<|im_end|>\n"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{{ '<think>\n' if enable_thinking | default(false) else '<think>\n\n</think>\n\n' }}{% endif %}"
)


def native_folder(family, folder, lab, seed=0, tied=False):
    "A tiny random model of one of transformers' own families that can be trained from files, with tokenizer, template and picture processor, as on the hub."
    import json
    import shutil

    from transformers import MiniCPMV4_6ImageProcessorPil, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil

    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(lab / file, folder)
    tokenizer, sliced = PreTrainedTokenizerFast.from_pretrained(folder), family.startswith("minicpmv4")
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = THINKING_TEMPLATE if sliced else VISION_TEMPLATE
    tokenizer.save_pretrained(folder)
    number = tokenizer.convert_tokens_to_ids
    config = tiny_config(family).to_dict()
    config |= {"image_token_id": number("<|image_pad|>"), "video_token_id": number("<|video_pad|>")}
    config |= {k: number(t) for k, t in {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>", "image_start_id": "<image>", "image_end_id": "</image>",
                                         "slice_start_id": "<slice>", "slice_end_id": "</slice>"}.items() if k in config}  # fmt: skip
    if "newline_id" in config:
        config["newline_id"] = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    config["text_config"] |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 2048}
    if tied:  # said in both places, as published
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    if family == "qwen3_vl":  # what the second merger adds comes in after the second layer; only a third one can see it
        config["text_config"] |= {"num_hidden_layers": 3}
    torch.manual_seed(seed)
    AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config)).float().save_pretrained(folder)
    patch = config["vision_config"]["patch_size"]
    images = MiniCPMV4_6ImageProcessorPil(scale_resolution=112, max_slice_nums=4, patch_size=patch) if sliced else Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": 56 * 56, "longest_edge": 112 * 112})  # fmt: skip
    images.save_pretrained(folder)
    return folder


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
