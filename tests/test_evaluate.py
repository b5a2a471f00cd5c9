"""Asking and judging: batches against one by one for every family, each metric against its definition, intervals
against enumeration."""

import itertools
import json
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from families import FAMILIES, OURS, batch_of, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import pad

from vlm_lora_lab.data.batch import Collator, Processor
from vlm_lora_lab.data.dialects import DIALECTS, convert, to_record
from vlm_lora_lab.data.doctor import check_data
from vlm_lora_lab.data.drawn import HELD_OUT, KINDS, Drawn, draw
from vlm_lora_lab.data.records import Access, RecordError, ask, parse_record, read_conversations, samples_folder
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.evaluate.ask import _read, answer_all, generate_answers, why_not_together
from vlm_lora_lab.evaluate.boxes import iou, read_boxes
from vlm_lora_lab.evaluate.gallery import gallery
from vlm_lora_lab.evaluate.metrics import METRICS, Mark, check_truths, edit_distance, metric_of
from vlm_lora_lab.evaluate.scores import ExactMatch, Score, ScoreTable, bootstrap, middle
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.models.minicpmv import MiniCPMV, MiniCPMV25Config

BOUND = 1e-4  # largest difference of a first logit, in standard deviations of the logits (float32)
GREEDY = dict(
    max_new_tokens=6,
    do_sample=False,
    output_logits=True,
    return_dict_in_generate=True,
    eos_token_id=None,
    pad_token_id=0,
)


# --- together or one by one -----------------------------------------------------------------------------------------


def joined(rows):
    "Rows of a batch each, padded on the left, as one batch; pictures of different size are padded, too."
    longest = max(r["input_ids"].shape[1] for r in rows)
    gaps = [longest - r["input_ids"].shape[1] for r in rows]
    width = max((r["pixel_values"].shape[-1] for r in rows if "pixel_values" in r), default=0)
    batch = {}
    for key in dict.fromkeys(k for r in rows for k in r):
        parts = []
        for i, (r, gap) in enumerate(zip(rows, gaps)):
            if key not in r:
                continue
            value = r[key]
            if value.shape == r["input_ids"].shape and key != "target_sizes":
                value = pad(value, (gap, 0))
            elif key == "image_bound":
                value = value + torch.tensor([i, gap, gap])
            elif key == "pixel_values" and "target_sizes" not in r:
                value = pad(value, (0, width - value.shape[-1]))
            parts.append(value)
        batch[key] = torch.cat(parts, -1 if key == "pixel_values" and "target_sizes" in rows[0] else 0)
    return batch


@torch.no_grad()
def compared(model, rows):
    "How far the first logits are apart, and whether the answers are the same, for each row."
    alone, together = [model.generate(**r, **GREEDY) for r in rows], model.generate(**joined(rows), **GREEDY)
    spread = together.logits[0].std()
    far = [((together.logits[0][i] - a.logits[0][0]).abs().max() / spread).item() for i, a in enumerate(alone)]
    return far, [together.sequences[i, -6:].tolist() == a.sequences[0, -6:].tolist() for i, a in enumerate(alone)]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_changes_no_answer(family):
    model = tiny_model(family).eval()
    row = {k: v for k, v in batch_of(family, model).items() if k != "labels"}
    text = {k for k, v in row.items() if v.shape == row["input_ids"].shape and k != "target_sizes"}
    short = {k: v[:, :-5] if k in text else v for k, v in row.items()}
    far, same = compared(model, [row, short])
    assert max(far) < BOUND and all(same), (far, same)
    wrong = joined([row, short]) | {"attention_mask": torch.ones_like(joined([row, short])["attention_mask"])}
    with torch.no_grad():
        seen = model.generate(**wrong, **GREEDY).logits[0][1] - model.generate(**short, **GREEDY).logits[0][0]
    assert seen.abs().max() > 100 * BOUND, "the test must see padding that is looked at"


def our_rows(family, lengths, sizes):
    "Rows for a model of ours, with a picture of a size in patches, or none."
    g, rows = torch.Generator().manual_seed(0), []
    for n, size in zip(lengths, sizes):
        row = dict(
            input_ids=torch.randint(3, 290, (1, n), generator=g), attention_mask=torch.ones(1, n, dtype=torch.long)
        )
        if size:
            shape = (1, 3, 56, 56) if family == "qwen" else (1, 3, 14, size[0] * size[1] * 14)
            row |= dict(pixel_values=torch.randn(shape, generator=g), image_bound=torch.tensor([[0, 2, 18]]))
            if family != "qwen":
                row["tgt_sizes"] = torch.tensor([size])
        rows.append(row)
    return rows


