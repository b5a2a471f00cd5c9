"""What does the vision cache (chapter 51) save? Three copies of one model take the same steps in turns, in an order that rotates: one with the cache and
chapter 50's loss, one with the loss alone, and a plain one, which computes all logits.

    python benchmarks/cache.py --batches 6 --epochs 3

The lab model, and MiniCPM-V 2.6 scaled down to about 100 M weights with its real vocabulary, where the frozen vision tower is about half of the forward pass.
The plan is the default one: LoRA in the language model, the resampler in full. Each batch gives two ratios: the copy with the cache against the one
with the loss alone, and against the plain one; printed are medians over the first epoch and over all later ones, and bootstrap intervals (95 %)."""

import argparse
import copy
import random
import statistics
import time

import torch

from vlm_lora_lab.data.batch import Collator, Processor, Samples
from vlm_lora_lab.data.drawn import Drawn
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.models.minicpmv import MiniCPMV, MiniCPMVConfig
from vlm_lora_lab.plan import TuningPlan, apply_plan
from vlm_lora_lab.train.cache import VisionCache
from vlm_lora_lab.train.loss import label_only

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALED = dict(
    version=2.6, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, vocab_size=151_666, query_num=64,
    resampler_num_heads=4, vision_config=dict(hidden_size=160, intermediate_size=640, num_hidden_layers=6, num_attention_heads=4, image_size=448),
)  # fmt: skip


def lab(n):
    model, tokenizer = load_vlm("lab").float(), load_tokenizer("lab")
    processor = Processor.of(model.config, tokenizer)
    data, collate = Samples(Drawn(0, 8 * n, "number"), processor), Collator(tokenizer.pad_token_id)
    return model, [collate([data[i] for i in range(8 * k, 8 * k + 8)]) for k in range(n)]


def scaled(n):
    "One picture of 448 × 448 pixels, 64 places for it, 160 tokens of text, 40 of them to learn; two rows in a batch."
    model = MiniCPMV(MiniCPMVConfig.from_dict(SCALED))
    ids, keep = torch.randint(0, 151_666, (n, 2, 224)), torch.arange(224) >= 184
    bound = torch.tensor([[0, 2, 66], [1, 2, 66]])
    pictures = torch.randn(n, 2, 3, 14, 1024 * 14)
    return model, [dict(input_ids=i, labels=torch.where(keep, i, -100), pixel_values=p, tgt_sizes=torch.tensor([[32, 32]] * 2), image_bound=bound) for i, p in zip(ids, pictures)]


def now():
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(f):
    start = now()
    f()
    return now() - start


def step(model, optimizer, batch):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def share(model, batch, rounds=3):
    "Of the vision tower in a forward pass."
    tower = model.get_base_model().vpm
    with torch.no_grad():
        pairs = [(seconds(lambda: tower(batch["pixel_values"], batch["tgt_sizes"])), seconds(lambda: model(**batch))) for _ in range(rounds)]
    return statistics.median(a / b for a, b in pairs)


def interval(values, rounds=2000):
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(rounds))
    return medians[int(0.025 * rounds)], medians[int(0.975 * rounds)]


def measure(make, batches, epochs):
    torch.manual_seed(0)
    model, data = make(batches)
    model = apply_plan(model, TuningPlan()).to(DEVICE).train()
    data = [{k: v.to(DEVICE) for k, v in b.items()} for b in data]
    copies = {"cache": model, "loss": copy.deepcopy(model), "plain": copy.deepcopy(model)}
    arms = {k: (m, torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4)) for k, m in copies.items()}
    ratios, usual, cache, names = {(e, k): [] for k in ("loss", "plain") for e in ("first", "later")}, [], VisionCache(), list(arms)
    with label_only(copies["loss"]), label_only(model):
        seen = share(copies["loss"], data[0])
        for arm in arms.values():
            step(*arm, data[0])  # warm
        with cache.at(model):
            for epoch in range(epochs):
                for k, batch in enumerate(data):
                    took = {i: seconds(lambda i=i: step(*arms[i], batch)) for i in names[k % 3 :] + names[: k % 3]}
                    for other in ("loss", "plain"):
                        ratios["later" if epoch else "first", other].append(took["cache"] / took[other])
                    usual.append(took["plain"])
        losses = [step(*arm, data[0]) for arm in arms.values()]
    assert max(losses) / min(losses) < 1.001, losses
    return seen, ratios, statistics.median(usual), cache


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=6, help="in an epoch")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}, {args.batches} batches, {args.epochs} epochs")
    for name, make, n in (("lab, batch 8", lab, 4 * args.batches), ("MiniCPM-V 2.6 scaled down, batch 2", scaled, args.batches)):
        seen, ratios, usual, cache = measure(make, n, args.epochs)
        print(f"{name}: eyes {seen:.0%} of the forward pass, plain step {1000 * usual:.0f} ms; {cache}")
        for (epoch, other), values in ratios.items():
            low, high = interval(values)
            print(f"    {epoch} epoch, against {'the loss alone' if other == 'loss' else 'plain':15}{statistics.median(values):.2f}  {low:.2f} … {high:.2f}", flush=True)
