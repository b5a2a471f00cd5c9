"""Nothing in a record is dropped in silence: other media are refused, marks on answers are obeyed, and every field that
nobody reads is named."""

import json
import random
from collections import Counter

import pytest
from PIL import Image
from transformers import AutoTokenizer

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.batch import Reading, check_rows
from vlm_lora_lab.data.dialects import to_record
from vlm_lora_lab.data.doctor import check_data
from vlm_lora_lab.data.native import load_processor
from vlm_lora_lab.data.records import DIALECTS, Access, Conversations, RecordError, dialect_of, parse_record
from vlm_lora_lab.data.tokens import IGNORE, encode
from vlm_lora_lab.families.base import family_named
from vlm_lora_lab.data.view import see
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.evaluate.metrics import check_truths, metric_of
from vlm_lora_lab.models.load import lab_folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name in "ab":
        Image.new("L", (16, 16), 128).save(root / f"{name}.png")
    return root


def talk(question="Which?", answer="The first.", said=None, **more):
    return more | {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | (said or {})]
    }


def shared(question="Which?", answer="The first.", **more):
    return more | {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def parts(*given, **more):
    return talk([*given, {"type": "text", "text": "What is it?"}], **more)


MEDIA = [
    (talk("<video>\nWhat happens?", video="clip.mp4"), "a video is given", "video"),
    (talk("What happens?", video="clip.mp4"), "a video is given", "video"),
    (shared("<video>\nWhat happens?", videos=["clip.mp4"]), "a video is given", "videos"),
    (shared("<image>\nWhat happens?", videos=["clip.mp4"], image="a.png"), "a video is given", "videos"),
    (talk("What is said?", Audio="a.wav"), "an audio is given", "Audio"),
    (shared("<audio>What is said?", audios=["a.wav"]), "an audio is given", "audios"),
    (talk("Look", video_path="clip.mp4"), "a video is given", "video_path"),
    (talk("<video>\nWhat happens?"), "a video is given", "messages[0]"),
    (talk("<video>What happens?"), "a video is given", "messages[0]"),
    (talk("<video><video>\nWhich is longer?"), "a video is given", "messages[0]"),
    (talk("Watch this.\n<video>\nWhat happens?"), "a video is given", "messages[0]"),
    (shared("<video>clips/one.mp4</video>\nWhat happens?"), "a video is given", "conversations[0]"),
    (
        {
            "conversations": [
                {"from": "user", "value": "Audio 1: <audio>a.flac</audio>\nWhat?"},
                {"from": "assistant", "value": "x"},
            ]
        },
        "an audio is given",
        "conversations[0]",
    ),
    (talk("<|vision_start|><|video_pad|><|vision_end|>What happens?"), "a video is given", "messages[0]"),
    (talk("<|audio_pad|>What?"), "an audio is given", "messages[0]"),
    (talk("<|vision_start|><|image_pad|><|vision_end|>What?"), "contains <|image_pad|>", "messages[0]"),
    (talk("<Video>\nWhat happens?"), "a video is given", "messages[0]"),
    (shared("<video_0>\n<video_1>\nWhich?"), "a video is given", "conversations[0]"),
    (talk("<|AUDIO|>What?"), "an audio is given", "messages[0]"),
    (talk("<|image|>What?"), "contains <|image|>", "messages[0]"),
    (talk("What?", **{"audio-path": "a.wav"}), "an audio is given", "audio-path"),
    (talk("What?", None, {"tool_calls": [{}]}), "expected text, found None", "messages[1].content"),
    (parts({"type": "video", "video": "clip.mp4"}), "a video is given", "messages[0].content[0].video"),
    (parts({"type": "video"}, videos=["clip.mp4"]), "a video is given", "videos"),
    (
        parts({"type": "video_url", "video_url": {"url": "https://example.com/clip.mp4"}}),
        "a video is given",
        "messages[0].content[0].video_url",
    ),
    (parts({"type": "video", "video": ["f1.png", "f2.png"]}), "a video is given", "messages[0].content[0].video"),
    (
        parts({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}),
        "an audio is given",
        "messages[0].content[0]",
    ),
    (
        parts({"type": "audio_url", "audio_url": {"url": "a.wav"}}),
        "an audio is given",
        "messages[0].content[0].audio_url",
    ),
    (parts({"type": "file", "file": {"file_id": "x"}}), "a document is given", "messages[0].content[0]"),
    (parts({"type": "document", "source": "x"}), "a document is given", "messages[0].content[0]"),
    (parts({"type": "image", "image": "clip.mp4"}), "a video is given", "image"),
    (parts({"type": "image_url", "image_url": {"url": "data:video/mp4;base64,AAAA"}}), "a video is given", "image"),
    (shared("<image>\nWhat?", image="report.PDF"), "a document is given", "image"),
    (talk("What?", said={"audio": {"id": "audio_1"}}), "an audio is given", "messages[1].audio"),
    (
        talk([{"type": "text", "text": "What?", "video": "clip.mp4"}]),
        "a video is given",
        "messages[0].content[0].video",
    ),
    (talk([{"type": "text", "text": "What?", "image": "a.png"}]), "has the key 'image', too", "messages[0].content[0]"),
    (talk([{"type": "image", "image": "a.png", "text": "What?"}]), "a picture and a text", "messages[0].content[0]"),
    (
        {
            "messages": [
                {"role": "user", "content": "What?", "images": ["a.png"]},
                {"role": "assistant", "content": "x"},
            ]
        },
        "beside the text",
        "messages[0].images",
    ),
    (
        talk("Where is <ref-object>?", "<bbox>", objects={"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}),
        "'objects', which is not read",
        "messages[0]",
    ),
    (shared("Where?", "It is <bbox>.", bbox=[[1, 2, 3, 4]]), "'bbox', which is not read", "conversations[1]"),
]


@pytest.mark.parametrize("record, found, where", MEDIA)
def test_other_media_are_refused_with_what_to_give_instead(record, found, where, root):
    with pytest.raises(RecordError) as error:
        parse_record(record, Access(root))
    assert found in error.value.found and error.value.field == where and error.value.remedy
    if "video" in found:
        assert '"images": ["frame1.png", "frame2.png"]' in error.value.remedy
    report = check_data([record], image_root=root)
    assert report.status == 2 and report.bad == [0] and found in report.findings[0].reason


@pytest.mark.parametrize(
    "record",
    [
        talk("What does the tag <video> do in HTML?", "<video> shows a clip, and <audio> plays a sound."),
        talk("<video> is a tag. Of which language?", "HTML"),
        talk("Mend this:\n<video>\n<source src=clip.mp4>\n</video>", "<video>\n</video>"),
        talk("Which tag?\n```html\n<video>\n```", "<video>"),
        talk("Name a tag for clips.", "<video>"),
        talk("<audio>/<video>: which languages have them?", "HTML"),
        talk("Which tag?\n`<video>`\n`<audio>`", "`<video>`"),
        talk("Which file is larger?", "clip.mp4", videos=[], audio=None, video=""),
        talk("Has it sound?", "no", audio=False),
        talk("What does <bbox> mean?", "A box."),
        parts({"type": "image", "image": "a.png", "video": None, "text": None}),
    ],
)
def test_words_are_no_media(record, root):
    conversation = parse_record(record, Access(root))
    if isinstance(record["messages"][0]["content"], str):
        assert [m.content for m in conversation.messages] == [m["content"] for m in record["messages"]]
    assert check_data([record], image_root=root).status == 0


@pytest.mark.parametrize("command", ["check-data", "doctor", "train"])
def test_every_command_refuses_a_video(command, tmp_path, capsys):
    data = tmp_path / "d.json"
    data.write_text(json.dumps([talk("Fine?", "Yes."), talk("<video>\nWhat happens?", video="clip.mp4")]))
    arguments = [str(data)] if command == "check-data" else ["--data", str(data), "--output", str(tmp_path / "out")]
    assert main([command, *arguments]) == 2
    told = " ".join("".join(capsys.readouterr()).split())
    assert (
        "a video is given, and only pictures and text are read" in told
        and '"images": ["frame1.png", "frame2.png"]' in told
    )
    assert not (tmp_path / "out").exists()


def turns(*marks, **more):
    "Two turns; the marks stand at the answers."
    said = zip(("One.", "Two."), (*marks, {}, {}))
    return more | {
        "messages": [
            m
            for i, (text, mark) in enumerate(said)
            for m in ({"role": "user", "content": f"Say {i + 1}"}, {"role": "assistant", "content": text} | mark)
        ]
    }


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"loss": False},
        {"loss": 0},
        {"loss_scale": 0},
        {"train": False},
        {"training": False},
        {"weight": 0, "loss": False},
    ],
)
def test_an_answer_of_weight_0_is_context(mark, root):
    for record, learned in (
        (turns(mark), (False, True)),
        (turns({}, mark), (True, False)),
        (turns({"weight": 1}, {"loss": None}), (True, True)),
    ):
        assert parse_record(record, Access(root)).learned == learned
    with pytest.raises(RecordError, match="every answer is marked as not learned"):
        parse_record(turns(mark, mark), Access(root))
    sharegpt = {
        "conversations": [
            {"from": "system", "value": "Be brief.", "weight": 0},
            *({"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in turns()["messages"]),
        ]
    }
    sharegpt["conversations"][2] |= mark
    assert parse_record(sharegpt, Access(root)).learned == (False, True)


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0.5},
        {"weight": "1"},
        {"weight": float("nan")},
        {"loss": "false"},
        {"loss_scale": [1]},
        {"weight": 10**400},
        {"train": {}},
        {"weight": -1},
    ],
)
def test_other_weights_are_refused(mark, root):
    [(key, value)] = mark.items()
    for record in (turns(mark), turns({}, mark), talk(said=mark)):
        with pytest.raises(RecordError, match="expected 0 or 1, found") as error:
            parse_record(record, Access(root))
        assert error.value.field.endswith(key) and "only context" in error.value.remedy
    with pytest.raises(RecordError, match="weight says 1; loss says False"):
        parse_record(turns({"weight": 1, "loss": False}), Access(root))


