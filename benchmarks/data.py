"""How fast are rows prepared, beside upstream's way of doing it?

python benchmarks/data.py [--rows 240] [--rounds 3] [--workers 2] [--step 0.25] [--many 100000]

Three ways, interleaved, each in a process of its own:

  upstream's way   as OpenBMB/MiniCPM-V's finetune/dataset.py is described: the whole JSON in memory, every picture cut
                   in the training process, batches in random order, padded to their longest row. The cutting itself is
                   this package's, so that only the design differs.
  lazy             records read when they are asked for, one process, batches of similar length (lengths measured
                   beforehand, and that time counted)
  lazy, N workers  the same, with rows prepared in N processes

Between batches the program sleeps for --step seconds, as a program waits whose accelerator computes. Ratios are of the
medians of the rounds. A second table reads the records of a long file without pictures, for memory."""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import table


def make(folder, rows):
    "Pictures of many sizes, and texts of many lengths."
    import numpy as np
    from PIL import Image

    rng, records = random.Random(0), []
    for i in range(40):
        width, height = (int(300 * 2 ** rng.uniform(0, 2.2)) for _ in range(2))
        noise = np.random.default_rng(i).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((width, height)).save(folder / f"{i}.jpg", quality=85)
    for i in range(rows):
        text, answer = "word " * int(2 ** rng.uniform(0, 7)), "word " * int(2 ** rng.uniform(0, 6))
        record = {
            "id": str(i),
            "conversations": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}],
        }
        records.append(record | ({"image": f"{rng.randrange(40)}.jpg"} if rng.random() < 0.8 else {}))
    (folder / "data.json").write_text(json.dumps(records))


def processor():
    from vlm_lora_lab.data.batch import Processor
    from vlm_lora_lab.models.load import load_tokenizer

    # MiniCPM-V 2.6 but for the tokenizer
    return Processor(load_tokenizer("lab"), 64, 14, 448, True, 9, max_length=4096)


def child(way, folder, batch_size, workers, step):
    "One run; prints one line of JSON."
    from vlm_lora_lab.data.batch import Samples, loader
    from vlm_lora_lab.data.records import Conversations, read_conversations

    process = processor()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if way == "upstream":
        samples = Samples(read_conversations(folder / "data.json"), process)
        lengths = None
    else:
        conversations = Conversations.open(folder / "data.json")
        lengths = [len(process.measure(c).input_ids) for c in conversations]
        samples = Samples(conversations, process, workers if way == "workers" else 0, lengths)
    planned = time.perf_counter() - start
    tokens = real = rows = 0
    for batch in loader(samples, batch_size):
        tokens += batch["attention_mask"].numel()
        real += int(batch["attention_mask"].sum())
        rows += len(batch["labels"])
        time.sleep(step)
    seconds = time.perf_counter() - start
    own, worker = (resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(
        json.dumps(
            {
                "rows_per_s": rows / seconds,
                "planning_s": planned,
                "padding": 1 - real / tokens,
                "tokens": tokens,
                "own_mib": own,
                "grown_mib": own - before / 1024,
                "worker_mib": worker,
            }
        )
    )


def resident():  # MiB held now, where the system tells; the most ever held elsewhere
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def long_file(way, folder, rows):
    "Read all records of a long file once; the most memory held above that before."
    from vlm_lora_lab.data.records import Conversations

    before = resident()
    start = time.perf_counter()
    most = 0.0
    count = 0
    records = (
        json.loads((folder / "long.json").read_text())
        if way == "upstream"
        else Conversations.open(folder / "long.json")
    )
    for count, _ in enumerate(records, 1):
        if count % 1000 == 0:
            most = max(most, resident() - before)
    assert count == rows
    print(json.dumps({"rows_per_s": count / (time.perf_counter() - start), "grown_mib": most}))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 240), ("rounds", 3), ("workers", 2), ("batch-size", 8), ("many", 100_000)):
        p.add_argument(f"--{name}", type=int, default=default)
    p.add_argument("--step", type=float, default=0.25)
    p.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    p.add_argument("--long", nargs=2, help=argparse.SUPPRESS)
    o = p.parse_args()
    if o.child:
        return child(o.child[0], Path(o.child[1]), o.batch_size, o.workers, o.step)
    if o.long:
        return long_file(o.long[0], Path(o.long[1]), o.many)
    print(
        f"{o.rows} rows, batches of {o.batch_size}, {o.workers} workers, {o.step} s between batches, {o.rounds} "
        "rounds, interleaved"
    )
    ways = {"upstream": "upstream's way", "lazy": "lazy", "workers": f"lazy, {o.workers} workers"}

    def run(*args):
        return json.loads(
            subprocess.run(
                [sys.executable, __file__, *map(str, args)], capture_output=True, text=True, check=True
            ).stdout
        )

    common = ["--batch-size", o.batch_size, "--workers", o.workers, "--step", o.step]
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), o.rows)
        results = {way: [] for way in ways}
        for _ in range(o.rounds):
            for way in ways:
                results[way].append(run("--child", way, folder, *common))
        base = statistics.median(r["rows_per_s"] for r in results["upstream"])
        rows = []
        for way, name in ways.items():
            speeds = [r["rows_per_s"] for r in results[way]]
            m = {k: statistics.median(r[k] for r in results[way]) for k in results[way][0]}
            rows.append(
                [
                    name,
                    f"{m['rows_per_s']:.1f}",
                    f"{min(speeds):.1f} … {max(speeds):.1f}",
                    f"{m['rows_per_s'] / base:.2f}",
                    f"{m['padding']:.1%}",
                    f"{m['tokens']:,.0f}",
                    f"{m['own_mib']:.0f}",
                    f"{m['worker_mib']:.0f}",
                    f"{m['planning_s']:.1f}",
                ]
            )
        table(
            [
                "way",
                "rows/s",
                "least … most",
                "speed to upstream's",
                "padding",
                "tokens",
                "own MiB",
                "a worker, MiB",
                "planning, s",
            ],
            rows,
        )
        record = {
            "conversations": [
                {"role": "user", "content": "What is it? " * 8},
                {"role": "assistant", "content": "a red circle " * 4},
            ]
        }
        with open(Path(folder) / "long.json", "w") as file:
            file.write("[" + ",\n".join(json.dumps({"id": f"{i:06}"} | record) for i in range(o.many)) + "]")
        print(
            f"\n{o.many:,} records without pictures, {(Path(folder) / 'long.json').stat().st_size / 2**20:.0f} MiB of "
            "JSON"
        )
        rows = []
        for way in ("upstream", "lazy"):
            found = [run("--long", way, folder, "--many", o.many) for _ in range(o.rounds)]
            speed, grown = (statistics.median(r[k] for r in found) for k in ("rows_per_s", "grown_mib"))
            rows.append(["json.load" if way == "upstream" else "lazy, checked", f"{speed:,.0f}", f"{grown:.0f}"])
        table(["reading", "records/s", "memory grown, MiB"], rows)
    return None


if __name__ == "__main__":
    main()
