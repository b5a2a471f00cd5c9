"""Our training step beside the step of the `Trainer` with PEFT, and beside TRL's `SFTTrainer`: whole training loops
that take their steps in turns.

python benchmarks/step.py --batches 6 --epochs 3 [--only page] [--checkpointing]

Every arm is a training run of its own, in a thread of its own, and all are in one process: an arm takes one step and
waits while each of the others takes the same one, in an order that rotates. A turn holds all that the loop does: batch,
forward, backward, clipping, optimizer, log. Each step gives one ratio for every pair of arms; printed are medians over
the first epoch and over all later ones, and bootstrap intervals (95 %). All arms start from the same weights, see the
same batches, and log the same losses, which is asserted. Peak memory: each arm alone in a process of its own, over two
steps.

The models are random. MiniCPM-V 2.6 scaled down: its vocabulary of 151,666, 64 queries, pictures of 448 x 448 in
patches of 14, about 100 M weights. So small a model is mostly vocabulary (78 of 100 M), at 8 B it is a seventh; what
the loss saves here is therefore an upper bound. A row holds 160 tokens of text, 40 of them an answer, and one picture
or a page (an overview and four slices). The samples in `data_samples` have fewer labels (`shares` counts them), and
fewer labels would favour us. The plan is the default one: LoRA in the language model, the resampler in full. Plain PEFT
gets the same layers.

TRL is compared on models of transformers that it supports: Qwen2.5-VL and SmolVLM, scaled down likewise, LoRA alone,
each with its own vocabulary. It is needed beside the package's own requirements (`pip install trl==1.16.0`); its loss
does without all logits as well, on a GPU at labels alone, on a CPU at every position, so that only a GPU can compare
the two fairly; it also logs entropy and accuracy of its tokens."""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, Trainer, TrainerCallback, TrainingArguments

from common import DEVICE, RATIO, Peak, device, now, ratio, seconds, table
from vlm_lora_lab.data.batch import Collator, Processor, Samples
from vlm_lora_lab.data.drawn import Drawn
from vlm_lora_lab.data.records import read_conversations, samples_folder
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.models.minicpmv import MiniCPMV, MiniCPMVConfig
from vlm_lora_lab.models.names import TensorName
from vlm_lora_lab.models.parts import layout_of
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.train.cache import VisionCache
from vlm_lora_lab.train.loss import label_only
from vlm_lora_lab.train.run import PartTrainer, Schedule, fit

TEXT = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2)
EYES = dict(hidden_size=160, intermediate_size=640, num_hidden_layers=6, num_attention_heads=4, image_size=448)
SCALED = dict(version=2.6, vocab_size=151_666, query_num=64, resampler_num_heads=4, vision_config=EYES, **TEXT)
QWEN = dict(
    text_config=dict(
        TEXT,
        vocab_size=151_936,
        rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
    ),
    vision_config=dict(
        depth=6, hidden_size=160, out_hidden_size=256, intermediate_size=640, num_heads=4, fullatt_block_indexes=[2, 5]
    ),
)
SMOL = dict(
    text_config=dict(TEXT, model_type="llama", vocab_size=49_280),
    vision_config=dict(EYES, patch_size=14),
    scale_factor=4,
    image_token_id=49_190,
)
WORDS, ANSWER = 160, 40  # tokens of text in a row, and those of them with a label


class Rows(Samples):
    "Rows that were prepared beforehand; the loop still makes batches of them."

    def __init__(self, rows):
        super().__init__(rows, SimpleNamespace(collate=Collator(0)))

    def __getitem__(self, i):
        return self.conversations[i]


def text(places, words, token=None, length=None, answer=None):
    "Ids and labels of a row: places for pictures, then text, of which the last is an answer."
    length, answer = length or WORDS, answer or ANSWER
    ids = torch.randint(10, words, (places + length,)).tolist()
    if token is not None:
        ids[:places] = [token] * places
    return {"input_ids": ids, "labels": [-100] * (places + length - answer) + ids[-answer:]}


def minicpmv(pictures, rows):
    model = MiniCPMV(MiniCPMVConfig.from_dict(SCALED))

    def patches():
        return [(torch.randn(3, 14, 1024 * 14), (32, 32)) for _ in range(pictures)]

    bound = [(64 * i, 64 * i + 64) for i in range(pictures)]
    return (
        model,
        [text(64 * pictures, 151_000) | {"patches": patches(), "image_bound": bound} for _ in range(rows)],
        Collator(0),
    )


