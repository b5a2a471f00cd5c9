"""A run is known by what it started from, and not by the text of its paths: data, pictures and base, changed, moved, or
named from another folder."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from vlm_lora_lab.checkpoint.save import base_sha256, read_provenance
from vlm_lora_lab.cli import main
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.models.load import lab_folder
from vlm_lora_lab.train.identity import STARTED, file_sha256
from vlm_lora_lab.train.watch import LivePlot

FLAGS = [
    "--max-steps",
    "2",
    "--batch-size",
    "2",
    "--save-every",
    "1",
    "--rank",
    "2",
    "--vision-cache",
    "off",
    "--no-four-bit",
]


@pytest.fixture
def data(tmp_path):
    "Four rows and their pictures, in a folder of their own."
    source, folder = samples_folder() / "handwriting", tmp_path / "data"
    rows = json.loads((source / "train.json").read_text())[:4]
    (folder / "train").mkdir(parents=True)
    for row in rows:
        shutil.copyfile(source / row["image"], folder / row["image"])
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


def stop_after_a_step(monkeypatch, then=lambda: None, stop=True):
    "The next training is stopped after its first step, as by SIGTERM."

    class Stops(LivePlot):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                then()
                if stop:
                    signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("vlm_lora_lab.job.LivePlot", Stops)


@pytest.fixture
def stopped(data, tmp_path, monkeypatch):
    "A run that was stopped after its first step."
    with monkeypatch.context() as patch:
        stop_after_a_step(patch)
        assert main(["train", "--data", str(data / "train.json"), "--output", str(tmp_path / "out"), *FLAGS]) == 130
    return tmp_path / "out"


def edit(file):
    rows = json.loads(file.read_text())
    rows[0]["conversations"][-1]["content"] = "7"
    file.write_text(json.dumps(rows))


def resume(out, *more):
    return main(["train", "--resume", "--output", str(out), *more])


def test_data_that_changed_before_a_resume_is_refused_by_doctor_and_train(stopped, data, capsys):
    before = (data / "train.json").read_text()
    edit(data / "train.json")
    capsys.readouterr()
    assert resume(stopped) == 2
    said = capsys.readouterr().err
    assert (
        "data is another file than when the run started" in said
        and str(data / "train.json") in said
        and "job.json" in said
    )
    assert (
        main(["doctor", "--resume", "--output", str(stopped)]) == 2
        and "another file than when the run started" in capsys.readouterr().out
    )
    (data / "train.json").write_text(before)  # the same bytes at another time
    assert resume(stopped) == 0


def test_a_picture_that_was_replaced_is_named(stopped, data, capsys):
    first, second = sorted((data / "train").iterdir())[:2]
    shutil.copyfile(second, first)
    assert resume(stopped) == 2
    said = capsys.readouterr().err
    assert f"such as {first}" in said and "by size and time" in said and "cp -p" in said


def test_a_picture_that_is_gone_is_an_error(stopped, data):
    next((data / "train").iterdir()).unlink()
    assert resume(stopped) == 2


def test_data_that_moved_as_it_is_goes_on_and_is_said(stopped, data, tmp_path, capsys):
    data.rename(tmp_path / "elsewhere")
    assert resume(stopped) == 2 and "train.json" in capsys.readouterr().err  # nobody can know where it is
    new = tmp_path / "elsewhere" / "train.json"
    assert resume(stopped, "--data", str(new)) == 0
    assert f"{new} has the same content as {data / 'train.json'}" in capsys.readouterr().out
    assert json.loads((stopped / "job.json").read_text())["data"] == str(new)


def test_other_data_given_at_a_resume_is_refused(stopped, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "other")
    edit(tmp_path / "other" / "train.json")
    assert (
        resume(stopped, "--data", str(tmp_path / "other" / "train.json")) == 2
        and "data is another file" in capsys.readouterr().err
    )


def test_from_another_folder_the_same_files_are_the_same_job(data, tmp_path, monkeypatch, capsys):
    shutil.copytree(lab_folder(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_after_a_step(patch)
        assert (
            main(
                [
                    "train",
                    "--data",
                    "data/train.json",
                    "--image-root",
                    "data",
                    "--model",
                    "base",
                    "--output",
                    "out",
                    *FLAGS,
                ]
            )
            == 130
        )
    written = json.loads(Path("out/job.json").read_text())
    assert [written[k] for k in ("data", "image_root", "model", "output")] == [
        str(tmp_path / n) for n in ("data/train.json", "data", "base", "out")
    ]
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert (
        main(
            [
                "train",
                "--data",
                "../data/train.json",
                "--image-root",
                "../data",
                "--model",
                "../base",
                "--output",
                "../out",
                *FLAGS,
                "--resume",
            ]
        )
        == 0
    ), capsys.readouterr().err
    provenance = read_provenance("../out/adapter")
    assert provenance["base"] == str(tmp_path / "base") and provenance["data"] == {
        str(tmp_path / "data/train.json"): file_sha256("../data/train.json")
    }

    report = json.loads(Path("../out/report.json").read_text())
    assert [report["job"][k] for k in ("data", "image_root", "model", "output")] == [
        str(tmp_path / n) for n in ("data/train.json", "data", "base", "out")
    ]
    assert report["adapter"] == str(tmp_path / "out" / "adapter")


def test_what_merge_rescue_and_compare_write_names_files_that_can_be_found_from_anywhere(
    data, tmp_path, monkeypatch, capsys
):
    shutil.copytree(lab_folder(), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "data/train.json", "--model", "base", "--output", "out", *FLAGS]) == 0
    assert main(["merge", "out/adapter", "--model", "base", "--output", "merged", "--dtype", "float32"]) == 0, (
        capsys.readouterr().err
    )
    said = json.loads(Path("merged/merge.json").read_text())
    assert (said["adapter"], said["base"]) == (str(tmp_path / "out" / "adapter"), str(tmp_path / "base"))
    assert (
        main(
            [
                "compare",
                "base",
                "out/adapter",
                "--data",
                "data/train.json",
                "--output",
                "compared",
                "--max-new-tokens",
                "2",
            ]
        )
        == 0
    )
    said = json.loads(Path("compared/report.json").read_text())
    assert (
        said["data"] == str(tmp_path / "data" / "train.json")
        and [c["base"] for c in said["checkpoints"]] == [str(tmp_path / "base")] * 2
    )
    Path("out/adapter/provenance.json").unlink()
    assert main(["rescue", "out/adapter", "--base", "base", "--output", "rescued"]) == 0, capsys.readouterr().err
    assert (
        read_provenance("rescued")["base"]
        == json.loads(Path("rescued/adapter_config.json").read_text())["base_model_name_or_path"]
        == str(tmp_path / "base")
    )


def test_a_base_that_changed_is_refused_and_one_that_moved_is_not(data, tmp_path, monkeypatch, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(lab_folder(), base)
    with monkeypatch.context() as patch:
        stop_after_a_step(patch)
        assert (
            main(["train", "--data", str(data / "train.json"), "--model", str(base), "--output", str(out), *FLAGS])
            == 130
        )
    base.rename(tmp_path / "moved")
    raw = bytearray((tmp_path / "moved" / "model.safetensors").read_bytes())
    sound = bytes(raw)
    raw[-5_001] ^= 1
    (tmp_path / "moved" / "model.safetensors").write_bytes(raw)
    assert resume(out, "--model", str(tmp_path / "moved")) == 2 and "weights of the base" in capsys.readouterr().err
    (tmp_path / "moved" / "model.safetensors").write_bytes(sound)
    assert resume(out, "--model", str(tmp_path / "moved")) == 0 and "has the same content" in capsys.readouterr().out
    assert read_provenance(out / "adapter")["base_sha256"] == base_sha256("lab")


def test_data_swapped_while_training_is_named_and_provenance_holds_the_hash_of_what_was_started_from(
    data, tmp_path, monkeypatch, capsys
):
    started = file_sha256(data / "train.json")
    stop_after_a_step(monkeypatch, lambda: edit(data / "train.json"), stop=False)
    out = tmp_path / "out"
    assert main(["train", "--data", str(data / "train.json"), "--output", str(out), *FLAGS]) == 1
    [change] = json.loads((out / "report.json").read_text())["changed_while_training"]
    assert "data is another file" in change and f"Swapped while it trained: {change}" in capsys.readouterr().out
    assert read_provenance(out / "adapter")["data"] == {str(data / "train.json"): started}


def test_with_verify_times_do_not_matter_and_bytes_do(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    first = sorted((data / "train").iterdir())[0]
    with monkeypatch.context() as patch:
        stop_after_a_step(patch)
        assert main(["train", "--data", str(data / "train.json"), "--output", str(out), *FLAGS, "--verify"]) == 130
    before, times = first.read_bytes(), first.stat()
    first.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))  # equal size
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))  # and equal time
    assert resume(out) == 2 and "pictures of data" in capsys.readouterr().err
    first.write_bytes(before)
    os.utime(first)
    assert resume(out) == 0


def test_a_job_json_is_read_as_a_configuration(stopped, tmp_path):
    assert STARTED in json.loads((stopped / "job.json").read_text())
    assert main(["train", str(stopped / "job.json"), "--output", str(tmp_path / "again")]) == 0


def test_a_run_of_an_older_version_goes_on_and_says_what_is_not_known(stopped, capsys):
    values = json.loads((stopped / "job.json").read_text())
    del values[STARTED], values["reading"]["verify"]
    (stopped / "job.json").write_text(json.dumps(values))
    assert resume(stopped) == 0 and "kept no hashes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "broken", ["{", "[]", json.dumps({STARTED: 3}), json.dumps({STARTED: {"files": {"data": {"path": 1}}}})]
)
def test_a_broken_job_json_is_a_sentence(stopped, data, broken, capsys):
    (stopped / "job.json").write_text(broken)
    capsys.readouterr()
    assert main(["train", "--resume", "--data", str(data / "train.json"), "--output", str(stopped), *FLAGS]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_older_adapter_with_a_relative_base_is_read_from_any_folder(data, tmp_path, monkeypatch, capsys):
    shutil.copytree(lab_folder(), tmp_path / "models" / "base")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "data/train.json", "--model", "models/base", "--output", "runs/out", *FLAGS]) == 0
    file = Path("runs/out/adapter/provenance.json")
    values = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("files", "seal")}
    file.write_text(json.dumps(values | {"base": "models/base"}))
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert read_provenance("../runs/out/adapter")["base"] == str(tmp_path / "models" / "base")
    assert main(["merge", "../runs/out/adapter", "--output", "merged"]) == 0, capsys.readouterr().err
