"""The doctor: every record judged once, with the right reason, whatever is in the file."""

import json
import random
import shutil
from collections import Counter
from html.parser import HTMLParser

import pytest
from PIL import Image

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.batch import Processor
from vlm_lora_lab.data.dialects import to_record
from vlm_lora_lab.data.doctor import SEVERITIES, check_data, look, mutate
from vlm_lora_lab.data.records import (
    DIALECTS,
    Access,
    Conversation,
    Message,
    RecordError,
    parse_record,
    read_conversations,
    samples_folder,
)
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import load_tokenizer
from vlm_lora_lab.models.minicpmv import MiniCPMV26Config

st = pytest.importorskip("hypothesis.strategies")
from hypothesis import HealthCheck, given, settings  # noqa: E402

EXAMPLES, PER_EXAMPLE = 300, 36  # 10,800 mutated records in each run, beside those that hypothesis builds from nothing


@pytest.fixture(scope="module")
def processor():
    tokenizer = load_tokenizer("lab")
    return Processor.of(
        MiniCPMV26Config(
            vocab_size=len(tokenizer),
            query_num=16,
            use_image_id=False,
            vision_config={"patch_size": 8, "image_size": 112},
            slice_config={"scale_resolution": 56, "max_slice_nums": 4},
        ),
        tokenizer,
        400,
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate("abc"):
        Image.new("RGB", (60 + 30 * i, 40), (i * 90, 0, 0)).save(root / f"{name}.png")
    (root / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing else")
    return root


@pytest.fixture(scope="module")
def good(pictures):
    talks = [
        Conversation("one", (Message("user", "<image>\nWhat?"), Message("assistant", "a cat")), (pictures / "a.png",)),
        Conversation(
            "two",
            (
                Message("system", "Be brief."),
                Message("user", "<image>\n<image>\nWhich?"),
                Message("assistant", "the first"),
                Message("user", "And <image> now?"),
                Message("assistant", "<ref>x</ref><box>1</box>"),
            ),
            tuple(pictures / f"{n}.png" for n in "abc"),
        ),
        Conversation("none", (Message("user", "1 + 1?"), Message("assistant", "2"))),
    ]
    return [to_record(c, d, pictures) for c in talks for d in DIALECTS]


def verdicts(report, rows):
    "Every row is judged once: bad with an error of its own, or good; and what the reader says agrees."
    assert report.rows == rows and sum(report.dialects.values()) == rows
    assert all(f.row is None or 0 <= f.row < rows for f in report.findings) and all(
        f.severity in SEVERITIES and f.reason for f in report.findings
    )
    assert len(set(report.bad)) == len(report.bad) and report.to_dict()["good"] + len(report.bad) == rows
    return set(report.bad)


def test_good_records_are_good(good, pictures, processor):
    report = check_data(good, processor, pictures)
    assert not verdicts(report, len(good)) and report.dialects == Counter({d: 3 for d in DIALECTS})
    # they say the same in five dialects
    assert {f.kind for f in report.findings} == {"duplicate", "id"} and report.status == 1
    assert len(report.tokens) == len(good) and report.learned > 0


counted = Counter()


@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
@given(seed=st.integers(0, 2**32), count=st.just(PER_EXAMPLE))
def test_mutated_records_raise_nothing_and_none_is_lost(good, pictures, processor, seed, count):
    rng, records = random.Random(seed), []
    for _ in range(count):
        record = rng.choice(good)
        for _ in range(rng.randrange(1, 5)):
            record = mutate(record, rng)
        records.append(record)
    report = check_data(records, processor, pictures, pictures="header")
    bad, access = verdicts(report, count), Access(pictures)
    for i, record in enumerate(records):
        try:
            conversation = parse_record(record, access)
        except RecordError:
            assert i in bad, record
            continue
        try:
            processor(conversation)
        except InputError:
            assert i in bad, record
        else:
            assert i not in bad, record
    json.dumps(report.to_dict())
    report.text(), report.html()
    counted.update(records=count, bad=len(bad))


def test_enough_records_were_thrown():
    assert counted["records"] >= 10_000 and 0.3 < counted["bad"] / counted["records"] < 0.97


leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["<image>", "user", "assistant", "a.png", "text"])
)
keys = st.sampled_from(
    ["conversations", "messages", "image", "images", "role", "content", "from", "value", "type", "text", "id", "url"]
) | st.text(max_size=4)
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(records=st.lists(st.dictionaries(keys, anything, max_size=5) | anything, min_size=1, max_size=8))
def test_anything_that_json_can_hold(records, pictures, processor):
    verdicts(check_data(records, processor, pictures, pictures="header"), len(records))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(seed=st.integers(0, 2**32))
