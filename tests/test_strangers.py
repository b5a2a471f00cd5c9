"""Folders from strangers are only read: nothing in them runs without an end, leads out of them, or grows."""

import json
import os
import re
import shutil
import struct
import time

import fuzz
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlm_lora_lab.checkpoint.save import load_adapter, save_adapter
from vlm_lora_lab.cli import main
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.lora.patterns import check_patterns, patterns_in, run_patterns
from vlm_lora_lab.models.files import INDEX, check_links, copy_beside, stored_in
from vlm_lora_lab.models.load import lab_folder, load_tokenizer, load_vlm
from vlm_lora_lab.models.published import on_meta
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

ENDLESS = "(([a-z_0-9.]+)+)+!"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model = apply_plan(load_vlm("lab"), TuningPlan(connector="full", rank=2))
    save_adapter(model, folder, TuningPlan(connector="full", rank=2), "lab", load_tokenizer("lab"), False)
    return folder


@pytest.fixture
def plain(trained, tmp_path):
    "The same adapter without our own files: as PEFT writes it."
    folder = tmp_path / "plain"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trained / name, folder)
    return folder


def say(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr("vlm_lora_lab.lora.patterns.check_patterns.__defaults__", (2.0,))


COMMANDS = {
    "inspect": lambda adapter, out: ["inspect", str(adapter), "--base", "lab"],
    "rescue": lambda adapter, out: ["rescue", str(adapter), "--base", "lab"],
    "merge": lambda adapter, out: ["merge", str(adapter), "--model", "lab", "--output", str(out / "merged")],
    "ask": lambda adapter, out: ["ask", "What is this?", "--adapter", str(adapter), "--model", "lab"],
}
SPOILT = [
    {"target_modules": ENDLESS},
    {"modules_to_save": [ENDLESS]},
    {"exclude_modules": ENDLESS},
    {"rank_pattern": {ENDLESS: 2}},
    {"alpha_pattern": {"q_proj": 4, ENDLESS: 2}},
    {"layers_pattern": [ENDLESS], "layers_to_transform": [0], "target_modules": ["q_proj", "v_proj"]},
]


@pytest.mark.parametrize("fields", SPOILT, ids=lambda f: next(iter(f)))
@pytest.mark.parametrize("command", COMMANDS)
def test_a_pattern_that_never_ends_is_a_sentence(plain, tmp_path, capsys, command, fields):
    say(plain, **fields)
    start = time.monotonic()
    assert main(COMMANDS[command](plain, tmp_path)) == 2
    said = capsys.readouterr()
    assert "did not come to its end" in said.out + said.err and next(iter(fields)) in said.out + said.err
    assert time.monotonic() - start < 60 and not (tmp_path / "merged").exists()


def test_a_pattern_in_a_field_that_is_wrong_besides_is_stopped_too(plain, capsys):
    say(plain, rank_pattern={ENDLESS: "many"})
    assert main(["inspect", str(plain), "--base", "lab"]) == 2
    said = capsys.readouterr().out
    assert "rank_pattern" in said and "did not come to its end" in said


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(?P<a>x)(?P<a>y)", "\\", "[z-a]", "(" * 5000 + ")" * 5000])
def test_what_is_no_regular_expression_is_named(plain, pattern):
    say(plain, rank_pattern={pattern: 2})
    with pytest.raises(InputError, match="rank_pattern holds .*, which is no regular expression"):
        load_adapter(plain, "lab")


def test_patterns_match_as_peft_matches_them():
    from peft import LoraConfig, get_peft_model

    names = [n for n, _ in on_meta("lab").named_modules()]
    target = r"llm\.(?!.*lm_head).*\.(q_proj|v_proj)"  # a lookahead, as ms-swift writes it
    config = LoraConfig(target_modules=target, rank_pattern={r"0\..*q_proj": 3}, modules_to_save=["resampler"])
    expressions = {field: made for field, _, made in patterns_in(vars(config))}
    hits = dict(zip(expressions, run_patterns(list(expressions.values()), names)))
    wrapped = get_peft_model(load_vlm("lab"), config)
    adapted = {n: m.r["default"] for n, m in wrapped.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert {names[i] for i in hits["target_modules"]} == set(adapted)
    assert {n for n, r in adapted.items() if r == 3} == {names[i] for i in hits["rank_pattern"]} & set(adapted)
    saved = {n for n, m in wrapped.base_model.model.named_modules() if hasattr(m, "modules_to_save")}
    assert saved == {"resampler"} and {names[i] for i in hits["modules_to_save"]} >= saved
    check_patterns(config, names, "here")


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(lab_folder(), tmp_path / "model")


def test_a_link_that_leaves_is_neither_read_nor_copied(copied, plain, tmp_path, capsys):
    secret = tmp_path / "secret.json"
    secret.write_text('{"password": "hunter2"}')
    for folder, name in ((copied, "notes.json"), (plain, "tokenizer_config.json")):
        (folder / name).symlink_to(secret)
        with pytest.raises(InputError, match=rf"{name} is a link to .*secret\.json, which lies outside") as error:
            check_links(folder)
        assert error.value.remedy and "hunter2" not in str(error.value)
    ways = [
        ["inspect", str(copied)],
        ["inspect", str(plain)],
        ["rescue", str(plain), "--base", "lab"],
        ["merge", str(plain), "--model", "lab", "--output", str(tmp_path / "out")],
        ["ask", "Hello", "--model", str(copied)],
        ["export", str(plain), "--for", "vllm", "--model", "lab", str(tmp_path / "out")],
    ]
    for words in ways:
        assert main(words) == 2, words
        said = capsys.readouterr()
        assert "outside of this folder" in said.out + said.err and "hunter2" not in said.out + said.err, words
    assert not (tmp_path / "out").exists()


def test_links_within_a_folder_and_into_the_hub_s_own_cache_are_followed(copied, tmp_path):
    (copied / "same.txt").symlink_to("config.json")
    check_links(copied)
    cache = tmp_path / "models--owner--name"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "blobs").mkdir()
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir()
    for file in [f for f in copied.iterdir() if not f.is_symlink()]:
        shutil.move(file, cache / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    check_links(snapshot)
    assert load_vlm(snapshot).config.model_type == "minicpmv"
    (tmp_path / "to").mkdir()
    copy_beside(snapshot, tmp_path / "to")
    assert (tmp_path / "to" / "config.json").is_file() and not (tmp_path / "to" / "config.json").is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_not_waited_for(copied, plain, capsys):
    os.mkfifo(copied / "preprocessor_config.json")
    os.mkfifo(plain / "provenance.json")
    for words in (["inspect", str(copied)], ["ask", "Hello", "--model", str(copied)], ["inspect", str(plain)]):
        assert main(words) == 2
        said = capsys.readouterr()
        assert "is neither file nor folder" in said.out + said.err


def test_an_index_of_two_million_entries_is_answered_within_seconds(copied):
    entries = {f"layers.{i}.weight": "model.safetensors" for i in range(2_000_000)}
    (copied / INDEX).write_text(json.dumps({"weight_map": entries}))
    start = time.process_time()
    with pytest.raises(InputError, match="layers.0.weight is in model.safetensors, but it is not"):
        stored_in(copied)
    assert time.process_time() - start < 30  # about four on a free core; it was ninety


def test_a_header_of_a_hundred_megabytes_is_answered_within_seconds(copied, capsys):
    file = copied / "model.safetensors"
    for text in ({"__metadata__": {"x": "a" * 99_000_000}}, {"__metadata__": {"x": "a" * 101_000_000}}):
        header = json.dumps(text).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header)
        start = time.process_time()
        assert main(["inspect", str(copied)]) == 2
        assert time.process_time() - start < 30 and "error" in capsys.readouterr().out


IN_FILES = {
    torch.int8: "I8",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint16: "U16",
}


@pytest.mark.parametrize("kind", IN_FILES, ids=str)
@pytest.mark.parametrize("command", COMMANDS)
def test_tensors_of_every_type_are_named(plain, tmp_path, capsys, command, kind):
    weights = load_file(plain / "adapter_model.safetensors")
    name = next(n for n in weights if "lora_B" in n)
    save_file(weights | {name: torch.ones_like(weights[name]).to(kind)}, plain / "adapter_model.safetensors")
    status = main(COMMANDS[command](plain, tmp_path))
    said = capsys.readouterr()
    layer = name.removeprefix("base_model.model.").removesuffix(".weight")
    assert status == 2 and layer in said.out + said.err, said
    assert {str(kind).removeprefix("torch."), IN_FILES[kind]} & set(re.findall(r"\w+", said.out + said.err))


def test_spoilt_folders_end_in_a_sentence(tmp_path):
    "A part of what `python tests/fuzz.py` does to 5,000."
    pristine = fuzz.originals(tmp_path)
    ended = [fuzz.one(number, "ci", tmp_path, pristine) for number in range(60)]
    assert [e for e in ended if not isinstance(e[-1], int)] == []
    assert {status for *_, status in ended} == {0, 1, 2}
