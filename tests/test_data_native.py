"""Rows of transformers' own families: against transformers' own processors, and against what a stranger would get
wrong."""

import json
import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import native_folder, tiny_model
from PIL import Image
from standins import VISION_TEMPLATE
from transformers import (
    MiniCPMV4_6Processor,
    MiniCPMV4_7Processor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)

from vlm_lora_lab.cli import main
from vlm_lora_lab.evaluate.compare import Checkpoint
from vlm_lora_lab.data.batch import Reading, Samples, check_rows, loader
from vlm_lora_lab.data.native import load_processor
from vlm_lora_lab.data.records import Conversation, Message, ask
from vlm_lora_lab.data.tokens import IGNORE
from vlm_lora_lab.data.view import see
from vlm_lora_lab.debug.trials import rows_of
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.evaluate.ask import _one_batch
from vlm_lora_lab.models.load import lab_folder, load_vlm

UPSTREAM = {
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "minicpmv4_6": MiniCPMV4_6Processor,
    "minicpmv4_7": MiniCPMV4_7Processor,
}
SLICED = ("minicpmv4_6", "minicpmv4_7")


def picture(width, height, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Image.fromarray((torch.rand(height, width, 3, generator=g) * 255).to(torch.uint8).numpy())


TALK = Conversation(
    "talk",
    (
        Message("system", "Be short."),
        Message("user", "<image>\nWhat number is this?"),
        Message("assistant", "407"),
        Message("user", "And <image> beside <image>?"),
        Message("assistant", "1 and 2"),
        Message("user", "Which is larger?"),
        Message("assistant", "2"),
    ),
    (picture(300, 160), picture(60, 90, 1), picture(40, 40, 2)),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("native")
    return {f: native_folder(f, root / f) for f in UPSTREAM}


@pytest.fixture(params=UPSTREAM)
def family(request):
    return request.param


@pytest.fixture
def processor(family, folders):
    return load_processor(folders[family])


def upstream(family, ours):
    """transformers' own processor over the same parts.

    Its constructor asks for a video processor, and that for torchvision; what it does with pictures needs neither."""
    p, t = UPSTREAM[family].__new__(UPSTREAM[family]), ours.tokenizer
    p.image_processor = ours.images
    p.tokenizer = t
    p.chat_template = t.chat_template
    p.video_processor = SimpleNamespace(model_input_names=[], merge_size=2, downsample_mode="16x", slice_mode=False)
    p.image_token, p.video_token = "<|image_pad|>", "<|video_pad|>"
    p.image_token_id, p.video_token_id = t.convert_tokens_to_ids([p.image_token, p.video_token])
    p.slice_mode = True
    p.default_use_image_id = True
    p.image_token_divisor = 16
    for n in ("image", "slice", "image_id"):
        setattr(p, f"{n}_start_token", f"<{n}>"), setattr(p, f"{n}_end_token", f"</{n}>")
    return p


def as_upstream(conversation):
    "Messages as transformers' documentation writes them."

    def parts(m):
        first, *others = (t.strip() for t in m.content.split("<image>"))
        found = [{"type": "text", "text": first}]
        for t in others:
            found += [{"type": "image"}, {"type": "text", "text": t}]
        return [f for f in found if f.get("text", True)]

    return [
        {"role": m.role, "content": parts(m) if "<image>" in m.content else m.content} for m in conversation.messages
    ]


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_question_is_what_transformers_own_processor_makes_of_it(family, processor, turns):
    asked = Conversation("c", TALK.messages[: 1 + 2 * turns], TALK.images[: (0, 1, 3, 3)[turns]])
    its = upstream(family, processor)
    text = processor.tokenizer.apply_chat_template(as_upstream(asked)[:-1], tokenize=False, add_generation_prompt=True)
    theirs = its(images=list(asked.images), text=[text], return_tensors="pt")
    ours = processor.collate([processor(asked, answer=False)])
    assert set(theirs) == set(ours) - {"labels"}
    for name, t in theirs.items():
        assert torch.equal(t.to(ours[name].dtype), ours[name]), name


@pytest.mark.parametrize(
    "size", [(300, 160), (160, 300), (40, 40), (1, 1), (7, 900), (900, 7), (112, 112), (113, 112), (700, 500), (500, 3)]
)
def test_a_header_is_enough_to_know_the_text(processor, size):
    c = ask("What?", "that", picture(*size))
    row, measured = processor(c), processor.measure(c)
    assert row["input_ids"] == measured.input_ids and row["image_bound"] == measured.image_bound
    vectors = (
        (row["pixel_values"].shape[0] // 4)
        if processor.along == 0
        else sum(h * w // 16 for h, w in row["target_sizes"].tolist())
    )
    assert (
        sum(b - a for a, b in row["image_bound"])
        == vectors
        == row["input_ids"].count(processor.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    )


@pytest.mark.parametrize("family", ["qwen3_vl", "minicpmv4_6"])
def test_any_size(folders, family):
    p, rng = load_processor(folders[family]), random.Random(0)
    for _ in range(100):
        image = Image.new("RGB", (rng.randint(10, 2000), rng.randint(10, 2000)))
        sizes = p.pictures([image])[p.sizes]
        assert p.grid(image.size).count("<|image_pad|>") == int(sizes.prod(-1).sum()) // (4 if p.along == 0 else 16), (
            image.size
        )
        tiles, _ = p.tiles(image)
        assert [[t.height // p.images.patch_size, t.width // p.images.patch_size] for t in tiles] == [
            s[-2:] for s in sizes.tolist()
        ], image.size


def learned(processor, row):
    return processor.tokenizer.decode([i for i in row["labels"] if i != IGNORE])


def test_the_answers_and_their_ends_are_learned_and_nothing_else(family, processor):
    row = processor(TALK)
    assert learned(processor, row) == "407<|im_end|>1 and 2<|im_end|>2<|im_end|>"
    assert all(label in (IGNORE, i) for label, i in zip(row["labels"], row["input_ids"]))
    if family not in SLICED:  # where the template marks the answers itself, transformers agrees, token by token
        text = Conversation("t", tuple(Message(m.role, m.content.replace("<image>", "")) for m in TALK.messages))
        theirs = processor.tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in text.messages],
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        row = processor(text)
        assert (
            row["input_ids"] == theirs["input_ids"]
            and [int(i != IGNORE) for i in row["labels"]] == theirs["assistant_masks"]
        )


def test_an_answer_of_weight_0_has_no_label(processor):
    "Neither its words nor its end; the text stays, and what is learned of the others stays."
    whole, answers = processor.measure(TALK), [i for i, m in enumerate(TALK.messages) if m.role == "assistant"]
    for left_out in answers:
        e = processor.measure(
            replace(TALK, messages=tuple(replace(m, learned=i != left_out) for i, m in enumerate(TALK.messages)))
        )
        kept = "".join(TALK.messages[i].content + "<|im_end|>" for i in answers if i != left_out)
        assert (
            e.input_ids == whole.input_ids
            and processor.tokenizer.decode([t for t in e.labels if t != IGNORE]).replace("\n", "") == kept
        )


def test_what_a_user_writes_is_never_learned(processor):
    quoting = ask("Say: assistant\n12", "no")
    assert learned(processor, processor(quoting)) == "no<|im_end|>"
    for bad in ("<|im_start|>assistant", "<|image_pad|>", "<|vision_start|>"):
        with pytest.raises(InputError, match="special token"):
            processor(ask(f"Say {bad}", "no"))


def test_a_prompt_is_the_beginning_of_the_training_text(processor):
    row, prompt = processor(TALK), processor(TALK, answer=False)
    assert row["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"] and set(prompt["labels"]) == {IGNORE}
    assert any(i != IGNORE for i in row["labels"][len(prompt["input_ids"]) :])
    unanswered = Conversation("q", (*TALK.messages[:-1], Message("assistant", "")), TALK.images)
    assert processor(unanswered, answer=False)["input_ids"] == prompt["input_ids"]


def test_thoughts_of_the_last_answer_are_learned_and_an_empty_block_is_not(folders):
    p = load_processor(folders["minicpmv4_6"])
    thought = "<think>\nThree and four.\n</think>\n\n7"
    assert learned(p, p(ask("3+4?", "7"))) == "7<|im_end|>"
    assert learned(p, p(ask("3+4?", thought))) == f"{thought}<|im_end|>"


def test_too_long_is_an_error_or_loses_whole_turns(folders, family):
    full = load_processor(folders[family])(TALK)
    limit = len(full["input_ids"]) - 1
    with pytest.raises(InputError, match=f"{limit + 1} tokens are more than the limit of {limit}"):
        load_processor(folders[family], limit)(TALK)
    p = load_processor(folders[family], limit, drop=True)
    row = p(TALK)
    assert row["dropped"] == 1 and learned(p, row) == "1 and 2<|im_end|>2<|im_end|>" and len(row["input_ids"]) < limit
    shorter = load_processor(folders[family])(
        Conversation("s", (TALK.messages[0], *TALK.messages[3:]), TALK.images[1:])
    )
    # numbers begin at 0 again
    assert row["input_ids"] == shorter["input_ids"] and torch.equal(row["pixel_values"], shorter["pixel_values"])


ROWS = [
    TALK,
    ask("Hi", "there"),
    ask("What?", "1", picture(90, 60, 3)),
    ask("Which?", "the left one, I think", picture(30, 30, 4), picture(200, 90, 5)),
]


def test_rows_in_a_batch_are_what_they_are_alone(processor, folders, family):
    # their linear attention computes in single precision, and padding shifts its chunks
    bound = 1e-4 if family in SLICED else 1e-12
    model = load_vlm(folders[family]).double()
    rows = [processor(c) for c in ROWS]
    for side in ("right", "left"):
        batch = processor.collate(rows, side)
        with torch.no_grad():
            together = model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()}).logits
            for i, row in enumerate(rows):
                alone = processor.collate([row], side)
                one = model(**{k: v.double() if v.is_floating_point() else v for k, v in alone.items()}).logits[0]
                assert (together[i][batch["attention_mask"][i] == 1] - one).abs().max() < bound * one.abs().max(), (
                    side,
                    i,
                )


def test_answers_in_a_batch_are_what_they_are_alone(processor, folders, family):
    model, g = load_vlm(folders[family]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))  # or it says the same whatever it is asked
    rows = [processor(c, answer=False) for c in ROWS]
    together = _one_batch(model, processor, rows, 8)
    assert [a.text for a in together] == [_one_batch(model, processor, [r], 8)[0].text for r in rows]
    assert len({a.text for a in together}) > 1


def test_text_alone_has_no_pictures(processor, folders, family):
    batch = processor.collate([processor(ask("Hi", "there")), processor(ask("What is 2 + 3?", "5"))])
    assert set(batch) == {"input_ids", "labels", "attention_mask"} | (
        {"mm_token_type_ids"} if processor.types else set()
    )
    assert load_vlm(folders[family])(**batch).loss.isfinite()


def test_workers_make_the_same_batches(processor):
    samples = [loader(Samples(ROWS, processor, workers), 2, seed=1) for workers in (0, 2)]
    for a, b in zip(*samples, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_rows_of_a_batch_are_its_rows(processor):
    marker = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    rows = [processor(c) for c in ROWS]
    batch = processor.collate(rows)
    width = batch["input_ids"].shape[1]
    for i, cut in enumerate(rows_of(batch, marker)):
        alone = processor.collate([rows[i]])
        assert set(cut) == set(alone) and cut["input_ids"].shape[1] == width
        assert all(torch.equal(cut[k], alone[k]) for k in ("pixel_values", processor.sizes) if k in alone)
    with pytest.raises(ValueError, match="places for"):
        rows_of(batch | {processor.sizes: batch[processor.sizes][:-1]}, marker)


def test_qwen2_5_takes_a_missing_type_for_text_and_we_never_leave_it_out(folders):
    p, model = load_processor(folders["qwen2_5_vl"]), load_vlm(folders["qwen2_5_vl"])
    batch = p.collate([p(ROWS[2])])
    with torch.no_grad():
        right, silent = (
            model(**b).logits for b in (batch, {k: v for k, v in batch.items() if k != "mm_token_type_ids"})
        )
    assert (right - silent).abs().max() > 0.01 * right.std()
    for family in ("qwen2_vl", "qwen3_vl"):
        other = load_processor(folders[family])
        without = {k: v for k, v in other.collate([other(ROWS[2])]).items() if k != "mm_token_type_ids"}
        with pytest.raises(ValueError, match="mm_token_type_ids"):
            load_vlm(folders[family])(**without)


ABSENT = object()  # a field that an edited file has no more


def copy_of(folder, place):
    return shutil.copytree(folder, place / folder.name)


def test_files_that_do_not_belong_together(folders, tmp_path, family):
    def refused(match, change):
        folder = copy_of(folders[family], tmp_path / match.replace(" ", "-")[:12].strip("."))
        change(folder)
        with pytest.raises(InputError, match=match):
            load_processor(folder)

    def edit(name, **values):
        def change(folder):
            path = folder / name
            path.write_text(
                json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not ABSENT})
            )

        return change

    refused("cannot read the picture processor", lambda f: (f / "preprocessor_config.json").unlink())
    refused("patch_size is 12", edit("preprocessor_config.json", patch_size=12))
    other = "qwen3_vl" if family in SLICED else "minicpmv4_6"
    for field, value in (("do_resize", False), ("do_center_crop", True), ("do_pad", True), ("do_convert_rgb", False)):
        refused(f"{field} is {value}", edit("preprocessor_config.json", **{field: value}))
    refused("image_std is", edit("preprocessor_config.json", image_std=[0.5, 0.5]))
    refused("rescale_factor is", edit("preprocessor_config.json", rescale_factor="1/255"))
    if family in SLICED:
        refused("max_slice_nums is 2.5", edit("preprocessor_config.json", max_slice_nums=2.5))
        refused("scale_resolution is 0", edit("preprocessor_config.json", scale_resolution=0))
    else:
        older = dict.fromkeys(("min_pixels", "max_pixels"), ABSENT)
        refused(
            "max_pixels .longest_edge. is contradictory",
            edit("preprocessor_config.json", max_pixels=5000, size={"shortest_edge": 3136, "longest_edge": 12544}),
        )
        refused(
            "a least and a most number",
            edit("preprocessor_config.json", size={"shortest_edge": 9000, "longest_edge": 5000}, **older),
        )
        refused("should be a least", edit("preprocessor_config.json", size={"height": 448, "width": 448}, **older))
    refused("picture processor is a", lambda f: shutil.copy(folders[other] / "preprocessor_config.json", f))
    refused("no token of its own", edit("config.json", image_token_id=9999))
    (tmp_path / "t").mkdir()
    plain = copy_of(folders[family], tmp_path / "t")
    (plain / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.content is string else 'x' "
        "}}<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(InputError, match="writes 0 places for 1 pictures"):
        load_processor(plain)(ROWS[2])
    (plain / "chat_template.jinja").write_text("{{ raise_exception('no system message, please') }}")
    with pytest.raises(InputError, match="no system message, please"):
        load_processor(plain)(ROWS[2])


def test_a_template_beside_the_weights_of_an_older_layout(folders, tmp_path):
    "Qwen2-VL keeps its template in chat_template.json, and what later versions save is processor_config.json."
    folder = copy_of(folders["qwen2_vl"], tmp_path)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    del tokenizer["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": VISION_TEMPLATE}))
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": preprocessor, "processor_class": "Qwen2VLProcessor"})
    )
    assert load_processor(folder)(TALK)["input_ids"] == load_processor(folders["qwen2_vl"])(TALK)["input_ids"]


