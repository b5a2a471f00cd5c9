"""One writer in a folder at a time: the second is refused by the name of the first, and what a killed process left is
taken over."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.dialects import convert
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.errors import InputError, check_free, claimed, complete_or_nothing
from vlm_lora_lab.job import LOCK
from vlm_lora_lab.train.run import last_checkpoint

DATA = samples_folder() / "handwriting" / "validation.json"
FLAGS = ["--data", str(DATA), "--batch-size", "2", "--rank", "2", "--vision-cache", "off", "--no-four-bit"]


def wait_for(there, process, seconds=300):
    until = time.monotonic() + seconds
    while not there():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            pytest.fail(f"the run did not come so far: {process.communicate()}")
        time.sleep(0.02)


@pytest.fixture
def under_way(tmp_path):
    "A training in another process, which goes on for long."
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "vlm_lora_lab",
        "train",
        *FLAGS,
        "--max-steps",
        "5000",
        "--save-every",
        "1",
        "--output",
        str(out),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # a whole one: a folder that was only begun holds nothing to go on from
    wait_for(lambda: last_checkpoint(out / "checkpoints"), process)
    yield process, out
    process.kill()
    process.communicate()


def test_a_second_run_is_refused_by_name_and_a_killed_one_is_taken_over(under_way, capsys):
    process, out = under_way
    for more in ([], ["--resume"]):
        assert main(["train", *FLAGS, "--max-steps", "5000", "--save-every", "1", "--output", str(out), *more]) == 2
        said = capsys.readouterr().err
        assert f"process {process.pid} on {os.uname().nodename}, since 20" in said and str(out) in said
        assert (
            main(["doctor", *FLAGS, "--output", str(out), *more]) == 2
            and f"process {process.pid} " in capsys.readouterr().out
        )
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / LOCK).exists()
    check_free(out / LOCK, out)

    saved = json.loads((out / "job.json").read_text())
    # a short way to the end
    saved["schedule"]["max_steps"] = int(last_checkpoint(out / "checkpoints").name.split("-")[1]) + 1
    (out / "job.json").write_text(json.dumps(saved))
    assert main(["train", "--resume", "--output", str(out)]) == 0
    assert (
        f"left by a process that is gone (process {process.pid} " in capsys.readouterr().out
        and not (out / LOCK).exists()
    )


def test_the_lock_goes_when_a_run_ends_well_or_badly(tmp_path, monkeypatch):
    assert main(["train", *FLAGS, "--max-steps", "1", "--output", str(tmp_path / "well")]) == 0
    assert not (tmp_path / "well" / LOCK).exists()

    def fails(*args, **kwargs):
        assert (tmp_path / "badly" / LOCK).exists()
        raise ZeroDivisionError

    monkeypatch.setattr("vlm_lora_lab.job.fit", fails)
    with pytest.raises(ZeroDivisionError):
        main(["train", *FLAGS, "--max-steps", "1", "--output", str(tmp_path / "badly")])
    assert not (tmp_path / "badly" / LOCK).exists()


def test_two_writers_of_one_folder(tmp_path):
    script = f"""
import sys, time
from vlm_lora_lab.errors import complete_or_nothing
with complete_or_nothing({str(tmp_path / "merged")!r}) as partial:
    (partial / "weights").write_text("half")
    print("there", flush=True)
    sys.stdin.readline()
    (partial / "rest").write_text("whole")