def as_processed(rows):
    "What `Processor` says of the same rows, as far as `why_not_together` looks."
    return [
        {"input_ids": r["input_ids"][0].tolist(), "patches": [(p, None) for p in r.get("pixel_values", ())]}
        for r in rows
    ]


@pytest.mark.parametrize("family", OURS)
@pytest.mark.parametrize("lengths", [(28, 23, 10), (140, 100, 10), (140, 150, 130)])
@pytest.mark.parametrize("sizes", [((4, 3), (4, 3), None), ((4, 3), (2, 3), None)])
def test_where_company_changes_an_answer_it_is_known(family, lengths, sizes):
    # beyond it, Qwen-VL's positions and attention depend on the length
    short = {"seq_length": 128} if family == "qwen" else {}
    model, rows = tiny_model(family, **short).eval(), our_rows(family, lengths, sizes)
    far, same = compared(model, rows)
    why = why_not_together(model.config, as_processed(rows))
    assert bool(why) == (max(far) > BOUND), (far, why)
    assert why or all(same)
    expected = (family == "qwen" and lengths == (140, 100, 10)) or (family == "minicpmv-2.5" and sizes[1] == (2, 3))
    assert bool(why) == expected


@pytest.fixture(scope="module")
def lab():
    model, tokenizer = load_vlm("lab"), load_tokenizer("lab")
    return model, Processor.of(model.config, tokenizer)


def test_200_questions_together_and_alone(lab):
    model, processor = lab
    questions = Drawn(HELD_OUT + 1000, 200)
    together = generate_answers(model, processor, questions, batch_size=64)
    assert together == generate_answers(model, processor, questions, batch_size=1) and len(set(together)) > 50
    rows = [processor(c, answer=False) for c in questions]
    device = next(model.parameters()).device

    @torch.no_grad()
    def first(size):
        found = []
        for i in range(0, 200, size):
            batch = {k: v.to(device) for k, v in Collator(0, "left")(rows[i : i + size]).items() if k != "labels"}
            found.append(model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(0)).logits[:, -1])
        return torch.cat(found)

    a, b = first(64), first(1)
    assert (a - b).abs().max() / b.std() < BOUND


def test_minicpm_2_5_is_asked_one_by_one_and_says_so(lab):
    tokenizer = lab[1].tokenizer
    torch.manual_seed(0)
    config = MiniCPMV25Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        query_num=16,
        resampler_num_heads=4,
        initializer_range=0.2,
        image_size=56,
        version="2.5",
        slice_config={"max_slice_nums": 1, "scale_resolution": 56, "patch_size": 8},
        vision_config=dict(
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=56,
            patch_size=8,
        ),
    )
    model, processor = MiniCPMV(config).eval(), replace(lab[1], query_num=16)
    mixed, alike = (
        [draw(s, k) for s, k in enumerate(("number", "caption", "sum", "pair"))],
        [draw(s, "caption") for s in range(4)],
    )
    with pytest.warns(UserWarning, match="one by one: MiniCPM-V 2.5"):
        answers = generate_answers(model, processor, mixed, max_new_tokens=8)
    assert answers == generate_answers(model, processor, mixed, batch_size=1, max_new_tokens=8)
    calls, generate = [], model.generate
    model.generate = lambda **kw: calls.append(len(kw["input_ids"])) or generate(**kw)
    generate_answers(model, processor, alike, max_new_tokens=2)
    assert calls == [4], "pictures of one size share a batch, without a warning"


def test_qwen_vl_is_asked_one_by_one_where_a_prompt_is_long():
    tokenizer = load_tokenizer("lab")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<img>", "</img>", "<imgpad>"]})
    start = tokenizer.convert_tokens_to_ids("<img>")
    model = tiny_model("qwen", vocab_size=len(tokenizer), seq_length=128, visual={"image_start_id": start}).eval()
    processor = Processor.of(model.config, tokenizer, 400)
    processor = replace(processor, max_length=400)
    picture = Image.new("RGB", (40, 40), "red")
    short, long = ask("What is it?", "red", picture), ask("What is it? " * 40, "red", picture)
    assert len(processor(long, answer=False)["input_ids"]) > model.config.seq_length
    with pytest.warns(UserWarning, match="one by one: Qwen-VL"):
        answers = generate_answers(model, processor, [short, long], max_new_tokens=8)
    assert answers == generate_answers(model, processor, [short, long], batch_size=1, max_new_tokens=8)
    assert not why_not_together(model.config, [processor(short, answer=False)] * 3)