def test_lines_with_broken_bytes(good, pictures, seed, tmp_path_factory):
    rng, lines = random.Random(seed), []
    for _ in range(12):
        line = bytearray(json.dumps(rng.choice(good)).encode())
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(line))
            line[at : at + rng.randrange(3)] = bytes(
                rng.choice(b'\x00\xff\xc3{}[]",:\\<x') for _ in range(rng.randrange(3))
            )
        lines.append(bytes(line).replace(b"\n", b" ").replace(b"\r", b" "))
    path = tmp_path_factory.mktemp("lines") / "d.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    try:
        report = check_data(path, None, pictures, pictures="none")
    except InputError as e:  # the first line made it look like a list
        assert str(path) in str(e)
        return
    if not path.read_bytes().lstrip().startswith(b"["):
        verdicts(report, sum(bool(line.strip()) for line in lines))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_processes_says_the_same(workers, good, pictures, processor, tmp_path):
    rng = random.Random(5)
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps(mutate(rng.choice(good), rng)) for _ in range(300)))
    reports = [check_data(path, processor, pictures, workers=w).to_dict() for w in (1, workers)]
    for r in reports:
        del r["seconds"]
    assert reports[0] == reports[1] and len(reports[0]["bad"]) > 50


def write(path, *records):
    path.write_text(json.dumps(list(records)))
    return path


def qa(question, answer, **more):
    return {**more, "conversations": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    "record, kind, severity",
    [
        (qa("<image>", "x", image="broken.png"), "picture", "error"),
        (qa("<image>", "x", image="none.png"), "picture", "error"),
        (qa("<image>", "x", image="../a.png"), "picture", "error"),
        (qa("<image>", "x", image="https://example.com/a.png"), "picture", "error"),
        (qa("<image>", "x", image="big.png"), "picture", "error"),
        (qa("<image>", "x", image="tiny.png"), "picture", "warning"),
        (qa("<image>", "x", image="moving.gif"), "picture", "note"),
        (qa("hello", "x " * 900), "tokens", "error"),
        (qa("<|im_start|>", "x"), "tokens", "error"),
        (qa("hello", "x" * 1_000_001), "text", "error"),
        (qa("\ud800", "x"), "text", "error"),
        (qa("hello", " "), "text", "error"),
        (qa("<image>", "x"), "placeholder", "error"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "roles", "error"),
        ({"prompt": "x"}, "dialect", "error"),
        (qa("x", "y", conversation_id=3), None, None),
    ],
)
def test_each_fault_has_its_kind(record, kind, severity, pictures, processor, tmp_path):
    for name in ("a.png", "broken.png"):
        shutil.copy(pictures / name, tmp_path)
    Image.new("1", (9000, 9000)).save(tmp_path / "big.png")
    Image.new("L", (4, 4)).save(tmp_path / "tiny.png")
    Image.new("L", (9, 9)).save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("L", (9, 9), 255)])
    report = check_data(write(tmp_path / "d.json", qa("fine", "yes"), record), processor)
    assert [(f.kind, f.severity, f.row) for f in report.findings] == ([(kind, severity, 1)] if kind else [])
    assert report.status == (SEVERITIES.index(severity) if severity else 0)
    if kind is None:
        assert report.unread == {"conversation_id": 1}


def test_a_truncated_picture_needs_decoding(tmp_path):
    Image.effect_noise((50, 50), 90).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:500])
    path = write(tmp_path / "d.json", qa("<image>", "y", image="x.png"))
    assert [check_data(path, pictures=how).status for how in ("decode", "header", "none")] == [2, 0, 0]
    with pytest.raises(InputError, match="decode, header or none"):
        check_data(path, pictures="perhaps")


def test_turns_that_are_dropped_are_a_warning(processor, tmp_path):
    long = {
        "conversations": [
            {"role": r, "content": c}
            for r, c in (("user", "x " * 400), ("assistant", "one"), ("user", "and?"), ("assistant", "two"))
        ]
    }
    from dataclasses import replace

    path = write(tmp_path / "d.json", long)
    assert check_data(path, processor).status == 2
    [f] = check_data(path, replace(processor, drop=True)).findings
    assert f.severity == "warning" and "first 1 turns" in f.reason


