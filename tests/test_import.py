"""The package lives beside a transformers that knows our model types, and leaves its registries alone."""

import subprocess
import sys

import pytest

KNOWN_BEFORE = """
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
for kind in ("minicpmv", "minicpmo", "qwen"):
    config = type("Theirs", (PreTrainedConfig,), {"model_type": kind})
    AutoConfig.register(kind, config)
    AutoModelForImageTextToText.register(config, type("TheirModel", (PreTrainedModel,), {"config_class": config}))
"""
WORK = """
import json, sys
from pathlib import Path
import torch
from vlm_lora_lab.data.batch import Processor
from vlm_lora_lab.data.drawn import draw
from vlm_lora_lab.evaluate.ask import generate_answers
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.models.minicpmv import MiniCPMOConfig, MiniCPMV, MiniCPMVConfig
from vlm_lora_lab.models.published import model_class, model_config, on_meta
from vlm_lora_lab.models.qwenvl import QwenVL, QwenVLConfig
from vlm_lora_lab.cli import main

model = load_vlm("lab")
assert type(model) is MiniCPMV and isinstance(model.config, MiniCPMVConfig)
for name, ours, config in (
    ("openbmb/MiniCPM-V-2_6", MiniCPMV, MiniCPMVConfig),
    ("openbmb/MiniCPM-o-2_6", MiniCPMV, MiniCPMOConfig),
    ("Qwen/Qwen-VL-Chat", QwenVL, QwenVLConfig),
):
    built = on_meta(name)
    assert type(built) is ours and isinstance(built.config, config), name
asked, processor = draw(0, "number"), Processor.of(model.config, load_tokenizer("lab"))
assert generate_answers(model, processor, [asked]) == [asked.answer]
out = Path(sys.argv[1])
assert main(["train", "--data", sys.argv[2], "--output", str(out), "--max-steps", "3"]) == 0
assert main(["merge", str(out / "adapter"), "--output", str(out.parent / "merged")]) == 0
assert type(load_vlm(out.parent / "merged")) is MiniCPMV
print("all works")
"""


def run(code, *args):
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=240)


def test_everything_works_where_transformers_knows_our_model_types(tmp_path):
    from vlm_lora_lab.data.records import samples_folder

    done = run(KNOWN_BEFORE + WORK, tmp_path / "out", samples_folder() / "handwriting" / "test.json")
    assert done.returncode == 0 and done.stdout.strip().endswith("all works"), done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("kind", ["minicpmv", "minicpmo", "qwen"])
def test_others_can_still_register_these_types_afterwards(kind):
    code = f"""
import vlm_lora_lab.models.minicpmv, vlm_lora_lab.models.qwenvl, vlm_lora_lab.models.published
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
assert {kind!r} not in CONFIG_MAPPING._extra_content
AutoConfig.register({kind!r}, type("Theirs", (PreTrainedConfig,), {{"model_type": {kind!r}}}))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr[-2000:]
