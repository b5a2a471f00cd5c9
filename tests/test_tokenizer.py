"""Tokenizers and image settings from a checkpoint's files: recorded ids of the original libraries, the libraries
themselves, and bad input."""

import base64
import io
import json
import random
import shutil
import struct
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from vlm_lora_lab.errors import InputError
from vlm_lora_lab.families.base import families, family_named
from vlm_lora_lab.models.load import lab_folder
from vlm_lora_lab.models.tokenizer import (
    QWEN_SPECIAL,
    QWEN_SPLIT,
    check_special_ids,
    check_vocabulary,
    image_settings,
    merges_of,
    read_sentencepiece,
    special_tokens,
    tokenizer_of,
    version_of,
)

RECORDED = Path(__file__).parent / "golden" / "tokenizer"
ORIGINALS = ("minicpmv20", "minicpmv25", "qwenvl")
SPECIAL = {
    "minicpmv20": ["<image>", "</image>", "<unk>", "<slice>", "<s>", "</s>", "<reserved_5>"],
    "minicpmv25": ["<image>", "</image>", "<unk>", "<|eot_id|>", "!"],
    "qwenvl": ["<img>", "</img>", "<imgpad>", "<|im_start|>", "<|im_end|>", "<|extra_7|>"],
}
PIECES = [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\n ",
    "a",
    "the",
    " image",
    "123",
    "٣",
    "'s",
    "'RE",
    "ſ",
    "K",
    "é",
    "e\u0301",
    "\u0338",
    "ﬁ",
    "猫",
    "图里",
    "한",
    "\u1112\u1161\u11ab",
    "💩",
    "👩\u200d🚀",
    "\u00a0",
    "\u3000",
    "\u2028",
    "\u0085",
    "\u200b",
    "\u180e",
    "\ufeff",
    "\x00",
    "\x0b",
    "\x1c",
    "\u202f",
    "▁",
    "▁▁",
    "<",
    ">",
    "|",
    "..",
    "!!",
    "==",
    "\ue000",
    "\U000f0000",
    "\U0010ffff",
]


def random_text(rng, special=()):
    "Words, spaces of all kinds, special tokens, repeated letters, and any code point."
    out = ""
    for _ in range(rng.randint(0, 9)):
        kind, point = rng.random(), rng.randrange(1, 0x30000)
        if kind < 0.62:
            out += rng.choice(PIECES)
        elif kind < 0.75 and special:
            out += rng.choice(special)
        elif kind < 0.9:
            out += "x" if 0xD800 <= point < 0xE000 else chr(point)
        else:
            out += rng.choice("aAbz") * rng.randint(1, 30)
    return out


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def write(folder, **files):
    folder.mkdir(exist_ok=True, parents=True)
    for name, value in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder


def byte_level(special, **kw):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    t.train_from_iterator(["What is in the image? A red cat sits on the mat!! aaaa abab"] * 4, trainer)
    t.add_special_tokens(special)
    return t


@pytest.fixture
def json_folder(tmp_path):
    "A folder like MiniCPM-V 2.6's."
    names = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<unk>",
        "<image>",
        "</image>",
        "<slice>",
        "</slice>",
        "<image_id>",
        "</image_id>",
    ]
    config = {
        "tokenizer_class": "MiniCPMVTokenizerFast",
        "auto_map": {"AutoTokenizer": ["tokenization_minicpmv_fast.MiniCPMVTokenizerFast", None]},
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
    }
    return write(
        tmp_path / "m",
        tokenizer__json=byte_level(names).to_str(),
        tokenizer_config__json=config,
        config__json={"model_type": "minicpmv", "version": 2.6},
    )


# ---- equal to the originals


@pytest.mark.parametrize("name", ORIGINALS)
def test_ids_are_those_that_the_original_made(name):
    cases = json.loads((RECORDED / name / "cases.json").read_text())
    tokenizer = tokenizer_of(RECORDED / name)
    assert len(cases) >= 250 and tokenizer.is_fast
    assert not [c["text"] for c in cases if ids(tokenizer, c["text"]) != c["ids"]]
    both_ways = [c for c in cases if c["decoded"] == c["text"]]
    assert len(both_ways) > 100 and not [c["text"] for c in both_ways if tokenizer.decode(c["ids"]) != c["text"]]


@pytest.mark.parametrize("name", ORIGINALS)
def test_saved_and_read_again_it_is_the_same(name, tmp_path):
    tokenizer = tokenizer_of(RECORDED / name)
    tokenizer.save_pretrained(tmp_path)
    again = tokenizer_of(tmp_path)
    for case in json.loads((RECORDED / name / "cases.json").read_text()):
        assert ids(again, case["text"]) == case["ids"] and again.decode(case["ids"]) == tokenizer.decode(case["ids"])
    assert again("a cat").input_ids == tokenizer("a cat").input_ids
    assert again.get_vocab() == tokenizer.get_vocab() and again.all_special_tokens == tokenizer.all_special_tokens
    assert (
        again.chat_template == tokenizer.chat_template
        and str(RECORDED) not in (tmp_path / "tokenizer_config.json").read_text()
    )


