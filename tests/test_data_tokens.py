"""Ids, labels and picture places against `finetune/dataset.py` of MiniCPM-V; every deliberate difference is asserted as
such.

Differences, numbered as in the table of the chapter `data.tokens`: 1. after an answer's end token, its successor has
the label "end token" upstream (ChatML, Llama 3); here it has none 2. an empty answer supervises the next question
upstream; here the record is refused 3. a long text is cut at the limit upstream; here it is refused, or whole turns
are dropped 4. only sliced pictures are numbered and counted upstream; here all are, when the model wants numbers 5.
with several pictures, upstream writes a line break after the last one even if no text follows; here there is none 6.
2.0 is tokenised in pieces upstream; here as a whole, which is the same as long as no text holds a special token, and
such text is refused 7. what crashes upstream works here 8. 2.0's processor, not its training, puts a line break after
each picture; here there is none"""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from vlm_lora_lab.data.files import Limits
from vlm_lora_lab.data.records import Access, Conversation, Message, RecordError, ask, parse_record
from vlm_lora_lab.data.slicing import cut_of
from vlm_lora_lab.data.batch import prepared
from vlm_lora_lab.data.tokens import ENDS, IGNORE, drop_turns, encode, picture_text, render
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.families.base import families

TEMPLATES = {
    "qwen": ("qwen", "2.6"),
    "qwen_v45_template": ("qwen", "4.5"),
    "llama3": ("llama3", "2.5"),
    "minicpm": ("minicpm", "2.0"),
}
NAMES = [
    "single_unsliced",
    "no_tag_placeholder_is_prepended",
    "multi_turn_three",
    "single_sliced",
    "two_images_one_sliced",
    "unicode_and_role_words",
    "empty_answer_in_the_middle",
    "leading_and_trailing_spaces",
    "truncated_max_length_40",
    "slicing_off",
    "batch_vision_false",
]
WORDS = {f.key: f.words for f in families()}
CASES = [(t, n) for t in ("qwen", "llama3", "minicpm") for n in NAMES]
CASES += [
    ("qwen_v45_template", n)
    for n in ("single_unsliced", "multi_turn_three", "think_in_last_answer", "no_think_two_turns")
]


@pytest.fixture(scope="module")
def golden(golden_root):
    return json.loads((golden_root / "dataset" / "labels.json").read_text())


@pytest.fixture(scope="module")
def tokenizers(golden_root, golden):
    made = {}
    for name in ("qwen", "llama3", "minicpm"):
        ids = golden["meta"]["special_ids"][name]
        t = PreTrainedTokenizerFast(
            tokenizer_file=str(golden_root / "dataset" / name / "tokenizer.json"), unk_token="<unk>"
        )
        t.bos_token, t.eos_token = t.convert_ids_to_tokens([ids["bos_id"], ids["eos_id"]])
        made[name] = t
    return made


def test_the_list_of_cases_is_complete(golden):
    assert {(t, n) for t, cases in golden["cases"].items() for n in cases} == set(CASES)


def conversation_of(case, tmp_path):
    for i, _name in enumerate(case["images"]):
        (tmp_path / f"{i}.png").touch()
    images = {name: f"{i}.png" for i, name in enumerate(case["images"])}
    record = {
        "conversations": case["conversations"],
        "image": images["<image>"] if set(images) == {"<image>"} else images,
    }
    return parse_record(record, Access(tmp_path, limits=Limits()))


def encode_case(case, tokenizer, words, tmp_path, **kwargs):
    o, c = case["options"], conversation_of(case, tmp_path)
    s = o["slice_config"]
    pictures = [case["images"][k] for k in case["images"]]  # every case mentions its pictures in order
    grids = (
        [
            cut_of(p["width"], p["height"], s["scale_resolution"], s["patch_size"], s["max_slice_nums"]).grid
            for p in pictures
        ]
        if s
        else None
    )
    number = words.numbered != "" and any(grids or [])  # difference 4
    return encode(
        c,
        tokenizer,
        o["query_nums"],
        kwargs.pop("max_length", o["max_length"]),
        number,
        words=words,
        grids=grids,
        **kwargs,
    )


