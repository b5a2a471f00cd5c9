"""What people give as data that is no JSON: each kind of file is named in one message, by every command, with what
makes JSON of it."""

import bz2
import csv
import gzip
import json
import lzma
import os
import pickle
import shlex
import sqlite3
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import yaml
from PIL import Image

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.files import Rows, find_picture
from vlm_lora_lab.errors import InputError, encoding_of

RECORDS = [
    {
        "id": str(i),
        "image": f"pics/{i}.png",
        "conversations": [
            {"role": "user", "content": "<image>\nWhat is this?"},
            {"role": "assistant", "content": f"a cat, or {i} cats"},
        ],
    }
    for i in range(5)
]
TEXT = json.dumps(RECORDS, ensure_ascii=False)
LINES = "".join(json.dumps(r) + "\n" for r in RECORDS)


def table(path, delimiter):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["image", "question", "answer"])
        writer.writerows(
            [[r["image"], r["conversations"][0]["content"], r["conversations"][1]["content"]] for r in RECORDS]
        )


def database(path):
    with sqlite3.connect(path) as base:
        base.execute("create table pairs (image text, answer text)")
    base.close()


def zipped(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "[]")


def tarred(path, mode="w"):
    (path.parent / "inside.json").write_text(TEXT)
    with tarfile.open(path, mode) as archive:
        archive.add(path.parent / "inside.json", "train.json")
    (path.parent / "inside.json").unlink()


MAKE = {
    "train.csv": (lambda p: table(p, ","), "a table (CSV)"),
    "train.json": (lambda p: table(p, ","), "a table (CSV)"),
    "train.tsv": (lambda p: table(p, "\t"), "a table (TSV)"),
    "german.txt": (lambda p: table(p, ";"), "a table (CSV)"),
    "train.xlsx": (
        lambda p: zipped(p, "[Content_Types].xml", "xl/workbook.xml", "xl/worksheets/sheet1.xml"),
        "a table (Excel)",
    ),
    "old.xls": (lambda p: p.write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)), "a table (Excel)"),
    "train.ods": (lambda p: zipped(p, "mimetype", "content.xml"), "a table (OpenDocument)"),
    "train.parquet": (lambda p: p.write_bytes(b"PAR1" + bytes(range(256)) + b"PAR1"), "a table (Parquet)"),
    "train.feather": (lambda p: p.write_bytes(b"ARROW1\0\0" + bytes(99)), "a table (Feather)"),
    "data-00000-of-00001.arrow": (lambda p: p.write_bytes(struct.pack("<iI", -1, 400) + bytes(400)), "an Arrow stream"),
    "train.db": (database, "a table (SQLite)"),
    "train.pkl": (lambda p: p.write_bytes(pickle.dumps(RECORDS)), "a table (pickle)"),
    "train.npy": (lambda p: np.save(p, np.zeros(3)), "a NumPy array"),
    "train.json.gz": (lambda p: p.write_bytes(gzip.compress(TEXT.encode())), "a gzip archive"),
    "train.jsonl": (lambda p: p.write_bytes(bz2.compress(TEXT.encode())), "a bzip2 archive"),
    "train.xz": (lambda p: p.write_bytes(lzma.compress(TEXT.encode())), "an xz archive"),
    "train.zst": (lambda p: p.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(99)), "a Zstandard archive"),
    "train.zip": (lambda p: zipped(p, "a/train.json", "a/0.png"), "a zip archive of 2 files, such as a/train.json"),
    "cut.zip": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(30)), "a damaged zip archive"),
    "train.tar": (tarred, "a tar archive"),
    "train.tar.gz": (lambda p: tarred(p, "w:gz"), "a tar archive"),
    "train.tgz": (lambda p: tarred(p, "w:gz"), "a tar archive"),
    "cat.png": (lambda p: Image.new("RGB", (9, 9)).save(p), "a picture"),
    "cat.jpg": (lambda p: Image.new("RGB", (9, 9)).save(p), "a picture"),
    "paper.pdf": (lambda p: p.write_bytes(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"), "a PDF document"),
    "page.json": (lambda p: p.write_text("<!DOCTYPE html>\n<html><body>Not found</body></html>"), "HTML or XML"),
    "pointer.json": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
        "a Git LFS pointer",
    ),
    "repr.json": (lambda p: p.write_text(repr(RECORDS)), "Python's way to write a dictionary"),
    "repr.jsonl": (lambda p: p.write_text("\n".join(map(repr, RECORDS))), "Python's way to write a dictionary"),
    "train.yaml": (lambda p: p.write_text(yaml.safe_dump(RECORDS)), "YAML"),
    "job.json": (lambda p: p.write_text("data: train.json\noutput: runs/first\n"), "YAML"),
    "notes.txt": (lambda p: p.write_text("Labels of 2024\n\nsee folder\n"), "its first line is 'Labels of 2024'"),
    "commas.json": (lambda p: p.write_text(",\n".join(json.dumps(r) for r in RECORDS)), "commas between them"),
    "pretty.jsonl": (
        lambda p: p.write_text("\n".join(json.dumps(r, indent=1) for r in RECORDS)),
        "records of several lines follow one another",
    ),
    "one.json": (lambda p: p.write_text(json.dumps(RECORDS[0], indent=1)), "one record over several lines"),
    "random.bin": (lambda p: p.write_bytes(np.random.default_rng(0).bytes(5000)), "looks like no other text"),
}


