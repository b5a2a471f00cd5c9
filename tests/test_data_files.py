"""Reading strangers' files: records one at a time, limits, paths, and the network that is not touched."""

import http.server
import json
import os
import random
import subprocess
import sys
import threading
from io import BytesIO

import pytest
from PIL import Image

from vlm_lora_lab.data.files import Inline, Limits, Remote, Rows, find_picture, parse_json
from vlm_lora_lab.data.records import Conversations, read_conversations
from vlm_lora_lab.data.slicing import load_image
from vlm_lora_lab.errors import InputError


def values(path, **kwargs):
    rows = Rows(path, **kwargs)
    assert rows.broken is None
    return [rows[i] for i in range(len(rows))]


@pytest.mark.parametrize("indent", [None, 0, 3])
@pytest.mark.parametrize("seed", range(6))
def test_rows_are_what_json_reads(tmp_path, seed, indent):
    rng = random.Random(seed)

    def text():
        return "".join(rng.choice('abc "\\\n\t[]{},:é猫🙂\u2028') for _ in range(rng.choice([0, 3, 40, 5000])))

    made = [
        {"id": i, "a": text(), "b": [text(), {"c": rng.random(), "d": None}]} for i in range(rng.choice([1, 2, 300]))
    ]
    for ascii_ in (True, False):
        (tmp_path / "d.json").write_text(
            ("\ufeff" if seed % 2 else "") + json.dumps(made, indent=indent, ensure_ascii=ascii_), encoding="utf-8"
        )
        (tmp_path / "d.jsonl").write_text(
            "\n\n".join(json.dumps(r, ensure_ascii=ascii_) for r in made), encoding="utf-8"
        )
        assert values(tmp_path / "d.json") == values(tmp_path / "d.jsonl") == made
        lines = (tmp_path / "d.jsonl").read_bytes().split(b"\n")
        rows = Rows(tmp_path / "d.jsonl")
        assert all(lines[rows.lines[i] - 1] == rows.raw(i).rstrip(b"\n") for i in range(len(rows)))
        rows = Rows(tmp_path / "d.json")
        whole = (tmp_path / "d.json").read_bytes()
        assert all(whole[: rows.starts[i]].count(b"\n") == rows.lines[i] - 1 for i in range(len(rows)))


def test_scalars_and_windows(tmp_path):
    made = [1, 12345678901234567890, "x" * 300_000, None, True, -1.5e-7, [], {}, "y" * 700_000, 42]
    (tmp_path / "d.json").write_text(" [ " + " , ".join(map(json.dumps, made)) + " ] \n")
    assert values(tmp_path / "d.json") == made
    for cut in range(262_140, 262_148):  # a number and a string across the border of the first piece
        (tmp_path / "d.json").write_text("[" + " " * (cut - 4) + '12345, "é🙂"]', encoding="utf-8")
        assert values(tmp_path / "d.json") == [12345, "é🙂"]


@pytest.mark.parametrize(
    "text", ["[1, 2", "[1 2]", "[1,]", "[1,,2]", "[1] 2", "[", "[1, {]", '["a', "[1]]", "[nul]", "[,1]"]
)
def test_a_broken_list_ends_where_it_breaks(tmp_path, text):
    (tmp_path / "d.json").write_text(text)
    rows = Rows(tmp_path / "d.json")
    assert (
        rows.broken is not None
        and "d.json, line 1, column" in str(rows.broken)
        and all(rows[i] == i + 1 or text == '["a' for i in range(len(rows)))
    )
    with pytest.raises(InputError, match="d.json"):
        Conversations.open(tmp_path / "d.json")


@pytest.mark.parametrize(
    "content, found",
    [
        (b"", "no record"),
        (b"  \n ", "no record"),
        (b"[]", "no record"),
        (b"\xff\xfe[\x00]\x00", "UTF-8"),
        (b'{"a": {"b":\n 1}}\n', "one object"),
        (b'[{"a": "\xe9"}]', "UTF-8"),
    ],
)
def test_files_that_are_no_lists(tmp_path, content, found):
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(InputError, match=found):
        read_conversations(tmp_path / "d.json")


def test_limits_of_a_record(tmp_path):
    small = Limits(record_bytes=1000, depth=5)
    for text, found in (
        (b'"' + b"x" * 1000 + b'"', "bytes"),
        (b"[" * 7 + b"]" * 7, "deep"),
        (b"[" * 100_000, "deep|bytes"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"1" * 999 + b" ", ""),
        (b"\xff", "UTF-8"),
        (b"{", "JSON"),
    ):
        if found:
            with pytest.raises(InputError, match=found):
                parse_json(text, "here", small)
        else:
            assert parse_json(text, "here", small) == int("1" * 999)
    with pytest.raises(InputError, match="not valid JSON"):
        parse_json(b"1" * 5000, "here")  # more digits than Python turns into a number
    (tmp_path / "d.jsonl").write_bytes(b'"' + b"x" * 5_000_000 + b'"\n"fine"\n' + b" " * 3000 + b"\n7")
    rows = Rows(tmp_path / "d.jsonl", small)
    assert len(rows) == 4 and rows[1] == "fine" and rows[3] == 7 and len(rows.raw(0)) == 1001
    with pytest.raises(InputError, match="no end within"):
        (tmp_path / "d.json").write_bytes(b'["' + b"x" * 5_000_000)
        raise Rows(tmp_path / "d.json", small).broken


