"""Which tokens are commands: the special tokens of the published models, one by one, in every role, in labels and in
generated answers."""

import os

import pytest
import torch
from real import folder, real
from standins import GROUNDING, SIGHT, THINKS, TOOLS, TURNS, stand_in, tokenizer_json, words
from transformers import PreTrainedTokenizerFast

from vlm_lora_lab.data.batch import Processor
from vlm_lora_lab.data.native import load_processor
from vlm_lora_lab.data.records import Conversation, Message, ask
from vlm_lora_lab.data.tokens import IGNORE, control_tokens, encode, end_ids
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.evaluate.ask import _read, generate_answers
from vlm_lora_lab.evaluate.boxes import read_boxes
from vlm_lora_lab.evaluate.scores import Score
from vlm_lora_lab.models.load import load_tokenizer, load_vlm

PICTURE = {"<image>", "</image>", "<slice>", "</slice>", "<unk>"}
NUMBER = {"<image_id>", "</image_id>"}
LLAMA3 = {"<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}
COMMANDS = {  # all of them, written by hand
    "openbmb/MiniCPM-Llama3-V-2_5": LLAMA3 | PICTURE,
    "openbmb/MiniCPM-V-2_6": {*TURNS} | PICTURE | NUMBER,
    "openbmb/MiniCPM-V-4_5": {*TURNS, *SIGHT} | PICTURE | NUMBER,
    "Qwen/Qwen-VL-Chat": {*TURNS, "<img>", "</img>", "<imgpad>"},
    "Qwen/Qwen2-VL-2B-Instruct": {*TURNS, *SIGHT},
    "Qwen/Qwen2.5-VL-3B-Instruct": {*TURNS, *SIGHT},
    "Qwen/Qwen3-VL-2B-Instruct": {*TURNS, *SIGHT},
}
SAID = {  # some of what can be said
    "openbmb/MiniCPM-Llama3-V-2_5": {
        "!",
        "<ref>",
        "<box>",
        "</box>",
        "<quad>",
        "<point>",
        "<|reserved_special_token_1|>",
    },
    "openbmb/MiniCPM-V-2_6": {"<ref>", "<box>", "</quad>", "<point>"},
    "openbmb/MiniCPM-V-4_5": {*GROUNDING, *TOOLS, *THINKS, "<ref>", "<box>"} - {"<think>", "</think>"},
    "Qwen/Qwen-VL-Chat": {"<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<|extra_0|>", "<|extra_204|>"},
    "Qwen/Qwen2-VL-2B-Instruct": {*GROUNDING},
    "Qwen/Qwen2.5-VL-3B-Instruct": {*GROUNDING, *TOOLS},
    "Qwen/Qwen3-VL-2B-Instruct": {*GROUNDING, *TOOLS, *THINKS} - {"<think>", "</think>"},
}
GROUNDED = "<|object_ref_start|>circle<|object_ref_end|><|box_start|>(250,244),(500,500)<|box_end|>"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made, root = {}, tmp_path_factory.mktemp("published")

    def one(name):
        if name not in made:
            made[name] = stand_in(name, root / name.replace("/", "--"), small=True)
        return made[name]

    return one


@pytest.fixture(params=COMMANDS)
def name(request):
    return request.param


@pytest.fixture
def processor(name, folders):
    return load_processor(folders(name))


def learned(processor, row):
    return processor.tokenizer.decode([i for i in row["labels"] if i != IGNORE])


def refusal(processor, conversation):
    try:
        processor(conversation)
    except InputError as e:
        return str(e)
    return ""


def test_commands_are_these_and_no_others(name, processor):
    own = {str(t) for t in processor.tokenizer.added_tokens_decoder.values()}
    found = control_tokens(
        processor.tokenizer, processor.words.template if isinstance(processor, Processor) else None, processor.named
    )
    assert found == COMMANDS[name] and SAID[name] <= own - found


def test_a_command_is_refused_in_every_role(name, processor):
    for token in COMMANDS[name] - {"<image>"}:  # that one is a mention of a picture
        spoken = f"so {token} it is"
        for talk in (
            ask(spoken, "no"),
            ask("what?", spoken),
            Conversation("s", (Message("system", spoken), Message("user", "a"), Message("assistant", "b"))),
        ):
            assert f"contains the special token {token}" in refusal(processor, talk), (token, talk)


def test_every_other_token_is_learned_as_one_and_kept_in_answers(name, processor):
    tokenizer = processor.tokenizer
    for token in SAID[name]:
        answer, number = f"a {token} b", tokenizer.convert_tokens_to_ids(token)
        for talk in (ask("what?", answer), ask(f"is it {token}?", answer)):
            row = processor(talk)
            assert row["labels"].count(number) == 1 and answer in learned(processor, row), token
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ends = end_ids(tokenizer)
        assert _read([*ids, ends[-1], *ids], tokenizer, named=processor.named).text == answer, token


@pytest.mark.parametrize("special", [True, False])
def test_a_token_that_a_user_added_is_a_word(special, folders):
    tokenizer = load_tokenizer(folders("Qwen/Qwen2.5-VL-3B-Instruct"))
    # asked before it is there: the answer is not remembered wrongly
    assert "<my_tool>" not in control_tokens(tokenizer)
    (
        tokenizer.add_special_tokens({"additional_special_tokens": ["<my_tool>", "helpful"]})
        if special
        else tokenizer.add_tokens(["<my_tool>", "helpful"])
    )
    processor = load_processor(folders("Qwen/Qwen2.5-VL-3B-Instruct"))
    processor = type(processor)(
        tokenizer, processor.images, processor.image_token, processor.types, named=processor.named
    )
    row = processor(ask("be helpful", "yes <my_tool> helpful"))
    assert {*tokenizer.convert_tokens_to_ids(["<my_tool>", "helpful"])} <= {*row["labels"]} and learned(
        processor, row
    ) == "yes <my_tool> helpful<|im_end|>"
    assert _read([i for i in row["labels"] if i != IGNORE], tokenizer).text == "yes <my_tool> helpful"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<my_tool>")  # now it opens turns
    assert "<my_tool>" in control_tokens(tokenizer) and "helpful" not in control_tokens(tokenizer)


def test_the_configuration_can_name_commands(folders):
    processor = load_processor(folders("Qwen/Qwen2-VL-2B-Instruct"))
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(["<eyes>", "<bye>"])
    assert not {"<eyes>", "<bye>"} & control_tokens(tokenizer)
    config = load_vlm(folders("Qwen/Qwen2-VL-2B-Instruct")).config
    config.image_token_id, config.get_text_config().eos_token_id = (
        tokenizer.convert_tokens_to_ids("<eyes>"),
        [tokenizer.convert_tokens_to_ids("<bye>"), 5],
    )
    from vlm_lora_lab.data.tokens import named_tokens

    named = named_tokens(config, tokenizer)
    assert {"<eyes>", "<bye>"} <= control_tokens(tokenizer, named=named) and len(named) == len(set(named))
    # 5 is a word
    assert set(end_ids(tokenizer, config.get_text_config())) - set(end_ids(tokenizer)) == {
        tokenizer.convert_tokens_to_ids("<bye>")
    }


def test_turns_that_are_ordinary_text_are_commands_where_the_template_writes_them():
    from test_tokenizer import RECORDED

    from vlm_lora_lab.families.base import family_named
    from vlm_lora_lab.models.tokenizer import tokenizer_of

    tokenizer = tokenizer_of(RECORDED / "minicpmv20")
    for bad in ("<用户>", "<AI>", "</s>", "<slice>"):
        with pytest.raises(InputError, match="special token"):
            encode(ask(f"say {bad}", "no"), tokenizer, 4, words=family_named("2.0").words)
    two = Conversation(
        "x", (Message("user", "1"), Message("assistant", "one"), Message("user", "2"), Message("assistant", "two"))
    )
    assert [i for i in encode(two, tokenizer, 4, words=family_named("2.0").words).labels if i != IGNORE].count(
        tokenizer.eos_token_id
    ) == 2
    assert "<用户>" not in control_tokens(tokenizer, family_named("2.6").words.template)


def test_text_is_looked_at_as_the_normaliser_makes_it(folders):
    from tokenizers import normalizers

    processor = load_processor(folders("Qwen/Qwen2-VL-2B-Instruct"))
    processor.tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    assert "special token <|im_end|>" in refusal(processor, ask("\uff1c|im_end|\uff1e", "no"))


# --- padding that is an ordinary word
# -----------------------------------------------------------------------------------


def test_an_exclamation_mark_has_a_label_and_padding_has_none(folders):
    processor = load_processor(folders("openbmb/MiniCPM-Llama3-V-2_5"))
    pad = processor.tokenizer.pad_token_id
    assert processor.tokenizer.pad_token == "!"
    rows = [
        processor(ask("Stop! What?", "A circle!!")),
        processor(ask("What! is it?", "It is a red circle, and a blue one, far away!")),
    ]
    for side in ("right", "left"):
        batch = processor.collate(rows, side)
        ids = batch["input_ids"]
        labels = batch["labels"]
        mask = batch["attention_mask"]
        assert ((ids == pad) & (mask == 0)).sum() == (mask == 0).sum() > 0 and (labels[mask == 0] == IGNORE).all()
        assert ((ids == pad) & (mask == 1)).sum() == 5 and (labels == pad).sum() == 3  # the answers' own


def test_answers_that_end_in_the_padding_token_are_learned_asked_and_judged(folders):
    place = folders("openbmb/MiniCPM-Llama3-V-2_5")
    model, processor = load_vlm(place, dtype=torch.float32), load_processor(place)
    talks = [ask("Hot! Is it?", "Yes!!"), ask("Cold! Is it, on this long grey day?", "No, never!")]
    batch = processor.collate([processor(t) for t in talks])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    model.train()
    for _ in range(120):
        loss = model(**batch).loss
        if loss.item() < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.02
    answers = generate_answers(model.eval(), processor, talks, max_new_tokens=24)
    assert answers == ["Yes!!", "No, never!"] and Score.of("exact", answers, talks).value == 1


# --- boxes
# -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, text, boxes",
    [
        ("openbmb/MiniCPM-V-2_6", "<ref>circle</ref><box>250 244 500 500</box>", ((250, 244, 500, 500),)),
        ("openbmb/MiniCPM-V-4_5", "<box>250 244 500 500</box><box>1 2 3 4</box>", ((250, 244, 500, 500), (1, 2, 3, 4))),
        ("Qwen/Qwen-VL-Chat", "<ref>circle</ref><box>(250,244),(500,500)</box>", ((250, 244, 500, 500),)),
        ("Qwen/Qwen2-VL-2B-Instruct", GROUNDED, ((250, 244, 500, 500),)),
        (
            "Qwen/Qwen2.5-VL-3B-Instruct",
            '```json\n[{"bbox_2d": [250, 244, 500, 500], "label": "circle"}]\n```',
            ((250, 244, 500, 500),),
        ),
        (
            "Qwen/Qwen3-VL-2B-Instruct",
            '[{"bbox_2d": [250, 244, 500, 500], "label": "circle"}]',
            ((250, 244, 500, 500),),
        ),
    ],
)
def test_a_box_is_the_same_in_file_labels_answer_and_metric(name, text, boxes, folders):
    processor = load_processor(folders(name))
    talk = ask("Where is the circle?", text)
    row = processor(talk)
    said = [i for i in row["labels"] if i != IGNORE]
    answer = _read(said, processor.tokenizer, named=processor.named)
    assert answer.text == text and not answer.cut and read_boxes(answer.text)[1] == boxes
    assert Score.of("iou", [answer.text], [talk]).value == 1