@pytest.mark.parametrize("name", MAKE)
def test_each_kind_is_named_once(name, tmp_path):
    make, said = MAKE[name]
    make(tmp_path / name)
    with pytest.raises(InputError) as e:
        Rows(tmp_path / name)
    message = str(e.value)
    assert (
        said in message
        and message.startswith(str(tmp_path / name))
        and e.value.remedy
        and "\n" not in message
        and len(message) < 600 + len(str(tmp_path))
    ), message
    assert "{" not in e.value.remedy.replace("{…}", ""), "a blank that was not filled"


@pytest.mark.parametrize("name", ["train.csv", "train.xlsx", "train.json.gz"])
def test_every_command_says_so(name, tmp_path, capsys):
    make, said = MAKE[name]
    make(tmp_path / name)
    (tmp_path / "good.json").write_text(LINES)
    path = str(tmp_path / name)
    for argv in (
        ["check-data", path],
        ["check-data", str(tmp_path / "good.json"), "--against", path],
        ["doctor", "--data", path],
        ["train", "--data", path, "--output", str(tmp_path / "out")],
        ["evaluate", "lab", "--data", path],
    ):
        assert main(argv) == 2, argv
        told = capsys.readouterr()
        assert (told.out + told.err).count(said) == 1, (argv, told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["repr.jsonl", "train.yaml", "data.json", "keyed.json"])
def test_what_it_says_to_type_works(name, tmp_path):
    path = tmp_path / name
    if name in MAKE:
        MAKE[name][0](path)
    else:
        keyed = {"version": 2, "data": RECORDS} if name == "data.json" else {r["id"]: r for r in RECORDS}
        path.write_text(json.dumps(keyed, indent=1))
    with pytest.raises(InputError) as e:
        Rows(path)
    command = e.value.remedy[e.value.remedy.index("python -c") :].replace("python", shlex.quote(sys.executable), 1)
    before = set(tmp_path.iterdir())
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    (made,) = set(tmp_path.iterdir()) - before
    rows = Rows(made)
    assert [rows[i] for i in range(len(rows))] == RECORDS