def test_modes_are_left_as_they_were(lab):
    model, processor = lab
    model.train()
    try:
        assert generate_answers(model, processor, [draw(0)]) and model.training
        with pytest.raises(InputError):
            generate_answers(model, replace(processor, max_length=5), [draw(0)])
        batches = answer_all(model, processor, Drawn(0, 4), batch_size=2)
        next(batches)
        assert model.training, "also between the batches"
        batches.close()
    finally:
        model.eval()


# --- from tokens to an answer ---------------------------------------------------------------------------------------


def test_boxes_survive_and_commands_do_not(lab):
    tokenizer = lab[1].tokenizer
    text = "<ref>a red cross</ref><box>(10,20),(300,400)</box>"
    ids = tokenizer(text)["input_ids"]
    stop, image = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<image>"])
    assert _read([*ids, stop, *ids], tokenizer).text == text and not _read([*ids, stop], tokenizer).cut
    assert _read([image, *ids, image], tokenizer).text == text and _read(ids, tokenizer).cut
    assert tokenizer.decode(ids, skip_special_tokens=True) != text, "or the test sees nothing"


def test_an_answer_ends_where_its_turn_ends_even_if_the_files_name_another_end(lab):
    model, processor = lab
    questions = Drawn(HELD_OUT, 20)
    right = generate_answers(model, processor, questions)
    other = load_tokenizer("lab")
    other.eos_token = "<|endoftext|>"
    assert generate_answers(model, replace(processor, tokenizer=other), questions) == right


def test_cut_answers_are_marked(lab):
    model, processor = lab
    caption = [draw(HELD_OUT, "caption"), draw(0, "sum")]
    [[long, short]] = answer_all(model, processor, caption, max_new_tokens=4)
    assert long.cut and not short.cut
    assert not any(a.cut for a in next(iter(answer_all(model, processor, caption))))


# --- edit distance, CER, ANLS ---------------------------------------------------------------------------------------


