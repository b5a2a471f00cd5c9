"""The command line as a user meets it: in a process of its own, with bad input, a full disk, and Ctrl-C."""

import json
import re
import resource
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vlm_lora_lab
from vlm_lora_lab.cli import main
from vlm_lora_lab.cli.line import COMMANDS, module_of
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.errors import InputError, complete_or_nothing, explain_write_errors

COMMAND = [str(Path(sys.executable).parent / "vlm-lora-lab")]
HANDWRITING = samples_folder() / "handwriting"


def run(*args, **kwargs):
    return subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=300, **kwargs)


@pytest.fixture
def data(tmp_path):
    "Eight records of the samples, copied so that they can be broken."
    records = json.loads((HANDWRITING / "train.json").read_text())[:8]
    for r in records:
        Image.open(HANDWRITING / r["image"]).save(tmp_path / Path(r["image"]).name)
        r["image"] = Path(r["image"]).name
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def spoil(data, how):
    records = json.loads(data.read_text())
    if how == "missing picture":
        (data.parent / records[3]["image"]).unlink()
    elif how == "truncated picture":
        (data.parent / records[3]["image"]).write_bytes((data.parent / records[3]["image"]).read_bytes()[:90])
    elif how == "broken JSON":
        data.write_text(data.read_text()[:-5])
        return
    elif how == "no answer":
        records[3]["conversations"].pop()
    elif how == "placeholder without a picture":
        del records[3]["image"]
    elif how == "special token":
        records[3]["conversations"][1]["content"] = "<|im_end|>"
    data.write_text(json.dumps(records))


