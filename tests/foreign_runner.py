"""Trains with somebody else's tool, in that tool's environment, and writes down what the tool's own model says.

`foreign_tools.py` starts it; nothing of this project is imported here. A hook on `transformers.Trainer.train` asks the
model as it stands in memory after training, before anything is saved, so that what a tool loses on its way to the disk
is seen."""

import gc
import inspect
import json
import os
import sys
import traceback
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch
import transformers
from safetensors.torch import load_file, save_file

SEEN = {}


def complete_torchvision():
    """torchvision's wheel for CUDA beside a torch for a CPU: its compiled part does not load, and its import ends when
    it describes operators that are not there. Resizing, all that pictures need, is plain torch."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        kept = torch.library.register_fake, torch.library.register_autograd
        torch.library.register_fake = torch.library.register_autograd = lambda *_, **__: lambda f: f
        import torchvision  # noqa: F401

        torch.library.register_fake, torch.library.register_autograd = kept


def complete_torchaudio():
    "Likewise; LLaMA-Factory imports it, and uses it for sounds alone."
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = ModuleType("torchaudio")
        sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)


def told(model, inputs):
    "Logits of the last positions, a greedy answer, and the parameters that were trained."
    model = model.eval()
    for module in model.modules():  # ms-swift prepares its batches in one, which would take these inputs for a batch
        module._forward_pre_hooks.clear()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(inner.forward).parameters
    given = {k: v for k, v in inputs.items() if k in known}
    trained = [(n, p.numel()) for n, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        logits = model(**given, use_cache=False).logits[0, -3:].float()
        answer = model.generate(**given, max_new_tokens=4, do_sample=False)[0, given["input_ids"].shape[1] :]
    return {"logits": logits.contiguous(), "answer": answer.contiguous()}, trained


def hook():
    "After training, ask."
    train = transformers.Trainer.train

    def trained(self, *args, **kwargs):
        done = train(self, *args, **kwargs)
        tensors, names = told(self.accelerator.unwrap_model(self.model), SEEN["inputs"])
        SEEN.update(tensors=tensors, trained=names)
        return done

    transformers.Trainer.train = trained


def trl(job):
    "SFTTrainer as its documentation shows it for vision-language models."
    import peft
    from datasets import Dataset, Image, Sequence
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    row = job["row"]
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["question"]}]},
        {"role": "assistant", "content": [{"type": "text", "text": row["answer"]}]},
    ]
    data = Dataset.from_list([{"messages": turns, "images": [row["image"]]}] * 4)
    data = data.cast_column("images", Sequence(Image()))
    model = transformers.AutoModelForImageTextToText.from_pretrained(job["base"], dtype=torch.float32)
    asked = dict(job["asked"])
    config = None
    if "trains" in asked:  # full, of these parts
        for n, p in model.named_parameters():
            p.requires_grad_(any(part in n for part in asked["trains"]))
    else:
        config = getattr(peft, asked.pop("config", "LoraConfig"))(**asked, task_type="CAUSAL_LM")
    args = SFTConfig(
        output_dir=job["output"],
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        warmup_steps=0,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        max_length=None,
        save_strategy="no",
        logging_steps=1,
    )
    trainer = SFTTrainer(model, args, train_dataset=data, peft_config=config, processing_class=processor(job["base"]))
    trainer.train()
    trainer.save_model(job["output"])


def processor(base):
    "With the tokenizer's chat template, where the folder has no other."
    found = transformers.AutoProcessor.from_pretrained(base)
    found.chat_template = found.chat_template or found.tokenizer.chat_template
    return found


def llamafactory(job):
    "`llamafactory-cli train`, called as that command calls it."
    from llamafactory.train.tuner import run_exp

    data = Path(job["output"]).parent / "data"
    data.mkdir(exist_ok=True)
    row = job["row"]
    turns = [
        {"role": "user", "content": "<image>" + row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]
    (data / "rows.json").write_text(json.dumps([{"messages": turns, "images": [row["image"]]}] * 4))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    about = {"file_name": "rows.json", "formatting": "sharegpt", "tags": tags}
    about["columns"] = {"messages": "messages", "images": "images"}
    (data / "dataset_info.json").write_text(json.dumps({"rows": about}))
    run_exp(
        {
            "model_name_or_path": job["base"],
            "stage": "sft",
            "do_train": True,
            "dataset": "rows",
            "dataset_dir": str(data),
            "template": {"qwen3_vl": "qwen3_vl_nothink"}.get(job["model_type"], "qwen2_vl"),
            "cutoff_len": 1024,
            "output_dir": job["output"],
            "overwrite_output_dir": True,
            "per_device_train_batch_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "report_to": "none",
            "use_cpu": True,
            "preprocessing_num_workers": 1,
            "flash_attn": "sdpa",
            "disable_gradient_checkpointing": True,
            "save_only_model": True,
            **job["asked"],
        }
    )


def swift(job):
    "`swift sft`, called as that command calls it."
    from swift import sft_main
    from swift.template.templates.qwen import Qwen2VLTemplate

    values = json.loads((Path(job["base"]) / "config.json").read_text())  # it has the published ids written into it
    Qwen2VLTemplate.image_token_id = values["image_token_id"]
    Qwen2VLTemplate.video_token_id = values["video_token_id"]
    row = job["row"]
    turns = [
        {"role": "user", "content": "<image>" + row["question"]},
        {"role": "assistant", "content": row["answer"]},
    ]
    data = Path(job["output"]).parent / "rows.jsonl"
    data.write_text("\n".join([json.dumps({"messages": turns, "images": [row["image"]]})] * 4))
    flags = {
        "model": job["base"],
        "model_type": job["model_type"],
        "template": job["model_type"],
        "dataset": str(data),
        "torch_dtype": "float32",
        "bf16": "false",
        "fp16": "false",
        "attn_impl": "sdpa",
        "output_dir": job["output"],
        "add_version": "false",
        "max_steps": "2",
        "save_steps": "2",
        "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "1",
        "gradient_checkpointing": "false",
        "learning_rate": "1e-2",
        "warmup_ratio": "0",
        "dataset_num_proc": "1",
        "dataloader_num_workers": "0",
        "split_dataset_ratio": "0",
        "report_to": "none",
        "use_cpu": "true",
        "save_only_model": "true",
        "load_from_cache_file": "false",
        "max_length": "1024",
        **job["asked"],
    }
    words = []
    for k, v in flags.items():
        words += [f"--{k}", *(v if isinstance(v, list) else [str(v)])]
    sft_main(words)


def versions():
    found = {}
    for name in ("trl", "llamafactory", "ms-swift", "transformers", "peft", "accelerate", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def run(job, tool):
    "One job; what came of it lies beside the folder that the tool wrote."
    output = Path(job["output"])
    SEEN["inputs"] = load_file(job["inputs"])
    try:
        {"trl": trl, "llamafactory": llamafactory, "swift": swift}[tool](job)
        save_file(SEEN["tensors"], output.parent / "told.safetensors")
        said = {"trained": SEEN["trained"], "error": None}
    except Exception as e:  # of the tool, whatever it is: the row says so
        traceback.print_exc()
        said = {"trained": [], "error": f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"}
    (output.parent / "said.json").write_text(json.dumps(said | {"versions": versions()}))
    gc.collect()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    complete_torchvision()
    complete_torchaudio()
    hook()
    for job in json.loads(Path(sys.argv[2]).read_text()):
        run(job, sys.argv[1])
