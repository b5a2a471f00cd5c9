"""A mention in a text, the medium that it stands for, and a dialect that is added from outside."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from vlm_lora_lab.data import dialects, media, records, slicing
from vlm_lora_lab.data.dialects import DIALECTS, Dialect, Turns, register_dialect
from vlm_lora_lab.data.doctor import check_data
from vlm_lora_lab.data.media import MENTION, PLACEHOLDER, REFUSED, Conversation, Message, Picture, kind_of
from vlm_lora_lab.data.media import mentions, numbered, pieces, woven
from vlm_lora_lab.data.records import Access, RecordError, convert, parse_record, read_conversations
from vlm_lora_lab.errors import InputError

PACKAGE = Path(dialects.__file__).parent


@pytest.mark.parametrize("text", ["", "a", MENTION, f"{MENTION}{MENTION}", f"a {MENTION}\nb{MENTION} c"])
def test_a_text_is_its_pieces_and_what_it_mentions(text):
    count = mentions(text)
    assert len(pieces(text)) == count + 1 and MENTION.join(pieces(text)) == text
    assert "".join(woven(text, [MENTION] * count)) == text
    assert PLACEHOLDER.sub(MENTION, "".join(woven(text, map(numbered, range(count))))) == text


def test_an_iterator_of_media_goes_on_with_the_next_text():
    following = iter("abc")
    assert [woven(text, following) for text in (f"{MENTION}?", "none", MENTION * 2)] == [
        ["", "a", "?"],
        ["none"],
        ["", "b", "", "c", ""],
    ]


def test_a_mention_is_spelt_in_one_place():
    "Elsewhere in the data's room, `<image>` is only the bracket that MiniCPM-V writes before a picture's vectors."
    bracket = {"tokens.py": 3, "native.py": 2}
    for path in PACKAGE.glob("*.py"):
        spelt = [line for line in path.read_text(encoding="utf-8").splitlines() if "<image>" in line]
        assert len(spelt) == (1 if path.name == "media.py" else bracket.get(path.name, 0)), (path.name, spelt)


def test_a_picture_has_a_size_and_pixels_and_keeps_neither(tmp_path):
    Image.new("L", (6, 4), 128).save(tmp_path / "a.png")
    messages = (Message("user", f"{MENTION}\n?"), Message("assistant", "x"))
    c = Conversation("c", messages, (tmp_path / "a.png", Image.new("RGB", (3, 2))))
    assert c.media == tuple(map(Picture, c.images)) and {m.mention for m in c.media} == {MENTION}
    assert [m.size() for m in c.media] == [m.pixels().size for m in c.media] == [(6, 4), (3, 2)]
    assert all(m.pixels().mode == "RGB" for m in c.media)
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match="there is no picture"):
        [m.pixels(c.where) for m in c.media]


@pytest.mark.parametrize("kind", REFUSED)
def test_every_kind_that_is_refused_says_what_to_give_instead(kind, tmp_path):
    ending = re.match(r"\w+", REFUSED[kind].endings)[0].removesuffix("x")
    assert kind_of(f"https://x.org/a.{ending}?b=1") == kind_of(f"folder/a.{ending.upper()}") == kind
    assert kind_of("a.png") == kind_of(f"{ending}.png") == ""
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."}]
    with pytest.raises(RecordError, match=f"a[n]? {kind} is given") as e:
        parse_record({"image": f"a.{ending}", "conversations": turns}, Access(tmp_path))
    assert e.value.remedy == REFUSED[kind].instead and e.value.kind == "medium"


def read_quiz(record):
    rows = [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": record["a"]}]
    return Turns(rows, "q", pictures=record.get("shown"), fields=frozenset({"q", "a", "shown"}))


def write_quiz(c, names):
    if len(c.messages) != 2:
        raise InputError("a quiz has one question", c.where)
    return {"q": c.messages[0].content, "a": c.messages[1].content} | ({"shown": names} if names else {})


@pytest.fixture
def quiz():
    register_dialect("quiz", Dialect("Quiz", lambda record: "q" in record, read_quiz, write_quiz))
    yield "quiz"
    del DIALECTS["quiz"]


def test_a_dialect_from_outside_is_read_written_and_examined(quiz, tmp_path):
    Image.new("L", (16, 16), 128).save(tmp_path / "a.png")
    rows = [
        {"q": "What number is this?", "a": "407", "shown": "a.png", "source": "web"},
        {"q": "One and one?", "a": "two", "category": "sums"},
    ]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    first, second = read_conversations(tmp_path / "d.json")
    assert first.messages[0].content == f"{MENTION}\nWhat number is this?" and first.images == (tmp_path / "a.png",)
    assert second.category == "sums" and [u.name for u in first.unread] == ["source"]
    report = check_data(tmp_path / "d.json")
    assert report.status == 0 and report.dialects == {"quiz": 2} and "dialect: Quiz 2" in report.text()
    for name in DIALECTS:  # to every other, and back
        there, back = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.back.json"
        assert convert(tmp_path / "d.json", there, name) == convert(there, back, "quiz") == 2
        assert [c.messages for c in read_conversations(back)] == [first.messages, second.messages]


def test_a_record_of_a_dialect_from_outside_is_checked_like_any_other(quiz, tmp_path):
    for record, said in (
        ({"q": "What?", "a": " "}, "an assistant message is empty"),
        ({"q": f"{MENTION} What?", "a": "x"}, "no such picture"),
        ({"q": "What?", "a": "x", "shown": ["a.mp4"]}, "a video is given"),
        ({"q": "What?", "a": 7}, "expected text, found 7"),
        ({"q": "What?", "a": "x", "video": "a.mp4"}, "a video is given"),
    ):
        with pytest.raises(RecordError, match=said):
            parse_record(record, Access(tmp_path))


def test_a_name_that_is_taken_is_no_new_dialect(quiz):
    for name in ("llava", quiz):
        with pytest.raises(InputError, match="already"):
            register_dialect(name, DIALECTS["hf"])


def test_what_moved_is_found_where_it_stood():
    assert dialects.convert is records.convert and slicing.load_image is media.load_image
    with pytest.raises(AttributeError):
        _ = dialects.nothing_of_this_name