@pytest.mark.parametrize("name", ORIGINALS)
def test_offsets_point_into_the_text(name):
    tokenizer, rng = tokenizer_of(RECORDED / name), random.Random(3)
    for _ in range(200):
        text = " ".join(rng.choices(["a cat", "图里", SPECIAL[name][0], "é!", "  x"], k=6))
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        covered = {i for lo, hi in out.offset_mapping for i in range(lo, hi)}
        assert covered == set(range(len(text)))
        first = [
            text[lo:hi]
            for i, (lo, hi) in zip(out.input_ids, out.offset_mapping)
            if i == tokenizer.convert_tokens_to_ids(SPECIAL[name][0])
        ]
        assert first == [SPECIAL[name][0]] * text.count(SPECIAL[name][0])


def test_random_text_equals_tiktoken():
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken (dev extra) is the independent truth")
    folder = RECORDED / "qwenvl"
    lines = (folder / "qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(a): int(b) for a, b in map(bytes.split, lines)}
    truth = tiktoken.Encoding(
        "x",
        pat_str=QWEN_SPLIT,
        mergeable_ranks=ranks,
        special_tokens={t: len(ranks) + i for i, t in enumerate(QWEN_SPECIAL)},
    )
    tokenizer, rng = tokenizer_of(folder), random.Random(1)
    for _ in range(3000):
        text = random_text(rng, SPECIAL["qwenvl"])
        nfc = unicodedata.normalize("NFC", text)
        assert ids(tokenizer, text) == truth.encode(nfc, allowed_special="all"), ascii(text)
        assert tokenizer.decode(ids(tokenizer, text)) == nfc


def test_a_word_with_a_rank_is_looked_up_before_anything_is_joined(tmp_path):
    "`wxyz` has a rank that joining cannot reach: `xy` goes first and neither `wxy` nor `xyz` is known."
    tokens = [bytes([b]) for b in range(256)] + [b"xy", b"wx", b"yz", b"wxyz"]
    tokenizer = tokenizer_of(
        write(tmp_path, qwen__tiktoken=b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    )
    assert ids(tokenizer, "wxyz") == [259] and ids(tokenizer, "awxyz") == [ord("a"), ord("w"), 256, ord("z")]


def spm(**options):
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece (dev extra) is the independent truth")
    text = [
        "What is in the image? A red cat sits on the mat.",
        "图里有什么？有一只猫。",
        "aaaa aaaaaaa ababab aa",
        "a  b   c    d\n e",
        "naïve café",
    ] * 30
    out = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 500,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "allow_whitespace_only_pieces": True,
        "user_defined_symbols": ["<reserved", "<reserved_5>", "<image>"],  # one begins another
    } | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=out, **settings)
    return out.getvalue(), sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": False, "vocab_size": 300},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"user_defined_symbols": []},
    ],
    ids=["like 2.0", "no bytes", "no prefix", "squeezed", "no symbols"],
)
def test_random_text_equals_sentencepiece(options, tmp_path):
    proto, truth = spm(**options)
    tokenizer, rng = tokenizer_of(write(tmp_path, tokenizer__model=proto)), random.Random(2)
    assert [p for p, *_ in read_sentencepiece(tmp_path / "tokenizer.model").pieces] == [
        truth.id_to_piece(i) for i in range(truth.get_piece_size())
    ]
    symbols = options.get("user_defined_symbols", ["<reserved", "<reserved_5>", "<image>"])
    for _ in range(1500):
        text = random_text(rng, symbols)
        want = truth.encode(text)
        assert ids(tokenizer, text) == want, ascii(text)
        if truth.decode(want) == text:
            assert tokenizer.decode(want) == text, ascii(text)


def test_the_line_of_a_text_keeps_its_spaces():
    tokenizer = tokenizer_of(RECORDED / "minicpmv20")
    for text in ("a\n b", "\n x", " a\n  b", "a<image>b\n c<image> d"):
        assert tokenizer.decode(ids(tokenizer, text)) == text


