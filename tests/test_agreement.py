"""Doctor and train hold the same opinion of every job: what the one refuses, the other refuses, in the same words, and
the doctor writes nothing."""

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

import vlm_lora_lab.job as job_module
from vlm_lora_lab.cli import main
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.errors import InputError

HANDWRITING = samples_folder() / "handwriting"
JOBS, QUICK = 300, 20


class Reached(Exception):
    "The training is about to make its first step."


def reached(*args, **kwargs):
    raise Reached


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "Data files and folders, good and bad."
    folder = tmp_path_factory.mktemp("world")
    records = json.loads((HANDWRITING / "train.json").read_text())[:6]
    for r in records:
        Image.open(HANDWRITING / r["image"]).save(folder / Path(r["image"]).name)
        r["image"] = Path(r["image"]).name
    text = [
        {
            "id": f"t{i}",
            "conversations": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": str(i)}],
        }
        for i in range(5)
    ]
    long = {
        "id": "long",
        "conversations": [{"role": "user", "content": "very " * 3000}, {"role": "assistant", "content": "yes"}],
    }
    turns = {
        "id": "turns",
        "conversations": [
            m
            for i in range(150)
            for m in ({"role": "user", "content": f"And {i}?"}, {"role": "assistant", "content": f"also {i}"})
        ],
    }
    box = {
        "id": "box",
        "conversations": [
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": "<box>(1,2),(30,40)</box>"},
        ],
    }
    files = {
        "good": records,
        "text": text,
        "mixed": text[:3] + records[:3],
        "one": records[:1],
        "bad_picture": [*records[:3], records[3] | {"image": "broken.png"}, records[4]],
        "no_picture": [*records[:3], records[3] | {"image": "nowhere.png"}],
        "all_bad": [r | {"image": "nowhere.png"} for r in records[:2]],
        "too_long": [*records[:2], long],
        "many_turns": [*records[:2], turns],
        "boxes": [box, box | {"id": "box2"}],
        "no_answer": [*records[:2], {"id": "q", "conversations": [{"role": "user", "content": "Why?"}]}],
        "outside": [records[0] | {"image": "../elsewhere.png"}],
        "empty": [],
    }
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "half.json").write_text(json.dumps(records)[:200])
    (folder / "gbk.json").write_bytes('[{"id": "中文"}]'.encode("gbk"))
    (folder / "hollow").mkdir()
    (folder / "config_only").mkdir()
    (folder / "config_only" / "config.json").write_text('{"model_type": "minicpmv", "version": 2.6}')
    (folder / "nonsense").mkdir()
    (folder / "nonsense" / "config.json").write_text('{"model_type": "bert"}')
    return folder


def some_job(world, g, number):
    "A job as a file might hold it, most of it sound; about half of all have something wrong somewhere."

    def chance(p):
        return g.random() < p

    def data():
        return str(
            world
            / f"{g.choice(['good', 'good', 'text', 'mixed', 'one', 'many_turns'] if chance(0.85) else SORTS)}.json"
        )

    job = {
        "data": data(),
        "output": str(world / f"out-{number}"),
        "schedule": {
            "batch_size": g.choice([1, 2, 4]),
            "max_steps": g.choice([1, 2, -1]),
            "epochs": g.choice([0.5, 1, 3]),
        },
    }
    plan = {"rank": g.choice([1, 2, 8]), "connector": g.choice(["full", "lora", "freeze"]), "language": "lora"}
    if chance(0.35):
        plan |= g.choice(PLANS)
    job["plan"] = plan
    if chance(0.3):
        job["eval_data"] = str(world / f"{g.choice(['one', 'boxes', 'text'] if chance(0.7) else SORTS)}.json")
        job["metric"] = g.choice(["exact", "exact", "cer", "anls", "iou", "iou@0.5"])
    if chance(0.2):
        job |= {"mix_data": g.choice(["drawn", data()]), "mix_share": g.choice([0.2, 0.5, 0.9])}
    if chance(0.3):
        job["reading"] = g.choice(
            [
                {"skip_bad_rows": True},
                {"skip_bad_rows": True},
                {"drop_turns": True},
                {"group_by_length": True},
                {"max_pixels": 100},
                {"max_pixels": 4000},
                {"allow_outside": True},
                {"workers": 1},
            ]
        )
    if chance(0.2):
        job["vision_cache"] = g.choice(["off", "auto", "memory", "disk"])
    if chance(0.3):
        job["four_bit"] = g.choice([True, False])
    if chance(0.15):
        job["stages"] = g.choice(STAGES)
    if chance(0.15):
        job["nan"] = g.choice(["skip", "rollback", "stop"])
    if chance(0.1):
        job["model"] = g.choice(
            [
                str(world / "hollow"),
                str(world / "config_only"),
                str(world / "nonsense"),
                str(world / "not there"),
                "lab",
            ]
        )
    if chance(0.1):
        job["output"] = g.choice(
            [
                str(world),
                str(world / "good.json"),
                str(world / "good.json" / "below"),
                str(world / "deep" / "er" / f"out-{number}"),
            ]
        )
    if chance(0.07):
        job["image_root"] = g.choice([str(world), str(world / "hollow"), str(world / "not there")])
    if chance(0.1):
        job["watch"] = g.choice([{"tensorboard": True}, {"questions": 2}, {"every": 1}])
    if chance(0.08):
        place = g.choice([job, job["schedule"], plan])
        place[g.choice([*place, "unknown"])] = g.choice(
            [float("nan"), float("inf"), True, "2e-4", 10**15, -1, 0, [1], {}, "x" * 300, 1e39]
        )
    return job


