"""Batches: the same with any number of workers, grouped by length, sliced; bad rows are an error or are listed."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerFast

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.batch import ByLength, Checked, Collator, Processor, Reading, Samples, check_rows, loader
from vlm_lora_lab.data.drawn import Drawn, draw
from vlm_lora_lab.data.native import load_processor
from vlm_lora_lab.data.records import Conversation, Conversations, Message, ask, samples_folder
from vlm_lora_lab.data.view import see
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.job import Job
from vlm_lora_lab.models.load import lab_folder, load_vlm, load_tokenizer
from vlm_lora_lab.models.minicpmv import MiniCPMV26Config
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.train.run import Schedule, fit


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("lab")


def processor(tokenizer, slices=1, max_length=2048, **kwargs):
    config = MiniCPMV26Config(
        vocab_size=len(tokenizer),
        query_num=16,
        use_image_id=slices > 1,
        vision_config={"patch_size": 8, "image_size": 112},
        slice_config={"scale_resolution": 56, "max_slice_nums": slices},
    )
    return Processor.of(config, tokenizer, max_length, **kwargs)


def wide(width, height, answer="x"):
    return ask("What?", answer, Image.effect_noise((width, height), 60))


def equal(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b)
    )


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("grouped", [False, True])
def test_any_number_of_workers_gives_the_same_batches(tokenizer, grouped):
    process, rows = processor(tokenizer, 4), Drawn(0, 50)
    lengths = [len(process.measure(c).input_ids) for c in rows] if grouped else None
    made = [list(loader(Samples(rows, process, workers, lengths), 8, seed=4)) for workers in (0, 1, 2, 3)]
    assert all(equal(made[0], m) for m in made[1:])
    assert not equal(made[0], list(loader(Samples(rows, process, 0, lengths), 8, seed=5)))
    assert not equal(made[0], list(loader(Samples(rows, process, 0, lengths), 8, seed=4, epoch=1)))


def test_grouping_shows_every_row_once_and_pads_less(tokenizer):
    lengths = [int(2 ** (i * 7919 % 97 / 12)) for i in range(1000)]
    sampler = ByLength(8, lengths, seed=1)
    order = list(sampler)
    assert (
        sorted(order) == list(range(1000))
        and order == list(ByLength(8, lengths, seed=1))
        and order != list(ByLength(8, lengths, seed=2))
    )
    sampler.set_epoch(1)
    assert list(sampler) != order

    def waste(o):
        return sum(max(b) * len(b) - sum(b) for b in ([lengths[i] for i in o[k : k + 8]] for k in range(0, 1000, 8)))

    assert waste(order) < waste(list(torch.randperm(1000, generator=torch.Generator().manual_seed(0)))) / 3


def test_measuring_agrees_with_preparing(tokenizer, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((300, 100), 50).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    process = processor(tokenizer, 9)
    for c in (*Drawn(0, 30), wide(400, 90), wide(90, 400), ask("?", "x", tmp_path / "turned.jpg")):
        row, e = process(c), process.measure(c)
        assert (row["input_ids"], row["labels"], row["image_bound"]) == (e.input_ids, e.labels, e.image_bound)
        assert len(row["patches"]) == len(e.image_bound)


def test_slices_reach_the_model(tokenizer):
    model, process = load_vlm("lab"), processor(tokenizer, 4)
    rows = [process(c) for c in (wide(150, 60), draw(1, "pair"), draw(0, "sum"))]
    batch = Collator(tokenizer.pad_token_id)(rows)
    assert len(batch["pixel_values"]) == 4 + 2 and batch["image_bound"][:, 0].tolist() == [0] * 4 + [1] * 2
    for row, start, end in batch["image_bound"].tolist():
        assert (batch["input_ids"][row, start:end] == tokenizer.unk_token_id).all() and end - start == 16
    with torch.no_grad():
        together = model(**batch).logits
        alone = model(**Collator(tokenizer.pad_token_id)(rows[:1])).logits
    torch.testing.assert_close(together[0, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-4)


def test_the_lab_model_sees_overviews_only(tokenizer):
    process = Processor.of(load_vlm("lab").config, tokenizer)
    assert process.max_slice_nums == 1 and len(process(wide(600, 200))["patches"]) == 1


def test_dropped_turns_take_their_pictures(tokenizer):
    talk = Conversation(
        "t",
        (
            Message("user", "<image>\n1?"),
            Message("assistant", "a"),
            Message("user", "<image>\n2?"),
            Message("assistant", "b"),
        ),
        (Image.new("RGB", (56, 56), "red"), Image.new("RGB", (56, 56), "blue")),
    )
    with pytest.raises(InputError, match="limit of 50"):
        processor(tokenizer, max_length=50)(talk)
    row = processor(tokenizer, max_length=50, drop=True)(talk)
    assert row["dropped"] == 1 and len(row["patches"]) == len(row["image_bound"]) == 1
    assert row["patches"][0][0][:, 0, 0].tolist() == [-1, -1, 1]  # blue
    view = see(talk, processor(tokenizer, max_length=50, drop=True))
    assert view.dropped == 1 and len(view.pictures) == 1 and "left out" in view._repr_html_()


def test_qwen_vl_gets_squares(golden_root):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(golden_root / "dataset" / "qwen" / "tokenizer.json"),
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<img>", "</img>", "<imgpad>"]})

    class Config:
        model_type = "qwen"
        visual = {"image_size": 448, "patch_size": 14, "n_queries": 256}
        max_position_embeddings = 8192

    process = Processor.of(Config, tokenizer)
    c = ask("Same?", "no", Image.new("RGB", (30, 90), "white"), Image.new("L", (500, 100)))
    batch = Collator(tokenizer.pad_token_id)([process(c), process(ask("1?", "2"))])
    assert (
        batch["pixel_values"].shape == (2, 3, 448, 448)
        and "tgt_sizes" not in batch
        and batch["image_bound"].tolist()[0][0] == 0
    )
    for row, start, end in batch["image_bound"].tolist():
        assert (
            end - start == 256
            and (batch["input_ids"][row, start:end] == tokenizer.convert_tokens_to_ids("<imgpad>")).all()
        )
    text = tokenizer.decode(batch["input_ids"][0])
    assert "Picture 1: <img>" in text and "Picture 2: <img>" in text and see(c, process).count("picture") == 512
    already = ask("Picture 1: <image>\nWhat?", "x", Image.new("L", (4, 4)))
    assert tokenizer.decode(process(already)["input_ids"]).count("Picture 1: ") == 1


@pytest.fixture
def data(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")

    def qa(i, image):
        return {
            "id": f"r{i}",
            "image": image,
            "conversations": [{"role": "user", "content": "<image>\n?"}, {"role": "assistant", "content": "red"}],
        }

    rows = [json.dumps(qa(i, {2: "bad.png", 5: "none.png"}.get(i, "good.png"))) for i in range(8)]
    rows[6] = '{"id": "r6", '
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    return tmp_path / "data.jsonl"


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_an_error_or_are_listed(data, tokenizer, workers):
    conversations, process = Conversations.open(data), processor(tokenizer)
    with pytest.raises(InputError, match=r"record 2 \(line 3, id r2\)"):
        check_rows(conversations, process, Reading(workers=workers))
    checked = check_rows(conversations, process, Reading(workers=workers, skip_bad_rows=True, group_by_length=True))
    assert [c.id for c in checked.conversations] == ["r0", "r1", "r3", "r4", "r7"] and len(checked.lengths) == 5
    assert [(s.row, s.id) for s in checked.skipped] == [(2, "r2"), (5, "r5"), (6, "6")] and all(
        "data.jsonl" in s.reason for s in checked.skipped
    )
    samples = checked.samples(process, Reading(group_by_length=True))
    assert [len(samples[i]["input_ids"]) for i in range(5)] == list(samples.lengths)
    again = checked.conversations.select([1, 3])
    assert [c.id for c in again] == ["r1", "r4"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_goes_bad_later_is_one_sentence(data, tokenizer, workers):
    samples = Samples(Conversations.open(data), processor(tokenizer), workers)
    with pytest.raises(InputError) as e:
        list(loader(samples, 8))
    assert "data.jsonl" in str(e.value) and "\n" not in str(e.value) and "Traceback" not in str(e.value)


def test_a_resumed_run_finds_its_place_among_grouped_rows(tokenizer, tmp_path):
    process, rows = processor(tokenizer), list(Drawn(0, 40))
    lengths, schedule = (
        [len(process.measure(c).input_ids) for c in rows],
        Schedule(max_steps=8, batch_size=8, save_every=7, learning_rate=1e-3),
    )

    def run(folder, resume=False):
        torch.manual_seed(0)
        model = apply_plan(load_vlm("lab"), TuningPlan(connector="freeze"))
        return [
            h["loss"]
            for h in fit(
                model, Samples(rows, process, 0, lengths), schedule, folder, resume=resume, log_every=1
            ).history
            if "loss" in h
        ]

    whole = run(tmp_path / "a")
    # five steps an epoch: in the middle of the second
    shutil.copytree(tmp_path / "a" / "checkpoint-7", tmp_path / "b" / "checkpoint-7")
    assert len(whole) == 8 and run(tmp_path / "b", resume=True)[-1] == pytest.approx(whole[-1], abs=1e-6)


def test_nothing_left_is_an_error(data, tokenizer):
    (data.parent / "good.png").unlink()
    with pytest.raises(InputError, match="no row is left; all 8"):
        check_rows(Conversations.open(data), processor(tokenizer), Reading(skip_bad_rows=True))


def test_training_skips_only_when_told(data, tmp_path, capsys):
    command = ["train", "--data", str(data), "--output", str(tmp_path / "out"), "--max-steps", "2", "--batch-size", "2"]
    assert main(command) == 2 and "record 2" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*command, "--skip-bad-rows", "--group-by-length", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "Left out 3 of 8 rows" in out and "r2, r5, 6" in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [s["id"] for s in report["skipped_rows"][str(data)]] == ["r2", "r5", "6"] and report["job"]["reading"][
        "workers"
    ] == 1


@pytest.mark.parametrize(
    "values, found",
    [
        ({"workers": -1}, "workers"),
        ({"workers": True}, "workers"),
        ({"skip_bad_rows": "yes"}, "skip_bad_rows"),
        ({"worker": 1}, "unknown"),
    ],
)
def test_options_are_checked(values, found):
    with pytest.raises(InputError, match=found):
        Job.of({"data": "d", "output": "o", "reading": values})


def test_the_whole_course_s_data_passes(tokenizer):
    rows = Conversations.open(samples_folder() / "mixed.json")
    checked = check_rows(rows, processor(tokenizer))
    assert (
        isinstance(checked, Checked) and checked.conversations is rows and not checked.skipped and checked.dropped == 0
    )


def like_the_lab(folder, config=None, **pre):
    "The lab model's files without its weights, for patches of 14 and 4 queries, and a picture processor's file."
    folder.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(lab_folder() / file, folder)
    values = json.loads((lab_folder() / "config.json").read_text())
    values["vision_config"] |= {"patch_size": 14, "image_size": 224}
    values = {k: v for k, v in values.items() if k not in ("slice_config", "use_image_id")} | {
        "query_num": 4,
        "resampler_num_heads": 4,
    }
    (folder / "config.json").write_text(json.dumps(values | (config or {})))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"patch_size": 14, "image_feature_size": 4, "version": 2.6} | pre)
    )
    return folder


@pytest.mark.parametrize("numbered", [True, False])
def test_pictures_follow_the_picture_processors_file(golden_root, tmp_path, numbered):
    """Slices, sizes, text and pixels of the original image processor, with settings that stand in the file alone; and
    the same pixels under another mean and deviation."""
    table = json.loads((golden_root / "preprocess" / "image_processor.json").read_text())
    mean, std = (0.1, 0.2, 0.3), (0.25, 0.5, 0.75)
    for i, c in enumerate(table["cases"]):
        chosen = {k: c[k] for k in ("max_slice_nums", "scale_resolution")} | {"use_image_id": numbered}
        image = Image.fromarray(
            np.random.RandomState(c["rng_seed"]).randint(0, 256, (c["height"], c["width"], 3), dtype=np.uint8)
        )
        plain, other = (
            load_processor(like_the_lab(tmp_path / f"{i}-{n}", **chosen, **more))
            for n, more in (("plain", {}), ("other", {"norm_mean": mean, "norm_std": std}))
        )
        row, moved = plain(ask("What?", "x", image)), other(ask("What?", "x", image))
        assert c["placeholder_with_id" if numbered else "placeholder_without_id"] + "\nWhat?" in plain.tokenizer.decode(
            row["input_ids"]
        )
        assert row["input_ids"] == moved["input_ids"] == plain.measure(ask("What?", "x", image)).input_ids
        assert (
            [list(size) for _, size in row["patches"]]
            == c["tgt_sizes_hw"]
            == [list(size) for _, size in moved["patches"]]
        )
        for (strip, _), (shifted, _), first in zip(row["patches"], moved["patches"], c["first_pixels"]):
            torch.testing.assert_close(strip.flatten()[:8], torch.tensor(first), rtol=0, atol=1e-6)
            for channel in range(3):
                torch.testing.assert_close(
                    shifted[channel], (strip[channel] * 0.5 + 0.5 - mean[channel]) / std[channel], rtol=0, atol=1e-5
                )


def test_max_pixels_starts_from_the_files_number_of_slices(tmp_path):
    with pytest.warns(
        UserWarning,
        match="max_slice_nums is contradictory: 4 in preprocessor_config.json max_slice_nums, 9 in slice_config",
    ):
        p = load_processor(
            like_the_lab(
                tmp_path / "m",
                {"slice_config": {"max_slice_nums": 9, "patch_size": 14}},
                max_slice_nums=4,
                scale_resolution=56,
            )
        )
    assert (
        p.grid((300, 60)) == (4, 1)
        and p.smaller(3 * 56**2).grid((300, 60)) == (3, 1)
        and p.smaller(10**6).max_slice_nums == 4
    )
    assert load_processor(like_the_lab(tmp_path / "off", slice_mode=False, scale_resolution=56)).grid((300, 60)) is None


@pytest.mark.parametrize(
    ("pre", "said"),
    [
        ({"do_resize": False}, "do_resize is False"),
        ({"resample": 2}, "resample is 2"),
        ({"patch_size": 16}, "patch_size is contradictory"),
    ],
)
def test_a_file_that_is_not_followed_stops_every_command(tmp_path, capsys, pre, said):
    folder = like_the_lab(tmp_path / "m", **pre)
    (tmp_path / "data.json").write_text(
        json.dumps([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    )
    assert main(["check-data", str(tmp_path / "data.json"), "--model", str(folder)]) == 2
    assert said in capsys.readouterr().err
