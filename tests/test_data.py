"""Records, pictures, tokens and batches: edge cases and independent truth."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_lora_lab.data.batch import Collator, Processor
from vlm_lora_lab.data.drawn import HELD_OUT, KINDS, PLACES, Drawn, draw
from vlm_lora_lab.data.handwriting import build, scans
from vlm_lora_lab.data.records import Conversation, Message, ask, read_conversations, samples_folder
from vlm_lora_lab.data.slicing import load_image, overview_size, to_patches
from vlm_lora_lab.data.tokens import IGNORE, encode
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import load_tokenizer
from vlm_lora_lab.models.minicpmv import MiniCPMV26Config


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("lab")


def test_overview_sizes_equal_the_original(golden_root):
    table = json.loads((golden_root / "preprocess" / "slicing.json").read_text())
    rows = [r for r in [*table["combos"], *table["other_resolutions"]] if "source_size_wh" in r]
    assert len(rows) > 50
    patch, scale = table["meta"].get("patch_size", 14), table["meta"].get("scale_resolution", 448)
    for r in rows:
        sliced = r.get("grid_cols_rows") is not None
        size = overview_size(
            r["width"],
            r["height"],
            r.get("scale_resolution", scale),
            r.get("patch_size", patch),
            allow_upscale=not sliced,
        )
        assert list(size) == r["source_size_wh"], r


def test_patches_are_the_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 88, 3), dtype=np.uint8)
    [(strip, (rows, cols))] = to_patches(Image.fromarray(pixels), 56, 8)
    assert (rows, cols) == (4, 11) and strip.shape == (3, 8, 44 * 8)
    for r in range(rows):
        for c in range(cols):
            want = torch.from_numpy(pixels[r * 8 : r * 8 + 8, c * 8 : c * 8 + 8]).permute(2, 0, 1) / 127.5 - 1
            i = (r * cols + c) * 8
            torch.testing.assert_close(strip[:, :, i : i + 8], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    Image.new(mode, (9, 5)).save(path)
    image = load_image(path)
    assert image.mode == "RGB" and image.size == (9, 5)


def test_orientation_tag_is_obeyed(tmp_path):
    image, exif = Image.new("RGB", (10, 4)), Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg").size == (4, 10)


def test_a_truncated_picture_is_named(tmp_path):
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match="cut.png"):
        load_image(path, "record 3")


def write(tmp_path, *records):
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    (tmp_path / "d.json").write_text(json.dumps(list(records)))
    return tmp_path / "d.json"


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def test_several_pictures_come_in_order_of_mention(tmp_path):
    path = write(
        tmp_path,
        {
            "image": {"<image_00>": "a.png", "<image_01>": "b.png"},
            "conversations": turns("<image_01> or <image_00>?", "first"),
        },
    )
    [c] = read_conversations(path)
    assert [p.name for p in c.images] == ["b.png", "a.png"] and c.messages[0].content == "<image> or <image>?"


@pytest.mark.parametrize(
    "record, message",
    [
        ({"conversations": turns("hello")}, "no answer"),
        ({"conversations": turns("hello", "")}, "empty"),
        ({"conversations": []}, "list of messages"),
        ({"conversations": turns("hello", "hi") + turns("again")}, "no answer"),
        ({"conversations": [{"role": "assistant", "content": "hi"}]}, "'user' is due"),
        ({"conversations": [{"from": "human", "value": "hi"}]}, "no answer"),
        ({"conversations": [{"role": "user", "content": 5}, {"role": "assistant", "content": "hi"}]}, "content"),
        ({"id": 3}, "missing"),
        ({"conversations": turns("<image> x", "hi")}, "no such picture"),
        ({"image": "a.png", "conversations": turns("<image><image> x", "hi")}, "more than once"),
        ({"image": {"<image_00>": "a.png"}, "conversations": turns("x", "hi")}, "never mentions"),
        ({"image": "nowhere.png", "conversations": turns("<image> x", "hi")}, "nowhere.png"),
        ({"image": 7, "conversations": turns("x", "hi")}, "expected a path"),
        ({"image": "a.png", "conversations": turns("x", "<image> hi")}, "assistant message contains"),
        ("text", "expected a record"),
    ],
)
def test_a_bad_record_is_named(tmp_path, record, message):
    with pytest.raises(InputError, match=message) as error:
        read_conversations(write(tmp_path, {"id": "fine", "conversations": turns("hello", "hi")}, record))
    assert "d.json, record 1" in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"[{]", b"\xff\xfe[]"])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(InputError, match="d.json"):
        read_conversations(tmp_path / "d.json")


def test_labels_are_the_answers_and_their_ends(tokenizer):
    talk = Conversation(
        "x",
        (
            Message("system", "Be brief."),
            Message("user", "<image>\nHow many?"),
            Message("assistant", " two "),
            Message("user", "Sure?"),
            Message("assistant", "yes"),
        ),
        ("x",),
    )
    e = encode(talk, tokenizer, 4)
    assert len(e.input_ids) == len(e.labels)
    assert all(label in (IGNORE, token) for token, label in zip(e.input_ids, e.labels))
    assert tokenizer.decode([x for x in e.labels if x != IGNORE]) == " two <|im_end|>yes<|im_end|>"


@pytest.mark.parametrize("text", ["407", "naïve 猫 🙂", "a\n\nb", "<b>bold</b>", "x" * 50])
def test_any_text_survives_the_tokenizer(tokenizer, text):
    e = encode(ask("say it", text), tokenizer, 4)
    assert tokenizer.decode([x for x in e.labels if x != IGNORE]) == text + "<|im_end|>"


@pytest.mark.parametrize("bad", ["<|im_end|>", "<unk>", "</image>", "<slice>"])
def test_special_tokens_in_text_are_refused(tokenizer, bad):
    with pytest.raises(InputError, match="special token"):
        encode(ask(f"what is {bad}?", "x"), tokenizer, 4)


def test_image_ids_are_written_when_the_model_wants_them(tokenizer):
    e = encode(ask("Compare.", "same", "a", "b"), tokenizer, 4, use_image_id=True)
    text = tokenizer.decode(e.input_ids)
    assert (
        "<image_id>0</image_id><image>" in text and "<image_id>1</image_id><image>" in text and len(e.image_bound) == 2
    )


def test_too_long_is_an_error_not_a_cut(tokenizer):
    with pytest.raises(InputError, match="limit of 10"):
        encode(ask("hello", "world " * 20), tokenizer, 4, max_length=10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows(tokenizer, side):
    config = MiniCPMV26Config(
        vocab_size=len(tokenizer),
        query_num=16,
        use_image_id=False,
        slice_config={"scale_resolution": 56},
        vision_config={"patch_size": 8, "image_size": 112},
    )
    process = Processor.of(config, tokenizer)
    rows = [process(draw(i, kind)) for i, kind in enumerate(KINDS)]
    batch = Collator(tokenizer.pad_token_id, side)(rows)
    first = 0
    for i, row in enumerate(rows):
        real = batch["attention_mask"][i].bool()
        assert (
            batch["input_ids"][i][real].tolist() == row["input_ids"]
            and batch["labels"][i][real].tolist() == row["labels"]
        )
        assert (batch["labels"][i][~real] == IGNORE).all()
        for strip, size in row["patches"]:
            assert batch["tgt_sizes"][first].tolist() == list(size) and batch["image_bound"][first][0] == i
            assert torch.equal(batch["pixel_values"][first][..., : strip.shape[-1]], strip)
            first += 1
    assert first == len(batch["pixel_values"])


def test_drawn_answers_are_true_and_unambiguous():
    for seed in range(HELD_OUT, HELD_OUT + 400):
        c = draw(seed)
        kind = c.id.split("-")[0]
        assert c.answer and len(c.images) == {"sum": 0, "pair": 2}.get(kind, 1)
        if kind == "sum":
            assert int(c.answer) == eval(c.question.removeprefix("What is ").rstrip("?"))
        if c.question.startswith("Where"):
            assert c.answer in PLACES


def test_drawn_is_reproducible():
    a, b = Drawn(3, 5), Drawn(3, 5)
    assert all(
        x.messages == y.messages and [i.tobytes() for i in x.images] == [i.tobytes() for i in y.images]
        for x, y in zip(a, b)
    )


def test_the_samples_are_what_the_code_makes(tmp_path):
    pytest.importorskip("sklearn")
    build(tmp_path)
    made, kept = (
        {p.relative_to(root): p for p in root.rglob("*") if p.is_file()} for root in (tmp_path, samples_folder())
    )
    assert set(made) == set(kept) - {p for p in kept if p.name == "README.md"}
    for name, path in made.items():
        if path.suffix == ".png":
            assert Image.open(path).tobytes() == Image.open(kept[name]).tobytes(), name
        else:
            assert path.read_bytes() == kept[name].read_bytes(), name


def test_no_scan_is_in_two_splits():
    pytest.importorskip("sklearn")
    pools = [{str(s) for s, _ in pool} for pool in scans().values()]
    assert sum(map(len, pools)) == len(set.union(*pools))
