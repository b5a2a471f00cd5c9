"""What cannot be: numbers, words and names that no configuration class accepts, in Python, from a file, and in a
changed copy."""

import json
import math
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Annotated, ClassVar

import numpy as np
import pytest

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.batch import Reading
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.job import Job
from vlm_lora_lab.plan.tuning import Rule, TuningPlan, read_rules
from vlm_lora_lab.settings import FilePath, OneOf, Settings, Within, shown
from vlm_lora_lab.train.run import Schedule
from vlm_lora_lab.train.stages import Stage
from vlm_lora_lab.train.watch import Watch

CLASSES = {
    TuningPlan: {},
    Schedule: {},
    Reading: {},
    Watch: {},
    Rule: {"word": "lora"},
    Stage: {"plan": TuningPlan()},
    Job: {"data": "d.json", "output": "o"},
}
# no field of any class takes these
NEVER = [math.nan, math.inf, -math.inf, 1e39, 10**5000, -(10**15), b"x", {"a": 1}, object(), [math.nan], 3 + 1j]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_no_field_of_any_class_takes_what_cannot_be(cls):
    good = cls(**CLASSES[cls])
    for f in fields(cls):
        for value in NEVER:
            with pytest.raises(InputError) as e:
                cls(**CLASSES[cls] | {f.name: value})
            assert len(str(e.value)) < 1000 and f.name in str(e.value) or f.name in ("stages", "plan")
            with pytest.raises(InputError):
                replace(good, **{f.name: value})


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_a_bool_is_no_number_a_number_no_bool_and_neither_is_text(cls):
    for f in fields(cls):
        value = getattr(cls(**CLASSES[cls]), f.name)
        if isinstance(value, (bool, int, float)):
            for other in ["yes", "2e-4", None, 1, 0.5] if isinstance(value, bool) else ["2e-4", True, None, [1]]:
                with pytest.raises(InputError, match=f.name):
                    cls(**CLASSES[cls] | {f.name: other})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Job(data=3, output="o"), "data is 3. Write text, such as a path"),
        (lambda: Job(data="d", output="o", nan="banana"), "nan is 'banana'. Write one of stop, skip, rollback"),
        (lambda: Job(data="d", output="o", nan="stopp"), "Did you mean stop?"),
        (lambda: Job(data="d", output="o", metric=["exact"]), "metric is ['exact']"),
        (lambda: Job(data="d", output="o", metric="exakt"), "exakt"),
        (lambda: Job(data="d", output="x" * 300), "300 bytes"),
        (lambda: Job(data="/".join(["x" * 200] * 30), output="o"), "in a path of 6029"),
        (lambda: Job(data="d", output="a\0b"), "zero byte"),
        (lambda: Job(data="d", output="o", eval_data=""), "eval_data is empty"),
        (lambda: Job(data="d", output="o", plan={"rank": 8}), "TuningPlan(…) in Python"),
        (lambda: Job(data="d", output="o", stages=[TuningPlan()]), "stages[0]"),
        (
            lambda: Job(data="d", output="o", mix_share=1),
            "mix_share is 1. Write a number from 0 up to, not including, 1",
        ),
        (lambda: Job(data="d", output="o", watch=Watch(every=5)), "there is no evaluation data"),
        (lambda: Job(data="d", output="o", vision_cache="disk", plan=TuningPlan(vision="lora")), "vision: lora"),
        (
            lambda: Job(data="d", output="o", schedule=Schedule(epochs=1), stages=(Stage(TuningPlan(), steps=1),)),
            "each stage says its own length",
        ),
        (lambda: TuningPlan(language="lora(lr=nan)"), "lr is nan"),
        (lambda: TuningPlan(language="lora(alpha=inf)"), "alpha is inf"),
        (lambda: TuningPlan(language="lora(rank=" + "9" * 5000 + ")"), "rank is '999"),
        (lambda: TuningPlan(language="lora(rank=1000000000)"), "rank is 1000000000"),
        (lambda: TuningPlan(language="lora(targets=)"), "targets"),
        (lambda: TuningPlan(language=Rule("lora", lr=0.1), vision=True), "True is not a way to train a part"),
        (
            lambda: TuningPlan(alpha=math.nan),
            "alpha is nan. Write a number above 0, up to 1,000,000; twice the rank is usual",
        ),
        (lambda: TuningPlan(alpha=True), "alpha is True"),
        (lambda: TuningPlan(lora_plus=math.inf), "lora_plus is inf"),
        (lambda: TuningPlan(variant=["lora"]), "variant is ['lora']"),
        (lambda: TuningPlan(variant="pisa"), "Did you mean pissa?"),
        (lambda: TuningPlan(targets="q_proj"), "Write a list of layers, such as [q_proj, v_proj]"),
        (lambda: TuningPlan(targets=[]), "targets"),
        (lambda: TuningPlan(targets=["q_proj", 3]), "targets[1] is 3"),
        (lambda: TuningPlan(rank=10**9), "Write a whole number from 1 to 16,384; 8 to 64 are usual"),
        (lambda: Schedule(learning_rate=1e39), "learning_rate is 1e+39"),
        (lambda: Schedule(learning_rate="2e-4"), "YAML reads 2e-4 as text"),
        (lambda: Schedule(batch_size=10**15), "from 1 to 65,536"),
        (lambda: Schedule(max_length=10**12), "max_length is 1000000000000"),
        (lambda: Schedule(max_steps=10**5000), "a number of 5001 digits"),
        (lambda: Schedule(max_steps=0), "or -1 to go by epochs"),
        (lambda: Schedule(seed=-1), "negative"),
        (lambda: Rule("full", rank=8), "full has no rank"),
        (lambda: Rule("freeze", lr=1e-3), "freeze has no lr"),
        (lambda: Rule("both"), "Write one of freeze, lora, full"),
        (lambda: Rule("lora", on="0-3, 5"), "on is '0-3, 5'"),
        (lambda: Rule("lora", on="1" * 5000), "on is"),
        (lambda: Stage(TuningPlan(), steps=True), "steps is True"),
        (lambda: Stage(TuningPlan(), epochs=1, steps=1), "how long the stage is once"),
        (lambda: Stage({"language": "lora"}), "TuningPlan(…) in Python"),
        (lambda: Reading(workers=1.5), "workers is 1.5"),
    ],
)
def test_an_illegal_one_cannot_be_built(make, message):
    with pytest.raises(InputError) as e:
        make()
    assert message in str(e.value) and len(str(e.value)) < 600