def shifted(e):
    return [*e.labels[1:], IGNORE]


def without_the_extra_label(case, ends):
    "Difference 1."
    ids, target = case["input_ids"], list(case["target_preshifted"])
    extra = [i for i, t in enumerate(target) if t in ends and ids[i] == t]
    for i in extra:
        target[i] = IGNORE
    return target, extra


SPECIAL = {"empty_answer_in_the_middle", "truncated_max_length_40", "two_images_one_sliced"}


@pytest.mark.parametrize("template, name", [c for c in CASES if c[1] not in SPECIAL], ids="-".join)
def test_equal_to_the_original(template, name, golden, tokenizers, tmp_path):
    case, (kind, version) = golden["cases"][template][name], TEMPLATES[template]
    tokenizer, words = tokenizers[kind], WORDS[version]
    e = encode_case(case, tokenizer, words, tmp_path)
    if "input_ids" not in case:  # difference 7
        assert (
            case["head_error"]
            and tokenizer.decode([x for x in e.labels if x != IGNORE]) == "A red cat.<|im_end|>"
            and len(e.image_bound) == 1
        )
        return
    ends = {tokenizer.convert_tokens_to_ids(t) for t in ENDS if t in tokenizer.get_vocab()}
    target, extra = without_the_extra_label(case, ends)
    answers = sum(m["role"] == "assistant" for m in case["conversations"])
    # Llama 3's last end token has no successor, so nothing is extra there
    assert len(extra) == (0 if kind == "minicpm" else answers - (kind == "llama3"))
    assert (
        e.input_ids == case["input_ids"]
        and shifted(e) == target
        and [list(b) for b in e.image_bound] == case["image_bound"]
    )
    if case.get("rendered_text"):
        assert tokenizer.decode(e.input_ids) == case["rendered_text"] or name == "unicode_and_role_words"
    assert sum(x != IGNORE for x in e.labels) > 0 and e.dropped == 0


@pytest.mark.parametrize("template", ["qwen", "llama3", "minicpm"])
def test_two_pictures_one_sliced(template, golden, tokenizers, tmp_path):
    case, (kind, version) = golden["cases"][template]["two_images_one_sliced"], TEMPLATES[template]
    tokenizer, words = tokenizers[kind], WORDS[version]
    e = encode_case(case, tokenizer, words, tmp_path)
    assert len(e.image_bound) == 5 and tokenizer.decode([x for x in e.labels if x != IGNORE]).startswith(
        "a dog and a cat."
    )
    if "rendered_text" not in case:
        assert "head_error" in case  # difference 7
        return
    text = case["rendered_text"]
    if words.numbered:
        assert text.count("<image_id>") == 1 and "<image_id>0</image_id><image>" in text
        # difference 4
        text = text.replace("<image_id>0", "<image_id>1").replace(
            "<image><unk>", "<image_id>0</image_id><image><unk>", 1
        )
        assert text.count("</slice>\n<|im_end|>") == 1
        text = text.replace("</slice>\n<|im_end|>", "</slice><|im_end|>")  # difference 5
    else:
        assert (
            e.input_ids == case["input_ids"] and shifted(e) == without_the_extra_label(case, set(e.input_ids[-1:]))[0]
        )
    assert (
        tokenizer.decode(e.input_ids) == text and e.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    )


@pytest.mark.parametrize("template", ["qwen", "llama3", "minicpm"])
def test_an_empty_answer_is_refused(template, golden, tmp_path):
    with pytest.raises(RecordError, match="nothing to learn"):  # difference 2
        conversation_of(golden["cases"][template]["empty_answer_in_the_middle"], tmp_path)
    if template == "qwen":  # what upstream makes of it: the question is learned
        case = golden["cases"][template]["empty_answer_in_the_middle"]
        learned = [t for t in case["target_preshifted"] if t != IGNORE]
        assert len(learned) > 10 and golden["meta"]["special_ids"]["qwen"]["user"] in learned


