"""The whole road on a stand-in of a published checkpoint, through the command line: from plan to compare, each step
checked.

`walk(name, folder)` gives the cells of one row of ROADS.md; `remember` keeps a row in roads.json and writes the table
again. `tests/test_roads.py` runs it."""

import io
import json
import re
import shutil
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from datetime import date
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from real import real
from safetensors.torch import load_file
from standins import stand_in
from transformers import AutoTokenizer

from vlm_lora_lab.checkpoint.save import load_adapter, read_provenance, save_adapter
from vlm_lora_lab.checkpoint.serve import check_export
from vlm_lora_lab.cli import main
from vlm_lora_lab.data.native import load_processor
from vlm_lora_lab.families.base import families
from vlm_lora_lab.data.records import read_conversations, samples_folder
from vlm_lora_lab.models.load import load_vlm
from vlm_lora_lab.models.parts import count
from vlm_lora_lab.models.published import PUBLISHED, on_meta
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.plan.preview import Preview

ROWS, TABLE = Path(__file__).parent / "roads.json", Path(__file__).parent / "ROADS.md"
COLUMNS = (
    "plan",
    "estimate",
    "doctor",
    "train",
    "resume",
    "ask",
    "inspect",
    "merge",
    "vllm",
    "llama.cpp",
    "transformers",
    "compare",
    "tied",
)
CI = (
    "openbmb/MiniCPM-V-2_6",
    "openbmb/MiniCPM-V-4.6",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen3-VL-2B-Instruct",
    "Qwen/Qwen-VL-Chat",
    "openbmb/MiniCPM-Llama3-V-2_5",
)
REAL_WORDS = {
    "openbmb/MiniCPM-Llama3-V-2_5": "llama3.json",
    "openbmb/MiniCPM-V-4_5": "qwen3.json",
    "Qwen/Qwen-VL-Chat": "qwen.tiktoken",
}
PREPARED = {t for f in families() if f.eyes for t in f.model_types}  # families whose rows `train` can prepare
# LLaVA-OneVision has a bare image_newline beside its embed_tokens
TIED_PLANS = ({"embeddings": "full on embed_tokens"}, {"embeddings": "lora"}, {"head": "lora"})
RATE = 0.01  # high: two steps must be seen in the logits
ROWS_LEARNED, LONGEST_ANSWER = 4, 6
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
HEAD = """# The whole road on each published checkpoint

Made by `pytest -m slow tests/test_roads.py`, never by hand; `tests/roads.py` says how. {when}

Each row is a small random checkpoint with every published field but the sizes (`tests/standins.py`), and each step a \
command of `vlm-lora-lab`. ✓ means: the exit status is 0, and

- **plan**: of the published shapes, and of the stand-in; **estimate**: a sum is named; **doctor**: nothing speaks \
against training;
- **train**: two steps of the default plan on handwriting in four bit; the logits moved; as many weights were saved \
as plan said;
- **resume**: from what a run that was killed after its first step leaves; every tensor equals the unbroken run's;
- **ask**: answers, and what it says is what `compare` writes down for that question; **compare**: base and adapter \
answered every question;
- **inspect**: counts as many weights as the plan; **merge**: the merged model's logits are the adapter's;
- **vllm**, **llama.cpp**, **transformers**: `export --for`, every rule of the reader holds, and the whole model that \
was written loads;
- **tied** (where the head is tied to the embeddings): `embeddings: full on embed_tokens`, `embeddings: lora` and \
`head: lora` learn, are saved, inspected and merged as above; `head: full` is refused.

"refused", "warns" (`doctor`) and "unmet" (a rule of the reader) carry the package's own sentence below. "in Python": \
`train` cannot prepare pictures of that family; the same plan was applied, trained for two steps, saved and loaded \
again with `apply_plan`, `save_adapter` and `load_adapter`, and the commands to its right were given that adapter.
The words are real ones in rows marked so, and a few hundred short ones elsewhere. Upstream's Python files, and for \
families of transformers `preprocessor_config.json`, are there by name alone. What goes by size is that of the \
stand-in: vLLM knows MiniCPM-V 2.0 by its width alone, and refuses LoRA on the published one.
Seconds are by the clock, on cores that had other things to do; free, a row takes ten to forty.

"""


class Stopped(Exception):
    "A step that did not go as it should: a word for the table, and the package's own sentence."

    def __init__(self, word, says):
        super().__init__(f"{word}: {says}")
        self.word, self.says = word, says


