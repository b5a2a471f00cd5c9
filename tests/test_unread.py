"""Nothing in a record is dropped in silence: other media are refused, marks on answers are obeyed, and every field that nobody reads is named."""

import json

import pytest
from PIL import Image

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.doctor import check_data
from vlm_lora_lab.data.records import Access, RecordError, parse_record


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for name in "ab":
        Image.new("L", (16, 16), 128).save(root / f"{name}.png")
    return root


def talk(question="Which?", answer="The first.", said=None, **more):
    return more | {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer} | (said or {})]}


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
    ({"conversations": [{"from": "user", "value": "Audio 1: <audio>a.flac</audio>\nWhat?"}, {"from": "assistant", "value": "x"}]}, "an audio is given", "conversations[0]"),
    (talk("<|vision_start|><|video_pad|><|vision_end|>What happens?"), "a video is given", "messages[0]"),
    (talk("<|audio_pad|>What?"), "an audio is given", "messages[0]"),
    (talk("<|vision_start|><|image_pad|><|vision_end|>What?"), "contains <|image_pad|>", "messages[0]"),
    (parts({"type": "video", "video": "clip.mp4"}), "a video is given", "messages[0].content[0].video"),
    (parts({"type": "video"}, videos=["clip.mp4"]), "a video is given", "videos"),
    (parts({"type": "video_url", "video_url": {"url": "https://example.com/clip.mp4"}}), "a video is given", "messages[0].content[0].video_url"),
    (parts({"type": "video", "video": ["f1.png", "f2.png"]}), "a video is given", "messages[0].content[0].video"),
    (parts({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}), "an audio is given", "messages[0].content[0]"),
    (parts({"type": "audio_url", "audio_url": {"url": "a.wav"}}), "an audio is given", "messages[0].content[0].audio_url"),
    (parts({"type": "file", "file": {"file_id": "x"}}), "a document is given", "messages[0].content[0]"),
    (parts({"type": "document", "source": "x"}), "a document is given", "messages[0].content[0]"),
    (parts({"type": "image", "image": "clip.mp4"}), "a video is given", "image"),
    (parts({"type": "image_url", "image_url": {"url": "data:video/mp4;base64,AAAA"}}), "a video is given", "image"),
    (shared("<image>\nWhat?", image="report.PDF"), "a document is given", "image"),
    (talk("What?", said={"audio": {"id": "audio_1"}}), "an audio is given", "messages[1].audio"),
    (talk([{"type": "text", "text": "What?", "video": "clip.mp4"}]), "a video is given", "messages[0].content[0].video"),
    (talk([{"type": "text", "text": "What?", "image": "a.png"}]), "has the key 'image', too", "messages[0].content[0]"),
    (talk([{"type": "image", "image": "a.png", "text": "What?"}]), "a picture and a text", "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": "What?", "images": ["a.png"]}, {"role": "assistant", "content": "x"}]}, "beside the text", "messages[0].images"),
    (talk("Where is <ref-object>?", "<bbox>", objects={"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}), "'objects', which is not read", "messages[0]"),
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
    assert "a video is given, and only pictures and text are read" in told and '"images": ["frame1.png", "frame2.png"]' in told
    assert not (tmp_path / "out").exists()