@pytest.mark.parametrize(
    "value, key",
    [
        ({"data": RECORDS}, "the list is under 'data'"),
        ({"version": 1, "license": "CC0", "info": {}, "train": RECORDS}, "the list is under 'train'"),
        ({"train": RECORDS, "test": RECORDS}, "lists are under 'train' and 'test'"),
        ({r["id"]: r for r in RECORDS}, "the records are its values"),
        ({"a": 1, "b": 2}, "the keys a, b"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_under_a_key(value, key, indent, tmp_path):
    (tmp_path / "d.json").write_text(json.dumps(value, indent=indent))
    if indent is None and key in ("the records are its values", "the keys a, b"):
        assert len(Rows(tmp_path / "d.json")) == 1, "one line is one record, of a dialect that is not known"
        return
    with pytest.raises(InputError, match="one object with the keys") as e:
        Rows(tmp_path / "d.json")
    assert key in str(e.value)


def test_a_list_under_a_key_may_be_long(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps({"data": [RECORDS[0] | {"id": "x" * 1000}] * 20_000}, indent=1))
    assert (tmp_path / "d.json").stat().st_size > 2**24
    with pytest.raises(InputError, match="the list is under 'data'"):
        Rows(tmp_path / "d.json")


@pytest.mark.parametrize(
    "text",
    [
        LINES,
        TEXT,
        json.dumps(RECORDS, indent=2),
        json.dumps(RECORDS[0]),
        "\ufeff" + TEXT,
        "\n\n " + LINES,
        LINES.replace("\n", "\r\n"),
        '{"conversations": [], "data": [{"a": 1}]}',
        '{"id": 1, "image": "x", "qa": [{"q": 1}]}',
    ],
)
def test_what_is_json_is_left_alone(text, tmp_path):
    for name in ("d.json", "d.csv", "d.yaml", "d"):
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        rows = Rows(tmp_path / name)
        assert rows.broken is None and all(isinstance(rows[i], dict) for i in range(len(rows)))


CHINESE = [
    {
        "id": str(i),
        "conversations": [
            {"role": "user", "content": f"图片{i}里有什么？请描述一下。"},
            {"role": "assistant", "content": "一只猫坐在窗台上，看着外面。"},
        ],
    }
    for i in range(4)
]
FRENCH = [
    {
        "id": str(i),
        "conversations": [
            {"role": "user", "content": "Où est le château ?"},
            {"role": "assistant", "content": "À côté de la forêt."},
        ],
    }
    for i in range(4)
]


@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
@pytest.mark.parametrize(
    "records, encoding, said",
    [
        (CHINESE, "gbk", "GBK (GB18030)"),
        (CHINESE, "utf-16", "UTF-16"),
        (CHINESE, "utf-16-le", "UTF-16LE"),
        (FRENCH, "utf-16-be", "UTF-16BE"),
        (FRENCH, "latin-1", "Latin-1 (Windows-1252)"),
        (FRENCH, "utf-32", "UTF-32"),
    ],
)
def test_an_encoding_is_named_with_what_converts_it(lines, records, encoding, said, tmp_path, capsys):
    text = (
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        if lines
        else json.dumps(records, ensure_ascii=False, indent=1)
    )
    (tmp_path / "d.json").write_bytes(text.encode(encoding))
    assert main(["check-data", str(tmp_path / "d.json")]) == 2
    err = capsys.readouterr().err
    assert (
        err.count("is not UTF-8 text") == 1 and f"is {said}" in err and "iconv -f" in err and "> 'd.utf8.json'" in err
    )
    name = err.partition("iconv -f ")[2].split()[0]
    (tmp_path / "converted.json").write_bytes((tmp_path / "d.json").read_bytes().decode(name).encode())  # as iconv does
    rows = Rows(tmp_path / "converted.json")
    assert [rows[i] for i in range(len(rows))] == records


def test_one_spoilt_line_is_one_spoilt_record(tmp_path):
    lines = [json.dumps(r, ensure_ascii=False).encode() for r in CHINESE]
    lines[2] = lines[2][:60] + b"\xff" + lines[2][60:]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    rows = Rows(tmp_path / "d.jsonl")
    with pytest.raises(InputError, match=r"record 2 \(line 3\): this is not UTF-8 text"):
        rows[2]
    assert [rows[i] for i in (0, 1, 3)] == [CHINESE[i] for i in (0, 1, 3)]


@pytest.mark.parametrize(
    "text, encoding",
    [
        ("你好，世界", "GB18030"),
        ("請描述這張圖片", "BIG5"),
        ("ネコがいます", "SHIFT_JIS"),
        ("이 사진을 설명해 주세요", "EUC-KR"),
        ("Опишите картинку", "WINDOWS-1251"),
        ("Größenänderung", "WINDOWS-1252"),
        ("naïve café", "WINDOWS-1252"),
    ],
)
def test_encodings_are_told_apart(text, encoding):
    assert encoding_of(json.dumps([{"text": text}], ensure_ascii=False).encode(encoding)) == encoding
    assert encoding_of(text.encode()) == "UTF-8" and encoding_of(text.encode("utf-16")) == "UTF-16"


def test_a_folder_is_no_data_file(tmp_path):
    for names, said in (
        ((), "JSON or JSON Lines"),
        (("train.json", "test.json"), "Give one of its files: test.json, train.json"),
        (("data-00000-of-00001.arrow", "state.json"), "datasets.load_from_disk"),
    ):
        for name in names:
            (tmp_path / name).touch()
        with pytest.raises(InputError, match="this is a folder") as e:
            Rows(tmp_path)
        assert said in e.value.remedy


@pytest.mark.skipif(os.sep != "/", reason="a backslash is between folders here")
def test_paths_of_another_machine(tmp_path, capsys):
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics" / "1.png").write_bytes(b"x")
    for reference, said in (
        ("pics\\1.png", "A backslash is part of a name here; write / between folders. Did you mean 'pics/1.png'?"),
        ("C:\\data\\pics\\1.png", "a path of Windows, which no file has here"),
        ("C:\\data\\pics\\1.png", "Did you mean 'pics/1.png'?"),
        ("pics\\2.png", "write / between folders"),
        ("\\\\server\\share\\2.png", "a path of Windows"),
        ("/home/me/data/pics/1.png", "Did you mean 'pics/1.png'?"),
        ("data/pics/1.png", "Did you mean 'pics/1.png'?"),
        ("pics/\new.png", "a tab and a line break"),
        ("nowhere.png", "Paths are relative to"),
        ("../pics/1.png", "--image-root"),
    ):
        with pytest.raises(InputError) as e:
            find_picture(reference, tmp_path)
        assert said in str(e.value), e.value
    assert find_picture("pics/1.png", tmp_path).is_file()
    odd = tmp_path / "a\\b.png"
    odd.write_bytes(b"x")
    assert find_picture("a\\b.png", tmp_path) == odd, "a file may be called so"
    (tmp_path / "d.json").write_text('[{"id": "1", "image": "C:\\pics\\1.png"}]')
    (tmp_path / "d.jsonl").write_text('{"id": "1", "image": "C:\\users\\1.png"}\n')
    for name in ("d.json", "d.jsonl"):
        assert main(["check-data", str(tmp_path / name)]) == 2
        assert "In JSON a backslash is written twice; in paths, write / instead" in capsys.readouterr().out
    for given, said in (
        (f"{tmp_path}\\d.json", f"Did you mean '{tmp_path}/d.json'?"),
        (str(tmp_path / "d.jsno"), "Did you mean 'd.json"),
        ("data\\d.json", "write / between folders"),
    ):
        assert main(["doctor", "--data", given]) == 2
        assert said in " ".join(capsys.readouterr().out.split())