@lru_cache(None)
def by_definition(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(by_definition(a[1:], b) + 1, by_definition(a, b[1:]) + 1, by_definition(a[1:], b[1:]) + (a[0] != b[0]))


WORD = st.text(alphabet="abcA 1é猫🙂", max_size=9)


@settings(max_examples=300, deadline=None)
@given(WORD, WORD, WORD)
def test_edit_distance_is_its_definition_and_a_distance(a, b, c):
    d = edit_distance(a, b)
    assert d == by_definition(a, b) == edit_distance(b, a)
    assert (d == 0) == (a == b) and abs(len(a) - len(b)) <= d <= max(len(a), len(b))
    assert d <= edit_distance(a, c) + edit_distance(c, b)


def judged(metric, answers, truths):
    return Score.of(metric, answers, [ask("?", t[0], answers=tuple(t[1:])) for t in truths])


def test_cer_by_hand():
    score = judged("cer", ["407", "4071", "", "kitten"], [["407"], ["407"], ["12"], ["sitting"]])
    assert [m.points for m in score.marks] == [0, 1, 2, 3] and [m.out_of for m in score.marks] == [3, 3, 2, 7]
    assert score.value == 6 / 15, "the corpus, not the mean of the answers"
    assert judged("cer", ["York"], [["New York", "York"]]).value == 0, "the nearest of several"
    assert judged("cer", ["abcdefgh"], [["x"]]).value == 8, "no upper end"


@pytest.mark.parametrize(  # the table that goes with the metric's own description, and the threshold itself
    "answer, truths, expected",
    [
        ("The Coca", ["Coca Cola", "Coca Cola Company"], 0),
        ("CocaCola", ["Coca Cola", "Coca Cola Company"], 8 / 9),
        ("Coca cola", ["Coca Cola", "Coca Cola Company"], 1),
        ("Cola", ["Coca Cola", "Coca Cola Company"], 0),
        ("Cat", ["Coca Cola", "Coca Cola Company"], 0),
        ("ab", ["ac"], 0),
        ("abc", ["abd"], 2 / 3),
        ("", ["a"], 0),
        ("  two\n words ", ["Two words"], 1),
        ("words two", ["two words"], 0),
    ],
)
def test_anls_by_hand(answer, truths, expected):
    assert judged("anls", [answer], [truths]).value == pytest.approx(expected)


@settings(max_examples=200, deadline=None)
@given(WORD.filter(str.strip), WORD.filter(str.strip), WORD.filter(str.strip))
def test_anls_is_bounded_symmetric_and_takes_the_best(a, b, c):
    one = METRICS["anls"].mark(a, [b]).points
    assert one == 0 or 0.5 < one <= 1
    assert one == METRICS["anls"].mark(b, [a]).points and METRICS["anls"].mark(a, [a]).points == 1
    assert METRICS["anls"].mark(a, [b, c]).points == max(one, METRICS["anls"].mark(a, [c]).points)


# --- boxes ----------------------------------------------------------------------------------------------------------

CORNER = st.tuples(*[st.integers(0, 8)] * 4).map(lambda v: (v[0], v[1], v[0] + v[2], v[1] + v[3]))


@settings(max_examples=200, deadline=None)
@given(CORNER, CORNER)
def test_iou_counts_cells(a, b):
    def cells(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    union = cells(a) | cells(b)
    assert iou(a, b) == iou(b, a) == (len(cells(a) & cells(b)) / len(union) if union else 0)
    assert 0 <= iou(a, b) <= 1 and iou(a, a) == (1 if cells(a) else 0)

    def stretched(box):
        return (3 * box[0] + 1, 7 * box[1] - 2, 3 * box[2] + 1, 7 * box[3] - 2)

    assert iou(stretched(a), stretched(b)) == pytest.approx(iou(a, b)), "the unit does not matter"


WAYS = {
    "Qwen-VL": "<ref>it</ref><box>({},{}),({},{})</box>",
    "MiniCPM-V": "<ref>it</ref><box>{} {} {} {}</box>",
    "Qwen3-VL": '```json\n[\n\t{{"bbox_2d": [{}, {}, {}, {}], "label": "it"}}\n]\n```',
}


@pytest.mark.parametrize("way", WAYS)
def test_boxes_of_every_family_are_read(way):
    notation, boxes = read_boxes(
        "Here: " + WAYS[way].format(10, 20, 300, 400.5) + " and " + WAYS[way].format(0, 0, 1000, 1000)
    )
    assert notation == ("bbox_2d" if way == "Qwen3-VL" else "<box>") and boxes == (
        (10, 20, 300, 400.5),
        (0, 0, 1000, 1000),
    )


@pytest.mark.parametrize(
    "text, reason",
    [
        ("no idea", "no box"),
        ("", "no box"),
        ("<box>1 2 3</box>", "broken box"),
        ("<box>1 2 3 4", "broken box"),
        ("<box>(1,2),(3,4</box>", "broken box"),
        ("<box>1 2 3 4</box><box>5 6", "broken box"),
        ("<box>1234</box>", "broken box"),
        ("<box>30 2 3 4</box>", "swapped corners"),
        ('{"bbox_2d": [1, 9, 3, 4]}', "swapped corners"),
        ("<box>1 2 3 1001</box>", "outside 0 to 1000"),
        ("<box>-1 2 3 4</box>", "outside 0 to 1000"),
        ('[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2', "broken box"),
        ('<box>1 2 3 4</box>{"bbox_2d": [1, 2, 3, 4]}', "two notations"),
    ],
)
def test_a_box_that_cannot_be_read_is_counted_with_its_reason(text, reason):
    with pytest.raises(ValueError, match=reason):
        read_boxes(text)
    for metric in ("iou", "iou@0.5"):
        score = judged(metric, [text, "<box>1 2 3 4</box>"], [["<box>1 2 3 4</box>"]] * 2)
        assert score.value == 0.5 and len(score.marks) == 2 and score.notes == {reason: 1} and reason in str(score)


def test_long_nonsense_is_refused_quickly():
    for text in (
        "<box>" + "1 " * 20_000,
        "<box>" + " " * 20_000 + "1",
        "<box>" + "1" * 20_000,
        '"bbox_2d": [' + "1, " * 20_000,
    ):
        with pytest.raises(ValueError):
            read_boxes(text)


def test_boxes_are_worth_their_overlap():
    half, whole = "<box>0 0 10 5</box>", "<box>(0,0),(10,10)</box>"
    assert judged("iou", [half, whole], [[whole], [whole]]).value == 0.75
    assert judged("iou@0.5", [half, "<box>0 0 10 4</box>"], [[whole]] * 2).value == 0.5, "half is enough, less is not"
    far = "<box>50 50 60 60</box>"
    assert judged("iou", [whole + far, far + half], [[whole], [whole + far]]).value == pytest.approx(
        (0.5 + 0.75) / 2
    ), "too many costs; order does not matter"
    assert judged("iou", [half], [[far, whole]]).value == 0.5, "the best of several right answers"
    other = judged("iou", ['{"bbox_2d": [0, 0, 10, 10]}'], [[whole]])
    assert other.value == 0 and other.notes == {"another notation": 1}
    assert judged("iou", ['{"bbox_2d": [0, 0, 10, 10]}'], [['{"bbox_2d": [0, 0, 10, 20]}']]).value == 0.5


# --- metrics, scores, intervals -------------------------------------------------------------------------------------


def test_a_metric_is_named_and_knows_its_direction():
    assert set(METRICS) == {"exact", "contains", "cer", "anls", "iou", "iou@0.5"}
    assert [n for n, m in METRICS.items() if not m.higher_is_better] == ["cer"]
    assert (
        METRICS["cer"].better(0.1, 0.2) == 1
        and METRICS["exact"].better(0.1, 0.2) == -1
        and METRICS["anls"].better(1, 1) == 0
    )
    with pytest.raises(InputError, match="exact, contains, cer, anls, iou"):
        metric_of("accuracy")
    with pytest.raises(InputError, match="conversation 0.*no box"):
        judged("iou", ["x"], [["red"]])
    with pytest.raises(InputError, match="no questions"):
        check_truths(METRICS["exact"], [])
    with pytest.raises(ValueError):
        Score.of("exact", ["a"], [ask("?", "a")] * 2)


def test_exact_match_takes_every_right_answer():
    conversations = [ask("?", " Hugo ", answers=("Victor Hugo",))] * 3
    assert ExactMatch.of(["Hugo", "Victor Hugo", "hugo"], conversations).right == 2
    assert [m.points for m in Score.of("exact", ["Hugo", "Victor Hugo", "hugo"], conversations).marks] == [1, 1, 0]


def test_the_bootstrap_is_every_possible_draw():
    points, out_of = np.array([[0.0, 1, 2, 5], [1, 1, 0, 3]]), np.array([[2.0, 3, 4, 5], [2, 3, 4, 5]])
    draws = bootstrap(points, out_of, 20_000)
    every = np.array(
        [points[:, list(d)].sum(1) / out_of[:, list(d)].sum(1) for d in itertools.product(range(4), repeat=4)]
    ).T
    for found, all_ in zip((*draws, draws[1] - draws[0]), (*every, every[1] - every[0])):
        at = np.quantile(all_, np.linspace(0.05, 0.95, 10)) + 1e-9

        def share(values):
            return (values[:, None] <= at).mean(0)

        assert np.abs(share(found) - share(all_)).max() < 0.02
    assert np.array_equal(draws, bootstrap(points, out_of, 20_000)) and not np.array_equal(
        draws, bootstrap(points, out_of, 20_000, seed=1)
    )
    assert np.array_equal(bootstrap(points, out_of, 50)[:1], bootstrap(points[:1], out_of[:1], 50)), (
        "the same draws, however many models"
    )


def test_intervals():
    exact = judged("exact", ["a"] * 7 + ["b"] * 3, [["a"]] * 10)
    assert exact.interval == ExactMatch(7, 10).interval and exact.value == 0.7
    alike = judged("cer", ["a"] * 10, [["a"]] * 10)
    assert (
        alike.interval is None
        and "no interval" in str(alike)
        and alike.to_dict()["interval_95"] is None
        and json.dumps(alike.to_dict())
    )
    score = judged("cer", ["ab", "a", "abc"] * 20, [["ab"]] * 60)
    assert (
        score.interval[0] < score.value < score.interval[1]
        and score.interval == judged("cer", ["ab", "a", "abc"] * 20, [["ab"]] * 60).interval
    )
    assert middle(np.arange(1001.0)) == (25, 975)


def test_a_table_has_every_question_in_one_row():
    marks = tuple(Mark(float(i % 3 == 0)) for i in range(30))
    categories = ["a<b", "", "c"] * 10
    table = ScoreTable({"x": Score(METRICS["exact"], marks)}, categories)
    kinds = table.kinds
    assert sorted(i for k, only in kinds.items() if k != "all" for i in only) == kinds["all"] == list(range(30))
    assert (
        set(kinds) == {"all", "a<b", "(no category)", "c"}
        and "100.0% (72% to 100%)" in str(table)
        and "a&lt;b" in table._repr_html_()
    )
    assert list(ScoreTable({"x": Score(METRICS["exact"], marks)}, [""] * 30).kinds) == ["all"]


# --- category and answers in data files -----------------------------------------------------------------------------


def test_category_and_answers_survive_every_dialect(tmp_path):
    c = replace(ask("Who?", "Hugo", id="1", category="author", answers=("Victor Hugo", "Hugo")))
    for dialect in DIALECTS:
        back = parse_record(json.loads(json.dumps(to_record(c, dialect))), Access(tmp_path))
        assert (back.category, back.answers, back.references) == (
            "author",
            ("Victor Hugo", "Hugo"),
            ("Hugo", "Victor Hugo"),
        )
    convert([c, ask("And?", "no", id="2")], tmp_path / "a.jsonl", "llava")
    convert(tmp_path / "a.jsonl", tmp_path / "b.json", "openai")
    first, second = read_conversations(tmp_path / "b.json")
    assert (first.category, first.answers, second.category, second.answers) == ("author", c.answers, "", ())
    assert "answers" not in json.loads((tmp_path / "b.json").read_text())[1]
    assert not check_data(tmp_path / "b.json").unread


@pytest.mark.parametrize(
    "extra",
    [
        {"category": ["a"]},
        {"category": "a" * 101},
        {"category": True},
        {"answers": "red"},
        {"answers": [""]},
        {"answers": [{"answer": "red"}]},
    ],
)
def test_a_category_that_is_none_is_an_error(extra, tmp_path):
    with pytest.raises(RecordError, match=next(iter(extra))):
        parse_record(to_record(ask("Who?", "Hugo"), "llava") | extra, Access(tmp_path))


def test_numbers_are_texts_too(tmp_path):
    c = parse_record(
        to_record(ask("How many?", "3"), "llava") | {"category": 7, "answers": [3, "three"]}, Access(tmp_path)
    )
    assert (c.category, c.references) == ("7", ("3", "three"))


def test_drawn_pictures_say_their_kind():
    assert {draw(1, kind).category for kind in KINDS} == set(KINDS)


# --- pictures -------------------------------------------------------------------------------------------------------


def shown(fig):
    return [ax for ax in fig.axes if ax.get_title() or ax.images]


def test_the_gallery_shows_any_conversation():
    many = ask("Which?", "the last", *[Image.new("RGB", (30 + 10 * i, 40), "red") for i in range(6)])
    wide = ask("What?", "a line", Image.new("RGB", (2000, 10), "red"))
    questions = [ask("What is 1 + 1?", "2"), many, wide, draw(1, "caption")]
    before = ["2", "the first", "$a$ " + "very long " * 60, "?"]
    fig = gallery(questions, before, ["3", "the last", "a line", "?"])
    axes = shown(fig)
    assert len(axes) == 4 and [len(ax.images) for ax in axes] == [0, 1, 1, 1], (
        "changed ones first, and the text alone has its question"
    )
    assert "What is 1 + 1?" in [t.get_text() for t in axes[0].texts] and "+2 more" in [
        t.get_text() for t in axes[1].texts
    ]
    assert "…" in axes[2].get_title() and len(axes[2].get_title()) < 250 and "3 of 4" in fig._suptitle.get_text()
    assert axes[0].title.get_color() != axes[1].title.get_color(), "worse and better"
    fig.canvas.draw()
    assert (
        len(shown(gallery(questions[:1], ["1"], ["1"]))) == 1
        and "(1.00)" in shown(gallery(questions[:1], ["1"], ["1"], metric="cer"))[0].get_title()
    )
    with pytest.raises(InputError, match="no conversations"):
        gallery([], [], [])


# --- in a job -------------------------------------------------------------------------------------------------------


def test_a_job_names_its_metric(tmp_path):
    from vlm_lora_lab.job import Job, train

    values = {
        "data": str(samples_folder() / "mixed.json"),
        "eval_data": str(samples_folder() / "mixed.json"),
        "output": str(tmp_path / "run"),
        "schedule": {"max_steps": 1, "batch_size": 1},
    }
    with pytest.raises(InputError, match="bleu"):
        Job.of(values | {"metric": "bleu"})
    with pytest.raises(InputError, match="cannot use this right answer"):
        train(Job.of(values | {"metric": "iou"}), say=lambda line: None)
    assert not (tmp_path / "run").exists()
    lines = []
    report = train(Job.of(values | {"metric": "cer"}), say=lines.append)
    assert (
        report["score"]["metric"] == "cer"
        and not report["score"]["higher_is_better"]
        and report["score"]["after"]["n"] == 3
    )
    assert set(report["exact_match"]) == {"before", "after"} and "character error rate" in "\n".join(lines)
