"""What a run costs in language is measured before, during and after, and kept."""

import json
import math

import pytest
import torch
from families import OURS, SMALL_PICTURES, STAND_INS, made, native_folder

from vlm_lora_lab import job
from vlm_lora_lab.cli import main
from vlm_lora_lab.data.native import load_processor
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.evaluate import language
from vlm_lora_lab.evaluate.language import Language, Text, cost, instructions, token_loss
from vlm_lora_lab.evaluate.scores import Score
from vlm_lora_lab.models.load import load_vlm

DATA = samples_folder() / "handwriting"
SHORT = ["--data", str(DATA / "train.json"), "--batch-size", "4", "--rank", "2", "--vision-cache", "off"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "own.txt"
    file.write_text("top left red circle, top right blue square\n" * 20)
    return str(file)


@pytest.mark.parametrize("family", [*OURS, *SMALL_PICTURES])
def test_loss_is_the_mean_over_what_was_predicted(family, tmp_path):
    ours, base = family in OURS, tmp_path / "base"
    folder = made(STAND_INS[family], dtype=torch.float32) if ours else native_folder(family, base, dtype=torch.float32)
    model, tokenizer = load_vlm(folder, dtype=torch.float32), load_processor(folder).tokenizer
    ids = tokenizer(Text.of("english").content)["input_ids"][:40]
    batch = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits
    by_hand = torch.nn.functional.cross_entropy(logits[0, :-1].float(), batch[0, 1:])
    assert token_loss(model, ids) == pytest.approx(by_hand.item(), abs=1e-4)
    whole = token_loss(model, ids[:20]) * 19 + token_loss(model, ids[20:]) * 19
    assert token_loss(model, ids, window=20) == pytest.approx(whole / 38, abs=1e-5), "windows start without a past"


def test_an_answer_counts_when_it_contains_the_word():
    rows = [c for c in instructions() if c.answer in ("Paris", "seven")]
    assert Score.of("contains", ["It is paris.", "A week has 7 days"], rows).value == 1
    assert Score.of("contains", ["Parisian", "in 1977"], rows).value == 0
    assert len({c.question for c in instructions()}) == 100


def test_a_run_says_what_it_cost(text, tmp_path, capsys):
    out = tmp_path / "run"
    held = ["--eval-data", str(DATA / "validation.json"), "--questions", "2", "--every", "2"]
    told = [*SHORT, *held, "--output", str(out), "--max-steps", "4", "--watch-text", text]
    assert main(["train", *told]) == 0
    said, report = capsys.readouterr().out, json.loads((out / "report.json").read_text())
    before, after = (Language.from_dict(report["language"][k]) for k in ("before", "after"))
    assert before.loss != after.loss and before.right is None and before.text == text
    assert f"language {cost(before, after)}" in said
    watched = [row["perplexity"] for row in report["watched"]]
    curve = job._with_language([], report | {"steps": 4})
    assert [row["step"] for row in curve] == [0, 4] and curve[0]["eval_perplexity"] == before.perplexity
    assert len(watched) == 2 and watched[-1] == pytest.approx(after.perplexity, rel=1e-4)
    alone = Language.of(load_vlm("lab", four_bit=True), load_processor("lab"), Text.of(text))
    assert before.loss == pytest.approx(alone.loss, rel=1e-5), "before is the base as it was loaded"

    kept = (out / "language.json").read_bytes()
    longer = [*told, "--resume"]
    longer[longer.index("--max-steps") + 1] = "6"
    assert main(["train", *longer]) == 0
    again = json.loads((out / "report.json").read_text())["language"]
    assert (out / "language.json").read_bytes() == kept and again["before"] == report["language"]["before"]
    assert again["after"] != report["language"]["after"]


def test_a_run_without_evaluation_data_is_measured_too(text, tmp_path):
    out = tmp_path / "run"
    assert main(["train", *SHORT, "--output", str(out), "--max-steps", "1", "--watch-text", text]) == 0
    report = json.loads((out / "report.json").read_text())
    assert "watched" not in report and report["language"]["after"]["tokens"] == report["language"]["before"]["tokens"]


def test_checkpoints_are_compared_and_not_measured_twice(text, tmp_path, capsys, monkeypatch):
    rows = json.loads((DATA / "test.json").read_text())[:4]
    data = tmp_path / "four.json"
    data.write_text(json.dumps([r | {"image": str(DATA / r["image"])} for r in rows]))
    asked = ["evaluate", "lab", "--data", str(data), "--allow-outside", "--output", str(tmp_path / "o")]
    assert main([*asked, "--watch-text", text]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("Language of lab: perplexity"))
    kept = json.loads((tmp_path / "o" / "report.json").read_text())["checkpoints"][0]["language"]
    assert f"{math.exp(kept['loss']):,.1f}" in line

    def never(*args, **kwargs):
        raise AssertionError("it was measured before")

    monkeypatch.setattr(language, "token_loss", never)
    assert main([*asked, "--watch-text", text]) == 0
    assert line in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, says",
    [(None, "cannot be read"), (b"", "is empty"), (b"\xff\xfe\x00", "not UTF-8"), (b" \n", "is empty")],
)
def test_a_text_that_is_none_stops_a_run_before_it_begins(content, says, tmp_path, capsys):
    file, out = tmp_path / "text.txt", tmp_path / "run"
    if content is not None:
        file.write_bytes(content)
    assert main(["train", *SHORT, "--output", str(out), "--max-steps", "1", "--watch-text", str(file)]) == 2
    assert says in capsys.readouterr().err and not out.exists()


def test_two_texts_are_not_compared():
    one, other = (Language("a", sha, 2, 1.0) for sha in "ab")
    with pytest.raises(ValueError, match="different texts"):
        cost(one, other)
    with pytest.raises(InputError, match="cannot be read"):
        Text.of("/")


@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_a_lost_measurement_costs_no_adapter(text, tmp_path, capsys, harm, monkeypatch):
    out = tmp_path / "run"
    told = ["train", *SHORT, "--output", str(out), "--max-steps", "1", "--watch-text", text]
    measured = job._spoken

    def without(*args):
        (out / "language.json").unlink() if harm == "gone" else (out / "language.json").write_text("{}")
        return measured(*args)

    monkeypatch.setattr(job, "_spoken", without)
    assert main(told) == 0 and (out / "adapter" / "adapter_model.safetensors").is_file()
    said, report = capsys.readouterr().out, json.loads((out / "report.json").read_text())
    assert "is not known, and the adapter is saved all the same" in said and "language" not in report
