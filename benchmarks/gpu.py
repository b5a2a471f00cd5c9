"""Published shapes with random weights on one CUDA card, in NF4: tokens a second, share of the card's peak arithmetic,
and peak memory against `estimate`.

    python benchmarks/gpu.py           all models and arms, each arm in a process of its own; about 8 minutes on an H100
    python benchmarks/gpu.py --only minicpmv-2.6 --steps 6
    python benchmarks/gpu.py --tiny    scaled down, on any machine: shows that the script runs, and nothing else

On a bare machine without a network: carry the wheels of what it lacks (`pip download bitsandbytes peft accelerate`, and
`trl==1.16.0 datasets` for TRL's arm), install them with `pip install --no-index --find-links FOLDER`, and run `python
benchmarks/run.py gpu --results gpu.json` in the repository; here, `python benchmarks/run.py --fold gpu.json` takes the
result over. Nothing is fetched: shapes come from the package's list of published models, weights from a random
generator. They are made on the card, tensor by tensor, and packed at once, so that 16-bit weights of the whole model
are never anywhere.

Arms: `fit` with and without the vision cache, the `Trainer` with PEFT on the same NF4 model, and TRL's `SFTTrainer`
where it knows the model. All with bf16 autocast, gradient checkpointing, LoRA of the default plan in the language
model, and everything else frozen. The first two steps are warm-up.

Share of the peak ("MFU"): the arithmetic that the step needs, whatever an arm really computes, over its time and the
card's dense bf16 peak: 4 x weights x tokens for the language model (forward, and back through frozen weights; LoRA is
left out), 12 x layers x width x tokens^2 for its attention, 4 x weights x labels for the head, 2 x weights x patches
for the vision tower and, where it is frozen, the connector. Recomputation by checkpointing is not counted as useful."""

import argparse
import json
import statistics
import subprocess
import sys
from importlib.util import find_spec

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import TrainerCallback
from transformers import initialization as init

from common import DEVICE, now, table
from step import Collator, VisionCache, apply_plan, plain_peft, run, text
from vlm_lora_lab.models.load import packable
from vlm_lora_lab.models.parts import count
from vlm_lora_lab.models.published import on_meta
from vlm_lora_lab.plan.tuning import TuningPlan
from vlm_lora_lab.quant.memory import estimate

PEAK = {  # dense bf16 TFLOP/s with fp32 accumulation, of NVIDIA's data sheets (the SXM variant where there are several)
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "A10": 125,
}
TINY = "--tiny" in sys.argv
MODELS = {
    "minicpmv-2.6": "openbmb/MiniCPM-V-2_6",
    "qwen2.5-vl-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
}
PLAN = TuningPlan(connector="freeze")
# pictures of 448 x 448 in a row (a page and its slices), tokens of text, and those with a label
PICTURES, WORDS, LABELS = (1, 40, 8) if TINY else (10, 384, 128)
SAID = {"cache": "fit, with the cache", "here": "fit, without", "plain": "Trainer + PEFT", "trl": "TRL"}


def config_of(model):
    config = on_meta(MODELS[model]).config
    if TINY:
        language, vision = config.get_text_config(), config.vision_config
        language.update(
            dict(
                hidden_size=256,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=152_000,
            )
        )
        if getattr(language, "layer_types", None):
            language.layer_types = language.layer_types[:2]
        small = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        vision.update(
            dict(small, depth=2, num_heads=2, out_hidden_size=256, fullatt_block_indexes=[1])
            if hasattr(vision, "depth")
            else small
        )
        if hasattr(config, "resampler_num_heads"):
            config.resampler_num_heads = 2
    return config


def random_nf4(config, cls, dtype=torch.bfloat16):
    "A model with random weights on the card, its decoder in NF4; at no time is more of it in 16 bit than one tensor."
    import bitsandbytes as bnb

    # buffers hold constants, such as rotary frequencies
    with init_empty_weights(include_buffers=False), init.no_init_weights():
        model = cls(config)
        model.tie_weights()
    take = set(packable(model))
    made = {}
    g = torch.Generator(DEVICE).manual_seed(0)
    for name, module in list(model.named_modules()):
        for key, p in list(module.named_parameters(recurse=False)):
            if id(p) not in made:
                fresh = torch.empty(p.shape, dtype=dtype, device=DEVICE)
                made[id(p)] = nn.Parameter(
                    fresh.fill_(key == "weight") if p.dim() == 1 else fresh.normal_(0, 0.02, generator=g),
                    requires_grad=False,
                )
            setattr(module, key, made[id(p)])
        if name in take:
            packed = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                module.bias is not None,
                dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            packed.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=packed
            ).to(DEVICE)
            packed.bias, packed.support_avx512bf16_for_cpu = module.bias, False
            made = {k: p for k, p in made.items() if p is not module.weight}
            module.weight = None  # in 16 bit, it goes
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, packed)
    model.is_loaded_in_4bit = True
    return model.to(DEVICE)