def test_a_table_of_replacements_is_used_and_said(tmp_path):
    proto, truth = spm(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    with pytest.warns(UserWarning, match="several code points"):
        tokenizer = tokenizer_of(write(tmp_path, tokenizer__model=proto))
    for text in ("ﬁ Ａ cat １", "  What　is\t\tit ", "图里，有什么？", "① ｱｲ ㎏"):
        assert ids(tokenizer, text) == truth.encode(text), text


@pytest.mark.parametrize("case", ["unigram", "whitespace as suffix"])
def test_other_kinds_of_sentencepiece_are_refused(case, tmp_path):
    proto, _ = spm(model_type="unigram", vocab_size=300) if case == "unigram" else spm(treat_whitespace_as_suffix=True)
    with pytest.raises(InputError, match="not BPE" if case == "unigram" else "whitespace"):
        tokenizer_of(write(tmp_path, tokenizer__model=proto))


@pytest.mark.parametrize("name", ["llama3", "minicpm", "qwen"])
def test_recorded_training_texts(golden_root, name, tmp_path):
    "finetune/dataset.py of the original: texts and ids."
    shutil.copy(golden_root / "dataset" / name / "tokenizer.json", tmp_path)
    tokenizer, checked = tokenizer_of(tmp_path), 0
    recorded = json.loads((golden_root / "dataset" / "labels.json").read_text())
    groups = ["qwen", "qwen_v45_template"] if name == "qwen" else [name]
    for case in (c for g in groups for c in recorded["cases"][g].values() if "input_ids" in c):
        text = case["rendered_text"] or case["raw_msg"]
        assert ids(tokenizer, text)[: case["options"]["max_length"]] == case["input_ids"]
        checked += 1
    assert checked >= 8
    assert {t: ids(tokenizer, t) for t in ("<image>", "</slice>", "<unk>")} == {
        t: [recorded["meta"]["special_ids"][name][t]] for t in ("<image>", "</slice>", "<unk>")
    }


def test_templates_write_what_the_original_wrote(golden_root):
    cases, filled = json.loads((golden_root / "dataset" / "labels.json").read_text())["cases"], 0
    for name, folder in (("minicpm", "minicpmv20"), ("qwen", "qwenvl")):
        tokenizer = tokenizer_of(RECORDED / folder)
        for key in ("single_unsliced", "multi_turn_three", "unicode_and_role_words", "leading_and_trailing_spaces"):
            case = cases[name][key]
            messages = [
                m | {"content": m["content"].replace("<image>", "<image>" + "<unk>" * 4 + "</image>")}
                for m in case["conversations"]
            ]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            if name == "minicpm" or key != "leading_and_trailing_spaces":
                assert text == (case["rendered_text"] or case["raw_msg"]), key
                filled += 1
    assert filled == 7
    with pytest.raises(Exception, match="no role but user and assistant"):
        tokenizer_of(RECORDED / "minicpmv20").apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


# ---- which file, and what transformers would have done


def test_equal_to_auto_tokenizer_where_that_is_right(json_folder):
    ours, auto = tokenizer_of(json_folder), AutoTokenizer.from_pretrained(json_folder, trust_remote_code=False)
    lab, lab_auto = tokenizer_of(lab_folder()), AutoTokenizer.from_pretrained(lab_folder(), trust_remote_code=False)
    rng = random.Random(4)
    for _ in range(600):
        text = random_text(rng, ["<image>", "</image>", "<unk>", "<|im_end|>"])
        assert ids(ours, text) == ids(auto, text) and ids(lab, text) == ids(lab_auto, text)
        assert lab.decode(ids(lab, text)) == lab_auto.decode(ids(lab, text))
    for role in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(ours, role) == getattr(auto, role) and getattr(lab, role) == getattr(lab_auto, role)
    assert lab.chat_template == lab_auto.chat_template and set(lab.all_special_tokens) == set(
        lab_auto.all_special_tokens
    )


def test_the_pipeline_of_the_file_is_kept(json_folder):
    made, file = (
        json.loads(tokenizer_of(json_folder).backend_tokenizer.to_str()),
        json.loads((json_folder / "tokenizer.json").read_text()),
    )
    for part in ("normalizer", "pre_tokenizer", "model", "decoder", "added_tokens"):
        assert made[part] == file[part], part


def test_code_in_the_folder_is_not_run(json_folder):
    trap = json_folder / "tokenization_minicpmv_fast.py"
    trap.write_text(f"open({str(json_folder / 'ran')!r}, 'w')\nraise SystemExit")
    tokenizer_of(json_folder)
    assert not (json_folder / "ran").exists()


def test_padding_with_an_ordinary_word_keeps_it_in_answers():
    tokenizer = tokenizer_of(RECORDED / "minicpmv25")
    out = ids(tokenizer, "hello!! <|eot_id|>")
    assert tokenizer.pad_token_id == 0 and out.count(0) == 2
    assert tokenizer.decode(out, skip_special_tokens=True) == "hello!! "


def test_tokenizer_model_wins_where_the_folder_names_a_slow_class(json_folder, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(RECORDED / "minicpmv20", folder)
    shutil.copy(json_folder / "tokenizer.json", folder)
    assert ids(tokenizer_of(folder), "a") == ids(tokenizer_of(RECORDED / "minicpmv20"), "a")
    shutil.copy(json_folder / "tokenizer_config.json", folder)  # now a fast one
    assert ids(tokenizer_of(folder), "a cat") == ids(tokenizer_of(json_folder), "a cat")


@pytest.mark.parametrize("files", ["json", "vocabulary and merges"])
def test_a_family_of_transformers_is_left_to_transformers(files, tmp_path):
    t = byte_level(["<|endoftext|>", "<|im_end|>"])
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write(tmp_path, tokenizer_config__json=config, config__json={"model_type": "qwen2_vl"})
    if files == "json":
        t.save(str(tmp_path / "tokenizer.json"))
    else:
        t.model.save(str(tmp_path))
    tokenizer = tokenizer_of(tmp_path)
    assert type(tokenizer).__name__ == "Qwen2Tokenizer" and tokenizer.is_fast and tokenizer.eos_token == "<|im_end|>"
    assert ids(tokenizer, "A red cat!! <|endoftext|>\n x") == ids(
        AutoTokenizer.from_pretrained(tmp_path), "A red cat!! <|endoftext|>\n x"
    )


# ---- ids


def test_merges_give_what_joining_by_rank_gives():
    def join(word, ranks):
        parts = list(word)
        while known := [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]:
            i = min(known)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    rng = random.Random(5)
    for _ in range(200):
        pieces = dict.fromkeys(
            ["a", "b", *("".join(rng.choices("ab", k=rng.randint(2, 7))) for _ in range(rng.randint(3, 40)))]
        )
        ranks = {p: i for i, p in enumerate(pieces)}
        bpe = Tokenizer(models.BPE(dict(ranks), merges_of(ranks)))
        for word in ("".join(rng.choices("ab", k=rng.randint(1, 24))) for _ in range(40)):
            assert bpe.encode(word).tokens == join(word, ranks)


@pytest.fixture(scope="module")
def published():
    "Tokenizers of the published sizes, with the published special tokens and other words in between."

    def make(version, **changed):
        at = {i: t for t, i in (family_named(version).ids | changed).items()}
        words = Tokenizer(models.WordLevel({at.get(i, f"w{i}"): i for i in range(family_named(version).id_count)}))
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_object=words)

    return make


def test_published_ids_are_as_published():
    "UPSTREAM's table and the files it was read from, written here a second time."
    p = {f.key: f.ids for f in families() if f.ids}
    assert {
        v: (t["<unk>"], t["<image>"], t["</image>"], t["<slice>"], t["</slice>"]) for v, t in p.items() if v != "qwenvl"
    } == {
        "2.0": (0, 101, 102, 111, 112),
        "2.5": (128002, 128010, 128011, 128020, 128021),
        "2.6": (128244, 151646, 151647, 151656, 151657),
        "4.5": (128244, 151669, 151670, 151679, 151680),
    }
    assert (p["2.6"]["<image_id>"], p["4.5"]["<image_id>"], p["4.5"]["<think>"], p["2.5"]["<|eot_id|>"]) == (
        151658,
        151681,
        151667,
        128009,
    )
    assert [
        p["qwenvl"][t] for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>")
    ] == [151643, 151644, 151645, 151646, 151850]
    tail = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>")
    assert [p["qwenvl"][t] for t in tail] == list(range(151851, 151860))


@pytest.mark.parametrize("version", [f.key for f in families() if f.ids])
def test_a_moved_token_is_named(published, version):
    assert check_special_ids(published(version), version) is True
    token = "<imgpad>" if version == "qwenvl" else "</slice>"
    expected = family_named(version).ids[token]
    with pytest.raises(
        InputError,
        match=f"{token} is id {expected - 40000 if version != '2.0' else 400}, and {expected} in the published version "
        f"{version}",
    ):
        check_special_ids(published(version, **{token: expected - 40000 if version != "2.0" else 400}), version)


def test_a_small_or_unpublished_tokenizer_makes_no_claim(json_folder):
    for version in [f.key for f in families() if f.ours]:
        assert check_special_ids(tokenizer_of(json_folder), version) is False
    with pytest.raises(InputError, match=r"no version '3\.0'"):
        check_special_ids(tokenizer_of(json_folder), "3.0")


def test_qwen_vl_at_full_size_has_the_published_ids(tmp_path):
    rng, tokens = random.Random(6), [bytes([b]) for b in range(256)]
    seen = set(tokens)
    while len(tokens) < 151643:
        new = rng.choice(tokens) + rng.choice(tokens[:4096])
        if len(new) < 20 and new not in seen:
            seen.add(new)
            tokens.append(new)
    write(tmp_path, qwen__tiktoken=b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    tokenizer = tokenizer_of(tmp_path)
    assert len(tokenizer) == family_named("qwenvl").id_count and check_special_ids(tokenizer, "qwenvl")
    special = special_tokens(tokenizer, "qwenvl")
    assert (special.image, special.filler, special.stop) == ((151857, 151858), 151859, (151643, 151645))


def test_special_tokens_by_version(json_folder):
    t = tokenizer_of(json_folder)
    s, at = special_tokens(t, "2.6"), t.convert_tokens_to_ids
    assert (
        s.image == (at("<image>"), at("</image>"))
        and s.slice == (at("<slice>"), at("</slice>"))
        and s.image_id == (at("<image_id>"), at("</image_id>"))
    )
    assert s.filler == at("<unk>") and s.turn_end == s.eos == at("<|im_end|>") and s.stop == (s.eos,)
    old = special_tokens(tokenizer_of(RECORDED / "minicpmv20"), "2.0")
    assert (old.image, old.slice, old.image_id, old.filler, old.turn_end) == ((101, 102), (111, 112), None, 0, 2)
    llama = tokenizer_of(RECORDED / "minicpmv25")
    s = special_tokens(llama, "2.5")
    assert s.turn_end == llama.convert_tokens_to_ids("<|eot_id|>") != s.eos and set(s.stop) == {s.turn_end, s.eos}
    with pytest.raises(InputError, match="lacks <image_id>, </image_id>"):
        special_tokens(llama, "4.5")
    with pytest.raises(InputError, match="no version"):
        special_tokens(llama, "2.7")


def test_ids_beyond_the_embedding_are_named(json_folder):
    t = tokenizer_of(json_folder)
    assert check_vocabulary(t, len(t)) is None and check_vocabulary(t, len(t) + 100) is None
    with pytest.raises(InputError, match=rf"</image_id> \(id {len(t) - 1}\)"):
        check_vocabulary(t, len(t) - 1)
    with pytest.raises(InputError, match=f"and {len(t) - 5} more"):
        check_vocabulary(t, 0)


@pytest.mark.parametrize(
    ("config", "version"),
    [
        ({"model_type": "minicpmv", "version": "2.5"}, "2.5"),
        ({"model_type": "minicpmv", "version": 2.6}, "2.6"),
        ({"model_type": "minicpmo"}, "o-2.6"),
        ({"model_type": "minicpmv", "vision_encoder": "vit"}, "2.0"),
        ({"model_type": "qwen", "visual": {}}, "qwenvl"),
        ({"model_type": "qwen"}, None),
        ({"model_type": "minicpmv"}, None),
        ({"model_type": "minicpmv", "version": 3}, None),
        ({}, None),
    ],
)
def test_versions_are_recognised(config, version):
    if version:
        assert version_of(config) == version
    else:
        with pytest.raises(InputError, match="is none of 2.0, 2.5"):
            version_of(config)


# ---- bad input: one sentence, naming the file


def broken(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data(path.read_bytes()))
    return folder


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 6204808\n"


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (b"", "empty"),
        (POINTER, "LFS pointer"),
        (lambda b: b[: len(b) // 2 - 1], "cut short|valid JSON|line|no rank|ranks are not"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "UTF-8|sentencepiece|base64"),
        (b"[1, 2]", "list|sentencepiece|base64"),
        (b"{}", "no 'model'|sentencepiece|base64"),
    ],
    ids=["empty", "pointer", "truncated", "picture", "list", "object"],
)
def test_a_damaged_tokenizer_is_one_sentence(name, damage, said, tmp_path):
    file = {"minicpmv20": "tokenizer.model", "minicpmv25": "tokenizer.json", "qwenvl": "qwen.tiktoken"}[name]
    shutil.copytree(RECORDED / name, tmp_path / "m")
    with pytest.raises(InputError, match=said) as e:
        tokenizer_of(broken(tmp_path / "m", file, damage))
    assert file in str(e.value) and "\n" not in str(e.value) and e.value.remedy


def test_every_cut_of_a_sentencepiece_file_is_an_input_error(tmp_path):
    data, rng = (RECORDED / "minicpmv20" / "tokenizer.model").read_bytes(), random.Random(7)
    for cut in [1, 2, 3, 5, 9, *rng.sample(range(10, len(data) - 200), 40)]:
        (tmp_path / "tokenizer.model").write_bytes(data[:cut])
        with pytest.raises(InputError, match="cut short"):
            read_sentencepiece(tmp_path / "tokenizer.model")
    for _ in range(200):  # noise: an InputError or a readable file, never another error
        (tmp_path / "tokenizer.model").write_bytes(rng.randbytes(rng.randint(1, 60)))
        with pytest.raises(InputError):
            read_sentencepiece(tmp_path / "tokenizer.model")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (lambda b: b.replace(b"IQ== 0\n", b""), "single bytes have no rank"),
        (lambda b: b + b"AAAA 5\n", "ranks are not 0 to"),
        (lambda b: b + b"AAA 700\n", "line 701"),
        (lambda b: b + b"AAAA\n", "line 701"),
        (lambda b: b + b"AAAA x\n", "line 701"),
    ],
    ids=["a byte", "a rank twice", "bad base64", "no rank", "no number"],
)
def test_a_wrong_line_of_ranks_is_named(lines, said, tmp_path):
    shutil.copytree(RECORDED / "qwenvl", tmp_path / "m")
    with pytest.raises(InputError, match=said):
        tokenizer_of(broken(tmp_path / "m", "qwen.tiktoken", lines))


