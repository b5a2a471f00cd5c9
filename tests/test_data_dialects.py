"""Every dialect both ways: what is written reads back as the same conversation."""

import itertools
import json
from io import BytesIO

import pytest
from PIL import Image

from vlm_lora_lab.data.dialects import convert, to_record
from vlm_lora_lab.data.files import Inline, Rows
from vlm_lora_lab.data.records import (
    DIALECTS,
    Access,
    Conversation,
    Conversations,
    Message,
    RecordError,
    ask,
    dialect_of,
    parse_record,
    read_conversations,
)
from vlm_lora_lab.errors import InputError

st = pytest.importorskip("hypothesis.strategies")
from hypothesis import HealthCheck, given, settings  # noqa: E402

PAIRS = list(itertools.product(DIALECTS, repeat=2))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i in range(6):
        Image.new("L", (8, 8), i).save(root / f"{i}.png")
    return root


words = st.text(st.characters(codec="utf-8", exclude_characters="<>\x00"), min_size=1, max_size=12).filter(
    lambda t: t.strip()
)
questions = st.lists(
    words | st.just("<image>") | st.sampled_from(["\n", " ", "\n\n", "<ref>x</ref>", "a < b"]), min_size=1, max_size=6
).map("".join)


@st.composite
def talks(draw):
    turns, messages = draw(st.integers(1, 4)), []
    if draw(st.booleans()):
        messages.append(Message("system", draw(words)))
    for _ in range(turns):
        messages += [Message("user", draw(questions)), Message("assistant", draw(words))]
    return tuple(messages)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(
    messages=talks(), name=st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), pair=st.sampled_from(PAIRS)
)
def test_round_trips_between_all_dialects(root, messages, name, pair):
    mentioned = sum(m.content.count("<image>") for m in messages)
    c = Conversation(name, messages, tuple(root / f"{i % 6}.png" for i in range(mentioned)))
    for dialect in pair:  # from the first dialect to the second
        c2 = parse_record(json.loads(json.dumps(to_record(c, dialect, root))), Access(root))
        assert (c2.id, c2.messages, c2.images) == (c.id, c.messages, c.images)
        c = c2


@pytest.mark.parametrize("first, second", PAIRS)
def test_files_of_every_pair(root, tmp_path, first, second):
    talk = Conversation(
        "t",
        (
            Message("system", "s"),
            Message("user", "<image>\n<image>\nWhich?"),
            Message("assistant", "a"),
            Message("user", "<image>\n?"),
            Message("assistant", "b"),
        ),
        tuple(root / f"{i}.png" for i in range(3)),
    )
    plain = ask("1 + 1?", "2", id="p")
    (root / "out").mkdir(exist_ok=True)
    for suffix in ("json", "jsonl"):
        one, two = root / "out" / f"{first}-{second}-1.{suffix}", root / f"{first}-{second}-2.{suffix}"
        assert convert([talk, plain], one, first, root) == 2  # pictures lie outside the new file's folder
        with pytest.raises(InputError, match="leads out"):
            read_conversations(one)
        assert convert(Conversations(Rows(one), Access(root / "out", allow_outside=True)), two, second) == 2
        for made, want in zip(read_conversations(two), (talk, plain), strict=True):
            assert (made.id, made.messages, made.images) == (want.id, want.messages, want.images)
        assert all(dialect_of(r) == second for r in Rows(two))


def test_writing_is_all_or_nothing(root, tmp_path):
    bad = [ask("x", "y"), ask("<image>", "y", Image.new("L", (4, 4)))]
    with pytest.raises(InputError, match="no name"):
        convert(bad, tmp_path / "d.json", "llava")
    assert not list(tmp_path.iterdir())
    for target, found in ((tmp_path / "d.txt", "ends in"), (root / "0.png", "ends in")):
        with pytest.raises(InputError, match=found):
            convert([], target, "llava")
    convert([ask("x", "y")], tmp_path / "d.json", "llava")
    with pytest.raises(InputError, match="exists"):
        convert([ask("x", "y")], tmp_path / "d.json", "llava")
    with pytest.raises(InputError, match="klingon"):
        to_record(ask("x", "y"), "klingon")
    with pytest.raises(InputError, match="Qwen-VL would read"):
        to_record(ask("what is <img>?", "a tag"), "qwenvl")