"""
    first = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "there\n"
    with (
        pytest.raises(InputError, match=f"process {first.pid} on .* since .* is writing here") as error,
        complete_or_nothing(tmp_path / "merged"),
    ):
        raise AssertionError("two at once")
    assert error.value.remedy and error.value.where == str(tmp_path / "merged")
    first.communicate("\n")
    assert first.returncode == 0 and sorted(p.name for p in tmp_path.rglob("*")) == ["merged", "rest", "weights"]


@pytest.mark.parametrize("command", ["merge", "export", "rescue", "save"])
def test_every_command_that_writes_a_folder_respects_it(command, tmp_path, capsys):
    from vlm_lora_lab.checkpoint.save import save_adapter
    from vlm_lora_lab.models.load import load_tokenizer, load_vlm
    from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

    plan = TuningPlan(rank=2)
    model = apply_plan(load_vlm("lab"), plan)
    for p in model.parameters():
        p.data += 0.01 * p.requires_grad

    def save(folder):
        return save_adapter(model, folder, plan, "lab", load_tokenizer("lab"), four_bit=False)

    adapter, out = save(tmp_path / "adapter"), tmp_path / "out"
    if command == "rescue":
        (adapter / "provenance.json").unlink()
    argv = {
        "merge": ["merge", str(adapter), "--output", str(out)],
        "export": ["export", str(adapter), str(out), "--for", "vllm"],
        "rescue": ["rescue", str(adapter), "--base", "lab", "--output", str(out)],
    }.get(command)
    with complete_or_nothing(out) as partial:
        (partial / "mine").write_text("")
        if argv:
            assert main(argv) == 2 and f"process {os.getpid()} on" in capsys.readouterr().err
        else:
            with pytest.raises(InputError, match=f"process {os.getpid()} on"):
                save(out)
        assert (partial / "mine").exists()
    assert [p.name for p in out.iterdir()] == ["mine"]


def test_two_comparisons_and_two_conversions_in_one_place(tmp_path, capsys):
    out, other = tmp_path / "out", DATA.with_name("train.json")
    (out / "answers").mkdir(parents=True)
    with claimed(out / "compare.lock", out):
        assert main(["compare", "lab", "--data", str(DATA), "--output", str(out)]) == 2
        assert f"process {os.getpid()} on" in capsys.readouterr().err
    assert not list((out / "answers").iterdir())
    target = tmp_path / "new.jsonl"
    with claimed(tmp_path / ".new.jsonl.lock", target):
        (tmp_path / "new.jsonl.partial").write_text("half of mine")
        with pytest.raises(InputError, match=f"process {os.getpid()} on"):
            convert(other, target, "openai")
        assert (tmp_path / "new.jsonl.partial").read_text() == "half of mine"


def test_two_processes_that_convert_the_same_pickle_give_one_model(tmp_path):
    import torch

    from vlm_lora_lab.models.files import convert_pickles, stored_in

    torch.save({"a.weight": torch.ones(3, 3)}, tmp_path / "pytorch_model.bin")
    script = f"""
import pathlib
from vlm_lora_lab.models import files
print("there", flush=True)
print([f.name for f in files.convert_pickles(pathlib.Path({str(tmp_path)!r}))])
"""
    with claimed(tmp_path / ".converting.lock", tmp_path):  # as the first one does
        second = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert second.stdout.readline() == "there\n"
        time.sleep(0.5)
        assert second.poll() is None  # it waits
        (tmp_path / "model.safetensors").write_bytes(b"written by the first")
    assert (
        second.communicate()[0] == "['model.safetensors']\n"
        and (tmp_path / "model.safetensors").read_bytes() == b"written by the first"
    )
    (tmp_path / "model.safetensors").unlink()
    assert convert_pickles(tmp_path) == [tmp_path / "model.safetensors"] and list(stored_in(tmp_path)) == ["a.weight"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.safetensors", "pytorch_model.bin"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_worker_that_outlives_its_parent_does_not_keep_the_lock(tmp_path):
    lock = tmp_path / LOCK
    script = f"""
import os, time
from vlm_lora_lab.errors import claimed
with claimed({str(lock)!r}, "here"):
    if os.fork() == 0:
        print(os.getpid(), flush=True)  # by the worker: what it must forget is forgotten then
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    try:
        with pytest.raises(InputError, match=f"process {parent.pid} "):
            check_free(lock, tmp_path)
        parent.kill()
        parent.wait()
        os.kill(worker, 0)  # it goes on
        check_free(lock, tmp_path)
        with claimed(lock, tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        parent.kill()
        parent.stdout.close()


def test_what_a_dead_process_left_is_taken_over_with_a_word(tmp_path):
    lock, said = tmp_path / LOCK, []
    lock.write_text("process 4194304999 on nowhere, since 2020-01-01 00:00:00")  # nobody holds the kernel's lock
    check_free(lock, tmp_path)
    with claimed(lock, tmp_path, said.append):
        assert f"process {os.getpid()} on" in lock.read_text()
    assert not lock.exists() and "since 2020-01-01" in said[0]


@pytest.mark.parametrize(
    "who, free",
    [
        ("process 4194304999 on {host}, since then", True),
        ("process 4194304999 on elsewhere, since then", False),
        ("process {pid} on {host}, since then", False),
        ("", True),
    ],
)
def test_a_file_system_without_locks_asks_for_the_process(who, free, tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_lora_lab.errors._flock", lambda file, kind: None)
    monkeypatch.setattr("vlm_lora_lab.errors._PATIENCE", 0)
    lock = tmp_path / LOCK
    lock.write_text(who.format(host=os.uname().nodename, pid=os.getpid()))
    if free:
        check_free(lock, tmp_path)
        with claimed(lock, tmp_path):
            pass
        return
    for attempt in (lambda: check_free(lock, tmp_path), claimed(lock, tmp_path).__enter__):
        with pytest.raises(InputError, match="is writing here") as error:
            attempt()
        assert ("elsewhere" in who) == (f"remove {lock}" in error.value.remedy)
    assert lock.exists()