def lab(rows):
    model, tokenizer = load_vlm("lab").float(), load_tokenizer("lab")
    data = Samples(Drawn(0, rows, "number"), Processor.of(model.config, tokenizer))
    return model, [data[i] for i in range(rows)], Collator(0)


def native(family, pictures, rows):
    "A model of transformers, and rows with what its own processor would make of a picture of 448 x 448."
    config = AutoConfig.for_model(family, **(QWEN if family == "qwen2_5_vl" else SMOL))
    model = AutoModelForImageTextToText.from_config(config)
    places, words = (256, 151_000) if family == "qwen2_5_vl" else (64, 49_000)
    data = [text(places * pictures, words, config.image_token_id) for _ in range(rows)]
    for row in data:
        row["pixels"] = (
            torch.randn(1024 * pictures, 3 * 2 * 14 * 14)
            if family == "qwen2_5_vl"
            else torch.randn(1, pictures, 3, 448, 448)
        )

    def collate(chosen):
        chosen = [data[r["row"]] if "row" in r else r for r in chosen]
        batch = {k: torch.tensor([r[k] for r in chosen]) for k in ("input_ids", "labels")}
        batch |= {
            "attention_mask": torch.ones_like(batch["input_ids"]),
            "pixel_values": torch.cat([r["pixels"] for r in chosen]),
        }
        if family == "qwen2_5_vl":
            batch |= {
                "image_grid_thw": torch.tensor([[1, 32, 32]] * pictures * len(chosen)),
                "mm_token_type_ids": (batch["input_ids"] == config.image_token_id).long(),
            }
        return batch

    return model, data, collate


SETTINGS = {  # name: (title, what makes it, its plan, arms)
    "picture": (
        "MiniCPM-V 2.6 scaled down, a picture a row",
        lambda n: minicpmv(1, n),
        TuningPlan(),
        ("cache", "here", "plain"),
    ),
    "lab": ("The lab model, drawn numbers", lab, TuningPlan(), ("cache", "here", "plain")),
    "page": (
        "MiniCPM-V 2.6 scaled down, a page a row",
        lambda n: minicpmv(5, n),
        TuningPlan(),
        ("cache", "here", "plain"),
    ),
    "qwen": (
        "Qwen2.5-VL scaled down",
        lambda n: native("qwen2_5_vl", 1, n),
        TuningPlan(connector="freeze"),
        ("here", "trl", "plain"),
    ),
    "smolvlm": (
        "SmolVLM scaled down",
        lambda n: native("smolvlm", 5, n),
        TuningPlan(connector="freeze"),
        ("cache", "here", "trl", "plain"),
    ),
}
SAID = {"cache": "here, with the cache", "here": "here, without", "plain": "Trainer + PEFT", "trl": "TRL"}


class Turns(TrainerCallback):
    "After each step, waits until the others have taken theirs; and times what lies between."

    gate = threading.Condition()

    def __init__(self, name, order):
        self.name = name
        self.order = order
        self.seconds = []

    def wait(self):
        with self.gate:
            self.gate.wait_for(lambda: not self.order or self.order[0] in (self.name, None))
            if self.order and self.order[0] is None:
                raise RuntimeError("another arm failed")
        self.start = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(now() - self.start)
        with self.gate:
            self.order.pop(0)
            self.gate.notify_all()
        if self.name in self.order:
            self.wait()


class Memory(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if not state.global_step:
            self.peak = Peak()


def plain_peft(model, plan, like, weights=True):
    "The layers that `apply_plan` chose, named to PEFT as one would do without it; the same first matrices."
    config = next(iter(like.peft_config.values()))
    names = [TensorName.of(n) for n, _ in like.named_parameters()]
    lora = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.alpha,
        lora_dropout=0.0,
        target_modules=sorted({n.module for n in names if n.lora == "lora_A"}),
        modules_to_save=config.modules_to_save,
    )
    wrapped = get_peft_model(model, lora)
    if weights:
        wrapped.load_state_dict(like.state_dict())
    assert [n for n, p in wrapped.named_parameters() if p.requires_grad] == [
        n for n, p in like.named_parameters() if p.requires_grad
    ]
    return wrapped