SORTS = [
    "good",
    "bad_picture",
    "no_picture",
    "all_bad",
    "too_long",
    "many_turns",
    "boxes",
    "no_answer",
    "outside",
    "empty",
    "half",
    "gbk",
    "missing",
]
PLANS = [
    {"language": "full"},
    {"language": "lora on 7-9"},
    {"language": "lora on 0-1, full on 4"},
    {"vision": "lora"},
    {"vision": "full"},
    {"targets": ["q_proj"]},
    {"targets": ["nowhere"]},
    {"variant": "dora"},
    {"variant": "pissa"},
    {"variant": "rslora"},
    {"language": "freeze"},
    {"language": "freeze", "connector": "full"},
    {"embeddings": "lora"},
    {"embeddings": "full"},
    {"head": "full"},
    {"head": "lora"},
    {"lora_plus": 16},
    {"language": "lora(rank=2, lr=1e-4) on mlp"},
    {"dropout": 0.1},
]
STAGES = [
    [{"plan": {"connector": "freeze"}}],
    [{"steps": 1}, {"plan": {"language": "lora"}, "steps": 1}],
    [{"plan": {"rank": 4}, "steps": 1}, {"plan": {"rank": 8}, "steps": 1}],
    [{"plan": {"language": "full"}, "steps": 1}],
    [{"plan": {"language": "lora"}, "steps": 1, "lora": "merge"}],
    [{"plan": {"language": "lora"}, "steps": 1, "lora": "merge"}, {"plan": {"connector": "full"}, "steps": 1}],
]