@pytest.mark.parametrize(
    "how",
    [
        "missing picture",
        "truncated picture",
        "broken JSON",
        "no answer",
        "placeholder without a picture",
        "special token",
    ],
)
def test_bad_data_gets_one_sentence_and_leaves_nothing(how, data, tmp_path, capsys):
    spoil(data, how)
    assert main(["train", "--data", str(data), "--output", str(tmp_path / "out"), "--max-steps", "1"]) == 2
    message = capsys.readouterr().err
    assert "data.json" in message and "Traceback" not in message and ("record 3" in message or how == "broken JSON")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--model", "openbmb/MiniCPM-V-2_6"], "hf download"),
        (["--eval-data", "nowhere.json"], "nowhere.json"),
        (["--connector", "maybe"], "freeze, lora, full"),
        (["--language", "lora on 7-9"], "There are layers 0-4"),
        (["--language", "full", "--connector", "full"], "four_bit: false"),
        (["--learning-rate", "-1"], "above 0"),
        (["--mix-data", "drawn", "--mix-share", "1.5"], "share"),
        (["--image-root", "nowhere"], "nowhere"),
        (["--language", "freeze"], "no part gets LoRA"),
        (["--full-learning-rate", "-1"], "negative"),
        (["--max-steps", "0"], "max_steps"),
        (["--batch-size", "1.5"], "whole number"),
    ],
)
def test_bad_flags_get_one_sentence(args, message, data, tmp_path, capsys):
    assert main(["train", "--data", str(data), "--output", str(tmp_path / "out"), *args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, message",
    [
        ("learing_rate: 1", "learing_rate"),
        ("[1, 2]", "key: value"),
        ("data: [", "line"),
        ("plan: lora", "plan"),
        ("schedule: {epochs: many}", "epochs"),
        ("data: 5", "text"),
        ("plan: {targets: q_proj}", "list"),
        ("1: x", "'1'"),
        ("schedule: {learning_rate: .nan}", "number"),
    ],
)
def test_a_bad_configuration_file_is_named(text, message, tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(text)
    assert (
        main(
            ["train", str(tmp_path / "job.yaml"), "--output", str(tmp_path / "out")]
            + ([] if "data" in text else ["--data", "x.json"])
        )
        == 2
    )
    assert message in capsys.readouterr().err


def test_a_folder_in_use_is_left_alone(data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    for argv in (["train", "--data", str(data)], ["demo"], ["pretrain"]):
        assert main([*argv, "--output", str(tmp_path / "out")]) == 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"] and capsys.readouterr().err.count(
        "not empty"
    ) == 3


def test_flags_win_over_the_file_and_yaml_and_json_are_equal(data, tmp_path):
    from vlm_lora_lab.cli.job import read_job
    from vlm_lora_lab.cli.line import parser_of

    values = {"data": str(data), "output": "o", "plan": {"rank": 4}, "schedule": {"batch_size": 3, "seed": 7}}
    (tmp_path / "job.json").write_text(json.dumps(values))
    (tmp_path / "job.yaml").write_text(
        f"data: {data}\noutput: o\nplan: {{rank: 4}}\nschedule: {{batch_size: 3, seed: 7}}\n"
    )

    def parse(*argv):
        return read_job(parser_of("train").parse_args([*map(str, argv)]))

    a, b = parse(tmp_path / "job.json"), parse(tmp_path / "job.yaml")
    assert a == b and a.plan.rank == 4 and a.schedule.seed == 7 and a.four_bit
    c = parse(tmp_path / "job.yaml", "--rank", "8", "--no-four-bit", "--targets", "q_proj,v_proj")
    assert c.plan.rank == 8 and not c.four_bit and c.plan.targets == ("q_proj", "v_proj") and c.schedule == a.schedule


def test_every_option_is_explained(capsys):
    for argv in (
        ["--help"],
        ["train", "--help"],
        ["demo", "--help"],
        ["ask", "--help"],
        ["merge", "--help"],
        ["pretrain", "--help"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
    text = capsys.readouterr().out
    for words in ("--full-learning-rate", "peak, for LoRA", "vlm-lora-lab train --resume", "--connector"):
        assert words in text


def test_train_ask_merge_in_one_go(data, tmp_path, capsys):
    out = tmp_path / "out"
    common = [
        "--data",
        str(data),
        "--eval-data",
        str(data),
        "--max-steps",
        "30",
        "--batch-size",
        "8",
        "--learning-rate",
        "0.003",
        "--full-learning-rate",
        "0.002",
    ]
    assert main(["train", *common, "--output", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["exact_match"]["after"]["rate"] > report["exact_match"]["before"]["rate"]
    assert {p.name for p in out.iterdir()} == {
        "adapter",
        "before.json",
        "checkpoints",
        "job.json",
        "loss.png",
        "report.json",
    }
    capsys.readouterr()
    picture, truth = data.parent / "0000.png", json.loads(data.read_text())[0]["conversations"][1]["content"]
    answers = []
    assert main(["ask", "What number is this?", "--image", str(picture), "--adapter", str(out / "adapter")]) == 0
    answers.append(capsys.readouterr().out.strip())
    assert main(["merge", str(out / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    assert main(["ask", "What number is this?", "--image", str(picture), "--model", str(tmp_path / "merged")]) == 0
    answers.append(capsys.readouterr().out.strip())
    assert answers[0] == answers[1] and len(answers[0]) == len(truth)


def test_ctrl_c_saves_and_resume_ends_where_an_unbroken_run_ends(data, tmp_path):
    flags = ["train", "--data", data, "--max-steps", "40", "--batch-size", "2", "--save-every", "1000"]
    whole = run(*flags, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        [*COMMAND, *map(str, flags), "--output", str(tmp_path / "cut")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    seen = ""
    while "loss" not in seen:  # the bar shows a loss after the first step
        char = process.stderr.read(1)
        assert char, "the process ended before its first step: " + seen
        seen += char
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume" in out and "Traceback" not in err
    assert not (tmp_path / "cut" / "report.json").exists()
    refused = run(*flags, "--output", tmp_path / "cut")
    assert refused.returncode == 2 and "--resume" in refused.stderr
    changed = run("train", "--resume", "--output", tmp_path / "cut", "--rank", "4")
    assert changed.returncode == 2 and "'rank': 16" in changed.stderr, changed.stderr
    again = run("train", "--resume", "--output", tmp_path / "cut")
    assert again.returncode == 0 and "Resuming" in again.stdout, again.stderr
    a, b = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert run("train", "--resume", "--output", tmp_path / "cut").returncode == 2  # finished: nothing to resume


def _limit_files(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    "flags, size",
    [
        (["--max-steps", "2"], 300_000),
        (["--max-steps", "2", "--save-every", "1"], 300_000),
        (["--max-steps", "2", "--save-every", "1"], 1_500_000),
    ],
)
def test_a_full_disk_gets_one_sentence_and_leaves_nothing_half_written(flags, size, data, tmp_path):
    """A real limit: the kernel refuses to let any file grow past `size` bytes, as it would on a full disk."""
    result = run("train", "--data", data, "--output", tmp_path / "out", *flags, preexec_fn=_limit_files(size))
    assert result.returncode == 2 and "disk is full" in result.stderr and "Traceback" not in result.stderr, (
        result.stderr
    )
    left = {p.name for p in (tmp_path / "out").rglob("*")}
    assert "adapter" not in left and not any("partial" in n or n == "adapter_model.safetensors" for n in left), left


@pytest.mark.parametrize("writer", ["python", "safetensors", "torch"])
def test_every_library_s_way_to_say_full_is_understood(writer, tmp_path):
    script = f"""
import torch, safetensors.torch
from vlm_lora_lab.errors import complete_or_nothing, InputError
big = torch.zeros(100_000)
try:
    with complete_or_nothing({str(tmp_path / "x")!r}) as p:
        if {writer!r} == "python": (p / "f").write_bytes(bytes(400_000))
        if {writer!r} == "safetensors": safetensors.torch.save_file({{"a": big}}, p / "f")
        if {writer!r} == "torch": torch.save(big, p / "f")
except InputError as e:
    print("InputError", e)
"""
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, preexec_fn=_limit_files(10_000)
    )
    assert "InputError" in result.stdout and "disk is full" in result.stdout, result.stderr
    assert not list(tmp_path.iterdir())


def test_other_errors_are_not_dressed_up(tmp_path):
    with pytest.raises(ZeroDivisionError), complete_or_nothing(tmp_path / "x"):
        1 / 0
    with pytest.raises(RuntimeError, match="shape"), explain_write_errors(tmp_path):
        raise RuntimeError("shape mismatch")
    with pytest.raises(InputError, match="not empty"):
        from vlm_lora_lab.errors import empty_folder

        (tmp_path / "y").write_text("")
        empty_folder(tmp_path)


def test_help_does_not_load_torch():
    script = "import sys, vlm_lora_lab.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    loaded = (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.splitlines()[-1].split()
    )
    assert "argparse" in loaded and "torch" not in loaded and "transformers" not in loaded


def test_only_the_command_that_is_named_is_loaded():
    script = (
        "import sys, vlm_lora_lab.cli as c\ntry: c.main(['merge', '--help'])\nexcept SystemExit: print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    loaded = {m for m in done.stdout.splitlines()[-1].split() if m.startswith("vlm_lora_lab.cli.")}
    assert loaded == {f"vlm_lora_lab.cli.{m}" for m in ("line", "merge", "options")}, done.stderr


def test_every_command_is_a_file_and_every_file_a_command():
    shared = {"__init__", "about", "files", "job", "line", "options"}
    files = {p.stem for p in Path(vlm_lora_lab.cli.__file__).parent.glob("*.py")}
    assert files - shared == {name.replace("-", "_") for name in COMMANDS}
    for name in COMMANDS:
        command = module_of(name)
        assert command.SHORT and command.LONG and callable(command.takes) and callable(command.run), name


def _versions(folder, *flags):
    "(what, fact) that --version prints, with packages of `folder` in front, or with them alone."
    (folder / "vlm_lora_lab").symlink_to(Path(vlm_lora_lab.__file__).parent)
    script = f"import sys; sys.path.insert(0, {str(folder)!r}); from vlm_lora_lab.cli import main; main(['--version'])"
    done = subprocess.run([sys.executable, *flags, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return {line[:16].strip(): line[17:] for line in done.stdout.splitlines()}


def test_version_answers_what_a_bug_report_is_asked_for():
    done = run("--version")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert len({re.match(r"(.{16}) \S", line).end() for line in lines}) == 1, "aligned"
    said = {line[:16].strip(): line[17:] for line in lines}
    assert (
        said["vlm_lora_lab"] == vlm_lora_lab.__version__
        and said["Python"].startswith(sys.version.split()[0])
        and said["torch"] == torch.__version__
    )
    for package in (
        "transformers",
        "peft",
        "bitsandbytes",
        "accelerate",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
    ):
        assert said[package] == version(package)
    assert "GPU support" in said and "platform" in said


def test_version_where_nothing_is_installed(tmp_path):
    said = _versions(tmp_path, "-S", "-E")
    assert {said[p] for p in ("torch", "transformers", "peft", "bitsandbytes", "huggingface_hub")} == {"not installed"}
    assert "No module named 'torch'" in said["GPU support"]


def test_version_where_torch_breaks_and_where_there_are_cards(tmp_path):
    for name, code in {
        "broken": "raise OSError('libcudart.so.13: cannot open\\nshared object file')",
        "cards": "from types import SimpleNamespace as N\nversion = N(cuda='13.0', hip=None)\n"
        "card = N(name='NVIDIA H100', total_memory=79.1 * 2**30, major=9, minor=0)\n"
        "cuda = N(is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda i: card)",
    }.items():
        (tmp_path / name / "torch").mkdir(parents=True)
        (tmp_path / name / "torch" / "__init__.py").write_text(code)
    assert _versions(tmp_path / "broken")["GPU support"].endswith(
        "OSError: libcudart.so.13: cannot open shared object file"
    )
    said = _versions(tmp_path / "cards")
    assert (
        said["GPU support"] == "CUDA 13.0"
        and said["card 0"] == said["card 1"] == "NVIDIA H100, 79.1 GiB, compute capability 9.0"
    )


def test_pretrain_runs_from_start_to_end(tmp_path):
    "A few steps of each stage; train.pretrain tells of the whole."
    done = run("pretrain", "--output", tmp_path / "lab", "--eyes", 3, "--words", 3, "--questions", 2)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in (tmp_path / "lab").iterdir()}
