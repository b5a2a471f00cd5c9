"""Two processes over gloo, by the command that a user types: the step of one that accumulates, one voice, one folder,
one end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file, save_file

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.published import lab_folder
from vlm_lora_lab.plan.tuning import TuningPlan
from vlm_lora_lab.train.devices import CONFIGS, Devices, ProcessLost, check_devices, config_file, devices
from vlm_lora_lab.train.devices import watched_processes
from vlm_lora_lab.train.run import last_checkpoint

TWO = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node=2",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0",
    "-m",
    "vlm_lora_lab",
]
ENV = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"} | {
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
}


def two(*args, timeout=240):
    return subprocess.run([*TWO, *map(str, args)], capture_output=True, text=True, env=ENV, timeout=timeout)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    "Rows with and without a picture, with answers of very different length; and what two processes made of them."
    place, handwriting = tmp_path_factory.mktemp("devices"), samples_folder() / "handwriting"
    records = json.loads((handwriting / "validation.json").read_text())[:8]
    for k, r in enumerate(records):
        if k % 2:
            del r["image"]
            r["conversations"][0]["content"] = "Count."
            r["conversations"][1]["content"] = " ".join(map(str, range(3 * k)))
    (place / "data.json").write_text(json.dumps(records))
    flags = [
        "train",
        "--data",
        place / "data.json",
        "--image-root",
        handwriting,
        "--eval-data",
        place / "data.json",
        "--questions",
        3,
        "--every",
        8,
        "--batch-size",
        1,
        "--max-steps",
        16,
        "--save-every",
        1000,
    ]
    return place, flags, two(*flags, "--output", place / "two")


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_two_processes_make_the_step_of_one_that_accumulates(job):
    place, flags, result = job
    assert result.returncode == 0, result.stderr[-3000:]
    # one voice
    assert (
        result.stdout.count("all     ") == 1
        and result.stdout.count("Written:") == 1
        and "Traceback" not in result.stderr
    )
    assert sorted(p.name for p in (place / "two" / "checkpoints" / "checkpoint-16").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    assert not (place / "two" / "run.lock").exists()  # which both shared
    assert main([*map(str, flags), "--accumulation", "2", "--output", str(place / "one")]) == 0
    a, b = adapter(place / "one"), adapter(place / "two")
    assert a.keys() == b.keys() and [(t.dtype, t.shape) for t in a.values()] == [(t.dtype, t.shape) for t in b.values()]

    def norm(ts):
        return torch.cat([t.flatten().double() for t in ts]).norm()

    off = norm([a[k] - b[k] for k in a]) / norm(a.values())
    assert off < 1e-4, off  # the two add gradients in another order, and AdamW divides small gradients by small numbers
    one, both = (json.loads((place / name / "report.json").read_text()) for name in ("one", "two"))
    assert both["exact_match"] == one["exact_match"] and len(both["watched"]) == 2
    # the Trainer's eval_loss is a mean of batches, and those differ
    assert [w["exact"] for w in one["watched"]] == [w["exact"] for w in both["watched"]]
    assert both["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_a_signal_stops_both_at_the_same_step_and_a_resume_ends_where_an_unbroken_run_ends(job):
    place, flags, _ = job
    process = subprocess.Popen(
        [*TWO, *map(str, flags), "--output", str(place / "cut")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    seen = ""
    while "loss" not in seen:
        char = process.stderr.read(1)
        assert char, "the processes ended before their first step: " + seen[-2000:]
        seen += char
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert out.count("a checkpoint was saved") == 1 and not (place / "cut" / "report.json").exists()
    again = two("train", "--resume", "--output", place / "cut")
    assert again.returncode == 0, again.stderr[-3000:]
    a, b = adapter(place / "two"), adapter(place / "cut")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_bad_input_is_said_once_and_nothing_hangs(job):
    place, flags, _ = job
    records = json.loads((place / "data.json").read_text())
    records[3]["conversations"].pop()
    (place / "bad.json").write_text(json.dumps(records))
    result = two("train", "--data", place / "bad.json", "--image-root", flags[4], "--output", place / "bad")
    assert result.returncode and result.stderr.count("vlm-lora-lab train: ") == 1 and not (place / "bad").exists(), (
        result.stderr[-2000:]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_configuration_is_what_accelerate_reads(name, monkeypatch):
    args, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(config_file(name)), "train.py"])
    )
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (
        name == "ddp",
        name == "fsdp2",
        name.startswith("zero"),
    ) and args.num_processes == 2
    if name.startswith("zero"):
        assert args.zero_stage == int(name[-1]) and args.offload_optimizer_device == "none"
        told = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(args.zero_stage)}
    else:
        told = prepare_multi_gpu_env(args)
    for key, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        **{k: v for k, v in told.items() if k.startswith(("ACCELERATE_USE", "FSDP", "ACCELERATE_DEEPSPEED"))},
    }.items():
        monkeypatch.setenv(key, value)
    assert devices() == Devices(1, 2, {"fsdp2": "FSDP2", "zero3": "ZeRO-3"}.get(name, ""), name.startswith("zero"))
    if name == "fsdp2":
        monkeypatch.setenv("FSDP_VERSION", "1")
        with pytest.raises(InputError, match="fsdp_version: 2"):
            devices()


@pytest.mark.parametrize(
    "here, four_bit, stages, plan, message",
    [
        (Devices(0, 2, "ZeRO-3"), True, (), TuningPlan(), "--no-four-bit"),
        (Devices(0, 2, "ZeRO-3"), False, (), TuningPlan(language="full"), "Give a part 'lora'"),
        (Devices(0, 2, "FSDP2"), False, (), TuningPlan(), "GPUs only"),
        (Devices(0, 2), True, (1,), TuningPlan(), "stages run in one process"),
    ],
)
def test_what_cannot_be_shared_is_refused(here, four_bit, stages, plan, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=message):
        check_devices(here, four_bit, stages, plan)
    for policy in ("skip", "rollback"):
        check_devices(Devices(0, 2), True, (), TuningPlan(), policy)
        with pytest.raises(InputError, match=f"nan is {policy}, and ZeRO-2 takes a step by itself.*share with ddp"):
            check_devices(Devices(0, 2, deepspeed=True), True, (), TuningPlan(), policy)


def test_the_command_says_where_a_configuration_lies(capsys):
    assert main(["config", "zero2"]) == 0 and capsys.readouterr().out.strip() == str(config_file("zero2"))
    assert main(["config", "zero9"]) == 2 and "ddp, fsdp2" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_both_and_a_resume_ends_where_an_unbroken_run_ends(job, rank):
    place, flags, _ = job
    out = place / f"killed {rank}"
    flags = [3 if before == "--save-every" else flag for before, flag in zip(["", *flags], flags)]
    launch = ["-m", "accelerate.commands.launch", "--config_file", config_file("ddp"), "--num_processes", 2]
    command = [sys.executable, *launch, "-m", "vlm_lora_lab", *flags, "--output", out]
    with open(place / "stderr", "w+", encoding="utf-8") as stderr:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=stderr, env=ENV)
        while last_checkpoint(out / "checkpoints") is None:
            assert process.poll() is None, (place / "stderr").read_text(encoding="utf-8")[-3000:]
            time.sleep(0.05)
        (one,) = [
            p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == str(rank)
        ]
        start = time.monotonic()
        one.kill()
        assert process.wait(timeout=60) != 0
        assert time.monotonic() - start < 60
    said = (place / "stderr").read_text(encoding="utf-8")
    kept = last_checkpoint(out / "checkpoints").name
    assert f"another process of this training is gone, and process {1 - rank} of 2" in said, said
    assert f"Saved up to {kept}" in said and "--resume" in said and "RuntimeError" not in said, said
    again = two("train", "--resume", "--output", out)
    assert again.returncode == 0, again.stderr[-3000:]
    a, b = adapter(place / "two"), adapter(out)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_only_a_lost_connection_is_a_lost_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="preamble"), watched_processes():
        raise RuntimeError("gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4")
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    with pytest.raises(ProcessLost, match="process 0 of 2 cannot go on"), watched_processes():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:30624.")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match="closed by peer"), watched_processes():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:30624.")


@pytest.mark.slow
def test_a_step_that_is_not_finite_ends_both_with_its_cause(job, tmp_path):
    place, flags, _ = job
    shutil.copytree(lab_folder(), tmp_path / "lab")
    tensors = load_file(tmp_path / "lab" / "model.safetensors")
    # finite, and too large for any loss
    tensors["llm.model.norm.weight"] = torch.full_like(tensors["llm.model.norm.weight"], 1e37)
    save_file(tensors, tmp_path / "lab" / "model.safetensors", metadata={"format": "pt"})
    result = two(
        "train",
        "--data",
        place / "data.json",
        "--image-root",
        flags[4],
        "--model",
        tmp_path / "lab",
        "--no-four-bit",
        "--batch-size",
        1,
        "--max-steps",
        2,
        "--vision-cache",
        "off",
        "--output",
        tmp_path / "out",
    )
    assert (
        result.returncode == 1
        and "Stopped before the weights were lost, at step 1" in result.stdout
        and "remedy" in result.stdout
    ), result.stdout + result.stderr[-3000:]
    assert "AttributeError" not in result.stderr and not (tmp_path / "out" / "adapter").exists()
    assert (tmp_path / "out" / "nan" / "step-1" / "case.json").is_file() or (
        tmp_path / "out" / "nan" / "process-1" / "step-1" / "case.json"
    ).is_file()
