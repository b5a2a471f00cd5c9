"""Every command, with something that is no file or folder wherever one is due: it ends in a sentence and a status, and
nothing is left behind."""

import json
import os
import re

import pytest

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.errors import InputError, check_writable, empty_folder

DATA = str(samples_folder() / "handwriting" / "train.json")
FILES = (
    "config.json",
    "adapter_config.json",
    "provenance.json",
    "adapter_model.safetensors",
    "plan.json",
    "model.safetensors",
    "job.json",
    "report.json",
    "tokenizer.json",
    "preprocessor_config.json",
    "README.md",
)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
    (tmp_path / "file").write_text("hello")
    (tmp_path / "nothing").touch()
    (tmp_path / "bytes").write_bytes(bytes(range(256)))
    (tmp_path / "dangling").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    for folder in ("folders", "objects", "lists"):
        for name in FILES:
            path = tmp_path / folder / name
            path.parent.mkdir(exist_ok=True)
            path.mkdir() if folder == "folders" else path.write_text({"objects": "{}", "lists": "[null]"}[folder])
    return tmp_path


IN = ["file", "dangling", "loop", "folders", "objects", "x" * 300, "", "half\ud800"]
MORE = [
    "nothing",
    "bytes",
    "lists",
    "file/below",
    "nowhere",
    ".",
    "/dev/null",
    "a/" * 2500,
    " ",
    "nul\0byte",
    "tab\tand\n",
    "C:\\data\\x",
]
OUT = [
    "file",
    "dangling",
    "loop",
    "file/below",
    "/dev/null",
    "/dev/null/x",
    "x" * 300,
    "a/" * 2500,
    "",
    "nul\0byte",
    "half\ud800",
]


def reading(bad):
    "Commands that read from a path."
    for options in (
        ["--data", bad],
        ["--data", "few.json", "--model", bad],
        ["--data", "few.json", "--eval-data", bad],
        ["--data", "few.json", "--mix-data", bad],
        ["--data", "few.json", "--stages", bad],
        [bad],
    ):
        yield ["train", *options, "--output", "out"]
        yield ["doctor", *options]
    yield from (
        ["train", "--resume", "--output", bad],
        ["doctor", "--resume", "--output", bad],
        ["doctor", "--data", "file", "--image-root", bad],
    )
    yield from (
        ["check-data", bad],
        ["check-data", "few.json", "--against", bad],
        ["check-data", "few.json", "--model", bad, "--pictures", "none"],
    )
    yield from (
        ["ask", "hi", "--adapter", bad],
        ["ask", "hi", "--model", bad],
        ["ask", "hi", "--image", bad],
        ["evaluate", bad, "--data", "few.json"],
        ["evaluate", "lab", "--data", bad],
        ["compare", "lab", bad, "--data", "few.json"],
    )
    yield from reading_checkpoints(bad)


def reading_checkpoints(bad):
    "Commands that read a model or an adapter from a path."
    yield from (
        ["parts", bad],
        ["plan", bad],
        ["plan", "lab", "--stages", bad],
        ["plan", "lab", "--flags", bad],
        ["plan", "lab", "--flags", "minicpmv", bad],
        ["estimate", bad],
        ["estimate", "lab", "--gpu", bad],
        ["config", bad],
    )
    yield from (
        ["inspect", bad],
        ["inspect", "objects", "--base", bad],
        ["merge", bad, "--output", "out"],
        ["merge", "objects", "--model", bad, "--output", "out"],
    )
    yield from (["export", bad, "out", "--for", server] for server in ("vllm", "llama.cpp", "transformers"))
    yield from (
        ["export", "objects", bad, "--for", server, "--check"] for server in ("vllm", "llama.cpp", "transformers")
    )
    yield from (
        ["rescue", bad, "--base", "lab"],
        ["rescue", "objects", "--base", bad],
        ["rescue", "objects", "--base", "lab", "--flags", bad],
    )


def writing(bad):
    "Commands that write to it."
    yield from (
        ["train", "--data", "few.json", "--output", bad],
        ["doctor", "--data", "few.json", "--output", bad],
        ["demo", "--output", bad],
        ["pretrain", "--output", bad],
        ["merge", "objects", "--output", bad],
    )
    yield from (
        ["export", "objects", bad, "--for", "vllm"],
        ["rescue", "objects", "--base", "lab", "--output", bad],
        ["evaluate", "lab", "--data", "few.json", "--output", bad],
    )
    yield from (["doctor", "--data", "few.json", "--report", bad], ["check-data", "few.json", "--output", bad])


def there(folder):
    return {str(p) for p in folder.rglob("*") if "cache" not in str(p)}


def ends_well(argv, capsys, statuses=(2,)):
    try:
        status = main(argv)
    except SystemExit as e:
        status = e.code
    except Exception as e:
        raise AssertionError(f"{argv!r:.200} ends in {type(e).__name__}: {e}") from e
    said = capsys.readouterr()
    assert status in statuses, (argv, status, said)
    assert argv[0] in ("doctor", "inspect", "check-data") or re.search(
        rf"^vlm-lora-lab {argv[0]}: .", said.err, re.M
    ), said.err
    assert "Traceback" not in said.err and "[Errno" not in said.err and len(said.err) < 6500, said.err


@pytest.mark.parametrize(
    "bad", [pytest.param(b, id=repr(b)[1:15], marks=[pytest.mark.slow] * (b in MORE)) for b in IN + MORE]
)
def test_read_from(bad, world, capsys):
    before = there(world)
    for argv in reading(bad):
        ends_well(argv, capsys)
    assert there(world) == before


@pytest.mark.parametrize("bad", OUT, ids=[repr(b)[1:15] for b in OUT])
def test_written_to(bad, world, capsys):
    "What cannot be written to is seen before anything is computed: making the lab model takes half an hour."
    before = there(world)
    for argv in writing(bad):
        ends_well(argv, capsys)
    assert there(world) == before


def test_without_permission(world, capsys):
    for name in ("closed", "read only"):
        (world / name).mkdir()
        (world / name / "config.json").write_text("{}")
    (world / "closed file").write_text("[]")
    (world / "closed file").chmod(0)
    if os.access(world / "closed file", os.R_OK):
        pytest.skip("root may read and write everything")
    (world / "closed").chmod(0)
    (world / "read only").chmod(0o500)
    try:
        for argv in [*reading("closed"), *reading("closed file"), *writing("read only/new"), *writing("closed/new")]:
            ends_well(argv, capsys)
    finally:
        for name in ("closed", "read only"):
            (world / name).chmod(0o700)


def test_an_empty_folder_is_one_that_can_be_written_to(tmp_path):
    assert empty_folder(tmp_path / "new" / "below") == tmp_path / "new" / "below"
    (tmp_path / "file").touch()
    for bad, said in (
        (tmp_path / "file", "is no folder"),
        (tmp_path / "file" / "below", "is no folder"),
        (tmp_path / "nul\0", "no file can have the name"),
        (tmp_path / ("x" * 300), "cannot be written to"),
    ):
        for check in (empty_folder, check_writable):
            with pytest.raises(InputError, match=said):
                check(bad)