class Road:
    "One checkpoint, the files made of it, and what each step came to."

    def __init__(self, name, folder, small):
        self.name = name
        self.folder = folder
        self.cells = {}
        self.base = stand_in(name, folder / "base", small=small)
        values = json.loads((self.base / "config.json").read_text())
        self.kind = values["model_type"]
        for path in values.get("auto_map", {}).values():  # a download has them; nobody may run them
            (self.base / f"{path.split('.')[0]}.py").write_text("raise SystemExit('remote code ran')")
        if self.kind not in PREPARED:
            (self.base / "preprocessor_config.json").write_text("{}")
        handwriting = samples_folder() / "handwriting"
        self.pictures, self.data = handwriting, folder / "few.json"
        self.records = json.loads((handwriting / "train.json").read_text())[:ROWS_LEARNED]
        self.data.write_text(json.dumps(self.records))

    def run(self, *argv, fine=(0,)):
        "A command's output. Raises `Stopped` for another exit status than a fine one."
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                status = main([str(a) for a in argv])
            except SystemExit as e:
                status = e.code
        if status not in fine:
            words = {1: "unmet" if argv[0] == "export" else "warns", 2: "refused"}
            raise Stopped(words.get(status, f"status {status}"), self.sentence(argv[0], out.getvalue(), err.getvalue()))
        return out.getvalue()

    def sentence(self, command, out, err):
        "What a command that did not end well says, without the folder of this run."
        said = [
            line.removeprefix(f"vlm-lora-lab {command}: ")
            for line in err.splitlines()
            if line.startswith(f"vlm-lora-lab {command}: ")
        ]
        said = said or [line for line in out.splitlines() if line.startswith(("NO ", "WARNING", "ERROR"))]
        said = [re.sub(r"^(ERROR|WARNING) +\w+ +", "", line) for line in said]
        return " ".join(" ".join(said or [out[-300:], err[-300:]]).replace(f"{self.folder}/", "").split())

    def step(self, column, do, *args):
        "Do one step and keep its cell; whether it went well."
        try:
            do(*args)
        except Stopped as e:
            self.cells[column] = [e.word, e.says]
        except Exception as e:
            traceback.print_exc()
            says = str(e).replace(f"{self.folder}/", "").splitlines()
            self.cells[column] = ["FAILS", f"{type(e).__name__}: {says[0] if says else ''}"]
        else:
            self.cells[column] = ["✓", ""]
        return self.cells[column][0] == "✓"

    def flags(self):
        return [
            "--data",
            self.data,
            "--image-root",
            self.pictures,
            "--model",
            self.base,
            "--batch-size",
            2,
            "--max-steps",
            2,
            "--save-every",
            1,
            "--learning-rate",
            RATE,
        ]

    @cached_property
    def batch(self):
        if self.kind not in PREPARED:
            return picture_batch(on_meta(self.base))
        processor = load_processor(self.base)
        return processor.collate([processor(c) for c in read_conversations(self.data, self.pictures)[:2]])

    def logits(self, model):
        with torch.no_grad():
            return model.eval()(**{k: v for k, v in self.batch.items() if k != "labels"}).logits.float()

    def plan(self):
        self.run("plan", self.name)
        assert f"{Preview.of(on_meta(self.base), TuningPlan()).trained:,}" in self.run("plan", self.base)

    def estimate(self):
        assert "together" in self.run("estimate", self.base, "--max-length", 512)

    def doctor(self):
        self.run("doctor", *self.flags())

    @cached_property
    def untrained(self):
        return self.logits(load_vlm(self.base, four_bit=True))

    def train(self, place="run", **words):
        "Train by the command, or in Python where it cannot; see that it learned what the plan says."
        plan, out = TuningPlan(**words), self.folder / place
        if self.kind in PREPARED:
            self.run("train", *self.flags(), *[a for k, w in words.items() for a in (f"--{k}", w)], "--output", out)
            assert json.loads((out / "report.json").read_text())["steps"] == 2
        else:
            self.in_python(plan, out)
        seen, fixed = Preview.of(on_meta(self.base), plan), read_provenance(out / "adapter").get("not_trained", ())
        saved = sum(
            t.nbytes for n, t in load_file(out / "adapter" / "adapter_model.safetensors").items() if n not in fixed
        )
        assert saved == seen.adapter_bytes, f"{saved:,} bytes were saved, and the plan says {seen.adapter_bytes:,}"
        self.live = self.logits(load_adapter(out / "adapter"))
        assert self.live.isfinite().all() and (self.live - self.untrained).abs().max() > 0.03 * self.untrained.std(), (
            "nothing was learned"
        )

    def in_python(self, plan, out):
        torch.manual_seed(0)
        model, batch = apply_plan(load_vlm(self.base, four_bit=True), plan), self.batch
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
        for _ in range(2):
            model.train()(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        save_adapter(model, out / "adapter", plan, self.base, AutoTokenizer.from_pretrained(self.base), True)
        difference = (self.logits(model) - self.logits(load_adapter(out / "adapter"))).abs().max()
        assert difference == 0, f"the adapter's logits are {float(difference):.2g} off the trained model's"

    def resume(self):
        cut, whole = self.folder / "cut", self.folder / "run"
        cut.mkdir()
        shutil.copy(whole / "job.json", cut)
        shutil.copytree(whole / "checkpoints" / "checkpoint-1", cut / "checkpoints" / "checkpoint-1")
        assert "Resuming from" in self.run("train", *self.flags(), "--output", cut, "--resume")
        a, b = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (whole, cut))
        different = [n for n in a if not torch.equal(a[n], b[n])]
        assert a.keys() == b.keys() and not different, (
            f"{len(different)} of {len(a)} tensors differ from the unbroken run's"
        )

    def inspect(self, place="run", **words):
        report = json.loads(self.run("inspect", self.folder / place / "adapter", "--json"))
        assert (
            sum(r["weights"] for r in report["rows"] if r["kind"] != "table")
            == Preview.of(on_meta(self.base), TuningPlan(**words)).trained
        )

    def merge(self, place="run"):
        merged = self.folder / place / "merged"
        self.run("merge", self.folder / place / "adapter", "--output", merged, "--dtype", "float32")
        # not the largest difference: the gated norms of linear attention make of a rounding at one position a thousand
        off = (self.logits(load_vlm(merged, dtype=torch.float32)) - self.live).std() / self.live.std()
        assert off < 3e-4, f"logits are {float(off):.2g} of their spread off the adapter's"

    def export(self, target):
        out = self.folder / target.replace(".", "")
        self.run("export", self.folder / "run" / "adapter", out, "--for", target)
        assert all(r.ok for r in check_export(out, target))
        if (out / "model").is_dir():
            off = (self.logits(load_vlm(out / "model", dtype=torch.float32)) - self.live).std() / self.live.std()
            # types on the disk round
            assert target == "vllm" or off < 0.3, f"logits are {float(off):.2g} of their spread off the adapter's"

    def ask(self):
        "What `ask` says of each picture is what `compare` has written down."
        answers = self.answers("run/adapter")
        for record in self.records[:1]:
            question = record["conversations"][0]["content"].replace("<image>\n", "")
            said = self.run(
                "ask",
                question,
                "--image",
                self.pictures / record["image"],
                "--adapter",
                self.folder / "run" / "adapter",
                "--max-new-tokens",
                LONGEST_ANSWER,
            )
            assert said.strip() == answers[record["id"]].strip(), (
                f"ask says {said!r}, compare {answers[record['id']]!r}"
            )
        assert any(answers.values()), "no answer has a word"

    def compare(self):
        self.run(
            "compare",
            self.base,
            self.folder / "run" / "adapter",
            "--four-bit",
            "--data",
            self.data,
            "--image-root",
            self.pictures,
            "--max-new-tokens",
            LONGEST_ANSWER,
            "--output",
            self.folder / "compared",
        )
        assert len(self.answers("base")) == len(self.answers("run/adapter")) == ROWS_LEARNED

    def answers(self, which):
        "What a checkpoint answered, by question, as `compare` wrote it down."
        lines = [
            json.loads(line)
            for line in (self.folder / "compared" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        return {line["id"]: line["answers"][str(self.folder / which)]["answer"] for line in lines}

    def tied(self):
        for i, words in enumerate(TIED_PLANS):
            try:
                self.train(f"tied-{i}", **words)
                self.inspect(f"tied-{i}", **words)
                self.merge(f"tied-{i}")
            except Stopped as e:
                raise Stopped(e.word, f"{words}: {e.says}") from None
            except AssertionError as e:
                raise AssertionError(f"{words}: {e}") from None
        assert "tied to the embeddings" in Stopped_of(self.run, "plan", self.base, "--head", "full").says
        if self.kind in PREPARED:
            assert (
                "tied to the embeddings"
                in Stopped_of(
                    self.run, "train", *self.flags(), "--head", "full", "--output", self.folder / "never"
                ).says
            )
            assert not (self.folder / "never").exists()

    def walk(self):
        "All steps, in order; the cells."
        self.step("plan", self.plan)
        self.step("estimate", self.estimate)
        self.step("doctor", self.doctor)
        trained = self.step("train", self.train)
        if self.kind in PREPARED:
            steps = [("resume", self.resume), ("compare", self.compare), ("ask", self.ask)]
        else:
            refusal = Stopped_of(self.run, "train", *self.flags(), "--output", self.folder / "refused")
            assert not (self.folder / "refused").exists()
            self.cells["resume"] = [refusal.word, refusal.says]
            if trained:
                self.cells["train"] = ["in Python", refusal.says]
            picture = [
                "--image",
                self.pictures / self.records[0]["image"],
                "--adapter",
                self.folder / "run" / "adapter",
            ]
            steps = [("compare", self.compare), ("ask", lambda: self.run("ask", "What?", *picture))]
        steps += [
            ("inspect", self.inspect),
            ("merge", self.merge),
            *((t, lambda t=t: self.export(t)) for t in ("vllm", "llama.cpp", "transformers")),
        ]
        for column, do in steps if trained else ():
            self.step(column, do)
        if not count(on_meta(self.base))["head"]:
            self.step("tied", self.tied)
        else:
            self.cells["tied"] = ["–", ""]
        for column in COLUMNS:
            self.cells.setdefault(column, ["not reached", self.cells["train"][1]])
        return {c: self.cells[c] for c in COLUMNS}


def Stopped_of(run, *argv):
    "The refusal of a command that must refuse."
    try:
        run(*argv)
    except Stopped as e:
        assert e.word == "refused", str(e)
        return e
    raise AssertionError(f"{argv[0]} refuses nothing")


def picture_batch(model):
    "One row of a family of transformers with one picture: as many tokens for it as the model makes of it."
    g = torch.Generator().manual_seed(0)
    config, kind = model.config, model.config.model_type
    side, width = config.vision_config.image_size, config.get_text_config().hidden_size
    side = side[0] if isinstance(side, (list, tuple)) else side
    shapes = {
        "idefics2": (1, 1, 3, 56, 56),
        "idefics3": (1, 1, 3, side, side),
        "llava_onevision": (1, 3, 3, side, side),
    }
    pictures = {"pixel_values": torch.randn(shapes.get(kind, (1, 3, side, side)), generator=g)}
    if kind == "llava_onevision":
        pictures["image_sizes"] = torch.tensor([[2 * side, side]])
    token = getattr(config, "image_token_id", None) or config.image_token_index
    tokens = picture_tokens(model, pictures) // width
    ids = torch.randint(3, 120, (1, tokens + 12), generator=g)
    ids[ids == token] = 3
    ids[:, 2 : 2 + tokens] = token
    batch = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=torch.where(torch.arange(ids.shape[1]) >= tokens + 4, ids, -100),
        **pictures,
    )
    return batch | ({"token_type_ids": (ids == token).long()} if kind in ("gemma3", "paligemma") else {})


def picture_tokens(model, pictures):
    "How many numbers a model makes of a picture; its weights are of no account."
    torch.manual_seed(0)
    model = type(model)(model.config).float().eval()
    with torch.no_grad():
        seen = model.model.get_image_features(**pictures)
    seen = getattr(seen, "pooler_output", seen)
    return sum(t.numel() for t in seen) if isinstance(seen, (list, tuple)) else seen.numel()


def walk(name, folder, whole=False):
    "A row: with the real words where they are at hand and `whole` asks for them."
    small = not (whole and name in REAL_WORDS and real(REAL_WORDS[name]))
    begun = time.monotonic()
    cells = Road(name, folder, small).walk()
    return {
        "words": "few" if small else "real",
        "seconds": round(time.monotonic() - begun),
        "date": str(date.today()),
        "versions": {p: version(p) for p in PACKAGES},
        "cells": cells,
    }


def rows():
    return json.loads(ROWS.read_text(encoding="utf-8")) if ROWS.exists() else {}


def remember(name, row):
    known = rows() | {name: row}
    ROWS.write_text(
        json.dumps({n: known[n] for n in PUBLISHED if n in known}, indent=1, ensure_ascii=False) + "\n",
        encoding="utf-8",
    )
    TABLE.write_text(table(rows()), encoding="utf-8")


def table(rows):
    "The rows as Markdown, with a note for every cell that is no tick."
    versions = sorted({", ".join(f"{p} {v}" for p, v in r["versions"].items()) for r in rows.values()})
    dates = sorted({r["date"] for r in rows.values()})
    notes, lines = {}, []
    for name in PUBLISHED:
        if name not in rows:
            lines.append(f"| {name} | not walked yet |{' |' * (len(COLUMNS) + 1)}")
            continue
        row, cells = rows[name], []
        for column in COLUMNS:
            word, says = row["cells"][column]
            cells.append(f"{word} [{notes.setdefault(says, len(notes) + 1)}]" if says else word)
        lines.append(f"| {name} | {row['words']} | {' | '.join(cells)} | {row['seconds']} |")
    head = HEAD.format(when=f"{' and '.join(dict.fromkeys([dates[0], dates[-1]]))}, {'; '.join(versions)}.")
    titles = ["checkpoint", "words", *COLUMNS, "seconds"]
    quoted = [f"{number}. {says.replace('<', '&lt;').replace('|', chr(92) + '|')}" for says, number in notes.items()]
    return head + "\n".join([f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}", *lines, "", *quoted]) + "\n"