def trainer_options(folder, steps, batch, checkpointing, bf16):
    "What `fit` does by itself, said to a Trainer of others."
    return dict(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.01,
        max_grad_norm=1.0,
        use_cpu=DEVICE == "cpu",
        seed=0,
        data_seed=0,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=bf16,
        save_strategy="no",
        logging_steps=1,
        logging_first_step=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def run(arm, model, data, collate, steps, batch, checkpointing, callback, cache=None, bf16=False):
    "One training run; returns the losses it logged."
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(collate, Collator) and arm in ("cache", "here"):
            schedule = Schedule(max_steps=steps, batch_size=batch, learning_rate=1e-4, full_learning_rate=1e-4)
            options = dict(log_every=1, checkpoint_activations=checkpointing, save=False, callbacks=[callback])
            return fit(model, Rows(data), schedule, folder, cache=cache, **options).losses
        shared = trainer_options(folder, steps, batch, checkpointing, bf16)
        if arm == "trl":
            from datasets import Dataset
            from trl import SFTConfig, SFTTrainer

            config = SFTConfig(**shared, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
            rows = Dataset.from_dict({"row": list(range(len(data)))})
            trainer = SFTTrainer(
                model,
                config,
                data_collator=collate,
                train_dataset=rows,
                processing_class=load_tokenizer("lab"),
                callbacks=[callback],
            )
        else:
            own = (lambda *a, **k: PartTrainer(*a, full_rate=1e-4, **k)) if arm != "plain" else Trainer
            trainer = own(
                model=model,
                args=TrainingArguments(**shared, prediction_loss_only=True),
                train_dataset=Rows(data),
                data_collator=collate,
                callbacks=[callback],
            )
        trainer.callback_handler.callbacks = [
            c for c in trainer.callback_handler.callbacks if type(c).__name__ != "PrinterCallback"
        ]
        if checkpointing:
            model.enable_input_require_grads()
        with cache.at(model) if cache else nullcontext():
            trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def arms_of(setting, rows, chosen=None):
    "The models of the arms, equal but for what wraps them."
    title, make, plan, arms = SETTINGS[setting]
    torch.manual_seed(0)
    model, data, collate = make(rows)
    empty, ours = copy.deepcopy(model), apply_plan(model, plan)
    arms = [a for a in arms if chosen in (None, a) and (a != "trl" or find_spec("trl"))]
    models = {
        a: plain_peft(copy.deepcopy(empty), plan, ours) if a in ("plain", "trl") else copy.deepcopy(ours) for a in arms
    }
    return title, {a: m.to(DEVICE) for a, m in models.items()}, data, collate


def eyes(model, batch, rounds=3):
    "The vision tower's share of a forward pass, with chapter 50's loss."
    took, base = [], model.get_base_model()
    tower = base.get_submodule(layout_of(model).vision[0])
    hooks = [
        tower.register_forward_pre_hook(lambda *a: took.append(now())),
        tower.register_forward_hook(lambda *a: took.append(now())),
    ]
    model.train()
    with label_only(model), torch.no_grad():
        whole = [seconds(lambda: model(**{k: v.to(DEVICE) for k, v in batch.items()})) for _ in range(rounds + 1)][1:]
    for h in hooks:
        h.remove()
    return statistics.median((b - a) / w for a, b, w in zip(took[2::2], took[3::2], whole))


def in_turns(setting, batches, epochs, batch, checkpointing):
    title, models, data, collate = arms_of(setting, batches * batch)
    seen = eyes(next(iter(models.values())), collate(data[:batch]))
    names = list(models)
    steps = batches * epochs
    order = [
        a
        for k in range(steps)
        for a in (names[k % len(names) :] + names[: k % len(names)] if len(names) > 2 or k % 2 else names[::-1])
    ]
    order[: len(names)] = names
    turns, cache = {a: Turns(a, order) for a in names}, VisionCache()

    def one(arm):
        try:
            turns[arm].wait()
            return run(
                arm,
                models[arm],
                data,
                collate,
                steps,
                batch,
                checkpointing,
                turns[arm],
                cache if arm == "cache" else None,
            )
        except BaseException:  # also Ctrl-C: the other arms must not wait for their turn; it is raised again
            with Turns.gate:
                order[:] = [None]
                Turns.gate.notify_all()
            raise

    with ThreadPoolExecutor(len(names)) as pool:
        futures = {a: pool.submit(one, a) for a in names}
        errors = [e for f in futures.values() if (e := f.exception())]
        if errors:
            raise next((e for e in errors if str(e) != "another arm failed"), errors[0])
        losses = {a: f.result() for a, f in futures.items()}
    for k, row in enumerate(zip(*losses.values())):
        assert max(row) - min(row) <= 2e-3 * max(row), (k, losses)
    sizes = [
        statistics.mean(len(r["input_ids"]) for r in data),
        statistics.mean(sum(x != -100 for x in r["labels"]) for r in data),
    ]
    return title, seen, {a: t.seconds for a, t in turns.items()}, cache, sizes


def peak(setting, arm, batch, checkpointing):
    same = [
        "--only",
        setting,
        "--memory",
        arm,
        "--batch-size",
        str(batch),
        *(["--checkpointing"] if checkpointing else []),
        *(["--tiny"] if TINY else []),
    ]
    return int(
        subprocess.run(
            [sys.executable, __file__, *same], capture_output=True, text=True, check=True
        ).stdout.splitlines()[-1]
    )


def shares():
    """Labels among the tokens of our own samples, as MiniCPM-V 2.6 would be given them (64 queries, the lab's
    tokenizer)."""
    process, found = Processor(load_tokenizer("lab"), 64, 14, 448, True), []
    for file in (samples_folder() / "mixed.json", samples_folder() / "handwriting" / "test.json"):
        rows = [process.measure(c) for c in read_conversations(file)[:50]]
        found.append(
            f"{file.parent.name}/{file.name} "
            f"{sum(sum(x != -100 for x in r.labels) for r in rows) / sum(len(r.input_ids) for r in rows):.1%}"
        )
    return ", ".join(found)


def report(setting, batches, epochs, batch, checkpointing):
    title, seen, took, cache, sizes = in_turns(setting, batches, epochs, batch, checkpointing)
    print(
        f"\n**{title}**, batch {batch}, {sizes[0]:.0f} tokens a row, {sizes[1] / sizes[0]:.0%} of them with labels, "
        f"{'with' if checkpointing else 'without'} checkpointing; the vision tower is {seen:.0%} of a forward pass"
        + (f"; {cache}" if "cache" in took else "")
    )
    rows = []
    for a, b in [
        (a, b) for a in ("cache", "here") for b in ("plain", "trl", "here") if a in took and b in took and a != b
    ]:
        for epoch, part in (("first", slice(1, batches)), ("later", slice(batches, None))):
            target = None
            if b == "plain" and epoch == "later" and setting != "lab":
                target = 0.8 if a == "here" else None
                if a == "cache" and seen >= 0.5:
                    target = 0.5
            rows.append(
                [
                    f"{SAID[a]} / {SAID[b]}",
                    epoch,
                    f"{1000 * statistics.median(took[b][part]):.0f}",
                    *ratio([x / y for x, y in zip(took[a][part], took[b][part])], target),
                ]
            )
    table(["step", "epoch", "the other's step, ms", *RATIO], rows)
    peaks = {a: peak(setting, a, batch, checkpointing) for a in took}
    table(
        ["peak memory of two steps", "MB", "ratio to Trainer + PEFT"],
        [[SAID[a], f"{p / 1e6:.0f}", f"{p / peaks['plain']:.2f}"] for a, p in peaks.items()],
    )


TINY = "--tiny" in sys.argv
if TINY:
    WORDS, ANSWER = 24, 6
    for values in (TEXT, SCALED, QWEN["text_config"], SMOL["text_config"]):
        values |= dict(
            hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
        )
    QWEN["text_config"]["rope_parameters"] = QWEN["text_config"]["rope_parameters"] | {"mrope_section": [4, 6, 6]}
    QWEN["vision_config"] |= dict(depth=1, out_hidden_size=64, fullatt_block_indexes=[0])
    for values in (EYES, SMOL["vision_config"]):
        values |= dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=6, help="in an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, help="default: 2, for the lab model 8")
    parser.add_argument("--only", choices=tuple(SETTINGS))
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, in all arms")
    parser.add_argument("--tiny", action="store_true", help="models that prove nothing, to see that all runs")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    o = parser.parse_args()

    def size(setting):
        return o.batch_size or (8 if setting == "lab" else 2)

    if o.memory:
        _, models, data, collate = arms_of(o.only, 2 * size(o.only), o.memory)
        memory = Memory()
        run(
            o.memory,
            models[o.memory],
            data,
            collate,
            2,
            size(o.only),
            o.checkpointing,
            memory,
            VisionCache() if o.memory == "cache" else None,
        )
        print(memory.peak.nbytes)
        sys.exit()
    print(f"{device()}, {o.batches} batches, {o.epochs} epochs. Labels in our samples: {shares()}.")
    for setting in [o.only] if o.only else SETTINGS:
        report(setting, o.batches, o.epochs, size(setting), o.checkpointing)
    if not find_spec("trl"):
        print("\nTRL is not installed: `pip install trl==1.16.0`.")