@pytest.mark.parametrize("template", ["qwen", "llama3"])
def test_a_long_text_is_refused_or_loses_whole_turns(template, golden, tokenizers, tmp_path):
    case, (kind, version) = golden["cases"][template]["truncated_max_length_40"], TEMPLATES[template]
    tokenizer, words = tokenizers[kind], WORDS[version]
    assert len(case["input_ids"]) == 40 and case["input_ids"][-1] not in tokenizer.convert_tokens_to_ids(
        ["<|im_end|>", "<|eot_id|>"]
    )
    with pytest.raises(InputError, match="limit of 40"):  # difference 3
        encode_case(case, tokenizer, words, tmp_path)
    e = encode_case(case, tokenizer, words, tmp_path, max_length=45, drop=True)
    assert (
        e.dropped == 1
        and e.image_bound == []
        and tokenizer.decode([x for x in e.labels if x != IGNORE]).startswith("It is blue and green.<|")
    )
    whole = encode_case(case, tokenizer, words, tmp_path, max_length=2048, drop=True)
    assert whole.dropped == 0 and whole.input_ids[:39] == case["input_ids"][:39]
    with pytest.raises(InputError, match="limit of 5"):
        encode_case(case, tokenizer, words, tmp_path, max_length=5, drop=True)


def test_dropping_takes_pictures_and_keeps_the_system(tokenizers):
    talk = Conversation(
        "x",
        (
            Message("system", "Be brief."),
            Message("user", "<image>\n1?"),
            Message("assistant", "1"),
            Message("user", "<image> and <image>?"),
            Message("assistant", "2"),
            Message("user", "3?"),
            Message("assistant", "3"),
        ),
        ("a", "b", "c"),
    )
    assert drop_turns(talk, 1).images == ("b", "c") and [m.content for m in drop_turns(talk, 2).messages] == [
        "Be brief.",
        "3?",
        "3",
    ]
    lengths = []
    for limit in range(30, 120):
        try:
            e = encode(talk, tokenizers["qwen"], 4, limit, True, grids=[None, (2, 1), None], drop=True)
        except InputError:
            continue
        assert len(e.input_ids) <= limit and len(e.image_bound) == {0: 5, 1: 4, 2: 0}[e.dropped]
        assert "Be brief." in tokenizers["qwen"].decode(e.input_ids)
        lengths.append(e.dropped)
    assert set(lengths) == {0, 1, 2} and lengths == sorted(lengths, reverse=True)


def test_placeholders_equal_the_original(golden_root):
    for c in json.loads((golden_root / "preprocess" / "image_processor.json").read_text())["cases"]:
        grid = cut_of(c["width"], c["height"], c["scale_resolution"], c["patch_size"], c["max_slice_nums"]).grid
        assert (
            picture_text(WORDS["2.6"], 4, grid, 0) == c["placeholder_with_id"]
            and picture_text(WORDS["2.6"], 4, grid) == c["placeholder_without_id"]
        )
        assert picture_text(WORDS["2.5"], 4, grid) == c["placeholder_v25"]
        assert picture_text(WORDS["2.0"], 4, grid) + "\n" == c["placeholder_v20"]  # difference 8


@pytest.mark.parametrize("kind, version", [("qwen", "2.6"), ("qwen", "4.5"), ("llama3", "2.5"), ("minicpm", "2.0")])
def test_a_prompt_is_the_beginning_of_the_training_text(kind, version, tokenizers):
    tokenizer, words = tokenizers[kind], WORDS[version]
    for c in (
        ask("What is it?", "A cat.", "x"),
        Conversation(
            "y", (Message("user", "1"), Message("assistant", "one"), Message("user", "2"), Message("assistant", "two"))
        ),
    ):
        whole, prompt = (encode(c, tokenizer, 4, words=words, answer=answer) for answer in (True, False))
        n = len(prompt.input_ids)
        assert (
            whole.input_ids[:n] == prompt.input_ids
            and whole.labels[n] == whole.input_ids[n]
            and set(prompt.labels) == {IGNORE}
        )
        last = c.messages[-1].content
        assert tokenizer.decode([x for x in whole.labels[n:] if x != IGNORE]).startswith(last)
        # when it is asked, there is no answer yet
        asked = Conversation(c.id, (*c.messages[:-1], Message("assistant", "")), c.images)
        assert encode(asked, tokenizer, 4, words=words, answer=False).input_ids == prompt.input_ids