@pytest.mark.parametrize(
    "record, want",
    [
        (
            {
                "conversations": [
                    {"from": "user", "value": "Picture 1: <img>0.png</img>\nPicture 2: <img>1.png</img>\nSame?"},
                    {"from": "assistant", "value": "no"},
                ]
            },
            ("Picture 1: <image>\nPicture 2: <image>\nSame?", ["0.png", "1.png"]),
        ),
        (
            {
                "image": ["0.png", "1.png"],
                "conversations": [{"from": "human", "value": "<image><image>Same?"}, {"from": "gpt", "value": "no"}],
            },
            ("<image><image>Same?", ["0.png", "1.png"]),
        ),
        (
            {
                "system": "Be brief.",
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
            },
            ("hi", []),
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}]},
                    {"role": "assistant", "content": "b"},
                ],
                "images": ["1.png", "0.png"],
            },
            ("<image>\na\n<image>", ["1.png", "0.png"]),
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "image": "2.png"}, {"type": "text", "text": "a", "image": None}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
                ]
            },
            ("<image>\na", ["2.png"]),
        ),
        (
            {
                "messages": [{"role": "user", "content": "<image>a"}, {"role": "assistant", "content": "b"}],
                "images": [{"bytes": None, "path": "3.png"}],
            },
            ("<image>a", ["3.png"]),
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": "0.png"}],
                    },
                    {"role": "assistant", "content": "b"},
                ]
            },
            ("a\n<image>", ["0.png"]),
        ),
        (
            {
                "image": {"<image>": "0.png"},
                "conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            },
            ("<image>\na", ["0.png"]),
        ),
    ],
)
def test_records_as_people_have_them(record, want, root):
    c = parse_record(record, Access(root))
    first = next(m for m in c.messages if m.role == "user")
    assert (first.content, [p.name for p in c.images]) == want
    assert (c.messages[0].role == "system") == ("system" in record)


@pytest.mark.parametrize(
    "record, found",
    [
        ({"messages": [{"role": "user", "content": "a"}], "conversations": [1]}, "both"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "its text is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "<image>"}]}]}, "part of its own"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.png", "url": "1.png"}]}]},
            "several pictures",
        ),
        ({"messages": [{"role": "user", "content": ["a"]}]}, "expected a part"),
        (
            {"conversations": [{"from": "user", "value": "<img>0.png"}, {"from": "assistant", "value": "x"}]},
            "<img>path</img>",
        ),
        (
            {"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "<img>0.png</img>"}]},
            "assistant message contains",
        ),
        (
            {
                "image": "0.png",
                "images": ["1.png"],
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            },
            "both image and images",
        ),
        (
            {
                "image": {"<img>": "0.png"},
                "conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            },
            "no placeholder",
        ),
        (
            {
                "conversations": [
                    {"role": "system", "content": "<image>"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                ],
                "image": "0.png",
            },
            "system message contains",
        ),
        (
            {"conversations": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            "'assistant' is due",
        ),
        (
            {
                "image": [0],
                "conversations": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "b"}],
            },
            "expected a path",
        ),
        (
            {"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 501},
            "limit is 1000",
        ),
        (
            {
                "image": ["0.png"] * 257,
                "conversations": [{"role": "user", "content": "<image>" * 257}, {"role": "assistant", "content": "b"}],
            },
            "limit is 256",
        ),
    ],
)
def test_records_that_cannot_mean_what_they_say(record, found, root):
    with pytest.raises(RecordError, match=found) as e:
        parse_record(record, Access(root), "d.json, record 7", 7)
    assert "d.json, record 7 (id 7)" in str(e.value) and e.value.kind and e.value.id in ("", "7")


def test_pictures_in_memory_stay_there(root):
    file = BytesIO()
    Image.new("RGB", (4, 2), "red").save(file, "PNG")
    c = ask("<image>\n?", "x", Image.new("L", (4, 4)), id="m")
    assert parse_record(to_record(c, "hf"), Access(root)).images[0] is c.images[0]
    c = ask("<image>\n?", "x", Inline(file.getvalue()), id="m")
    assert parse_record(to_record(c, "hf"), Access(root)).images == c.images
    with pytest.raises(InputError, match="in memory"):
        to_record(c, "llava")
    inline = ask("<image>\n?", "x", Inline("data:image/png;base64,AAAA"), id="m")
    for dialect in DIALECTS:
        assert parse_record(json.loads(json.dumps(to_record(inline, dialect))), Access(root)).images == inline.images


def test_a_dataset_of_hugging_face(root):
    datasets = pytest.importorskip("datasets")
    rows = [
        to_record(ask("<image>\nWhat?", "a", root / "1.png", id="1"), "hf", root),
        to_record(ask("1?", "2", id="2"), "hf"),
    ]
    table = datasets.Dataset.from_list(rows)
    found = Conversations(table, Access(root), "table")
    assert (
        [c.question for c in found] == ["What?", "1?"]
        and [len(c.images) for c in found] == [1, 0]
        and found[0].source == "table, record 0 (id 1)"
    )
    decoded = datasets.Dataset.from_list(
        [r | {"images": [str(root / i) for i in r["images"]]} for r in rows]
    ).cast_column("images", datasets.Sequence(datasets.Image()))
    assert Conversations(decoded, Access(root))[0].images[0].size == (8, 8)