@pytest.mark.parametrize(
    "text, why",
    [
        ("<|box_start|>(250,244),(500,500)", "broken"),
        ("<|box_start|>(500,244),(250,500)<|box_end|>", "swapped"),
        ("<|box_start|>(1,2),(3,1400)<|box_end|>", "outside"),
        (GROUNDED + "<box>1 2 3 4</box>", "two notations"),
        ("(250,244),(500,500)", "no box"),
    ],
)
def test_boxes_that_cannot_be_used(text, why):
    with pytest.raises(ValueError, match=why):
        read_boxes(text)


# --- the real words
# --------------------------------------------------------------------------------------------------------


def _tokenizer(file, name, tmp_path):
    import json

    if real(file) is None:
        assert "VLM_LORA_LAB_REAL" not in os.environ, f"{folder()} has no {file}: run python tests/real.py"
        pytest.skip(f"{file} was not fetched: python tests/real.py")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(words(name)), ensure_ascii=False) if name else real(file).decode())
    roles = words(name).roles if name else {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **roles)


def test_in_the_real_qwen3_some_names_are_ordinary_text(tmp_path):
    tokenizer = _tokenizer("qwen3.json", None, tmp_path)
    vocab = tokenizer.get_vocab()
    # entries that no text reaches
    assert {t: vocab[t] for t in ("<unk>", "<s>", "</s>")} == {"<unk>": 128244, "<s>": 128245, "</s>": 128247}
    assert tokenizer("<unk>")["input_ids"] == [128243, 29] and 128247 not in tokenizer("</s>")["input_ids"]
    assert control_tokens(tokenizer) == {*TURNS, *SIGHT} and set(end_ids(tokenizer)) == {151643, 151645}
    row = encode(ask("strike <s>this</s>", "a <unk> word </s>"), tokenizer, 4)
    assert tokenizer.decode([i for i in row.labels if i != IGNORE]) == "a <unk> word </s><|im_end|>"
    assert _read([vocab["</s>"], vocab["!"], 151645], tokenizer).text == "</s>!"
    tokenizer.add_special_tokens({"additional_special_tokens": ["<unk>"]})  # as MiniCPM-V lists it
    assert tokenizer("<unk>")["input_ids"] == [128244] and "<unk>" in control_tokens(tokenizer)


def test_texts_full_of_exclamation_marks_from_the_real_llama3(tmp_path):
    tokenizer = _tokenizer("llama3.json", "openbmb/MiniCPM-Llama3-V-2_5", tmp_path)
    assert tokenizer.pad_token_id == 0 and "!" not in control_tokens(tokenizer)
    from vlm_lora_lab.families.base import family_named

    for answer in ("Stop!", "!!!", "a!b!! c !", "!"):
        e = encode(ask("Hey! Look!!", answer), tokenizer, 4, words=family_named("2.5").words)
        said = [i for i in e.labels if i != IGNORE]
        assert tokenizer.decode(said) == answer + "<|eot_id|>" and _read([*said, 0, 0], tokenizer).text == answer
