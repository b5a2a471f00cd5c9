"""A base is known by every byte: one changed number is refused, other shards and places are not, and the hash is
computed once."""

import json
import os
import shutil
import time

import pytest
import torch

import vlm_lora_lab.checkpoint.save as save_module
from vlm_lora_lab.checkpoint.save import base_sha256, fingerprint, load_adapter, read_provenance, save_adapter, seal
from vlm_lora_lab.cli import main
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import lab_folder, load_tokenizer, load_vlm
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

PICTURE = samples_folder() / "handwriting" / "train" / "0000.png"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "An adapter of the lab model, and a base with one changed number."
    place = tmp_path_factory.mktemp("made")
    plan = TuningPlan(rank=2)
    model = apply_plan(load_vlm("lab"), plan)
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    save_adapter(model, place / "adapter", plan, "lab", load_tokenizer("lab"), four_bit=False)
    shutil.copytree(lab_folder(), place / "changed")
    changed_number(place / "changed")
    rows = json.loads((samples_folder() / "handwriting" / "test.json").read_text())[:2]
    rows = [r | {"image": str(samples_folder() / "handwriting" / r["image"])} for r in rows]
    (place / "questions.json").write_text(json.dumps(rows))
    return place


def changed_number(base):
    "One bit of one number, where the fingerprint takes no sample."
    file, before = base / "model.safetensors", fingerprint(base)
    content = bytearray(file.read_bytes())
    content[len(content) // 2 + 100] ^= 1
    file.write_bytes(content)
    assert fingerprint(base) == before and base_sha256(base) != base_sha256("lab")


@pytest.mark.parametrize("command", ["ask", "merge", "vllm", "transformers", "compare", "evaluate"])
def test_a_changed_number_is_refused_and_sampled_only_when_asked(command, made, tmp_path, capsys):
    adapter, out = str(made / "adapter"), str(tmp_path / "out")
    argv = {
        "ask": ["ask", "What?", "--image", str(PICTURE), "--adapter", adapter],
        "merge": ["merge", adapter, "--output", out],
        "compare": ["compare", adapter, "--data", str(made / "questions.json"), "--allow-outside"],
        "evaluate": ["evaluate", adapter, "--data", str(made / "questions.json"), "--allow-outside"],
    }.get(command) or ["export", adapter, out, "--for", command]
    argv += ["--model", str(made / "changed")]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "another base" in said and str(made / "changed") in said and not os.path.exists(out)
    assert main([*argv, "--quick"]) in (0, 1)
    said = capsys.readouterr().err
    assert said.count("by names, shapes and samples") == 1 and "(quick)" in said


def test_load_adapter_refuses_it_too_and_takes_the_same_weights_in_other_shards(made, tmp_path):
    with pytest.raises(InputError, match="another base"):
        load_adapter(made / "adapter", made / "changed")
    assert load_adapter(made / "adapter", made / "changed", quick=True)
    with pytest.raises(InputError, match="one of the two"):
        load_adapter(made / "adapter", quick=True, verify=True)
    load_vlm("lab", dtype="stored").save_pretrained(tmp_path / "cut", max_shard_size="1MB")
    for quick in (False, True):
        assert load_adapter(made / "adapter", tmp_path / "cut", quick=quick)


def test_an_older_adapter_without_a_full_hash_loads_with_a_word(made, tmp_path, capsys):
    shutil.copytree(made / "adapter", tmp_path / "old")
    provenance = read_provenance(tmp_path / "old")
    del provenance["base_sha256"]
    seal(tmp_path / "old", provenance)
    capsys.readouterr()
    assert load_adapter(tmp_path / "old") and "older version" in capsys.readouterr().err
    assert load_adapter(made / "adapter") and capsys.readouterr().err == ""


@pytest.fixture
def old_base(tmp_path, monkeypatch):
    "A base that counts as settled, with a cache of its own, and how often it was hashed."
    shutil.copytree(lab_folder(), tmp_path / "base")
    monkeypatch.setattr(save_module, "_SETTLED", -(10**12))
    monkeypatch.setenv("VLM_LORA_LAB_HASHES", str(tmp_path / "hashes"))
    hashed, real = [], save_module._sha256_of
    monkeypatch.setattr(save_module, "_sha256_of", lambda files: hashed.append(files) or real(files))
    return tmp_path / "base", hashed


def test_the_hash_is_computed_once_and_again_when_the_file_changed(old_base):
    base, hashed = old_base
    assert base_sha256(base) == base_sha256(base) == base_sha256("lab") and len(hashed) == 2  # base, and lab
    file, times = base / "model.safetensors", (base / "model.safetensors").stat()
    with open(file, "r+b") as f:
        f.seek(times.st_size // 2 + 100)
        byte = f.read(1)[0]
        f.seek(times.st_size // 2 + 100)
        f.write(bytes([byte ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # equal path, size, inode and time of change
    assert base_sha256(base) != base_sha256("lab") and len(hashed) == 3


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"0" * 64, b"0" * 64 + b" " + b"1" * 64, b"a b c"])
def test_a_broken_cache_is_no_error(old_base, content):
    base, hashed = old_base
    right = base_sha256(base)
    [file] = save_module.hashes_folder().iterdir()
    file.write_bytes(content)
    assert base_sha256(base) == right and len(hashed) == 2


@pytest.mark.parametrize("place", ["/proc/nowhere", "file"])
def test_a_cache_that_cannot_be_written_is_no_error(old_base, place, tmp_path, monkeypatch):
    base, hashed = old_base
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_LORA_LAB_HASHES", place if place.startswith("/") else str(tmp_path / place))
    assert base_sha256(base) == base_sha256(base) == base_sha256("lab") and len(hashed) == 3


def test_a_base_written_this_moment_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_LORA_LAB_HASHES", str(tmp_path / "hashes"))
    shutil.copytree(lab_folder(), tmp_path / "base")
    base_sha256(tmp_path / "base")
    assert not (tmp_path / "hashes").exists()
    time.sleep(2.1)
    base_sha256(tmp_path / "base")
    assert len(list((tmp_path / "hashes").iterdir())) == 1


def test_the_cache_follows_the_user_s_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("VLM_LORA_LAB_HASHES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert save_module.hashes_folder() == tmp_path / "vlm_lora_lab" / "hashes"
