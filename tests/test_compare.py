"""Comparing checkpoints: what is kept, what makes it stale, what the numbers promise, and the command."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlm_lora_lab.evaluate.compare as module
from vlm_lora_lab.checkpoint.merge import merge_adapter, save_merged
from vlm_lora_lab.checkpoint.save import load_adapter, save_adapter
from vlm_lora_lab.cli import main
from vlm_lora_lab.evaluate.compare import (
    Checkpoint,
    Comparison,
    compare,
    comparison_figure,
    data_digest,
    folder_digest,
    versus,
)
from vlm_lora_lab.data.batch import Processor
from vlm_lora_lab.data.records import read_conversations, samples_folder
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.evaluate.ask import generate_answers
from vlm_lora_lab.evaluate.metrics import METRICS, Mark
from vlm_lora_lab.evaluate.scores import Score
from vlm_lora_lab.models.load import lab_folder, load_tokenizer, load_vlm
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

QUESTIONS = 12


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Two adapters that say different things, one of them merged, and a file of questions."
    root = tmp_path_factory.mktemp("made")
    tokenizer = load_tokenizer("lab")
    for name, noise in (("small", 0.1), ("large", 0.2)):
        torch.manual_seed(len(name))
        plan = TuningPlan(connector="freeze", rank=4)
        model = apply_plan(load_vlm("lab", four_bit=True), plan)
        for p in model.parameters():
            if p.requires_grad:
                p.data += noise * torch.randn_like(p)
        save_adapter(model, root / name, plan, "lab", tokenizer, four_bit=True)
    save_merged(merge_adapter(root / "large"), root / "merged", "lab")
    records = json.loads((samples_folder() / "handwriting" / "test.json").read_text())[:QUESTIONS]
    for i, r in enumerate(records):
        shutil.copy(samples_folder() / "handwriting" / r["image"], root / f"{i}.png")
        r |= {"image": f"{i}.png", "category": f"{len(r['conversations'][1]['content'])} digits"}
    (root / "data.json").write_text(json.dumps(records))
    return root


def run(made, *names, **kwargs):
    lines = []
    names = [n if n == "lab" else made / n for n in names]
    return compare(
        names, kwargs.pop("data", made / "data.json"), say=lines.append, **{"batch_size": 5} | kwargs
    ), "\n".join(lines)


@pytest.fixture
def loads(monkeypatch):
    "Every checkpoint that is loaded, by name."
    seen, load = [], Checkpoint.load
    monkeypatch.setattr(Checkpoint, "load", lambda self: seen.append(Path(self.name).name) or load(self))
    return seen


def test_the_answers_are_those_of_each_model_alone(made, tmp_path, loads):
    results, said = run(made, "lab", "small", "large", "merged", metrics=["exact", "cer"], output=tmp_path / "out")
    assert loads == ["lab", "small", "large", "merged"]
    conversations = read_conversations(made / "data.json")
    for name, model in (("lab", load_vlm("lab")), (str(made / "large"), load_adapter(made / "large"))):
        answers = generate_answers(
            model, Processor.of(model.config, load_tokenizer("lab")), conversations, batch_size=1
        )
        for metric in ("exact", "cer"):
            assert results[metric].scores[name] == Score.of(metric, answers, conversations)
    large, merged, small = (results["cer"].scores[str(made / n)] for n in ("large", "merged", "small"))
    assert large.marks == merged.marks != small.marks != results["cer"].scores["lab"].marks
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [c["name"] for c in report["checkpoints"]] == ["lab", *(str(made / n) for n in ("small", "large", "merged"))]
    first, second = report["checkpoints"][:2]
    assert (
        second["base"] == "lab"
        and second["four_bit"]
        and second["plan"]["rank"] == 4
        and "torch" in second["trained_with"]
        and "torch" in first["versions"]
    )
    assert report["results"][1]["higher_is_better"] is False and report["resamples"] == 10_000
    lines = [json.loads(line) for line in (tmp_path / "out" / "questions.jsonl").read_text().splitlines()]
    assert (
        len(lines) == QUESTIONS
        and set(lines[0]["answers"]) == set(results["cer"].scores)
        and "cer" in lines[0]["answers"]["lab"]
    )
    assert (tmp_path / "out" / "compare-exact.png").stat().st_size > 5000 and "won : lost" in said
    assert {"all", "1 digits", "2 digits", "3 digits"} == set(report["results"][0]["scores"]["lab"])


def answers_of(out, name):
    report = json.loads((out / "report.json").read_text())
    return out / "answers" / next(c["answers"] for c in report["checkpoints"] if c["name"].endswith(name))


def test_nothing_is_asked_twice_and_a_stopped_run_goes_on(made, tmp_path, loads):
    out = tmp_path / "out"
    first, _ = run(made, "lab", "small", output=out)
    run(made, "lab", "small", metrics=["anls"], output=out)
    assert loads == ["lab", "small"], "another metric asks nothing"
    file = answers_of(out, "small")
    whole = file.read_bytes()
    ends = [i + 1 for i, b in enumerate(whole) if b == ord("\n")]
    for cut in (30, ends[0] + 3, ends[4], ends[-1] - 1):
        file.write_bytes(whole[:cut])
        again, said = run(made, "lab", "small", output=out)
        kept = max(0, sum(e <= cut for e in ends) - 1)
        assert f"{QUESTIONS - kept} questions in" in said and (f"{kept} answered before" in said) == (kept > 0)
        assert file.read_bytes() == whole and again["exact"].scores == first["exact"].scores
    assert loads == ["lab", "small"] + ["small"] * 4


def test_ctrl_c_keeps_what_was_answered(made, tmp_path, monkeypatch):
    real, out = module.answer_all, tmp_path / "out"

    def stopped(*args):
        batches = real(*args)
        yield next(batches)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "answer_all", stopped)
    lines = []
    with pytest.raises(KeyboardInterrupt):
        compare(["lab"], made / "data.json", output=out, batch_size=5, say=lines.append)
    assert "the same command goes on" in lines[-1] and not (out / "report.json").exists()
    monkeypatch.setattr(module, "answer_all", real)
    _, said = run(made, "lab", output=out)
    assert f"{QUESTIONS - 5} questions in" in said and "5 answered before" in said


def test_killed_while_asking(made, tmp_path):
    "The hard way, in a process of its own; what is on the disk is taken up, and the end is the same."
    script = "import sys; from vlm_lora_lab.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = ["evaluate", str(made / "small"), "--data", str(made / "data.json"), "--batch-size", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *argv, "--output", str(tmp_path / "killed")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    answers, end = tmp_path / "killed" / "answers", time.monotonic() + 200
    while (
        process.poll() is None
        and time.monotonic() < end
        and not any(f.read_bytes().count(b"\n") > 3 for f in answers.glob("*"))
    ):
        time.sleep(0.005)
    process.kill()
    process.communicate()
    [file] = answers.iterdir()
    kept = file.read_bytes().count(b"\n") - 1
    assert kept >= 3
    _, said = run(made, "small", output=tmp_path / "killed")
    assert f"{kept} answered before" in said or f"all {kept}" in said
    whole, _ = run(made, "small", output=tmp_path / "whole")
    assert file.read_bytes() == (tmp_path / "whole" / "answers" / file.name).read_bytes()


def test_a_changed_answer_file_is_refused(made, tmp_path, loads):
    out = tmp_path / "out"
    run(made, "lab", output=out)
    file = answers_of(out, "lab")
    whole = file.read_bytes()
    lines = whole.split(b"\n")
    for broken in (
        whole.replace(b'"n": 3', b'"n": 4'),
        whole.replace(b'"id": "test-0002"', b'"id": "test-0003"'),
        whole.replace(b'"questions": "', b'"questions": "0'),
        b"\n".join([*lines[:3], lines[3][:5], *lines[4:]]),
        b"\n".join([*lines[:3], *lines[4:]]),
        whole + lines[-2] + b"\n",
        whole.replace(b'"answer": "', b'"answer": 1, "x": "'),
    ):
        assert broken != whole
        file.write_bytes(broken)
        with pytest.raises(InputError, match="Remove this file"):
            run(made, "lab", output=out)
    assert loads == ["lab"]


def test_the_key_holds_all_that_an_answer_depends_on(made, tmp_path):
    keys, copy = [], tmp_path / "copy"
    shutil.copytree(made / "small", copy)
    shutil.copytree(made / "merged", tmp_path / "whole")
    keys.append(folder_digest(copy))
    weights = copy / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    keys.append(folder_digest(copy))
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1}))
    keys.append(folder_digest(copy))
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        keys.append(folder_digest(tmp_path / "whole"))
        file = tmp_path / "whole" / name
        changed = bytearray(file.read_bytes())
        changed[len(changed) // 2] ^= 1
        file.write_bytes(changed)
    assert len(set(keys)) == len(keys) and folder_digest(made / "small") == keys[0]
    assert folder_digest(lab_folder()) != folder_digest(made / "merged")
    conversations = read_conversations(made / "data.json")
    before = data_digest(conversations)
    assert before == data_digest(read_conversations(made / "data.json"))
    picture = (made / "3.png").read_bytes()
    try:
        (made / "3.png").write_bytes((made / "4.png").read_bytes())
        assert data_digest(conversations) != before
    finally:
        (made / "3.png").write_bytes(picture)
    assert data_digest(conversations[::-1]) != before and data_digest(conversations[1:]) != before


def test_other_settings_ask_again(made, tmp_path, loads):
    out = tmp_path / "out"
    run(made, "lab", output=out)
    run(made, "lab", output=out, max_new_tokens=3)
    run(made, "lab", output=out, four_bit=True)
    run(made, "lab", output=out, batch_size=3)
    assert loads == ["lab"] * 3 and len(list((out / "answers").iterdir())) == 3, (
        "only the size of the batches changes nothing"
    )


def test_answers_that_were_cut_off_are_said(made):
    _, said = run(made, "lab", max_new_tokens=1)
    assert "were cut off at 1 tokens" in said
    assert "cut off" not in run(made, "lab")[1]


@pytest.mark.parametrize(
    "names, kwargs, message",
    [
        (["lab", "lab"], {}, "twice"),
        ([], {}, "no checkpoint"),
        (["lab"], {"metrics": ["bleu"]}, "bleu"),
        (["lab"], {"metrics": []}, "no metric"),
        (["lab"], {"metrics": ["iou"]}, "cannot use this right answer"),
        (["nowhere"], {}, "no model"),
        (["lab"], {"data": "nowhere.json"}, "nowhere"),
        (["small"], {"base": "nowhere/at/all"}, "no model"),
        (["lab"], {"data": []}, "no questions"),
        (["lab"], {"max_length": 10}, "limit of 10"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(made, tmp_path, loads, names, kwargs, message):
    with pytest.raises(InputError, match=message):
        run(made, *names, output=tmp_path / "out", **kwargs)
    assert not loads and not (tmp_path / "out").exists()


def test_a_bad_picture_is_found_before_anything_is_loaded(made, tmp_path, loads):
    folder = tmp_path / "data"
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("merged", "small", "large"))
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:60])
    with pytest.raises(InputError, match="7.png"):
        run(made, "lab", data=folder / "data.json", output=tmp_path / "out")
    assert not loads and not (tmp_path / "out").exists()


def test_a_wrong_base_is_refused(made, tmp_path):
    with pytest.raises(InputError, match="another base"):
        run(made, "small", base=made / "merged")


def test_a_folder_of_somebody_else_is_left_alone(made, tmp_path, loads):
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(InputError, match="thesis.txt"):
            run(made, "lab", output=out)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"] and not loads


# --- numbers --------------------------------------------------------------------------------------------------------


def score(values, metric="exact"):
    return Score(METRICS[metric], tuple(Mark(float(v)) for v in values))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30))
def test_changing_places_changes_the_sign(pairs):
    a, b = (score([p[i] for p in pairs], "cer") for i in (0, 1))
    forth, back = versus(a, b, resamples=300), versus(b, a, resamples=300)
    assert back.difference == pytest.approx(-forth.difference) and (back.better, back.same, back.worse) == (
        forth.worse,
        forth.same,
        forth.better,
    )
    assert forth.better == sum(y < x for x, y in pairs), "for an error rate lower is better"
    assert (forth.interval is None) == (len({y - x for x, y in pairs}) == 1)
    if forth.interval:
        assert (
            back.interval == pytest.approx((-forth.interval[1], -forth.interval[0]))
            and forth.interval[0] <= forth.interval[1]
        )
        assert forth.sure == back.sure


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    true = 0.3 * 0.5 - 0.7 * 0.1
    for seed in range(200):
        first = rng.random(150) < 0.7
        second = np.where(first, rng.random(150) >= 0.1, rng.random(150) < 0.5)
        low, high = versus(score(first), score(second), resamples=1000, seed=seed).interval
        hits += low <= true <= high
    assert 181 <= hits <= 199  # 190 ± 3 standard deviations


def test_pairing_is_what_makes_it_narrow():
    rng = np.random.default_rng(0)
    first = rng.random(300) < 0.6
    second = np.where(rng.random(300) < 0.05, ~first, first)
    narrow, wide = (
        versus(score(first), score(second)).interval,
        versus(score(first), score(rng.permutation(second))).interval,
    )
    assert np.ptp(narrow) < 0.5 * np.ptp(wide)
    with pytest.raises(ValueError):
        versus(score(first), score(first[1:]))


def test_figure_and_table_of_one_and_of_many():
    rng = np.random.default_rng(0)
    scores = {f"runs/a-rather-long-name-of-an-experiment/{i}/adapter": score(rng.random(60) < 0.5) for i in range(3)}
    many = Comparison(scores, ("a", "b", "") * 20)
    left, right = comparison_figure(many).axes
    assert len(left.get_yticklabels()) == 3 and [t.get_text() for t in right.get_yticklabels()] == [
        "all (60)",
        "(no category) (20)",
        "a (20)",
        "b (20)",
    ]
    assert len(right.get_legend().get_texts()) == 2 and len({t.get_text() for t in left.get_yticklabels()}) == 3
    assert json.dumps(many.to_dict()) and len(many.differences) == 2 and "won : lost" in many._repr_html_()
    one = Comparison(dict(list(scores.items())[:1]), ("",) * 60)
    assert not one.differences and "won" not in str(one) and one.to_dict()["beside_the_first"] == {}
    comparison_figure(one).canvas.draw()


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command(made, tmp_path, capsys):
    argv = [
        "lab",
        str(made / "small"),
        "--data",
        str(made / "data.json"),
        "--metric",
        "cer",
        "--metric",
        "exact",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(["compare", *argv]) == 0
    said = capsys.readouterr().out
    assert (
        "character error rate, lower is better" in said
        and "exact match, higher is better" in said
        and "12 questions in" in said
    )
    assert main(["compare", *argv]) == 0 and "all 12 answers were there" in capsys.readouterr().out
    assert (
        main(["evaluate", str(made / "small"), "--data", str(made / "data.json"), "--output", str(tmp_path / "out")])
        == 0
    )
    assert "won" not in capsys.readouterr().out, "one alone is compared with nothing"
    assert main(["evaluate", "lab", "--data", "nowhere.json"]) == 2 and "nowhere.json" in capsys.readouterr().err
    assert (
        main(["compare", "lab", "--data", str(made / "data.json"), "--metric", "bleu"]) == 2
        and "cer" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(["evaluate", "lab", str(made / "small"), "--data", "x.json"])


def test_the_help_names_every_metric(capsys):
    for command in ("compare", "evaluate"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert all(f" {m}" in text for m in METRICS) and "vlm-lora-lab compare lab" in text


def test_ctrl_c_in_the_command_says_how_to_go_on(made, tmp_path, monkeypatch, capsys):
    def stopped(*args):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(module, "answer_all", stopped)
    assert main(["evaluate", "lab", "--data", str(made / "data.json"), "--output", str(tmp_path / "out")]) == 130
    out, err = capsys.readouterr()
    assert "goes on from there" in out and not err


def test_an_adapter_that_was_unfrozen_by_hand_has_no_plan_to_show(tmp_path):
    torch.manual_seed(0)
    model = apply_plan(load_vlm("lab"), TuningPlan(connector="freeze", rank=2))
    model.get_base_model().resampler.requires_grad_(True)
    folder = save_adapter(model, tmp_path / "adapter", None, "lab", load_tokenizer("lab"), four_bit=False)
    assert Checkpoint.of(folder).told["plan"] is None
