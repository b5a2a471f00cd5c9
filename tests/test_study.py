"""The experiments: their files are whole and their statistics are right. (`test_claims.py` holds a small run of today
to them.)"""

import json
import math
import random

import pytest

from vlm_lora_lab.data.drawn import scene
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.lora.targets import CHOICES, lora_size, rank_for
from vlm_lora_lab.models.published import on_meta
from vlm_lora_lab.plan.tuning import TuningPlan, lora_layers
from vlm_lora_lab.study import claims
from vlm_lora_lab.study.experiments import EXPERIMENTS, Mean, Results, main, results
from vlm_lora_lab.study.shifts import SHIFTS, shift


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_result_file_holds_what_the_experiment_asks_for(name):
    experiment, found = EXPERIMENTS[name](), results(name)
    assert (found.question, found.steps, list(found.arms), found.tasks) == (
        experiment.question,
        experiment.steps,
        list(experiment.arms),
        list(experiment.tasks),
    )
    for task in experiment.tasks:
        for arm, how in experiment.arms.items():
            rows = [r for r in found.rows if (r["task"], r["arm"], r["split"]) == (task, arm, "test")]
            assert sorted(r["seed"] for r in rows) == list(range(experiment.seeds))
            assert len({r["factor"] for r in rows}) == 1 and any(
                math.isclose(rows[0]["factor"], f) for f in how.factors
            )
            assert all(0 <= r["new"] <= 1 and 0 <= r["old"] <= 1 and r["trainable"] > 0 for r in rows)
            tried = {}
            for r in found.rows:
                if (r["task"], r["arm"], r["split"]) == (task, arm, "validation"):
                    assert r["seed"] >= 100  # never a seed that is reported
                    tried.setdefault(r["factor"], []).append(r["new"])
            if len(how.factors) > 1:
                assert len(tried) == len(how.factors)
                most = max(len(v) for v in tried.values())
                means = {f: sum(v) / len(v) for f, v in tried.items() if len(v) == most}
                assert means[rows[0]["factor"]] == max(means.values())


def test_a_mean_knows_its_interval():
    five = Mean((1.0, 2.0, 3.0, 4.0, 5.0))
    assert five.mean == 3 and math.isclose(five.half, 2.776 * math.sqrt(2.5 / 5)) and five.sign == 1
    assert (five - Mean((2.0, 3.0, 4.0, 5.0, 6.0))).sign == -1 and (five - five).sign == 0
    assert Mean((3.0,)).sign == 0 and math.isinf(Mean((3.0,)).half)
    with pytest.raises(ValueError):
        five - Mean((1.0, 2.0))


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["resampler", "--seeds", "11"]) == 2 and "1 to 10 seeds" in capsys.readouterr().err
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"question": "another", "steps": 1, "arms": [], "rows": []}))
    before = other.read_bytes()
    assert main(["resampler", "--output", str(other)]) == 2 and "another question" in capsys.readouterr().err
    assert other.read_bytes() == before
    with pytest.raises(KeyError):
        results("nothing")
    with pytest.raises(KeyError):
        Results("q", 1, ("a",), (), {}).of("words", "a")


@pytest.mark.parametrize("name", [*SHIFTS, "names", "letters", "sides"])
def test_a_task_is_the_same_every_time_and_its_splits_are_apart(name):
    task = shift(name)
    assert (len(task.train), len(task.validation), len(task.test)) == (2000, 200, 200)
    if name != "pictures":
        assert not set(task.train.seeds) & (set(task.validation.seeds) | set(task.test.seeds)) and not set(
            task.validation.seeds
        ) & set(task.test.seeds)
        assert (
            task.test[7].answer == task.test[7].answer
            and task.test[7].images[0].tobytes() == task.test[7].images[0].tobytes()
        )
    with pytest.raises(KeyError):
        shift("sounds")


def test_a_question_with_another_meaning_is_answered_by_what_is_there():
    where = {"K": "top left", "Q": "top right", "Z": "bottom left", "X": "bottom right"}
    for name, place_of in (
        ("letters", where.get),
        ("sides", lambda said: said.replace("left", "RIGHT").replace("right", "left").lower()),
    ):
        seen = set()
        for seed in range(40):
            row, (_, content, _) = shift(name).train[seed], scene(random.Random(f"{name} {seed}"), 4)
            said = row.question.split("at the ")[1].rstrip("?")
            assert len(content) == 4 and row.answer == "a {} {}".format(*content[place_of(said)])
            seen.add(said)
        assert len(seen) == 4


def test_a_stopped_command_says_so(monkeypatch, capsys):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setitem(EXPERIMENTS, "resampler", stop)
    monkeypatch.setattr(claims, "measure", stop)
    for command, arguments in ((main, ["resampler"]), (claims.main, ["--claims", "C1", "--output", "nowhere.json"])):
        assert command(arguments) == 130 and "Stopped" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["openbmb/MiniCPM-V-2_6", "Qwen/Qwen2.5-VL-7B-Instruct", "lab"])
def test_the_size_of_a_choice_is_what_the_plan_gives(name):
    model = on_meta(name)
    for targets in CHOICES.values():
        layers = lora_layers(model, TuningPlan(connector="freeze", targets=targets, rank=3))
        assert lora_size(model, targets, 3) == sum(3 * sum(model.get_submodule(n).weight.shape) for n in layers)
        rank = rank_for(model, targets, CHOICES["all"], 8)
        assert abs(lora_size(model, targets, rank) / lora_size(model, CHOICES["all"], 8) - 1) < 0.05
    assert rank_for(model, CHOICES["all"], CHOICES["q,k"], 1) == 1


def test_a_choice_that_a_model_does_not_have_names_what_it_has():
    with pytest.raises(InputError, match="c_attn"):
        lora_size(on_meta("Qwen/Qwen-VL"), CHOICES["q,v"])
