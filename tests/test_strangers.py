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
from vlm_lora_lab.debug.nan import diagnose, replay, save_case
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


MANY = {f"layers.{i}.q_proj": 2 for i in range(1_000_000)}
ENORMOUS = {  # field -> value, and what is said of it
    "layers_to_transform": (list(range(2_000_000)), "2,000,000 entries"),
    "target_modules": (list(MANY), "1,000,000 entries"),
    "exclude_modules": (list(MANY), "1,000,000 entries"),
    "modules_to_save": (list(MANY), "1,000,000 entries"),
    "rank_pattern": (MANY, "1,000,000 entries"),
    "alpha_pattern": (MANY, "1,000,000 entries"),
    "trainable_token_indices": ({"embed_tokens": list(range(2_000_000))}, "2,000,000 entries"),
    "r": (10**9, "1000000000"),
}


SLOW = [pytest.param(f, marks=pytest.mark.slow) for f in ("exclude_modules", "modules_to_save", "alpha_pattern")]


@pytest.mark.parametrize("field", [*SLOW, *(f for f in ENORMOUS if f not in [p.values[0] for p in SLOW])])
@pytest.mark.parametrize("command", COMMANDS)
def test_enormous_lists_and_numbers_are_answered_within_seconds(plain, tmp_path, capsys, command, field):
    value, says = ENORMOUS[field]
    say(plain, **{field: value})
    start = time.process_time()
    assert main(COMMANDS[command](plain, tmp_path)) == 2
    said = capsys.readouterr()
    assert says in said.out + said.err and field in said.out + said.err and len(said.out + said.err) < 5000
    assert time.process_time() - start < 20 and not (tmp_path / "merged").exists()


def test_a_list_longer_than_the_model_and_a_rank_above_the_file_are_refused(plain):
    say(plain, rank_pattern={f"layers.{i}.q_proj": 2 for i in range(5000)})  # for a large model it may be
    with pytest.raises(InputError, match="rank_pattern has 5,000 entries, and no adapter of this model needs more"):
        load_adapter(plain, "lab")
    say(plain, rank_pattern={"q_proj": 2**20})
    with pytest.raises(InputError, match=r"rank_pattern\['q_proj'\] is 1048576, and the largest rank in the file is 2"):
        load_adapter(plain, "lab")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    "What the NaN doctor writes of a step with an adapter."
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[1, 2, 3]])}
    model = apply_plan(load_vlm("lab"), TuningPlan(connector="freeze", rank=2))
    model.get_parameter(next(n for n, _ in model.named_parameters() if "lora_A" in n)).data.fill_(torch.inf)
    folder = tmp_path_factory.mktemp("case") / "case"
    return save_case(folder, model, batch, diagnose(model, batch))


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"target_modules": ENDLESS}, "did not come to its end"),
        ({"rank_pattern": {"(": 2}}, "no regular expression"),
        ({"rank_pattern": MANY}, "1,000,000 entries"),
        ({"r": 10**9}, "largest rank in the file is 2"),
        ({"target_modules": ["nowhere"]}, "PEFT cannot put this adapter on the model"),
        ({"r": "many"}, "PEFT cannot put this adapter on the model"),
    ],
    ids=["endless", "broken", "million", "rank", "nowhere", "word"],
)
def test_a_case_of_a_stranger_is_checked_as_an_adapter_is(case, tmp_path, fields, says):
    folder = shutil.copytree(case, tmp_path / "case")
    say(folder, **fields)
    start = time.process_time()
    with pytest.raises(InputError, match=says):
        replay(folder)
    assert time.process_time() - start < 20


def test_the_case_itself_can_be_played(case):
    told = json.loads((case / "case.json").read_text(encoding="utf-8"))["diagnosis"]
    assert (replay(case).cause, replay(case).bad) == (told["cause"], tuple(told["bad"]))


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


@pytest.mark.parametrize("value", [2**63, -1.5, ["q_proj", 3], {"q_proj": 1}], ids=str)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_no_pattern_is_named(plain, tmp_path, capsys, command, value):
    say(plain, target_modules=value)
    status, said = main(COMMANDS[command](plain, tmp_path)), capsys.readouterr()
    assert status == 2 and "target_modules is" in said.out + said.err


@pytest.mark.parametrize(
    "file, field, value",
    [
        ("tokenizer_config.json", "extra_special_tokens", -1),
        ("tokenizer_config.json", "additional_special_tokens", "many"),
        ("config.json", "pad_token_id", 2**63),
    ],
)
def test_what_no_model_can_be_made_of_is_a_sentence(copied, capsys, file, field, value):
    path = copied / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert main(["ask", "What is this?", "--model", str(copied)]) == 2
    said = capsys.readouterr().err
    assert file in said or str(copied) in said


def test_spoilt_folders_end_in_a_sentence(tmp_path):
    "A part of what `python tests/fuzz.py` does to 5,000."
    pristine = fuzz.originals(tmp_path)
    ended = [fuzz.one(number, "ci", tmp_path, pristine) for number in range(60)]
    assert [e for e in ended if not isinstance(e[-1], int)] == []
    assert {status for *_, status in ended} == {0, 1, 2}