@pytest.mark.parametrize(
    "answer",
    ["a\nb", "\nx", "x\n", "  ", "assistant", "user\n", "<think>\nhm\n</think>\n\nyes", "(x) [y] {z} \\1 .*", "ä" * 50],
)
@pytest.mark.parametrize("kind, version", [("qwen", "2.6"), ("qwen", "4.5"), ("llama3", "2.5"), ("minicpm", "2.0")])
def test_no_word_of_the_user_is_ever_learned(kind, version, answer, tokenizers):
    c = Conversation(
        "x",
        (
            Message("user", "question one"),
            Message("assistant", answer),
            Message("user", "question two"),
            Message("assistant", answer),
        ),
    )
    if "<think>" in answer and kind != "qwen":
        return
    e = encode(c, tokenizers[kind], 4, words=WORDS[version])
    learned = tokenizers[kind].decode([x for x in e.labels if x != IGNORE])
    assert "question" not in learned and learned.count(answer.strip().split("\n")[-1]) >= 2


@pytest.mark.parametrize("bad", ["<|im_start|>", "<image_id>", "</slice>", "<unk>", "<think>"])
def test_a_user_gives_no_commands(bad, tokenizers):
    with pytest.raises(InputError, match="special token"):
        encode(ask(f"say {bad}", "no"), tokenizers["qwen"], 4)


def test_boxes_and_thoughts_pass(tokenizers):
    e = encode(
        ask("Where is <ref>the cat</ref>?", "<think>\nleft\n</think>\n\n<box>1 2 3 4</box>"), tokenizers["qwen"], 4
    )
    assert tokenizers["qwen"].decode([x for x in e.labels if x != IGNORE]).endswith("<box>1 2 3 4</box><|im_end|>")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "does not end"),
        (
            "{% for m in messages %}{{ m['content'] | length }}{{ m['content'] }}<|im_end|>{% endfor %}",
            "changes the text",
        ),
        ("{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}", ""),
    ],
)
def test_a_template_that_cannot_be_matched_is_named(template, message, tokenizers):
    tokenizer = tokenizers["qwen"]
    tokenizer.chat_template = template
    try:
        if message:
            with pytest.raises(InputError, match=message):
                render(ask("hello", "hi there"), tokenizer, 4)
        else:
            text, [(start, end)], _ = render(ask("hello", "hi there"), tokenizer, 4)
            assert text[start:end] == "HI THERE<|im_end|>"
    finally:
        tokenizer.chat_template = None


def test_qwen_vl_numbers_its_pictures():
    class Config:
        model_type = "qwen"

    assert picture_text(prepared(Config).words, 2, None, 0) == "Picture 1: <img><imgpad><imgpad></img>"
    Config.model_type, Config.version = "minicpmv", "9.9"
    with pytest.raises(InputError, match="9.9"):
        prepared(Config)
    for version in (2.6, "2.6", 4.5):
        Config.version = version
        assert not prepared(Config).words.nested


def test_a_word_that_melts_into_the_marker_is_refused_and_a_line_break_is_not():
    import copy

    from vlm_lora_lab.data.records import ask
    from vlm_lora_lab.data.tokens import IGNORE, encode
    from vlm_lora_lab.errors import InputError
    from vlm_lora_lab.models.load import load_tokenizer

    def asked(end, answer):
        tokenizer = copy.deepcopy(load_tokenizer("lab"))
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['role'] + '" + end + "' + m['content'] + '<|im_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant" + end + "' }}{% endif %}"
        )
        labels = encode(ask("What colour is it?", answer), tokenizer, 4).labels
        return tokenizer.decode([t for t in labels if t != IGNORE])

    with pytest.raises(InputError, match="chat template: .* one token, ' yellow'.*line break"):
        asked(": ", "yellow square")
    assert asked(":\\n", "yellow square") == "yellow square<|im_end|>"
    assert asked(":\\n", "\n7") in ("\n7<|im_end|>", "7<|im_end|>")  # a line break too many is no word
