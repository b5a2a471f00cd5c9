"""A run that must end early keeps what it has learned: a closed terminal, a picture that is deleted or truncated after
the check, a disk that fills up."""

import fcntl
import json
import os
import pty
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from safetensors.torch import load_file
from test_identity import data  # noqa: F401

from vlm_lora_lab.cli import main
from vlm_lora_lab.train.run import last_checkpoint
from vlm_lora_lab.train.watch import LivePlot

FLAGS = ["--batch-size", "2", "--save-every", "100", "--rank", "2", "--vision-cache", "off", "--no-four-bit"]


def train(data, out, *more, steps=4):
    return ["train", "--data", str(data / "train.json"), "--output", str(out), "--max-steps", str(steps), *FLAGS, *more]


def resume(out, *more):
    return main(["train", "--resume", "--output", str(out), *more])


def after_step(monkeypatch, step, then):
    "Something happens to the world while a run is under way."

    class Breaks(LivePlot):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                then()

    monkeypatch.setattr("vlm_lora_lab.job.LivePlot", Breaks)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def weights(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("spoil, cause", [(lambda f: f.unlink(), "there is no"), (truncate, "")])
def test_a_picture_that_is_lost_in_mid_run_costs_nothing_that_was_learned(
    spoil, cause, workers, data, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    pictures = sorted((data / "train").iterdir())
    keep = tmp_path / "keep"
    shutil.copytree(data / "train", keep)
    assert main(train(data, tmp_path / "whole")) == 0
    capsys.readouterr()
    with monkeypatch.context() as patch:
        after_step(patch, 2, lambda: [spoil(p) for p in pictures])
        assert main(train(data, out, "--workers", workers)) == 2
    said = capsys.readouterr().err
    step = int(last_checkpoint(out / "checkpoints").name.split("-")[1])
    assert (
        f"after step {step}: " in said
        and cause in said
        and f"Saved up to checkpoint-{step}: mend it, then go on with --resume" in said
        and "Traceback" not in said
    ), said
    assert step >= 2 and any(p.name in said for p in pictures), said
    # still broken: the check says what it says of any bad row
    assert resume(out) == 2 and "--resume" not in capsys.readouterr().out
    for p in pictures:
        shutil.copyfile(keep / p.name, p)  # the same picture, at another time
    assert resume(out) == 0
    assert "were mended since the run was interrupted" in capsys.readouterr().out
    a, b = weights(tmp_path / "whole"), weights(out)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_pictures_that_were_whole_when_the_run_was_interrupted_may_not_change(data, tmp_path, capsys, monkeypatch):
    "Here the questions are lost, and the pictures to learn from are swapped only afterwards."
    questions, out = tmp_path / "questions", tmp_path / "out"
    shutil.copytree(data, questions)
    lost = sorted((questions / "train").iterdir())[0]
    with monkeypatch.context() as patch:
        after_step(patch, 1, lost.unlink)
        assert (
            main(train(data, out, "--eval-data", str(questions / "train.json"), "--every", "2", "--questions", "2"))
            == 2
        )
    said = capsys.readouterr().err
    assert "after step 2: " in said and lost.name in said and "Saved up to checkpoint-2" in said, said
    learned = sorted((data / "train").iterdir())
    shutil.copyfile(learned[1], lost)  # mended with another picture: a word, and it goes on
    was = learned[0].stat()
    shutil.copyfile(learned[1], learned[0])
    assert resume(out) == 2 and "pictures of data" in capsys.readouterr().err
    shutil.copyfile(questions / "train" / learned[0].name, learned[0])
    os.utime(learned[0], ns=(was.st_atime_ns, was.st_mtime_ns))
    if learned[0].stat().st_size == was.st_size:
        assert resume(out) == 0 and "Pictures of eval_data" in capsys.readouterr().out


def test_a_picture_that_is_lost_before_the_first_step_leaves_nothing_that_is_in_the_way(
    data, tmp_path, capsys, monkeypatch
):
    class Breaks(LivePlot):
        def on_train_begin(self, args, state, control, **kwargs):
            shutil.move(data / "train", data / "away")

    with monkeypatch.context() as patch:
        patch.setattr("vlm_lora_lab.job.LivePlot", Breaks)
        assert main(train(data, tmp_path / "out")) == 2
    assert "Nothing was saved yet: mend it, and start again" in capsys.readouterr().err
    shutil.move(data / "away", data / "train")
    assert main(train(data, tmp_path / "out")) == 0


def _read_until(stream, word, seconds=120):
    seen, end = b"", time.monotonic() + seconds
    while word not in seen and time.monotonic() < end:
        seen += os.read(stream, 1)
    assert word in seen, seen[-500:]


def _in_a_terminal_that_is_closed(command, hangup):
    "The exit status of a command whose real terminal goes away in mid-run."
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, hangup)
        os.execv(sys.executable, [sys.executable, "-m", "vlm_lora_lab", *command])
    # wide enough for a bar with a loss on it
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    _read_until(terminal, b", loss ")
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_closed_terminal_ends_no_run_that_ignores_it(data, tmp_path):
    "As after trap '' HUP: nobody hears what is said before the adapter is saved, and it is saved."
    assert _in_a_terminal_that_is_closed(train(data, tmp_path / "out", steps=20), signal.SIG_IGN) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["steps"] == 20 and weights(tmp_path / "out")


def test_a_closed_terminal_stops_a_run_with_a_checkpoint(data, tmp_path):
    out = tmp_path / "out"
    assert _in_a_terminal_that_is_closed(train(data, out, steps=200), signal.SIG_DFL) == 130
    done = last_checkpoint(out / "checkpoints").name.split("-")[1]
    assert not (out / "report.json").exists() and 0 < int(done) < 200
    assert resume(out, "--max-steps", done) == 0 and json.loads((out / "report.json").read_text())["steps"] == int(done)


def test_under_nohup_a_hangup_changes_nothing(data, tmp_path):
    command = [sys.executable, "-m", "vlm_lora_lab", *train(data, tmp_path / "out", steps=20)]
    run = subprocess.Popen(
        command,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    _read_until(run.stderr.fileno(), b", loss ")
    run.send_signal(signal.SIGHUP)
    run.communicate(timeout=120)
    assert run.returncode == 0 and json.loads((tmp_path / "out" / "report.json").read_text())["steps"] == 20


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_leaves_the_older_one_whole(
    data, tmp_path, capsys, monkeypatch
):
    "A real limit on the size of files, from the second step on."

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))

    out = tmp_path / "out"
    assert main(train(data, tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        after_step(patch, 2, full)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            status = main([f if f != "100" else "1" for f in train(data, out)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            signal.signal(signal.SIGXFSZ, handler)
    assert status == 2 and "the disk is full" in capsys.readouterr().err
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["checkpoint-1"]
    assert resume(out) == 0
    a, b = weights(tmp_path / "whole"), weights(out)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