def test_pixels_and_tokens_follow_the_picture_processors_file(folders, tmp_path, family):
    "Another mean, deviation and bound; in the older notation for Qwen."
    folder, image = copy_of(folders[family], tmp_path), picture(300, 200)
    path = folder / "preprocessor_config.json"
    mean = [0.1, 0.2, 0.3]
    std = [0.25, 0.5, 0.75]
    values, before = json.loads(path.read_text()), load_processor(folder)
    path.write_text(json.dumps(values | {"image_mean": mean, "image_std": std}))
    a, b = (p([ask("What?", "1", image)][0]) for p in (before, load_processor(folder)))
    was, now = (r["pixel_values"].reshape(len(r["pixel_values"]), 3, -1) for r in (a, b))
    for c in range(3):
        pixels = was[:, c] * before.images.image_std[c] + before.images.image_mean[c]
        torch.testing.assert_close(now[:, c], (pixels - mean[c]) / std[c], rtol=0, atol=1e-5)
    smaller = (
        {"max_slice_nums": 2, "scale_resolution": 112}
        if family in SLICED
        else {k: v for k, v in values.items() if k != "size"} | {"min_pixels": 56 * 56, "max_pixels": 84 * 84}
    )
    path.write_text(json.dumps(smaller if "min_pixels" in smaller else values | smaller))
    after = load_processor(folder)
    assert (
        len(after(ask("What?", "1", image))["input_ids"])
        == len(after.measure(ask("What?", "1", image)).input_ids)
        < len(a["input_ids"])
    )
    if family in SLICED:
        path.write_text(json.dumps(values | {"use_image_id": False}))
        assert "<image_id>" not in load_processor(folder).tokenizer.decode(
            load_processor(folder)(ask("What?", "1", image))["input_ids"]
        )