def test_what_was_allowed_still_is():
    assert Schedule(batch_size=8.0).batch_size == 8 and isinstance(Schedule(batch_size=8.0).batch_size, int)
    assert (
        Schedule(learning_rate=np.float32(0.5), seed=np.int64(3)) == Schedule(learning_rate=0.5, seed=3)
        and type(Schedule(seed=np.int64(3)).seed) is int
    )
    assert Schedule(epochs=Fraction(1, 2)).epochs == 0.5 and Schedule(full_learning_rate=0).full_rate == 0
    assert (
        TuningPlan(targets=["q_proj"]).targets == ("q_proj",)
        and TuningPlan(language=Rule("lora", rank=4)).language == "lora(rank=4)"
    )
    job = Job.of({"data": "d", "output": "o", "model": None, "plan": None, "stages": None, "vision_cache": False})
    assert job.vision_cache == "off" and job.model == "lab" and Job.of(json.loads(json.dumps(job.to_dict()))) == job
    assert json.loads(json.dumps(TuningPlan().to_dict())) == {
        "vision": "freeze",
        "connector": "full",
        "language": "lora",
        "embeddings": "freeze",
        "head": "freeze",
        "rank": 16,
        "alpha": 32,
        "dropout": 0.0,
        "targets": None,
        "variant": "lora",
        "lora_plus": None,
    }
    assert Job(data=__import__("pathlib").Path("a/b"), output="o").data == "a/b"
    assert (
        ", ".join(map(str, read_rules("lora(rank=4, alpha=9.0) on mlp, full(lr=1e-05) on 3")))
        == "lora(rank=4, alpha=9.0) on mlp, full(lr=1e-05) on 3"
    )


def test_a_place_comes_from_the_outside_in():
    with pytest.raises(InputError, match=r"^job\.yaml, plan, rank: rank is 0"):
        Job.of({"data": "d", "output": "o", "plan": {"rank": 0}}, "job.yaml")
    with pytest.raises(InputError, match=r"^job\.yaml, stages, 2, plan, alpha: alpha is nan"):
        Job.of({"data": "d", "output": "o", "stages": [{"steps": 1}, {"plan": {"alpha": math.nan}}]}, "job.yaml")
    with pytest.raises(InputError, match=r"^job\.yaml, nan: nan is 'x'"):
        Job.of({"data": "d", "output": "o", "nan": "x"}, "job.yaml")


def test_a_class_of_one_s_own():
    @dataclass(frozen=True)
    class Mine(Settings):
        SECTION: ClassVar[str] = "mine"

        name: Annotated[str, FilePath()]
        word: Annotated[str, OneOf(("a", "b"))] = "a"
        free: float = 0
        bound: Annotated[int, Within(0, 5, below=True)] | None = None

    assert Mine.of({"name": "x", "bound": 4}).to_dict() == {"name": "x", "word": "a", "free": 0, "bound": 4}
    for values in ({}, {"name": "x", "bound": 5}, {"name": "x", "free": 10**30}, {"name": "x", "nam": 1}, {1: 2}):
        with pytest.raises(InputError, match="mine"):
            Mine.of(values)
    assert shown([10**5000]) == "a list that cannot be printed" and len(shown("x" * 10**6)) == 60


@pytest.mark.parametrize(
    "text, message",
    [
        ("plan: {alpha: .nan}", "alpha is nan"),
        ("plan: {alpha: true}", "alpha is True"),
        ("plan: {lora_plus: .inf}", "lora_plus is inf"),
        ("plan: {variant: [lora]}", "variant is ['lora']"),
        ("plan: {language: 'lora(lr=nan)'}", "lr is nan"),
        ("metric: [exact]", "metric is ['exact']"),
        ("schedule: {learning_rate: 1e39}", "which is text"),
        ("schedule: {learning_rate: 1.0e+39}", "learning_rate is 1e+39"),
        ("schedule: {max_steps: " + "9" * 5000 + "}", "4300"),
        ("eval_data: " + "x" * 300, "300 bytes"),
        ("plan: 5", "plan is 5"),
        ("stages: {plan: {}}", "Write a list"),
        ("[" * 3000, "neither YAML nor JSON"),
        ("- a", "key: value"),
        ("a: &a [*a]", "unfold to more than"),
    ],
)
def test_a_job_file_with_it_is_one_sentence(text, message, tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(f"data: d.json\noutput: o\n{text}" if text[0] not in "[-" else text)
    for command in ("train", "doctor"):
        assert main([command, str(tmp_path / "job.yaml")]) == 2
        err = capsys.readouterr().err
        assert message in err and len(err) < 1500 and err.count("\n") == 1, err
