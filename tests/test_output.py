"""What a command says goes to a closed pipe, a full device or a terminal that knows only ASCII: no traceback, and the
work is done all the same. Real processes, real pipes, the real /dev/full."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout

import pytest

from vlm_lora_lab.cli.line import COMMANDS, main
from vlm_lora_lab.data.drawn import draw
from vlm_lora_lab.show import Outlet

FULL = "/dev/full"
pytestmark = pytest.mark.skipif(not os.path.exists(FULL), reason="there is no /dev/full here")
BUFFERED = pytest.mark.parametrize("env", [{"PYTHONUNBUFFERED": "1"}, {"PYTHONUNBUFFERED": ""}], ids=["now", "late"])
WRONG = ("Traceback", "Error:", "Exception ignored")


def run(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=None, **env):
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONIOENCODING", "PYTHONUTF8", "LC_"))}
    command = [sys.executable, "-m", "vlm_lora_lab", *map(str, args)]
    done = subprocess.run(
        command, stdout=stdout, stderr=stderr, encoding="utf-8", timeout=300, cwd=cwd, env=plain | env
    )
    assert not any(wrong in (done.stdout or "") + (done.stderr or "") for wrong in WRONG), done.stderr
    return done


@pytest.fixture
def closed():
    "The writing end of a pipe that nobody reads."
    reads, writes = os.pipe()
    os.close(reads)
    yield writes
    os.close(writes)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(8):
        draw(i, "colour").images[0].save(folder / f"{i:04}.png")
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "a red square"}]
    records = [{"id": str(i), "image": f"{i:04}.png", "conversations": turns} for i in range(8)]
    (folder / "train.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "train.json"


@BUFFERED
@pytest.mark.parametrize("args, status", [(["--help"], 0), (["merge"], 2)])
def test_a_closed_pipe_changes_no_status(args, status, env, closed):
    assert run(*args, stdout=closed, **env).returncode == status
    assert run(*args, stdout=closed, stderr=closed, **env).returncode == status


@BUFFERED
def test_a_full_output_is_a_sentence_and_status_2(env):
    with open(FULL, "w") as full:
        done = run("merge", "--help", stdout=full, **env)
        assert done.returncode == 2 and "No space left" in done.stderr and len(done.stderr.splitlines()) == 1
        assert run("--help", stdout=full, stderr=full, **env).returncode == 2
        assert run("merge", stderr=full, **env).returncode == 2


def test_a_report_goes_on_in_plain_letters(data, closed):
    said = run("check-data", data, PYTHONIOENCODING="ascii").stdout
    assert said.isascii() and "records" in said
    assert run("check-data", data, stdout=closed, PYTHONUNBUFFERED="1").returncode == 0


def test_a_picture_whose_name_this_terminal_cannot_say(data, tmp_path):
    records = [r | {"image": "图.png"} for r in json.loads(data.read_text(encoding="utf-8"))]
    (tmp_path / "图.png").write_bytes((data.parent / "0000.png").read_bytes())
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    done = run("check-data", "a.json", cwd=tmp_path, LC_ALL="C", PYTHONUTF8="0")
    assert done.returncode == 2 and "PYTHONUTF8=1" in done.stdout and done.stdout.isascii(), done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_text_can_be_read_in_ascii(command):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with redirect_stdout(terminal), pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    said = terminal.buffer.getvalue().decode("ascii")
    assert "usage" in said and "\\u" not in said and "\\x" not in said


def test_signs_of_others_keep_their_numbers():
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    print("é × … → 用 \udcff", file=Outlet(terminal), end="")
    assert terminal.buffer.getvalue().decode("cp1252") == "é × … -> \\u7528 \\udcff"


def test_a_run_goes_on_when_nobody_listens(data, tmp_path):
    flags = ["--data", data, "--max-steps", 2, "--batch-size", 2, "--rank", 2, "--vision-cache", "off"]
    with open(FULL, "w") as full:
        done = run("train", *flags, "--output", tmp_path / "out", stdout=full, PYTHONUNBUFFERED="1")
    assert done.returncode == 2 and "No space left" in done.stderr
    assert {"adapter", "report.json"} <= {p.name for p in (tmp_path / "out").iterdir()}


def test_a_name_that_is_no_text_is_refused(tmp_path, capsys):
    assert main(["train", "--data", os.fsdecode(b"x\xff.json"), "--output", str(tmp_path / "out")]) == 2
    assert "no text in utf-8. Rename it" in capsys.readouterr().err