def rows_of(model, rows):
    "As in step.py."
    torch.manual_seed(0)
    config = model.config
    words = config.get_text_config().vocab_size
    if hasattr(config, "query_num"):
        n = config.query_num * PICTURES
        bound = [(config.query_num * i, config.query_num * (i + 1)) for i in range(PICTURES)]
        data = [
            text(n, 151_000, None, WORDS, LABELS)
            | {"patches": [(torch.randn(3, 14, 1024 * 14), (32, 32)) for _ in range(PICTURES)], "image_bound": bound}
            for _ in range(rows)
        ]
        return data, Collator(0)
    data = [text(256 * PICTURES, min(words, 151_000), config.image_token_id, WORDS, LABELS) for _ in range(rows)]
    for row in data:
        row["pixels"] = torch.randn(1024 * PICTURES, 3 * 2 * 14 * 14)

    def collate(chosen):
        chosen = [data[r["row"]] if "row" in r else r for r in chosen]
        batch = {k: torch.tensor([r[k] for r in chosen]) for k in ("input_ids", "labels")}
        return batch | {
            "attention_mask": torch.ones_like(batch["input_ids"]),
            "pixel_values": torch.cat([r["pixels"] for r in chosen]),
            "image_grid_thw": torch.tensor([[1, 32, 32]] * PICTURES * len(chosen)),
            "mm_token_type_ids": (batch["input_ids"] == config.image_token_id).long(),
        }

    return data, collate


class Clock(TrainerCallback):
    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.start = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(now() - self.start)


def needed(empty, tokens, patches):
    "Floating-point operations of a row's step, by the formula at the top."
    parts, text_config = count(empty), empty.config.get_text_config()
    attention = 12 * text_config.num_hidden_layers * text_config.hidden_size * tokens**2
    head = text_config.vocab_size * text_config.hidden_size
    return (
        4 * parts["language"] * tokens
        + attention
        + 4 * head * LABELS
        + 2 * (parts["vision"] + parts["connector"]) * patches
    )


def one_arm(model_name, arm, steps):
    "Build, train, measure; one line of JSON."
    config = config_of(model_name)
    cls = type(on_meta(MODELS[model_name]))
    start = now()
    model = random_nf4(config, cls)
    built = now() - start
    data, collate = rows_of(model, 2)  # so that the cache has seen both when the clock counts
    if arm in ("plain", "trl"):
        like = apply_plan(on_meta(config), PLAN)
        model = plain_peft(model, PLAN, like, weights=False)
    else:
        model = apply_plan(model, PLAN)
    clock, cache = Clock(), VisionCache() if arm == "cache" else None
    losses = run(arm, model, data, collate, steps, 1, True, clock, cache, bf16=True)
    assert all(0 < x < 30 for x in losses), losses
    used = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
    empty = on_meta(config)
    print(
        json.dumps(
            {
                "seconds": clock.seconds[2:],
                "tokens": len(data[0]["input_ids"]),
                "peak": used,
                "built": built,
                "losses": losses[:2],
                "flops": needed(empty, len(data[0]["input_ids"]), 1024 * PICTURES),
            }
        )
    )


def arms_for(name):
    if name.startswith("minicpmv"):
        return "cache", "here", "plain"
    return ("here", "plain", "trl") if find_spec("trl") else ("here", "plain")


def report(name, steps):
    said, rows = {}, []
    for arm in arms_for(name):
        call = [
            sys.executable,
            __file__,
            "--only",
            name,
            "--arm",
            arm,
            "--steps",
            str(steps),
            *(["--tiny"] if TINY else []),
        ]
        said[arm] = json.loads(
            subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        )
    first = [r["losses"][0] for r in said.values()]
    assert max(first) - min(first) <= 0.02 * max(first), first
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    peak = next((v for k, v in PEAK.items() if k in card), None)
    guess = None if TINY else estimate(MODELS[name], PLAN, tokens=said["here"]["tokens"], pictures=PICTURES).total
    for arm, r in said.items():
        took = statistics.median(r["seconds"])
        share = f"{r['flops'] / took / peak / 1e12:.1%}" if peak else "–"
        memory = ["–", "–"]
        if r["peak"]:
            memory[0] = f"{r['peak'] / 2**30:.2f}"
        if r["peak"] and guess and arm != "plain":
            memory[1] = f"{guess / 2**30:.2f}"
        rows.append(
            [
                SAID[arm],
                f"{1000 * took:.0f}",
                f"{r['tokens'] / took:,.0f}",
                share,
                f"{took / statistics.median(said['plain']['seconds']):.2f}",
                *memory,
            ]
        )
    print(
        f"\n**{MODELS[name]}**{', scaled down' if TINY else ''}: a row of {said['here']['tokens']:,} tokens, {LABELS} "
        f"with labels, {PICTURES} pictures of 448 x 448;"
        f" built in {max(r['built'] for r in said.values()):.0f} s; first losses {min(first):.3f} … {max(first):.3f}"
    )
    table(
        ["arm", "step, ms", "tokens/s", "share of peak", "time to Trainer + PEFT", "peak, GiB", "estimate, GiB"], rows
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=tuple(MODELS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="scaled down, to see that all runs")
    parser.add_argument("--arm", choices=tuple(SAID), help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.steps < 3:
        parser.error("the first two steps are warm-up: --steps 3 or more")
    if DEVICE == "cpu" and not TINY:
        sys.exit("no CUDA card here; --tiny shows that the script runs")
    if o.arm:
        one_arm(o.only, o.arm, o.steps)
        sys.exit()
    print(
        f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else 'CPU'}, {o.steps} steps an arm, one arm after the "
        "other"
    )
    for name in [o.only] if o.only else MODELS:
        report(name, o.steps)