def test_memory_is_flat_over_a_hundred_thousand_records(tmp_path):
    record = (
        '{"id": "%06d", "conversations": [{"role": "user", "content": "What is it?"}, {"role": "assistant", '
        '"content": "a red circle"}]}'
    )
    (tmp_path / "long.json").write_text("[" + ",\n".join(record % i for i in range(100_000)) + "]")
    code = f"""
import tracemalloc
from vlm_lora_lab.data.records import Conversations
tracemalloc.start()
c = Conversations.open({str(tmp_path / "long.json")!r})
index = tracemalloc.get_traced_memory()[1]
tracemalloc.reset_peak()
for i in range(0, 100_000, 10): c[i]
print(len(c), index, tracemalloc.get_traced_memory()[1])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    count, index, reading = map(int, out)
    assert count == 100_000 and index < 8 * 2**20 and reading < 4 * 2**20  # all at once, they are more than 60 MiB


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "data"
    (root / "deep").mkdir(parents=True)
    for path in (root / "a.png", root / "deep" / "b.png", tmp_path / "secret.png"):
        Image.new("L", (4, 4)).save(path)
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "inner.png").symlink_to(root / "a.png")
    (root / "door").symlink_to(tmp_path)
    os.mkfifo(root / "pipe.png")
    return root


@pytest.mark.parametrize(
    "reference", ["a.png", "deep/b.png", "deep/../a.png", "inner.png", "file://a.png", "{root}/a.png", "./deep//b.png"]
)
def test_paths_inside(root, reference):
    found = find_picture(reference.format(root=root), root)
    assert load_image(found).size == (4, 4)


@pytest.mark.parametrize(
    "reference",
    [
        "../secret.png",
        "link.png",
        "door/secret.png",
        "{root}/../secret.png",
        "/etc/passwd",
        "file:///etc/passwd",
        "deep/../../secret.png",
        "/nowhere/at/all.png",
    ],
)
def test_paths_outside(root, reference):
    reference = reference.format(root=root)
    with pytest.raises(InputError, match="leads out"):
        find_picture(reference, root)
    if "nowhere" not in reference:
        assert find_picture(reference, root, allow_outside=True).is_file()


@pytest.mark.parametrize(
    "reference",
    ["none.png", "", ".", "deep", "pipe.png", "x" * 5000, "a\0.png", "a.png/b", "C:\\a.png", "deep/", "ftp://x/y.png"],
)
def test_paths_to_nothing(root, reference):
    with pytest.raises(InputError, match="no picture"):
        find_picture(reference, root)


def test_a_root_that_is_a_link_or_relative(root, tmp_path, monkeypatch):
    (tmp_path / "alias").symlink_to(root)
    assert find_picture("a.png", tmp_path / "alias").is_file()
    monkeypatch.chdir(root)
    assert find_picture("deep/b.png", ".").is_file()
    for outside in ("../secret.png", "deep/../../secret.png", "door/data/../secret.png"):
        with pytest.raises(InputError, match="leads out"):
            find_picture(outside, ".")
    monkeypatch.chdir(root / "deep")  # what "." means is not remembered
    assert find_picture("b.png", ".").is_file() and find_picture("a.png", "..").is_file()
    with pytest.raises(InputError, match="leads out"):
        find_picture("../a.png", ".")


@pytest.fixture
def server():
    picture = BytesIO()
    Image.new("RGB", (6, 3), "red").save(picture, "PNG")

    class Handler(http.server.BaseHTTPRequestHandler):
        asked = []

        def do_GET(self):
            self.asked.append(self.path)
            if self.path == "/to-file":
                self.send_response(302)
                self.send_header("Location", "file:///etc/passwd")
                self.end_headers()
                return
            self.send_response(200 if self.path in ("/a.png", "/big.png") else 404)
            self.end_headers()
            self.wfile.write(picture.getvalue() if self.path == "/a.png" else b"x" * 5000)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", Handler.asked
        httpd.shutdown()


def test_nothing_is_fetched_unless_the_user_says_so(server, tmp_path):
    address, asked = server
    record = {
        "image": f"{address}/a.png",
        "conversations": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "red"}],
    }
    (tmp_path / "d.json").write_text(json.dumps([record]))
    with pytest.raises(InputError, match="--allow-urls"):
        read_conversations(tmp_path / "d.json")
    [c] = read_conversations(tmp_path / "d.json", allow_urls=True)
    assert asked == [] and isinstance(c.images[0], Remote)
    assert load_image(c.images[0]).getpixel((0, 0)) == (255, 0, 0) and asked == ["/a.png"]


@pytest.mark.parametrize(
    "path, found", [("/none.png", "404"), ("/big.png", "larger than"), ("/to-file", "cannot be fetched")]
)
def test_fetching_has_limits(server, path, found):
    with pytest.raises(InputError, match=found):
        load_image(Remote(server[0] + path), "a record", Limits(file_bytes=4000))


def test_what_stands_in_the_record_has_limits():
    with pytest.raises(InputError, match="characters"):
        load_image(Inline("data:image/png;base64," + "A" * 100), "a record", Limits(file_bytes=40))
    assert "A" * 20 not in repr(Inline("data:image/png;base64," + "A" * 100))
