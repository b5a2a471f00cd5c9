"""Model folders and lists of stages with something wrong in them: every command ends in a sentence and a status, and
leaves nothing half written."""

import json
import random
import re
import shutil

import pytest
import yaml

from vlm_lora_lab.cli import main
from vlm_lora_lab.models.published import lab_folder

VALUES = [
    None,
    True,
    -1,
    0,
    10**15,
    float("nan"),
    1e39,
    "x",
    "",
    [],
    {},
    [1],
    [None],
    {"a": 1},
    "9" * 400,
    "\0",
    "\ud800",
    "../x",
]


@pytest.fixture
def few(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_LORA_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "few.json").write_text(
        json.dumps(
            [
                {
                    "id": str(i),
                    "conversations": [
                        {"role": "user", "content": f"Say {i}"},
                        {"role": "assistant", "content": str(i)},
                    ],
                }
                for i in range(3)
            ]
        )
    )
    return tmp_path / "few.json"


def places(value, path=()):
    "Every place inside a JSON value."
    yield path
    children = {}
    if isinstance(value, (dict, list)):
        children = value if isinstance(value, dict) else dict(enumerate(value))
    for key, child in children.items():
        yield from places(child, (*path, key))


def put(value, path, new):
    if not path:
        return new
    copy = list(value) if isinstance(value, list) else dict(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


def spoiled(folder, g):
    "Something wrong with a model's folder; returns what."
    what = g.choice(
        [
            "config.json",
            "config.json",
            "config.json",
            "tokenizer_config.json",
            "tokenizer.json",
            "generation_config.json",
            "bytes",
            "missing",
            "folder",
        ]
    )
    file = folder / what
    if what.endswith(".json"):
        values = json.loads(file.read_text())
        where, value = g.choice(list(places(values))[:200]), g.choice(VALUES)
        file.write_text(json.dumps(put(values, where, value))[: g.choice([None, None, None, 50])])
        return f"{what}: {where}={value!r:.30}"
    file = folder / "model.safetensors" if what == "bytes" else g.choice(sorted(folder.iterdir()))
    if what == "bytes":
        content = bytearray(file.read_bytes())
        content[g.randrange(3000)] = g.randrange(256)
        file.write_bytes(bytes(content[: g.choice([None, g.randrange(len(content))])]))
    else:
        file.unlink()
        if what == "folder":
            file.mkdir()
    return f"{what}: {file.name}"


def run(argv, capsys):
    try:
        status = main([str(a) for a in argv])
    except SystemExit as e:
        status = e.code
    said = capsys.readouterr()
    assert status in (0, 1, 2) and "Traceback" not in said.err and (status != 2 or len(said.err) < 4000), said.err
    return status


@pytest.mark.parametrize(
    "which", [pytest.param(range(4), id="quick"), pytest.param(range(4, 120), id="all", marks=pytest.mark.slow)]
)
def test_fuzzed_models_end_in_sentences(which, few, tmp_path, capsys):
    bad = 0
    for number in which:
        g = random.Random(number)
        model = tmp_path / f"model-{number}"
        out = tmp_path / f"out-{number}"
        shutil.copytree(lab_folder(), model)
        what = spoiled(model, g)
        for argv in (
            ["parts", model],
            ["plan", model],
            ["estimate", model, "--max-length", "64"],
            ["inspect", model],
            ["check-data", few, "--model", model],
            ["doctor", "--data", few, "--model", model],
            ["ask", "Hi", "--model", model, "--max-new-tokens", "1"],
            ["rescue", model, "--base", "lab", "--output", out],
        ):
            try:
                bad += run(argv, capsys) == 2
            except Exception as e:
                raise AssertionError(f"{number}, {what}: {argv[0]} ends in {type(e).__name__}: {e}") from e
            assert not list(tmp_path.glob("*.partial")), (what, argv)
        shutil.rmtree(model)
        shutil.rmtree(out, ignore_errors=True)
    assert bad > len(which) // 2


GOOD = [
    {"plan": {"connector": "full", "rank": 4}, "steps": 3},
    {
        "plan": {"language": "lora", "rank": 8, "targets": ["q_proj"]},
        "epochs": 1.0,
        "learning_rate": 1e-4,
        "lora": "merge",
    },
]


@pytest.mark.parametrize(
    "which", [pytest.param(range(60), id="quick"), pytest.param(range(60, 400), id="all", marks=pytest.mark.slow)]
)
def test_fuzzed_stages_end_in_sentences(which, tmp_path, capsys):
    bad = 0
    for number in which:
        g, stages = random.Random(number), GOOD
        for _ in range(g.choice([1, 1, 2])):
            stages = put(
                stages,
                g.choice(list(places(stages))),
                g.choice([*VALUES, "full", "freeze", "lora on 0-99", "lora(rank=2)"]),
            )
        text = (yaml.safe_dump if g.random() < 0.5 else json.dumps)(stages)
        if g.random() < 0.3:
            at = g.randrange(len(text))
            text = text[:at] + g.choice([":", "-", "{", "]", "\t", "\n", "&a", "*a", "'", '"']) + text[at:]
        (tmp_path / "stages.yaml").write_text(text)
        try:
            status = main(["plan", "lab", "--stages", str(tmp_path / "stages.yaml")])
        except Exception as e:
            raise AssertionError(f"{number}: {type(e).__name__}: {e}\n{text}") from e
        err = capsys.readouterr().err
        bad += status == 2
        assert status == 0 or (
            status == 2 and re.match(r"vlm-lora-lab plan: .+[.?]\n$", err, re.S) and len(err) < 2000
        ), (text, err)
    assert len(which) // 3 < bad <= len(which)


@pytest.mark.parametrize(
    "name, value",
    [("bos_token_id", [None]), ("eos_token_id", "<|im_end|>"), ("eos_token_id", [2, "x"]), ("pad_token_id", True)],
)
def test_generation_config_names_ids(name, value, few, tmp_path, capsys):
    model = shutil.copytree(lab_folder(), tmp_path / "model")
    values = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(values | {name: value}))
    for argv in (
        ["ask", "Hi", "--model", model, "--max-new-tokens", "1"],
        ["train", "--data", few, "--model", model, "--output", tmp_path / "out"],
    ):
        assert main([str(a) for a in argv]) == 2
        err = capsys.readouterr().err
        assert f"{name} is " in err and "generation_config.json" in err, err