def test_duplicates_contradictions_and_leaks(pictures, tmp_path):
    for name in "abc":
        shutil.copy(pictures / f"{name}.png", tmp_path)
    shutil.copy(pictures / "a.png", tmp_path / "other-name.png")
    a = qa("<image>\nWhat?", "a cat", image="a.png", id="1")
    train = write(
        tmp_path / "train.json",
        a,
        a | {"id": "2", "image": "other-name.png"},
        qa("<image>\nWhat?", "a dog", image="a.png", id="3"),
        qa("<image>\nWhat?", "a cat", image="b.png", id="4"),
        qa("1?", "2", id="4"),
    )
    found = {(f.row, f.kind, f.severity) for f in check_data(train).findings}
    assert found == {(1, "duplicate", "warning"), (2, "contradiction", "warning"), (4, "id", "note")}
    test = write(
        tmp_path / "test.json",
        qa("<image>\nWhat?", "a bird", image="other-name.png"),
        qa("<image>\nHow many?", "1", image="b.png"),
        qa("1?", "2"),
    )
    leaks = {(f.row, f.severity) for f in check_data(train, against=[test]).findings if f.kind == "leak"}
    assert leaks == {(0, "error"), (1, "error"), (2, "error"), (3, "warning"), (4, "error")}
    by_path = {f.row for f in check_data(train, against=[test], pictures="none").findings if f.kind == "leak"}
    assert by_path == {1, 3, 4}  # by their names alone, a.png and its copy differ


def test_a_broken_list_is_read_up_to_there(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([qa("x", "y"), qa("z", "w")])[:-1] + "\n,{oops}]")
    report = check_data(path)
    [f] = report.findings
    assert report.rows == 2 and f.row is None and f.severity == "error" and "line 2" in f.reason and report.status == 2


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], Counter()

    def handle_starttag(self, tag, attrs):
        self.seen[tag] += 1
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_no_record_can_write_into_the_report(tmp_path):
    evil = "<script>alert(1)</script>\x1b[31m\n"
    report = check_data(write(tmp_path / "d.json", {"id": evil, evil: evil}, qa(evil, "", id=evil)))
    page, seen = report.html(), Balanced()
    seen.feed(page)
    assert not seen.open and seen.seen["tr"] == 4 and "script" not in seen.seen and "&lt;script&gt;" in page
    assert "\x1b" not in report.text() and "\x1b" not in page


@pytest.mark.parametrize("how, status", [("good", 0), ("warning", 1), ("error", 2), ("missing", 2)])
@pytest.mark.parametrize("form", ["text", "json", "html"])
def test_the_command(how, status, form, tmp_path, capsys):
    path, record = tmp_path / "d.json", qa("hello", "hi", id="r")
    if how != "missing":
        more = {"warning": [record | {"id": "s"}], "error": [{"id": "bad"}]}
        write(path, record, *more.get(how, []))
    assert main(["check-data", str(path), "--format", form, "--model", "lab", "--workers", "1"]) == status
    out, err = capsys.readouterr()
    if how == "missing":
        assert not out and "no such data file" in err
    elif form == "json":
        assert json.loads(out)["status"] == status
    elif form == "html":
        assert out.startswith("<!doctype html>") and str(path) in out
    else:
        assert "can be trained on" in out and ("r" if how == "good" else "record") in out
    assert main(["check-data", str(path), "--output", str(path)]) == 2  # it exists, or cannot be read


def test_the_samples_of_the_course_are_healthy(processor):
    paths = sorted(samples_folder().rglob("*.json*"))
    assert len(paths) == 4 + len(DIALECTS) - 1
    for path in paths:
        assert check_data(path, processor).status == 0, path
        assert len(read_conversations(path)) > 0
    mixed = [[(c.messages, c.images) for c in read_conversations(p)] for p in paths if p.stem.startswith("mixed")]
    assert len(mixed) == len(DIALECTS) and all(m == mixed[0] for m in mixed)


def test_look_takes_bytes_and_values():
    access = Access(samples_folder())
    record = qa("x", "y", id="r")
    assert (
        look(json.dumps(record).encode(), access) == look(record, access)
        and look(b"{", access).findings[0].kind == "json"
    )
