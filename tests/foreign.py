"""Checkpoints of other scripts, re-enacted on tiny models: the same parameters trained, the same file names, keys and
types, the same things forgotten."""

import json
import warnings
from types import SimpleNamespace

import torch
from families import batch_of, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from vlm_lora_lab.models.load import load_vlm

MINICPMV = r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)"


def base_of(family, folder):
    "A tiny base in its family's own layout."
    model = tiny_model(family)
    model.save_pretrained(folder)
    return folder


def train(model, family, dtype=torch.float32):
    "Two steps of AdamW on all that asks for a gradient; then the values that the script's type can hold."
    batch, trained = batch_of(family, model), [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for p in trained:
        p.data = p.data.to(dtype).float()
    return model.eval()


def logits(model, family):
    batch = {k: v for k, v in batch_of(family, model).items() if k != "labels"}
    with torch.no_grad():
        return model.eval()(**batch).logits


def settings(folder):
    "What transformers' Trainer leaves beside the weights: among it a pickle of a class."
    torch.save(SimpleNamespace(tune_vision=True, learning_rate=1e-6), folder / "training_args.bin")
    (folder / "trainer_state.json").write_text('{"global_step": 2}')


def lora_only(model):
    """The filter of FastChat, from which the scripts of Qwen-VL, MiniCPM-V and others descend: what has 'lora_' in its
    name."""
    return {n: p.detach() for n, p in model.named_parameters() if "lora_" in n}


def as_peft(state):
    "Keys as PEFT writes them: without the adapter's name."
    return {
        k.replace(".default.", ".").replace(".default", "").replace("modules_to_save.", ""): v.contiguous().clone()
        for k, v in state.items()
    }


def minicpmv(folder, base, saved="modules_to_save", dtype=torch.bfloat16, tune_vision=True):
    """OpenBMB/MiniCPM-V finetune/finetune.py and trainer.py.

    saved="nothing": @ d2db62b, May to July 2024: `requires_grad_(True)` after get_peft_model, and the filter on "lora_"
    at the end (issue #222). saved="side": finetune/readme.md of June 2024: vpm_resampler_embedtokens.pt beside the
    adapter, read back by load_state_dict(strict=False) on the PEFT model. saved="modules_to_save": since 2024-07-15
    (#273)."""
    config = dict(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=MINICPMV, task_type="CAUSAL_LM")
    if saved == "modules_to_save":
        model = get_peft_model(
            load_vlm(base),
            LoraConfig(**config, modules_to_save=["embed_tokens", "resampler"] + ["vpm"] * tune_vision),
            autocast_adapter_dtype=False,
        )
    else:
        model = get_peft_model(load_vlm(base), LoraConfig(**config), autocast_adapter_dtype=False)
        model.base_model.model.resampler.requires_grad_(True)
        model.base_model.model.llm.model.embed_tokens.requires_grad_(True)
        model.base_model.model.vpm.requires_grad_(tune_vision)
    train(model, "minicpmv-2.6", dtype)
    folder.mkdir()
    model.active_peft_config.base_model_name_or_path = str(base)
    model.active_peft_config.save_pretrained(folder)
    state = {
        n: p.detach()
        for n, p in model.named_parameters()
        if "lora_" in n or (".modules_to_save." in n and saved == "modules_to_save")
    }
    save_file(
        {k: v.to(dtype) for k, v in as_peft(state).items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    if saved == "side":
        side = {
            k: v.to(dtype)
            for k, v in model.state_dict().items()
            if any(s in k for s in ("vpm", "resampler", "embed_tokens"))
        }
        torch.save(side, folder / "vpm_resampler_embedtokens.pt")
    settings(folder)
    return model


def qwenvl(folder, base, q_lora=False):
    """QwenLM/Qwen-VL finetune.py @ 0f31930: wte and lm_head in modules_to_save, and a state dict of "lora_" alone,
    saved as PEFT of that time did (adapter_model.bin).

    The Trainer's own checkpoints in between pass through no such filter."""
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules=["c_attn", "attn.c_proj", "w1", "w2"],
        task_type="CAUSAL_LM",
        modules_to_save=None if q_lora else ["wte", "lm_head"],
    )
    model = train(get_peft_model(load_vlm(base), config, autocast_adapter_dtype=False), "qwen")
    folder.mkdir()
    model.active_peft_config.base_model_name_or_path = "Qwen/Qwen-VL"
    model.active_peft_config.save_pretrained(folder)
    torch.save(as_peft(lora_only(model)), folder / "adapter_model.bin")
    settings(folder)
    model.save_pretrained(folder / "checkpoint-2", save_embedding_layers=False)
    torch.save({"state": {0: {"exp_avg": torch.zeros(3)}}}, folder / "checkpoint-2" / "optimizer.pt")
    return model


def qwen3vl(folder, base):
    """QwenLM/Qwen3-VL qwen-vl-finetune/qwenvl/train/train_qwen.py @ 01b3378: LoRA on q, k, v, o alone, whatever
    tune_mm_* say (#1952); the whole state dict goes to PEFT, which takes its own."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.05,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = load_vlm(base)
    model.requires_grad_(False)
    model = train(get_peft_model(model, config, autocast_adapter_dtype=False), "qwen3_vl", torch.bfloat16)
    model.active_peft_config.base_model_name_or_path = "Qwen/Qwen3-VL-8B-Instruct"
    model.save_pretrained(
        folder, state_dict={k: v.bfloat16() for k, v in model.state_dict().items()}, save_embedding_layers=False
    )
    settings(folder)
    return model


def series_finetune(folder, base, older=False, whole=False, vision_lora=False, family="qwen2_5_vl"):
    """2U1/Qwen-VL-Series-Finetune src/train/train_sft.py: LoRA on every Linear and Embedding outside of "visual" (by
    full names), then visual and merger opened.

    At the end what asks for a gradient and is no LoRA goes to non_lora_state_dict.bin; in checkpoint-N (whole=True) all
    that is no LoRA, so the base as well. older=True: names as transformers before 4.52 had them, which the script's
    merge cut at fixed places (#259)."""
    model = load_vlm(base)
    names = [
        n
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Embedding)) and (vision_lora or "visual" not in n)
    ]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=names), autocast_adapter_dtype=False)
    for n, p in model.named_parameters():
        if "merger" in n or ("visual" in n and not vision_lora):
            p.requires_grad_(True)
    train(model, family)
    folder.mkdir()
    model.get_base_model().config.save_pretrained(folder)
    model.active_peft_config.base_model_name_or_path = "Qwen/Qwen2.5-VL-3B-Instruct"
    model.active_peft_config.save_pretrained(folder)
    rename = (
        (
            lambda k: k.replace("model.model.language_model.", "model.model.").replace(
                "model.model.visual.", "model.visual."
            )
        )
        if older
        else (lambda k: k)
    )
    save_file(
        {rename(k): v for k, v in as_peft(lora_only(model)).items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    rest = {
        rename(n): p.detach() for n, p in model.named_parameters() if "lora_" not in n and (whole or p.requires_grad)
    }
    torch.save(rest, folder / "non_lora_state_dict.bin")
    settings(folder)
    return model


def swift_llm(folder, base):
    """modelscope/ms-swift swift/tuner_plugin/lora_llm.py @ 1c4956e: LoRA on the language model, vision tower and
    aligner in full, saved as vit.safetensors and read with strict=False."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r"^(model\.language_model(?=\.).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj))$",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_vlm(base), config, autocast_adapter_dtype=False)
    model.base_model.model.model.visual.requires_grad_(True)
    train(model, "qwen2_5_vl", torch.bfloat16)
    state = {n: p.detach().bfloat16() for n, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    save_file(
        {k: v for k, v in state.items() if ".visual." in k}, folder / "vit.safetensors", metadata={"format": "pt"}
    )
    (folder / "args.json").write_text(
        json.dumps(
            {"train_type": "lora_llm", "lora_rank": 4, "freeze_vit": False, "freeze_aligner": False, "quant_bits": None}
        )
    )
    settings(folder)
    return model


def swift(folder, base):
    """modelscope/ms-swift, train_type lora with freeze_vit and freeze_aligner off: LoRA on every linear layer but the
    head, a plain PEFT folder with args.json."""
    model = load_vlm(base)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    model = train(
        get_peft_model(
            model,
            LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"),
            autocast_adapter_dtype=False,
        ),
        "qwen3_vl",
        torch.bfloat16,
    )
    model.save_pretrained(
        folder, state_dict={k: v.bfloat16() for k, v in model.state_dict().items()}, save_embedding_layers=False
    )
    (folder / "args.json").write_text(
        json.dumps(
            {
                "train_type": "lora",
                "lora_rank": 4,
                "freeze_vit": False,
                "freeze_aligner": False,
                "freeze_llm": False,
                "quant_bits": None,
            }
        )
    )
    settings(folder)
    return model


def llamafactory(folder, base, zero3=False, family="qwen2_vl", additional=("embed_tokens", "lm_head")):
    """hiyouga/LLaMA-Factory src/llamafactory/model/adapter.py @ 01d87b8: lora_target all, additional_target
    embed_tokens,lm_head in modules_to_save, adapters in 32 bit. On a tied base each of them leaves the tie.

    zero3=True: as issue #7665 found the files, with tensors of shape [0]."""
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=r"^(?!.*(visual)).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
        task_type="CAUSAL_LM",
        modules_to_save=list(additional),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT speaks of the tie
        model = train(get_peft_model(load_vlm(base), config, autocast_adapter_dtype=False), family)
    model.save_pretrained(folder, save_embedding_layers=False)
    if zero3:
        state = {
            k: v if "lora_" in k else v[:0].flatten()
            for k, v in as_peft({n: p.detach() for n, p in model.named_parameters() if p.requires_grad}).items()
        }
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "README.md").write_text("---\nlibrary_name: peft\ntags:\n- llama-factory\n- lora\n---\n")
    (folder / "trainer_log.jsonl").write_text('{"loss": 1.0}\n')
    settings(folder)
    return model


def llamafactory_freeze(folder, base):
    "The same, finetuning_type freeze: the last layer of the language model is trained, and the whole model saved."
    model = load_vlm(base)
    model.requires_grad_(False)
    model.model.language_model.layers[-1].requires_grad_(True)
    train(model, "qwen2_vl").save_pretrained(folder)
    settings(folder)
    return model


def recipe(folder, base):
    """The comment in QwenLM/Qwen-VL issue #378: every module's parameters under f'{name}.{param_name}', which writes
    each once more with a leading dot."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["c_attn", "attn.c_proj", "w1", "w2"], task_type="CAUSAL_LM")
    model = get_peft_model(load_vlm(base), config, autocast_adapter_dtype=False)
    inner = model.base_model.model
    for module in (inner.transformer.visual, inner.transformer.wte, inner.lm_head):
        module.requires_grad_(True)
    train(model, "qwen")
    folder.mkdir()
    model.active_peft_config.save_pretrained(folder)
    torch.save(
        {f"{n}.{k}": p.detach() for n, m in model.named_modules() for k, p in m.named_parameters() if p.requires_grad},
        folder / "lora_adapter_model.pth",
    )
    return model


def dump(folder, base):
    """torch.save(model.state_dict(), 'adapter_model.bin'): a whole model that calls itself an adapter (here after
    MiniCPM-V's training; PEFT finds none of its keys)."""
    model = minicpmv(folder, base, dtype=torch.float32)
    (folder / "adapter_model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "adapter_model.bin")
    return model