def test_a_family_that_is_not_known_is_refused(tmp_path):
    tiny_model("llava").save_pretrained(tmp_path / "llava")
    for file in lab_folder().iterdir():
        if "token" in file.name or "template" in file.name:
            shutil.copy(file, tmp_path / "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text())
    config["text_config"]["vocab_size"] = 419
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="nothing here prepares data for model_type 'llava'.*Qwen3-VL"):
        load_processor(tmp_path / "llava")


def test_a_picture_that_no_family_takes_is_refused_by_name(processor):
    with pytest.raises(InputError, match="4 × 1000 pixels"):
        check_rows([ROWS[2], ask("What?", "1", picture(4, 1000))], processor)


def test_the_view_shows_what_the_model_sees(processor):
    view = see(TALK, processor)
    tiles, grid = view.pictures[0]
    assert len(view.pictures) == 3 and (grid is None) == (processor.along == 0)
    assert "picture 1:" in repr(view) and "⟦407<|im_end|>⟧" in repr(view)
    row = processor(ask("What?", "1", TALK.images[0]))
    rows, cols = row[processor.sizes][0].tolist()[-2:]
    assert tiles[0].size == (cols * processor.images.patch_size, rows * processor.images.patch_size)


def test_the_commands_take_them(folders, family, tmp_path, capsys):
    ROWS[2].images[0].save(tmp_path / "a.png")
    record = {
        "id": "1",
        "image": "a.png",
        "conversations": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "one"}],
    }
    (tmp_path / "d.json").write_text(json.dumps([record]))
    data, model = str(tmp_path / "d.json"), str(folders[family])
    assert main(["check-data", data, "--model", model]) == 0
    assert main(["doctor", "--model", model, "--data", data]) in (0, 1)
    assert main(["evaluate", model, "--data", data, "--max-new-tokens", "4"]) == 0
    assert "Traceback" not in "".join(capsys.readouterr())


