"""What CONTRIBUTING.md promises: a family, a variant and a dialect are each added in one place, from outside too.

Here that place is a module which the package does not know. A model of the new family is trained with the new variant
on records of the new dialect, and inspected, asked and merged, by the commands that everybody uses."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image
from safetensors import safe_open

from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.cli import main
from vlm_lora_lab.models import parts
from vlm_lora_lab.models.load import lab_folder

OUTSIDE = """
from dataclasses import replace

from transformers import PreTrainedConfig

from vlm_lora_lab.data.dialects import Dialect, Turns, register_dialect
from vlm_lora_lab.families.base import family_named, register_family
from vlm_lora_lab.lora.variants import Variant, register_variant
from vlm_lora_lab.models.minicpmv import MiniCPMV, MiniCPMV26Config


class ToyConfig(MiniCPMV26Config):
    model_type = "toyvlm"


class Toy(MiniCPMV):
    config_class = ToyConfig


known = family_named("2.6")
toy = replace(known, key="toy", name="Toy", model_types=("toyvlm",), versions=(), config=ToyConfig, model=Toy)
register_family(replace(toy, layout=replace(known.layout, family="Toy")))
register_variant(Variant("updora", "orthogonal DoRA", {"use_dora": True, "init_lora_weights": "orthogonal"}))


def read(record):
    turns = [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": record["a"]}]
    return Turns(turns, "q", pictures=record.get("shown"), fields=frozenset({"q", "a", "shown"}))


def write(conversation, names):
    return {"q": conversation.messages[0].content, "a": conversation.messages[1].content, "shown": names}


register_dialect("quiz", Dialect("Quiz", lambda record: "q" in record, read, write))
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    "A folder with the module, a checkpoint of its family and records of its dialect; and a command that knows them."
    folder = tmp_path_factory.mktemp("house")
    (folder / "outside.py").write_text(OUTSIDE)
    base = shutil.copytree(lab_folder(), folder / "toy")
    config = json.loads((base / "config.json").read_text()) | {"model_type": "toyvlm", "architectures": ["Toy"]}
    (base / "config.json").write_text(json.dumps(config))
    rows = json.loads((samples_folder() / "handwriting" / "train.json").read_text())[:16]
    quiz = []
    for i, row in enumerate(rows):
        Image.open(samples_folder() / "handwriting" / row["image"]).save(folder / f"{i}.png")
        question, answer = (turn["content"] for turn in row["conversations"])
        quiz.append({"q": question.replace("<image>", "").strip(), "a": answer, "shown": f"{i}.png"})
    (folder / "quiz.json").write_text(json.dumps(quiz))

    def command(*args):
        code = "import sys, outside; from vlm_lora_lab.cli import main; sys.exit(main(sys.argv[1:]))"
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, args)], cwd=folder, env=env, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    return folder, command


def test_a_family_a_variant_and_a_dialect_from_outside_are_trained_together(house):
    folder, command = house
    code, said = command("check-data", "quiz.json")
    assert code == 0 and "Quiz 16" in said, said
    code, said = command("parts", "toy")
    assert code == 0 and "Toy" in said, said
    wanted = ["--model", "toy", "--data", "quiz.json", "--output", "run", "--variant", "updora", "--no-four-bit"]
    code, said = command("train", *wanted, "--max-steps", "2", "--batch-size", "2")
    assert code == 0, said
    plan = json.loads((folder / "run" / "adapter" / "plan.json").read_text())
    with safe_open(folder / "run" / "adapter" / "adapter_model.safetensors", framework="pt") as f:
        names = list(f.keys())
    assert plan["variant"] == "updora" and any("lora_magnitude_vector" in n for n in names)
    code, said = command("inspect", "run/adapter")
    assert code == 0 and "Toy" in said and "DoRA, started by orthogonal" in said, said
    code, said = command("ask", "What number is this?", "--image", "0.png", "--adapter", "run/adapter")
    assert code == 0 and said.strip(), said
    code, said = command("merge", "run/adapter", "--output", "merged")
    assert code == 0, said
    code, said = command("parts", "merged")
    assert code == 0 and "Toy" in said, said


def test_nobody_else_knows_them(house):
    folder, _ = house
    code = "from vlm_lora_lab.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    for args, missing in (
        (("check-data", "quiz.json"), "conversations"),
        (("parts", "toy"), "toyvlm"),
        (("plan", "lab", "--variant", "updora"), "updora"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *args], cwd=folder, capture_output=True, text=True)
        assert done.returncode in (1, 2) and missing in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_job_asks_once_what_is_known_of_its_model(tmp_path, counted):
    "Twice in all: for the shapes that the plan is checked on, and by the loader, which looks at the files."
    data = samples_folder() / "handwriting" / "validation.json"
    flags = ["--max-steps", "2", "--batch-size", "2", "--rank", "2"]
    assert main(["train", "--data", str(data), "--output", str(tmp_path / "out"), *flags]) == 0
    assert dict(counted) == {"layout_of": 2, "layers": 2, "packed": 1, "tied": 1}


@pytest.fixture
def counted(monkeypatch):
    "How often layouts and facts of a model were worked out."
    calls, layout_of = Counter(), parts.layout_of

    def counting(name, f):
        def count(*args):
            calls[name] += 1
            return f(*args)

        return count

    ours = [m for n, m in list(sys.modules.items()) if n.startswith("vlm_lora_lab")]  # a look at one may import another
    for module in [m for m in ours if hasattr(m, "layout_of")]:
        monkeypatch.setattr(module, "layout_of", counting("layout_of", layout_of))
    for fact in ("layers", "packed", "tied"):
        known = vars(parts.VLM)[fact]
        monkeypatch.setattr(known, "func", counting(fact, known.func))
    return calls