@pytest.mark.parametrize("name", ["lab", "2.0", "2.5", "2.6", "4.0", "4.5", "qwenvl"])
def test_labels_leave_out_a_whole_turn(name, root):
    "Word for word: what is learned is the other answer with its end, and the text is the same."
    if name == "lab":
        encoded = load_processor("lab").measure
        decode = load_processor("lab").tokenizer.decode
    else:
        tokenizer = AutoTokenizer.from_pretrained(lab_folder())
        tokenizer.chat_template = None
        tokenizer.add_tokens(["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], special_tokens=True)
        encoded, decode = (lambda c: encode(c, tokenizer, 4, words=family_named(name).words)), tokenizer.decode
    whole = encoded(parse_record(turns(), Access(root)))
    for marks in (({"weight": 0}, {}), ({}, {"weight": 0})):
        c = parse_record(turns(*marks), Access(root))
        e = encoded(c)
        assert e.input_ids == whole.input_ids
        learned = decode([t for t in e.labels if t != IGNORE])
        kept, left_out = ("Two.", "One.") if marks[0] else ("One.", "Two.")
        assert learned.startswith(kept) and left_out not in learned and learned.count("<|") + learned.count("</s>") <= 1
        assert sum(t != IGNORE for t in e.labels) < sum(t != IGNORE for t in whole.labels)
        assert all(a in (b, IGNORE) for a, b in zip(e.labels, whole.labels))
    both = [encoded(parse_record(turns(*m), Access(root))).labels for m in (({"weight": 0}, {}), ({}, {"weight": 0}))]
    assert [max(a, b) for a, b in zip(*both)] == whole.labels  # the two halves are the whole


@pytest.mark.parametrize("dialect", DIALECTS)
def test_marks_survive_writing(dialect, root):
    c = parse_record(turns({"loss": False}, image="a.png"), Access(root))
    back = parse_record(json.loads(json.dumps(to_record(c, dialect, root))), Access(root))
    assert back.messages == c.messages and back.learned == (False, True)


def test_the_view_shows_context_as_prompt(root):
    view = see(parse_record(turns({"weight": 0}), Access(root)), load_processor("lab"))
    assert "".join(p.text for p in view.pieces if p.kind == "learned") == "Two.<|im_end|>"


def test_turns_that_are_dropped_may_take_the_last_learned_answer(root):
    "Nothing is left to learn, which is an error, and not a row without labels."
    processor = load_processor("lab", max_length=80, drop=True)
    record = talk("word " * 30, "One.") | {}
    record["messages"] += [
        {"role": "user", "content": "word " * 5},
        {"role": "assistant", "content": "Two.", "weight": 0},
    ]
    report = check_data([record], processor)
    assert report.status == 2 and "no token of the text is learned. Raise max_length" in report.text()
    with pytest.raises(InputError, match="Raise max_length: all answers that are learned"):
        check_rows([parse_record(record, Access(root))], processor, learned=True)


def test_an_evaluation_does_not_judge_by_an_answer_of_weight_0(root):
    check_truths(metric_of("exact"), [parse_record(turns({"weight": 0}), Access(root))])
    with pytest.raises(InputError, match="no right answer to judge by"):
        check_truths(metric_of("exact"), [parse_record(turns({}, {"weight": 0}), Access(root))])


LOSSES = [
    (
        talk(said={"tool_calls": [{"id": "1", "function": {"name": "f"}}]}),
        "messages[].tool_calls",
        "calls of tools are not learned",
    ),
    (talk(said={"function_call": {"name": "f"}}), "messages[].function_call", "calls of tools are not learned"),
    (talk(tools=[{"type": "function"}]), "tools", "calls of tools are not learned"),
    (shared(tools='[{"name": "f"}]'), "tools", "calls of tools are not learned"),
    (talk(said={"reasoning_content": "Hm."}), "messages[].reasoning_content", "<think>"),
    (talk(rejected="The second."), "rejected", "supervised fine-tuning"),
    (shared(chosen={"from": "gpt", "value": "x"}), "chosen", "supervised fine-tuning"),
    (talk(loss_scale=0.5), "loss_scale", "a whole record has no weight"),
    (talk(weight=0), "weight", "a whole record has no weight"),
    (talk(history=[["a", "b"]]), "history", "earlier turns"),
    (talk(objects={"bbox": [[1, 2, 3, 4]]}), "objects", "boxes are read from the text alone"),
    (
        talk(said={"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]}),
        "messages[].train_detail",
        "weight 0 leaves out a whole answer",
    ),
    (
        parts({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}),
        "messages[].content[].image_url.detail",
        "max_pixels",
    ),
    (parts({"type": "image", "image": "a.png", "max_pixels": 50176}), "messages[].content[].max_pixels", "max_pixels"),
    (
        parts({"type": "image", "image": "a.png", "resized_height": 28, "min_pixels": 3136}),
        "messages[].content[].resized_height",
        "max_pixels",
    ),
    (talk(Images=["a.png"]), "Images", "did you mean 'images'?"),
    (talk(imgae="a.png"), "imgae", "did you mean 'image'?"),
    (shared(iamges=["a.png"]), "iamges", "did you mean 'images'?"),
    (talk(img="a.png"), "img", "pictures are read from 'image' or 'images'"),
    (talk(image_path="a.png"), "image_path", "pictures are read from 'image' or 'images'"),
    (talk(System="Be brief."), "System", "did you mean 'system'?"),
    (talk(catagory="x"), "catagory", "did you mean 'category'?"),
    (talk(clip="clip.mp4"), "clip", "it names a video"),
    (talk(speech=["a.wav"]), "speech", "it names an audio"),
    (talk(file={"path": "report.pdf"}), "file", "it names a document"),
    (talk(said={"masked": True}), "messages[].masked", "by weight 0"),
    (talk(said={"Loss": False, "loss": None}), "messages[].Loss", "did you mean 'loss'?"),
    (talk(said={"Weight": 0}), "messages[].Weight", "did you mean 'weight'?"),
    (talk(said={"wieght": 0}), "messages[].wieght", "did you mean 'weight'?"),
    (
        shared()
        | {
            "conversations": [
                {"from": "human", "value": "Which?", "content": "And this?"},
                {"from": "gpt", "value": "x"},
            ]
        },
        "conversations[].content",
        "either under role and content",
    ),
    (
        talk() | {"messages": [{"role": "user", "content": "x", "weight": 1}, {"role": "assistant", "content": "y"}]},
        "messages[] of a user or the system marked as learned",
        "only answers are learned",
    ),
]


@pytest.mark.parametrize("record, name, loss", LOSSES)
def test_what_would_change_the_learning_is_a_warning(record, name, loss, root):
    report = check_data([talk(), record, record | {"id": "again"}], image_root=root, pictures="header")
    assert report.status == 1 and report.unread[name] == 2
    assert "?." not in report.text()
    [finding] = [f for f in report.findings if f.kind == "unread" and f"{name!r} in 2 records" in f.reason]
    assert finding.severity == "warning" and loss in finding.reason and finding.row is None
    assert (
        report.to_dict()["unread_fields"][name] == 2
        and repr(name) in report.text()
        and loss.partition("'")[0] in report.text()
    )


@pytest.mark.parametrize(
    "record, names",
    [
        (
            talk(conversation_id=3, source="web", score=0.5, label=True, message="y", ID=7) | {"answer": "x"},
            {"conversation_id", "source", "score", "label", "answer", "message", "ID"},
        ),
        (
            talk(
                said={
                    "name": "Ada",
                    "tool_calls": [],
                    "function_call": None,
                    "reasoning_content": "",
                    "context": "x",
                    "date": 1,
                }
            ),
            {
                "messages[].name",
                "messages[].tool_calls",
                "messages[].reasoning_content",
                "messages[].context",
                "messages[].date",
            },
        ),
        (
            parts(
                {"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}, "cache_control": {"type": "x"}}
            ),
            {"messages[].content[].image_url.detail", "messages[].content[].cache_control"},
        ),
        (talk("<image>\nWhich?", image="a.png", source="clip.mp4"), {"source"}),
        (talk(note="see clip.mp4", score=1), {"note", "score"}),
        (
            talk(tools=[], rejected="", history=[[]], weight=1, loss=True),
            {"tools", "rejected", "history", "weight", "loss"},
        ),
        (talk("Is <video> a tag?", "Yes."), {"<video> as a word in messages[]"}),
        (talk(video=None, images=None, system=None, tools=None), set()),
        (talk(bbox=[1, 2, 3, 4], stem="x", page=3, items=[]), {"bbox", "stem", "page", "items"}),
    ],
)
def test_the_rest_is_listed_and_no_alarm(record, names, root):
    report = check_data([record], image_root=root)
    assert report.status == 0 and set(report.unread) == names and set(report.unread.values()) <= {1}
    assert all(repr(name) in report.text() for name in names)


def test_another_case_of_the_turns_is_named(root):
    with pytest.raises(RecordError, match=r"Did you mean 'messages' by 'Messages'\?"):
        parse_record({"Messages": talk()["messages"]}, Access(root))


def test_doctor_and_train_name_the_same_fields(tmp_path, capsys, monkeypatch):
    import vlm_lora_lab.job as job

    class Reached(Exception):
        pass

    def reached(*args, **kwargs):
        raise Reached

    monkeypatch.setattr(job, "fit", reached)
    data, held = tmp_path / "d.json", tmp_path / "e.json"
    data.write_text(json.dumps([turns({"weight": 0}, source="web"), talk(said={"tool_calls": [1]})]))
    held.write_text(json.dumps([talk(rejected="No.")]))
    arguments = ["--data", str(data), "--eval-data", str(held), "--output", str(tmp_path / "out"), "--max-steps", "1"]
    lines = [
        f"'messages[].tool_calls' in 1 record of {data} is not read: calls of tools are not learned",
        f"Also not read in {data}, and nothing that should be learned: 'source' (1).",
        f"Answers of {data} that have weight 0, so that they are context and not learned: 1.",
        f"'rejected' in 1 record of {held} is not read",
    ]
    assert main(["doctor", *arguments]) == 1
    told = capsys.readouterr().out
    with pytest.raises(Reached):
        main(["train", *arguments])
    said = capsys.readouterr()
    for line in lines:
        assert line in told and line in said.out + said.err


READ = {"id", "image", "images", "conversations", "messages", "system", "category", "answers"}
TURN = {"weight", "loss", "loss_scale", "train", "training"}
PART = {"type", "text", "image", "path", "url", "image_url", "base64"}
EXTRAS = [
    "video",
    "videos",
    "audio",
    "audios",
    "Video",
    "video_url",
    "objects",
    "bbox",
    "ref",
    "tools",
    "tool_calls",
    "function_call",
    "reasoning_content",
    "rejected",
    "chosen",
    "label",
    "history",
    "name",
    "weight",
    "loss",
    "loss_scale",
    "train",
    "detail",
    "min_pixels",
    "max_pixels",
    "resized_height",
    "fps",
    "Images",
    "imgae",
    "IMAGE",
    "image",
    "images",
    "text",
    "content",
    "value",
    "role",
    "from",
    "type",
    "score",
    "source",
    "",
    " ",
    "\n",
    "x" * 50,
    "系统",
    "system",
    "answers",
    "category",
    "Weight",
    "id",
    "path",
    "url",
]
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    float("nan"),
    float("inf"),
    10**400,
    "",
    " ",
    "x",
    "a.png",
    "clip.mp4",
    "<video>",
    "<bbox>",
    "data:video/mp4;base64,AAAA",
    [],
    {},
    [None],
    ["a.png"],
    ["clip.mp4"],
    [[]],
    {"url": "a.png"},
    {"url": "a.png", "detail": "low"},
    {"ref": ["x"], "bbox": [[1, 2, 3, 4]]},
    [{"type": "video"}],
    {"": {"": [{}]}},
]
PARTS = [
    {"type": "video", "video": "clip.mp4"},
    {"type": "audio"},
    {"type": "video_url", "video_url": {"url": "x"}},
    {"type": "input_audio", "input_audio": {}},
    {"type": "file", "file": {"file_id": "x"}},
    {"type": "text"},
    {"type": "text", "text": "more"},
    {"type": "image"},
    {"type": ["image"]},
    {"type": "image", "image": "a.png", "max_pixels": 9},
    {"text": "x"},
    "x",
    None,
    5,
    [],
]
TAGS = [
    "<video>\n",
    "<video>",
    " <video> ",
    "<audio>",
    "<bbox>",
    "<ref-object>",
    "<|video_pad|>",
    "<|image_pad|>",
    "<video>clip.mp4</video>",
    "<image>",
]


def laden(record, rng):
    "A good record with extra fields, wrong types and odd media somewhere in it."
    record = json.loads(json.dumps(record))
    name = "messages" if "messages" in record else "conversations"
    for _ in range(rng.randrange(1, 4)):
        row = rng.choice(record[name])
        content = row.get("content", row.get("value"))
        where = [record, row]
        if isinstance(content, list):
            where += [p for p in content if isinstance(p, dict)]
            where += [p["image_url"] for p in content if isinstance(p, dict) and isinstance(p.get("image_url"), dict)]
            if rng.random() < 0.3:
                content.insert(rng.randrange(len(content) + 1), rng.choice(PARTS))
        elif isinstance(content, str) and rng.random() < 0.3:
            at = rng.randrange(len(content) + 1)
            row["content" if "content" in row else "value"] = content[:at] + rng.choice(TAGS) + content[at:]
        rng.choice(where)[rng.choice(EXTRAS)] = rng.choice(VALUES)
    return record


def ends(record):
    "Keys that the reader of this dialect leaves aside, from the record itself."
    name = "messages" if record.get("messages") is not None else "conversations"
    aside = {k for k, v in record.items() if k not in READ and v is not None}
    spoken = {"role", "content"} if dialect_of(record) not in ("qwenvl", "llava") else {"from", "value"}
    for row in record[name]:
        aside |= {f"{name}[].{k}" for k, v in row.items() if k not in TURN | spoken and v is not None}
        content = row["value" if "value" in spoken else "content"]
        for part in content if isinstance(content, list) else ():
            aside |= {f"{name}[].content[].{k}" for k, v in part.items() if k not in PART and v is not None}
            if isinstance(part.get("image_url"), dict):
                aside |= {
                    f"{name}[].content[].image_url.{k}"
                    for k, v in part["image_url"].items()
                    if k != "url" and v is not None
                }
    return {k[: k.rfind(".") + 1] + k[k.rfind(".") + 1 :][:40] for k in aside}


def texts(record):
    "Every text that somebody says in a record."
    for row in record.get("messages") or record.get("conversations"):
        content = row.get("content" if dialect_of(record) not in ("qwenvl", "llava") else "value")
        yield from (
            (p["text"] for p in content if p["type"] in ("text", "input_text"))
            if isinstance(content, list)
            else [content]
        )


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_hundred_laden_records_are_refused_or_listed_in_full(dialect, root):
    "Whatever is added to a record: a sentence, or a listed count, and all that is said is in the conversation."
    rng, processor = random.Random(dialect), load_processor("lab")
    good = [
        to_record(c, dialect, root)
        for c in (
            parse_record(turns(system="Be brief."), Access(root)),
            parse_record(talk("<image>\nWhich?", image="a.png"), Access(root)),
            parse_record(turns({"weight": 0}), Access(root)),
        )
    ]
    records = [laden(rng.choice(good), rng) for _ in range(150)]
    report = check_data(records, processor, root, pictures="header")
    json.dumps(report.to_dict()), report.text(), report.html()
    assert 30 < len(report.bad) < 130
    checked = check_rows(Conversations(records, Access(root)), processor, Reading(skip_bad_rows=True), learned=True)
    assert [s.row for s in checked.skipped] == report.bad and all(
        s.reason.endswith((".", "?")) and "Traceback" not in s.reason for s in checked.skipped
    )
    fine = [r for i, r in enumerate(records) if i not in set(report.bad)]
    aside = Counter(name for r in fine for name in ends(r))
    listed = Counter()
    for u, n in checked.unread.items():
        listed[u.name] += n * (" as a word in " not in u.name and " marked as " not in u.name)
    assert +listed == aside and all(report.unread[name] >= n for name, n in aside.items())
    warned = {f.reason for f in report.findings if f.kind == "unread"}
    assert all(
        any(reason.startswith(f"{u.name!r} in ") and reason.endswith(u.loss) for reason in warned)
        for u in checked.unread
        if u.loss
    )
    for record in fine:
        said = "".join(m.content for m in parse_record(record, Access(root)).messages)
        if dialect != "qwenvl":  # where pictures stand inside of the text
            assert all(text in said for text in texts(record))


def test_one_conversation_with_other_answers_learned_is_no_duplicate(root):
    "As files are made that teach one answer at a time."
    one, two = turns({"weight": 0}, id="a"), turns({}, {"weight": 0}, id="b")
    assert check_data([one, two]).status == 0
    assert [f.kind for f in check_data([one, one | {"id": "c"}]).findings] == ["duplicate"] and check_data(
        [one, one | {"id": "c"}]
    ).status == 1
