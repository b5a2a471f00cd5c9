"""A worker process that is killed ends what it worked for with a sentence, and a row's pictures are held one at a time.
Real processes, killed as the system does it where memory runs out."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from test_identity import data  # noqa: F401
from test_interrupted import after_step, train, weights
from torch.utils.data import DataLoader, Dataset

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.batch import Reading, WorkerLost, check_rows, watched_workers
from vlm_lora_lab.data.doctor import check_data
from vlm_lora_lab.data.native import load_processor
from vlm_lora_lab.data.records import Conversations
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.train.run import last_checkpoint

KILLED = r"a worker process \(\d+\) was killed.*fewer workers \(--workers\), smaller pictures"


def kill_one(number=signal.SIGKILL):
    os.kill(multiprocessing.active_children()[0].pid, number)


def none_is_left(seconds=5):
    "All workers have ended; the kernel may take a moment."
    end = time.monotonic() + seconds
    while multiprocessing.active_children():
        assert time.monotonic() < end, multiprocessing.active_children()
        time.sleep(0.01)


@contextmanager
def a_worker_dies():
    "As soon as there is one, another thread kills it."

    def wait():
        while not multiprocessing.active_children() and not over.wait(0.01):
            pass
        time.sleep(0.3)
        kill_one()

    over = threading.Event()
    killer, start = threading.Thread(target=wait), time.monotonic()
    killer.start()
    try:
        yield
    finally:
        over.set()
        killer.join()
    assert time.monotonic() - start < 60
    none_is_left()


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "Two thousand records with one picture of which the work takes a while."
    folder = tmp_path_factory.mktemp("many")
    Image.effect_noise((600, 600), 50).save(folder / "a.png")
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "noise"}]
    records = [{"id": str(i), "image": "a.png", "conversations": turns} for i in range(2000)]
    (folder / "many.json").write_text(json.dumps(records), encoding="utf-8")
    return folder / "many.json"


def test_check_data_does_not_wait_for_the_dead(many):
    with a_worker_dies(), pytest.raises(WorkerLost, match=f"many.json: {KILLED}"):
        check_data(many, workers=2)


def test_nor_does_the_check_before_a_training(many):
    with a_worker_dies(), pytest.raises(WorkerLost, match=f"rows: {KILLED}"):
        check_rows(Conversations.open(many), load_processor("lab"), Reading(workers=2), "rows")


def test_a_training_saves_what_was_learned_and_goes_on_with_fewer_workers(data, tmp_path, capsys, monkeypatch):  # noqa: F811
    records = json.loads((data / "train.json").read_text(encoding="utf-8"))
    more = [r | {"id": f"{r['id']} {i}"} for i in range(64 // len(records) + 1) for r in records]
    (data / "train.json").write_text(json.dumps(more), encoding="utf-8")
    assert main(train(data, tmp_path / "whole", steps=16)) == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        after_step(patch, 2, kill_one)
        assert main(train(data, out, "--workers", "1", steps=16)) == 2
    said = capsys.readouterr().err
    step = int(last_checkpoint(out / "checkpoints").name.split("-")[1])
    assert f"after step {step}: a worker process " in said and "fewer workers" in said, said
    assert f"Saved up to checkpoint-{step}" in said and step >= 2
    none_is_left()
    assert main(["train", "--resume", "--output", str(out), "--workers", "0"]) == 0, capsys.readouterr().err
    a, b = weights(tmp_path / "whole"), weights(out)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class _Ends(Dataset):
    "Rows of which the third one ends its process."

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 8

    def __getitem__(self, i):
        if i == 2:
            if isinstance(self.how, type):
                raise self.how
            os.kill(os.getpid(), self.how)
        return i


@pytest.mark.parametrize(
    "how, says",
    [
        (signal.SIGKILL, KILLED),
        (signal.SIGBUS, "shared memory.*shm-size"),
        (signal.SIGSEGV, "killed by signal: Segmentation fault. Write workers: 0"),
        (MemoryError, "a worker process ran out of memory.*fewer workers"),
    ],
)
def test_each_end_has_its_own_sentence(how, says):
    with pytest.raises(WorkerLost, match=says), watched_workers("looking"):
        list(DataLoader(_Ends(how), batch_size=None, num_workers=2))
    none_is_left()


def test_other_errors_pass_through():
    with pytest.raises(MemoryError), watched_workers():
        raise MemoryError
    with pytest.raises(RuntimeError, match="shape"), watched_workers():
        raise RuntimeError("shape")


@pytest.fixture
def large(tmp_path):
    "A row with six mentions of a picture of 36 million pixels, in a file of 5 kB."
    Image.new("1", (6000, 6000)).save(tmp_path / "large.png")
    turns = [{"role": "user", "content": "<image>" * 6 + "What?"}, {"role": "assistant", "content": "nothing"}]
    record = {"id": "0", "images": ["large.png"] * 6, "messages": turns}
    (tmp_path / "large.json").write_text(json.dumps([record]), encoding="utf-8")
    return tmp_path / "large.json"


def test_a_row_holds_one_picture_at_a_time(large):
    script = f"""
from vlm_lora_lab.data.batch import check_rows
from vlm_lora_lab.data.native import load_processor
from vlm_lora_lab.data.records import Conversations
from vlm_lora_lab.show import peak_memory
processor, before = load_processor("lab", 10_000), peak_memory()
check_rows(Conversations.open({str(large)!r}), processor)
print(peak_memory() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8 * 36e6, f"{int(done.stdout):,}"  # as RGB, each of the six takes 4 * 36e6


def test_pixels_of_a_row_have_a_limit_that_can_be_raised(large, capsys):
    conversations = Conversations.open(large)
    with pytest.raises(InputError, match=r"record 0.*216,000,000 pixels.*100,000,000.*raise row_pixels.*--row-pixels"):
        check_rows(conversations, load_processor("lab", row_pixels=10**8))
    assert load_processor("lab", 10_000, row_pixels=216_000_000).measure(conversations[0]).input_ids
    assert main(["check-data", str(large), "--pictures", "header"]) == 0
    assert main(["check-data", str(large), "--pictures", "header", "--row-pixels", "100000000"]) == 2
    assert "raise row_pixels" in capsys.readouterr().out
    for command in ("train", "doctor"):
        job = ["--data", str(large), "--output", str(large.parent / "out"), "--row-pixels", "100000000"]
        assert main([command, *job]) == 2
        said = capsys.readouterr()
        assert "raise row_pixels" in said.err + said.out
    assert not (large.parent / "out").exists()


def test_a_question_has_the_limits_of_a_row(large, capsys):
    pictures = ["--image", str(large.parent / "large.png")] * 6
    less = ["--row-pixels", "100000000"]
    asked = [
        ["ask", "What?", *pictures, *less],
        ["evaluate", "lab", "--data", str(large), *less],
        ["compare", "lab", "--data", str(large), *less],
    ]
    for command in asked:
        assert main(command) == 2, command
        said = capsys.readouterr()
        assert "216,000,000 pixels" in said.err + said.out and "--row-pixels" in said.err + said.out, command
    assert main(["ask", "What? " * 100, *pictures, "--max-length", "100"]) == 2
    assert "raise max_length" in capsys.readouterr().err
    assert main(["ask", "What?", *pictures, "--max-new-tokens", "1", "--row-pixels", "216000000"]) == 0