def set_config(folder, **changes):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "DELETE"}))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pad_token": "<pad>"}, "pad_token is '<pad>', which the vocabulary does not have"),
        ({"eos_token": {"content": "<end>"}}, "eos_token is '<end>'"),
        ({"additional_special_tokens": ["<new>"]}, "'<new>'"),
        ({"extra_special_tokens": {"image_token": "<new>"}}, "image_token is '<new>'"),
        (
            {"added_tokens_decoder": {"7": {"content": "<image>", "special": True}}},
            "<image> is id [0-9]+ here and id 7",
        ),
        ({"added_tokens_decoder": {"900": {"content": "<new>"}}}, "<new> is id 3[0-9]+ here and id 900"),
        ({"added_tokens_decoder": {"x": {"content": "<new>"}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": ["<new>"]}, "added_tokens_decoder"),
        ({"bos_token": 5}, "written as 5"),
        ({"chat_template": [1]}, "chat_template"),
        ({"padding_side": "middle"}, "padding_side"),
        ({"tokenizer_class": 5}, "tokenizer_class is 5"),
    ],
)
def test_a_configuration_that_contradicts_the_vocabulary(json_folder, changes, said):
    with pytest.raises(InputError, match=said):
        tokenizer_of(set_config(json_folder, **changes))


def test_added_tokens_json_is_read_and_checked(json_folder):
    size = len(tokenizer_of(json_folder))
    (json_folder / "added_tokens.json").write_text(json.dumps({"<mine>": size}))
    assert ids(tokenizer_of(json_folder), "a<mine>")[-1] == size
    (json_folder / "added_tokens.json").write_text(json.dumps({"<mine>": "7"}))
    with pytest.raises(InputError, match="the id of <mine> is '7'"):
        tokenizer_of(json_folder)
    (json_folder / "added_tokens.json").write_text(json.dumps({"<mine>": size}))
    with pytest.raises(InputError, match=f"id {size} is <mine> here and <other>"):
        tokenizer_of(set_config(json_folder, added_tokens_decoder={str(size): {"content": "<other>"}}))


def test_sentencepiece_ids_must_agree(tmp_path):
    shutil.copytree(RECORDED / "minicpmv20", tmp_path / "m")
    with pytest.raises(InputError, match="<image> is id 101 here and id 99"):
        tokenizer_of(set_config(tmp_path / "m", added_tokens_decoder={"99": {"content": "<image>", "special": True}}))
    with pytest.raises(InputError, match="legacy"):
        tokenizer_of(set_config(tmp_path / "m", legacy=False))
    with pytest.raises(InputError, match="bos_token is '<bos>'"):
        tokenizer_of(set_config(tmp_path / "m", legacy=True, added_tokens_decoder={}, bos_token="<bos>"))


def test_a_file_saved_without_its_pre_tokenizer_is_refused(json_folder):
    spec = json.loads((json_folder / "tokenizer.json").read_text()) | {"pre_tokenizer": None, "decoder": None}
    (json_folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="no pre-tokenizer turns text into bytes"):
        tokenizer_of(json_folder)


def test_folders_without_a_tokenizer(tmp_path, json_folder):
    with pytest.raises(InputError, match="no such folder"):
        tokenizer_of(tmp_path / "none")
    with pytest.raises(InputError, match="no tokenizer in this folder"):
        tokenizer_of(write(tmp_path / "empty"))
    (json_folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="'MiniCPMVTokenizerFast' is not one of transformers"):
        tokenizer_of(json_folder)
    with pytest.raises(InputError, match="transformers cannot read this tokenizer"):
        tokenizer_of(
            write(
                tmp_path / "native",
                tokenizer_config__json={"tokenizer_class": "Qwen2Tokenizer"},
                tokenizer__json='{"model": {"type": "BP',
            )
        )
    with pytest.raises(InputError, match="line 1"):
        tokenizer_of(broken(json_folder, "tokenizer_config.json", b'{"tokenizer_class": "MiniCPM'))


def test_chat_templates_and_roles_come_from_where_they_are(json_folder):
    assert tokenizer_of(json_folder).chat_template is None
    set_config(json_folder, chat_template=[{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}])
    assert tokenizer_of(json_folder).chat_template == {"default": "D", "rag": "R"}
    (json_folder / "chat_template.json").write_text('{"chat_template": "J"}')
    assert tokenizer_of(json_folder).chat_template == "J"
    (json_folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert tokenizer_of(json_folder).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"
    set_config(json_folder, pad_token="DELETE", eos_token="DELETE")
    (json_folder / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": "<unk>", "eos_token": {"content": "<|endoftext|>"}, "bos_token": "<unk>"})
    )
    t = tokenizer_of(json_folder)
    assert (t.pad_token, t.eos_token, t.bos_token) == ("<unk>", "<|endoftext|>", "<|im_start|>")


# ---- image settings

PRE = {
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "norm_mean": [0.5] * 3,
    "norm_std": [0.5] * 3,
    "slice_mode": True,
}
TOWER = {
    "model_type": "minicpmv",
    "patch_size": 14,
    "image_size": 448,
    "vision_config": {"patch_size": 14, "image_size": 980},
    "slice_mode": True,
}
FOLDERS = {
    "2.0 without the file": (
        {
            "model_type": "minicpmv",
            "vision_encoder": "v",
            "query_num": 64,
            "patch_size": 14,
            "max_slice_nums": 9,
            "scale_resolution": 448,
        },
        None,
    ),
    "2.0": (
        {
            "model_type": "minicpmv",
            "vision_encoder": "v",
            "query_num": 64,
            "patch_size": 14,
            "max_slice_nums": 9,
            "scale_resolution": 448,
        },
        PRE | {"image_feature_size": 64},
    ),
    "2.5": (
        TOWER | {"version": "2.5", "query_num": 96, "slice_config": {"max_slice_nums": 9, "patch_size": 14}},
        PRE | {"version": 2.5, "image_feature_size": 96},
    ),
    "2.6": (
        TOWER | {"version": 2.6, "query_num": 64, "use_image_id": True},
        PRE | {"version": 2.6, "image_feature_size": 64, "use_image_id": True},
    ),
    "4.5": (
        TOWER | {"version": 4.5, "query_num": 64},
        PRE | {"version": 2.6, "image_feature_size": 64, "use_image_id": True},
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_published_image_settings(name, tmp_path):
    config, pre = FOLDERS[name]
    s = image_settings(write(tmp_path, config__json=config, **({"preprocessor_config__json": pre} if pre else {})))
    assert (s.kind, s.size, s.patch_size, s.max_slice_nums, s.mean, s.std) == (
        "patches",
        448,
        14,
        9,
        (0.5,) * 3,
        (0.5,) * 3,
    )
    assert s.query_num == (96 if name == "2.5" else 64) and s.use_image_id == (name in ("2.6", "4.5"))


def test_image_settings_of_the_recorded_models(golden_root, tmp_path):
    s = image_settings(lab_folder())
    assert (s.size, s.patch_size, s.max_slice_nums, s.query_num, s.use_image_id) == (56, 8, 1, 16, False)
    config = json.loads((golden_root / "minicpmv26" / "config.json").read_text())
    s = image_settings(write(tmp_path / "26", config__json=config | {"model_type": "minicpmv"}))
    assert (s.query_num, s.patch_size, s.size) == (
        config["query_num"],
        14,
        config.get("slice_config", {}).get("scale_resolution", 448),
    )
    s = image_settings(
        write(
            tmp_path,
            config__json={"model_type": "qwen", "visual": {"image_size": 56, "patch_size": 7, "n_queries": 16}},
        )
    )
    assert (s.kind, s.size, s.patch_size, s.query_num, s.max_slice_nums, s.use_image_id) == (
        "square",
        56,
        7,
        16,
        1,
        False,
    )
    assert s.mean[0] == 0.48145466 and s.std[2] == 0.27577711 and s.resample == "bicubic"


def test_no_slices_when_switched_off(tmp_path):
    config, pre = FOLDERS["2.6"]
    for_all = {"slice_mode": False}
    assert (
        image_settings(
            write(tmp_path, config__json=config | for_all, preprocessor_config__json=pre | for_all)
        ).max_slice_nums
        == 1
    )


@pytest.mark.parametrize(
    ("config", "pre", "field", "value"),
    [
        ({}, {"use_image_id": False}, "use_image_id", False),
        ({"slice_config": {"max_slice_nums": 4}}, {}, "max_slice_nums", 9),
        ({}, {"slice_mode": False}, "max_slice_nums", 1),
        ({"slice_config": {"max_slice_nums": 9}}, {"max_slice_nums": 4}, "max_slice_nums", 4),
        ({"scale_resolution": 336}, {}, "size", 448),
    ],
)
def test_a_choice_follows_the_picture_processors_file_and_is_told(config, pre, field, value, tmp_path):
    base, extra = FOLDERS["2.6"]
    with pytest.warns(UserWarning, match="is contradictory: .*preprocessor_config.json.*The first is used"):
        settings = image_settings(write(tmp_path, config__json=base | config, preprocessor_config__json=extra | pre))
    assert getattr(settings, field) == value


def test_settings_inside_processor_config(tmp_path):
    config, pre = FOLDERS["2.6"]
    assert image_settings(
        write(
            tmp_path,
            config__json=config,
            processor_config__json={"image_processor": pre | {"norm_mean": [0.1, 0.2, 0.3]}},
        )
    ).mean == (0.1, 0.2, 0.3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pre))
    with pytest.raises(
        InputError,
        match=r"norm_mean is \[0.5, 0.5, 0.5\] in preprocessor_config.json and \[0.1, 0.2, 0.3\] in "
        r"processor_config.json",
    ):
        image_settings(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": 3}))
    with pytest.raises(InputError, match="no object"):
        image_settings(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "MiniCPMVProcessor"}))
    assert image_settings(tmp_path).mean == (0.5,) * 3


def test_a_square_of_another_model_is_refused(tmp_path):
    config = {"model_type": "qwen", "visual": {"image_size": 56, "patch_size": 7, "n_queries": 16}}
    for size in ({"height": 56, "width": 56}, 56):
        s = image_settings(
            write(
                tmp_path, config__json=config, preprocessor_config__json={"size": size, "image_mean": [0.1, 0.2, 0.3]}
            )
        )
        assert (s.size, s.mean, s.std[0]) == (56, (0.1, 0.2, 0.3), 0.26862954)
    for pre, said in (
        ({"size": 224}, "image_size is contradictory: 56"),
        ({"size": {"shortest_edge": 56}}, "looks at squares"),
        ({"patch_size": 14}, "patch_size is contradictory"),
        ({"do_center_crop": True}, "do_center_crop is True"),
        ({"size": {"height": 56, "width": 28}}, "looks at squares"),
    ):
        with pytest.raises(InputError, match=said):
            image_settings(write(tmp_path, config__json=config, preprocessor_config__json=pre))


@pytest.mark.parametrize(
    ("config", "pre", "said"),
    [
        (
            {},
            {"image_feature_size": 96},
            "query_num is contradictory: 64 in config.json query_num, 96 in preprocessor_config.json",
        ),
        ({}, {"patch_size": 16}, "patch_size is contradictory"),
        ({}, {"version": 2.5}, "version is 2.5 in preprocessor_config.json and 2.6"),
        ({}, {"do_resize": False}, "do_resize is False"),
        ({}, {"do_center_crop": True}, "do_center_crop is True"),
        ({}, {"resample": 2}, "resample is 2"),
        ({}, {"do_normalize": False}, "do_normalize is False"),
        ({}, {"rescale_factor": 1 / 127.5}, "divided by 255"),
        ({}, {"rescale_factor": "x"}, "1/255 in published"),
        ({}, {"size": {"height": 448, "width": 448}}, "Write scale_resolution"),
        ({}, {"max_pixels": 10**6}, "max_pixels is 1000000"),
        ({}, {"im_start": "<img>"}, "written with <image>"),
        ({}, {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type is 'CLIPImageProcessor'"),
        ({}, {"image_mean": [0.4] * 3}, "norm_mean is contradictory"),
        ({}, {"norm_std": [0.5, float("nan"), 0.5]}, "three numbers"),
        ({}, {"norm_mean": [True, 0, 0]}, "three numbers"),
        ({}, {"max_slice_nums": 2.5}, "whole number"),
        ({}, {"scale_resolution": 0}, "whole number"),
        ({}, {"use_image_id": "yes"}, "true or false"),
        ({}, {"slice_mode": 1}, "true or false"),
        ({"vision_config": {"patch_size": 16}}, {}, "patch_size is contradictory"),
        ({}, {"norm_mean": [0.5, 0.5]}, "three numbers"),
        ({}, {"norm_std": [0.5, 0, 0.5]}, "divided by"),
        ({"query_num": 0}, {"image_feature_size": 0}, "query_num is 0"),
        ({"query_num": "64"}, {"image_feature_size": "64"}, "whole number"),
        ({"version": "7"}, {}, "none of 2.0"),
        ({"model_type": "llava"}, {}, "none of 2.0"),
    ],
)
def test_image_settings_that_make_no_sense(config, pre, said, tmp_path):
    base, extra = FOLDERS["2.6"]
    with pytest.raises(InputError, match=said):
        image_settings(write(tmp_path, config__json=base | config, preprocessor_config__json=extra | pre))


def test_image_settings_from_missing_files(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        image_settings(tmp_path)
    with pytest.raises(InputError, match="query_num is in none of"):
        image_settings(write(tmp_path, config__json=TOWER | {"version": 2.6}))
    with pytest.raises(InputError, match="visual is not an object"):
        image_settings(write(tmp_path, config__json={"model_type": "qwen", "visual": 3}))
    with pytest.raises(InputError, match="image_size is None"):
        image_settings(write(tmp_path, config__json={"model_type": "qwen", "visual": {"patch_size": 14}}))


def test_the_wire_format_is_read_with_all_its_kinds(tmp_path):
    "A hand-made model: fields of eight and four bytes and unknown numbers are skipped, defaults are sentencepiece's."

    def varint(number, value):
        return bytes([number << 3, value])

    def field(number, data):
        return bytes([number << 3 | 2, len(data)]) + data

    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("a", 1), ("▁", 1), ("▁a", 1)]
    data = b"".join(
        field(1, field(1, t.encode()) + b"\x15" + struct.pack("<f", -i) + varint(3, k))
        for i, (t, k) in enumerate(pieces)
    )
    data += field(2, varint(3, 2) + b"\x49" + bytes(8) + b"\x55" + bytes(4)) + field(3, b"")
    sp = read_sentencepiece(write(tmp_path, tokenizer__model=data) / "tokenizer.model")
    assert (
        [p[0] for p in sp.pieces] == [t for t, _ in pieces] and sp.dummy_prefix and sp.squeeze and not sp.byte_fallback
    )
    assert tokenizer_of(tmp_path)("  a   aé ").tokens() == ["<s>", "▁a", "▁a", "<unk>"]
