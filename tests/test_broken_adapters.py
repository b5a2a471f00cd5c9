"""Folders of adapters with something wrong in them: every command ends in a sentence and a status, and leaves nothing
half written."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_lora_lab.checkpoint.merge import merge_into
from vlm_lora_lab.checkpoint.save import lora_config, read_provenance, save_adapter, seal
from vlm_lora_lab.cli import main
from vlm_lora_lab.errors import Finding, InputError
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

VALUES = [None, True, -1, 0, 10**15, float("nan"), 1e39, "x", [], {}, [1], "lora", ["q_proj"], {"a": 1}, "9" * 400]


def saved(folder, by):
    "An adapter of the lab model whose second matrices are `by` times random numbers."
    plan = TuningPlan(connector="freeze", rank=2)
    torch.manual_seed(0)
    model = apply_plan(load_vlm("lab"), plan)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = by * torch.randn_like(p)
    return save_adapter(model, folder, plan, "lab", load_tokenizer("lab"), False)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("adapter") / "good", 0.1)


def commands(adapter, place):
    yield ["inspect", adapter]
    yield ["merge", adapter, "--output", place / "merged"]
    yield ["export", adapter, place / "served", "--for", "vllm"]
    yield ["rescue", adapter, "--base", "lab", "--output", place / "rescued"]
    yield ["ask", "What is this?", "--adapter", adapter, "--max-new-tokens", "1"]


def run(command, capsys):
    status = main([str(c) for c in command])
    said = capsys.readouterr()
    assert status in (0, 1, 2) and (status != 2 or len(said.err) < 1500) and "Traceback" not in said.err
    return status, said.out + said.err


def test_an_adapter_that_changes_nothing_is_a_sentence_everywhere(tmp_path, capsys):
    zero = saved(tmp_path / "zero", 0.0)
    for server in ("llama.cpp", "transformers"):
        status, said = run(["export", zero, tmp_path / server, "--for", server], capsys)
        assert (
            status == 2 and "equals its base: this adapter changes nothing" in said and not (tmp_path / server).exists()
        )
    results = {c[0]: run(c, capsys) for c in commands(zero, tmp_path)}
    assert results["merge"][0] == 2 and results["merge"][1].count("\n") == 1 and not (tmp_path / "merged").exists()
    assert results["inspect"][0] == 2 and "never trained" in results["inspect"][1]
    assert results["rescue"][0] == 2 and results["ask"][0] == 0
    with pytest.raises(Finding, match="changes nothing"):
        merge_into(zero, tmp_path / "merged")
    assert issubclass(Finding, InputError) and issubclass(Finding, RuntimeError)


@pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf"), True, "5"])
def test_a_shard_has_a_size(size, good, tmp_path):
    with pytest.raises(InputError, match="max_shard_size"):
        merge_into(good, tmp_path / "merged", max_shard_size=size)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("text", ["0", "nan", "inf", "-1", "many", "1e99"])
def test_and_on_the_command_line(text, good, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        main(["merge", str(good), "--output", str(tmp_path / "merged"), "--max-shard-gb", text])
    assert e.value.code == 2 and "expected a number above 0, up to 10,000" in capsys.readouterr().err


def spoiled(adapter, g):
    "Something wrong with a folder; returns what."
    what = g.choice(
        [
            "adapter_config.json",
            "adapter_config.json",
            "plan.json",
            "provenance.json",
            "provenance.json",
            "tensors",
            "bytes",
            "missing",
        ]
    )
    if what.endswith(".json"):
        values = json.loads((adapter / what).read_text())
        key, value = g.choice(sorted(values)), g.choice(VALUES)
        (adapter / what).write_text(json.dumps(values | {key: value})[: g.choice([None, None, None, 50])])
        return f"{what}: {key}={value!r:.30}"
    if what == "missing":
        file = g.choice(sorted(adapter.iterdir()))
        file.unlink()
        return f"no {file.name}"
    weights = adapter / "adapter_model.safetensors"
    if what == "bytes":
        content = bytearray(weights.read_bytes())
        content[g.randrange(2000)] = g.randrange(256)
        weights.write_bytes(bytes(content[: g.choice([None, g.randrange(len(content))])]))
        return what
    tensors = load_file(weights)
    name = g.choice(sorted(tensors))
    changed = {
        "nan": tensors[name] * float("nan"),
        "row": tensors[name][:1].clone(),
        "whole numbers": tensors[name].to(torch.int64),
        "empty": tensors[name][:0].clone(),
    }
    how = g.choice([*changed, "renamed", "gone"])
    tensor = tensors.pop(name)
    if how != "gone":
        tensors["x." + name if how == "renamed" else name] = changed.get(how, tensor)
    save_file(tensors, weights, metadata={"format": "pt"})
    return f"{name} {how}"


@pytest.mark.parametrize(
    "which", [pytest.param(range(24), id="quick"), pytest.param(range(24, 200), id="all", marks=pytest.mark.slow)]
)
def test_fuzzed_folders_end_in_sentences(which, good, tmp_path, capsys):
    bad = 0
    for number in which:
        g = random.Random(number)
        adapter = tmp_path / f"adapter-{number}"
        place = tmp_path / f"out-{number}"
        shutil.copytree(good, adapter)
        what = spoiled(adapter, g)
        if g.random() < 0.7 and what != "no provenance.json":  # somebody edited it, and sealed it again
            try:
                seal(adapter, json.loads((adapter / "provenance.json").read_text()))
            except ValueError:
                pass
        for command in commands(adapter, place):
            try:
                status, _ = run(command, capsys)
            except Exception as e:
                raise AssertionError(f"{number}, {what}: {command[0]} ends in {type(e).__name__}: {e}") from e
            bad += status == 2
            left = {p.name for p in place.iterdir()} if place.is_dir() else set()
            assert not [n for n in left if n.endswith(".partial")], (what, command, left)
        shutil.rmtree(adapter)
        shutil.rmtree(place, ignore_errors=True)
    assert bad > len(which)


@pytest.mark.parametrize(
    "file, values, message",
    [
        ("adapter_config.json", {"r": "16"}, "r is '16'"),
        ("adapter_config.json", {"rank_pattern": True}, "rank_pattern is True"),
        ("adapter_config.json", {"rank_pattern": {"q": 0}}, "is 0"),
        ("adapter_config.json", {"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ("adapter_config.json", {"target_parameters": 5}, "target_parameters is 5"),
        ("adapter_config.json", {"eva_config": 5}, "PEFT cannot use it"),
        ("provenance.json", {"four_bit": "yes"}, "four_bit is 'yes'"),
        ("provenance.json", {"max_pixels": -1}, "max_pixels is -1"),
        ("provenance.json", {"base": 3}, "base is 3"),
        ("provenance.json", {"not_trained": 0}, "not_trained is 0"),
    ],
)
def test_a_value_that_cannot_be_is_named(file, values, message, good, tmp_path, capsys):
    adapter = shutil.copytree(good, tmp_path / "adapter")
    (adapter / file).write_text(json.dumps(json.loads((adapter / file).read_text()) | values))
    with pytest.raises(InputError) as e:
        lora_config(adapter) if file == "adapter_config.json" else read_provenance(adapter)
    assert message in str(e.value) and file in str(e.value)
    status, said = run(["inspect", adapter], capsys)
    assert status == 2 and " ".join(said.split()).count(file)
