"""The whole road of a user, for every family implemented here: train from a file, ask, merge, ask again."""

import json
import shutil

import pytest
import torch
from families import OURS, STAND_INS, made, native_folder, written
from PIL import Image

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.families.base import families as known
from vlm_lora_lab.models.load import lab_folder, load_tokenizer, load_vlm

# a picture is 16 patches, and four slices at most
SMALL = {"slice_config": {"max_slice_nums": 4, "patch_size": 14, "scale_resolution": 56}}


def checkpoint(family, folder):
    """The stand-in of a family implemented here, with pictures of 56 x 56 pixels, in 32 bit, so that a merge rounds
    nothing."""
    shutil.copytree(made(STAND_INS[family], dtype=torch.float32), folder)
    if family == "qwen":
        return written(folder, "config.json", {"visual": {"image_size": 56}})
    if (folder / "preprocessor_config.json").is_file():
        written(folder, "preprocessor_config.json", {"scale_resolution": 56, "max_slice_nums": 4})
    changes = {"scale_resolution": 56, "max_slice_nums": 4} if family == "minicpmv-2.0" else SMALL
    return written(folder, "config.json", changes)


NATIVE = [t for f in known() if f.eyes and not f.words for t in f.model_types]


@pytest.mark.parametrize("family", [*OURS, *NATIVE])
def test_train_ask_merge_ask(family, tmp_path, capsys):
    base = (
        native_folder(family, tmp_path / "base", dtype=torch.float32)
        if family in NATIVE
        else checkpoint(family, tmp_path / "base")
    )
    records = json.loads((samples_folder() / "handwriting" / "train.json").read_text())[:4]
    for r in records:
        Image.open(samples_folder() / "handwriting" / r["image"]).resize((150, 70)).save(
            tmp_path / r["image"].rpartition("/")[2]
        )
        r["image"] = r["image"].rpartition("/")[2]
    (tmp_path / "data.json").write_text(json.dumps(records))
    status = main(
        [
            "train",
            "--model",
            str(base),
            "--data",
            str(tmp_path / "data.json"),
            "--eval-data",
            str(tmp_path / "data.json"),
            "--output",
            str(tmp_path / "run"),
            "--max-steps",
            "3",
            "--batch-size",
            "2",
            "--learning-rate",
            "0.003",
            "--rank",
            "4",
        ]
    )
    said = capsys.readouterr()
    assert status == 0, said.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 3 and report["loss"]["first"] > 0
    adapter, merged = str(tmp_path / "run" / "adapter"), str(tmp_path / "merged")
    question = [
        "ask",
        records[0]["conversations"][0]["content"].replace("<image>", "").strip(),
        "--image",
        str(tmp_path / records[0]["image"]),
        "--max-new-tokens",
        "4",
    ]
    assert main([*question, "--adapter", adapter]) == 0
    answered = capsys.readouterr().out
    assert main(["merge", adapter, "--output", merged]) == 0
    capsys.readouterr()
    assert main([*question, "--model", merged]) == 0
    assert capsys.readouterr().out == answered
    assert {f.name for f in base.iterdir() if ".safetensors" not in f.name} <= {
        f.name for f in (tmp_path / "merged").iterdir()
    }
    load_tokenizer(merged)
    assert load_vlm(merged).config.get_text_config().vocab_size == load_vlm(base).config.get_text_config().vocab_size


def test_a_family_without_a_data_pipeline_is_refused_before_anything_is_loaded(tmp_path, capsys):
    from families import tiny_model

    tiny_model("llava").save_pretrained(tmp_path / "llava")
    for file in lab_folder().iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, tmp_path / "llava")
    (tmp_path / "llava" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "llava" / "config.json").read_text()))
    )
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    config["text_config"]["vocab_size"] = 419
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    data = samples_folder() / "handwriting" / "train.json"
    assert (
        main(["train", "--model", str(tmp_path / "llava"), "--data", str(data), "--output", str(tmp_path / "out")]) == 2
    )
    message = capsys.readouterr().err
    assert "Traceback" not in message and "llava" in message and not (tmp_path / "out").exists()