def test_fewer_pixels_are_fewer_tokens_and_the_adapter_remembers(folders, family, tmp_path, capsys):
    wide = ask("What?", "one", picture(300, 160))
    full, few = (
        load_processor(folders[family]),
        load_processor(folders[family], max_pixels=112 * 112 if family in SLICED else 64 * 64),
    )
    assert len(few(wide)["input_ids"]) < len(full(wide)["input_ids"])
    assert (
        sum(t.width * t.height for t in few.tiles(wide.images[0])[0]) <= (1 if family not in SLICED else 2) * 112 * 112
    )
    with pytest.raises(InputError, match="at least"):
        load_processor(folders[family], max_pixels=100)
    wide.images[0].save(tmp_path / "a.png")
    record = {
        "id": "1",
        "image": "a.png",
        "conversations": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "one"}],
    }
    (tmp_path / "d.json").write_text(json.dumps([record]))
    pixels, data = str(112 * 112 if family in SLICED else 64 * 64), str(tmp_path / "d.json")
    assert (
        main(
            [
                "train",
                "--model",
                str(folders[family]),
                "--data",
                data,
                "--output",
                str(tmp_path / "run"),
                "--max-steps",
                "1",
                "--max-pixels",
                pixels,
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "run" / "adapter" / "provenance.json").read_text())["max_pixels"] == int(pixels)
    assert Checkpoint.of(tmp_path / "run" / "adapter").processor().images.to_dict() == few.images.to_dict()
    assert (
        Checkpoint.of(tmp_path / "run" / "adapter", max_pixels=300 * 300).processor().images.to_dict()
        != few.images.to_dict()
    )
    assert (
        main(
            [
                "train",
                "--model",
                str(folders[family]),
                "--data",
                data,
                "--output",
                str(tmp_path / "other"),
                "--max-pixels",
                "3",
            ]
        )
        == 2
    )
    assert "max_pixels is 3" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_fewer_pixels_for_the_families_here(tmp_path):
    lab = load_processor("lab", max_pixels=56 * 56)
    assert lab.max_slice_nums == 1
    with pytest.raises(InputError, match="3,136 at least"):
        load_processor("lab", max_pixels=55 * 56)
    with pytest.raises(InputError, match="max_pixels is -1"):
        Reading(max_pixels=-1)


def test_pictures_of_a_row_one_by_one_are_those_of_all_at_once(processor):
    images = [Image.effect_noise(size, 80).convert("RGB") for size in ((60, 60), (130, 90), (57, 200))]
    whole, one_by_one = processor.pictures(images), processor.joined([processor.pictures([i]) for i in images])
    assert whole.keys() == one_by_one.keys() and all(torch.equal(whole[k], one_by_one[k]) for k in whole)
    assert processor.joined([]) == processor.pictures([]) == {}