def tree(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def opinions(path, capsys):
    "(status, what was said) of the doctor and of a training that is stopped before its first step."
    before = tree(path.parent)
    doctor = main(["doctor", str(path)])
    told = capsys.readouterr()
    assert tree(path.parent) == before, "the doctor wrote something"
    try:
        train = main(["train", str(path)])
    except Reached:
        train = 0
    said = capsys.readouterr()
    return doctor, told.out + told.err, train, said.err


def flat(text):
    return " ".join(text.split())


def numbers():
    "The first few in every run of the tests, all of them when one has a quarter of an hour."
    return [pytest.param(range(QUICK), id="quick"), pytest.param(range(QUICK, JOBS), id="all", marks=pytest.mark.slow)]


@pytest.mark.parametrize("which", numbers())
def test_what_the_doctor_refuses_train_refuses_and_nothing_else(which, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job_module, "fit", reached)
    monkeypatch.setattr(job_module, "fit_stages", reached)
    monkeypatch.setenv("VLM_LORA_LAB_CACHE", str(tmp_path / "cache"))
    seen, wrong = [], []
    for number in which:
        path = tmp_path / f"job-{number}.yaml"
        path.write_text(yaml.safe_dump(some_job(world, random.Random(number), number)))
        doctor, told, train, said = opinions(path, capsys)
        seen.append(train)
        sentence = flat(said.partition("vlm-lora-lab train: ")[2])
        if (doctor == 2) != (train == 2) or train not in (0, 2):
            wrong.append(f"{number}: doctor {doctor}, train {train} ({sentence or flat(told)[-300:]})")
        elif sentence and sentence not in flat(told):
            wrong.append(f"{number}: other words: {sentence!r} is not in {flat(told)!r}")
    assert not wrong, "\n".join(wrong)
    assert len(which) // 5 < seen.count(2) < len(which) * 4 // 5, "good and bad jobs"


def test_they_agree_on_a_folder_that_was_used(world, tmp_path, capsys, monkeypatch):
    job = tmp_path / "job.yaml"
    job.write_text(
        yaml.safe_dump(
            {
                "data": str(world / "good.json"),
                "output": str(tmp_path / "out"),
                "schedule": {"max_steps": 2, "save_every": 1, "batch_size": 2},
            }
        )
    )
    assert main(["doctor", str(job)]) in (0, 1)
    with monkeypatch.context() as patch:  # one that ended before its first checkpoint may start anew
        patch.setattr(job_module, "fit", reached)
        assert opinions(job, capsys)[::2][0] in (0, 1) and (tmp_path / "out" / "job.json").is_file()
        assert main(["doctor", str(job)]) in (0, 1)
        assert main(["doctor", str(job), "--resume"]) == 2 and "no complete checkpoint" in capsys.readouterr().out
    assert main(["train", str(job)]) == 0
    assert main(["doctor", str(job)]) == 2 and "not empty" in capsys.readouterr().out
    assert main(["doctor", str(job), "--resume"]) == 2 and "finished" in capsys.readouterr().out
    (tmp_path / "out" / "report.json").unlink()
    assert main(["doctor", str(job)]) == 2 and "Add --resume" in capsys.readouterr().out
    assert main(["doctor", str(job), "--resume"]) in (0, 1)


@pytest.mark.parametrize("where", ["load_vlm", "audit_gradients", "loss_of"])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 "
            "bytes."
        ),
    ],
    ids=["python", "torch"],
)
def test_memory_that_is_used_up_is_a_line_of_the_report(where, error, world, tmp_path, capsys, monkeypatch):
    "On a CPU; what PyTorch raises there is a RuntimeError."
    import vlm_lora_lab.debug.preflight as preflight_module

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(job_module if where == "load_vlm" else preflight_module, where, full)
    assert main(["doctor", "--data", str(world / "good.json"), "--batch-size", "2"]) == 2
    out = capsys.readouterr().out
    assert "ERROR" in out and ("out of memory" in out or "do not fit" in out)
    if where == "load_vlm":
        assert (
            main(["train", "--data", str(world / "good.json"), "--output", str(tmp_path / "out")]) == 2
            and "out of memory" in capsys.readouterr().err
        )


# what a hand or a broken disk puts into a YAML file
PIECES = [
    ":",
    "-",
    "{",
    "}",
    "[",
    "]",
    "'",
    '"',
    "\t",
    "\n",
    "&a",
    "*a",
    "!!python/object:os.system",
    "!!binary",
    "~",
    "null",
    ".nan",
    "0x",
    "1e5",
    "2026-13-45",
    "\0",
    "é",
    "9" * 5000,
    "<<: *a",
    "? ",
    "%",
    "@",
]


def test_a_hundred_fuzzed_job_files_end_in_sentences(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job_module, "fit", reached)
    monkeypatch.setattr(job_module, "fit_stages", reached)
    # what a job says is the matter here; what it names is that of the test above
    monkeypatch.setattr(job_module, "_prepare", reached)
    statuses, g = [], random.Random(0)
    for number in range(100):
        text = (
            yaml.safe_dump(some_job(world, g, number)) if g.random() < 0.5 else json.dumps(some_job(world, g, number))
        )
        for _ in range(g.choice([1, 1, 3, 10])):
            at = g.randrange(len(text))
            text = text[:at] + g.choice(PIECES) + text[at + g.choice([0, 0, 1, 5]) :]
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(text.encode("utf-8") if g.random() < 0.9 else text.encode("utf-16"))
        for command in ("train", "doctor"):
            try:
                status = main([command, str(path)])
            except Reached:
                status = 0
            err = capsys.readouterr().err
            statuses.append(status)
            assert status == 0 or (
                status == 2
                and re.match(rf"vlm-lora-lab {command}: .+[.?]\n$", err, re.S)
                and len(err) < 2000
                and "Traceback" not in err
            ), (status, err, text)
    assert 40 < statuses.count(2) < 199
    assert statuses[::2] == statuses[1::2]


def test_what_cannot_be_written_to_is_seen_before(world, tmp_path):
    from vlm_lora_lab.errors import check_writable

    check_writable(tmp_path / "a" / "b" / "c")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone" / "away")
    for folder in (tmp_path / "dangling", world / "good.json", world / "good.json" / "below"):
        with pytest.raises(InputError, match="is no folder"):
            check_writable(folder)
    with pytest.raises(InputError, match="cannot be written to"):
        check_writable(tmp_path / ("x" * 300))
