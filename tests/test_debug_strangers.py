"""The doctor among models that he was not made for: specimens, healthy steps, states, modes, several processes."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_debug_nan import Rows, Unit, trainer
from torch import nn

from vlm_lora_lab.debug.gradients import random_states, set_random_states, undisturbed
from vlm_lora_lab.debug.nan import NanDoctor, NonFiniteStep, diagnose, replay, save_case
from vlm_lora_lab.debug.strangers import HOSTS, STRANGERS, autocast, examined, gpt
from vlm_lora_lab.debug.trials import rows_of
from vlm_lora_lab.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:std")


@pytest.mark.parametrize("name", list(STRANGERS))
def test_a_specimen_is_named_or_called_unknown(name):
    [verdict] = examined(diagnose, {name: STRANGERS[name]})
    assert verdict.right, verdict
    assert not verdict.sure_and_wrong


def test_the_cabinet_of_strangers_is_full():
    assert len(STRANGERS) >= 40 and {name.split(":")[0] for name in STRANGERS} == set(HOSTS) and len(HOSTS) >= 5
    assert len({s.cause for s in STRANGERS.values()}) >= 15


@pytest.mark.parametrize("host", list(HOSTS))
def test_two_hundred_healthy_steps_without_an_alarm(host, tmp_path):
    torch.manual_seed(0)
    model, batch = HOSTS[host]()

    class Lossy(nn.Module):
        def __init__(self):
            super().__init__()
            self.host = model

        def forward(self, **batch):
            batch.pop("num_items_in_batch", None)
            return {"loss": self.host(**batch)[0]}

    doctor = NanDoctor()
    rows = [{k: v[i % 4] for k, v in batch.items()} for i in range(64)]
    run = trainer(Lossy(), rows, tmp_path, doctor, max_steps=200, learning_rate=1e-3)
    run.train()
    assert run.state.global_step == 200 and doctor.bad_steps == [] and doctor.zeros_examined == 0


class Chancy(Unit):
    "A root at zero when a generator says so."

    def __init__(self, chance):
        super().__init__()
        self.chance = chance

    def forward(self, x, number):
        size = float(self.chance() > 0.02)
        x = self.drop(self.fc(x)) * size
        return {"loss": (self.head(x) - 1).pow(2).mean() + 1e-3 * x.pow(2).sum(-1).sqrt().mean()}


@pytest.mark.parametrize("chance", [random.random, np.random.rand], ids=["python", "numpy"])
def test_chance_of_python_and_numpy_is_part_of_the_replay(chance, tmp_path):
    run = trainer(Chancy(chance), Rows(60), tmp_path, NanDoctor(), max_steps=400)
    with pytest.raises(NonFiniteStep) as e:
        run.train()
    assert e.value.diagnosis.cause == "root at zero", e.value


def counter():
    step = iter(range(1, 10**6))
    return lambda: float(next(step) % 7 != 0)


def generator():
    own = torch.Generator().manual_seed(3)
    return lambda: torch.rand(1, generator=own).item()


@pytest.mark.parametrize("chance", [counter, generator])
def test_a_forward_that_keeps_a_state_is_not_replayable(chance, tmp_path):
    class Counts(Chancy):
        def forward(self, x, number):
            return {"loss": (self.head(self.fc(x)) / torch.tensor(self.chance())).pow(2).mean()}

    class Draws(Chancy):
        def forward(self, x, number):
            return {"loss": (self.head(self.fc(x)) / torch.tensor(max(self.chance() - 0.1, 0.0))).pow(2).mean()}

    model = Counts(chance()) if chance is counter else Draws(chance())
    run = trainer(model, Rows(60), tmp_path, NanDoctor(folder=tmp_path / "nan"), max_steps=400)
    with pytest.raises(NonFiniteStep) as e:
        run.train()
    d = e.value.diagnosis
    assert d.cause == "not replayable" and "instead of" in d.trials["the same call again"], e.value
    assert d.samples is None and not d.event.module and "keeps a state" in str(d)


def test_generators_are_put_back():
    model = nn.Linear(1, 1)
    before = random_states()
    with undisturbed(model):
        inside = random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn(), torch.rand(1)
    set_random_states(before)
    assert inside == (random.random(), np.random.rand(), random.gauss(0, 1), np.random.randn(), torch.rand(1))
    random.gauss(0, 1)
    np.random.randn()  # both keep a spare number
    half = random_states()
    first = random.gauss(0, 1), np.random.randn()
    set_random_states(half)
    assert first == (random.gauss(0, 1), np.random.randn())


def test_a_mode_is_kept_and_said():
    case = STRANGERS["CNN+LSTM: A batch norm frozen after a bad batch went through it"].make()
    d = diagnose(case.model, case.batch)
    assert "1 modules such as host.norm in evaluation" in d.mode and "host.norm" in str(d)
    case.model.train()
    assert diagnose(case.model, case.batch) is None  # it looks at the batch, not at what it remembers


def test_a_step_left_out_leaves_nothing_in_a_batch_norm(tmp_path):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(6), nn.Linear(6, 1)

        def forward(self, x, number):
            return {"loss": self.fc(self.norm(x)).pow(2).mean()}

    class Divided(Rows):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return row | {"x": row["x"] / row["x"].abs().sum()}

    model, doctor = Normed(), NanDoctor("skip", say=lambda line: None)
    trainer(model, Divided(60, {5, 37}), tmp_path, doctor, max_steps=15).train()
    assert {d.cause for _, d in doctor.bad_steps} == {"corrupt input"}
    assert model.norm.running_var.isfinite().all()
    assert model.norm.num_batches_tracked == 15 - len(doctor.bad_steps)
    assert {r for _, d in doctor.bad_steps for r in d.samples} == {5, 37}


def test_an_optimizer_that_remembers_nan_is_refused_before_the_first_step(tmp_path):
    model = Unit()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 6), torch.zeros(2))["loss"].backward()
    optimizer.step()
    optimizer.state[model.head.weight]["exp_avg"] *= 1e39
    run = trainer(model, Rows(60), tmp_path, NanDoctor())
    run.optimizer = optimizer
    with pytest.raises(InputError, match=r"optimizer.state\['head.weight'\]\['exp_avg'\] holds NaN or infinity"):
        run.train()


def test_a_case_under_autocast_is_replayed_under_autocast(tmp_path):
    torch.manual_seed(0)
    model, batch = gpt()
    model = model.model.train()
    model.transformer.h[1].mlp.c_proj.weight.data *= 2**30
    assert diagnose(model, batch) is None
    d = diagnose(model, batch, autocast())
    assert d.cause == "fp16 overflow" and d.mode == "training; autocast to float16"
    assert d.trials["float32"] == d.trials["bfloat16"] == "heals"
    again = replay(save_case(tmp_path / "case", model, batch, d, autocast="float16"))
    assert (again.cause, again.event.module, again.mode) == (d.cause, d.event.module, d.mode)
    model.eval()
    with torch.autocast("cpu", dtype=torch.float16):
        d = diagnose(model, batch)
    again = replay(save_case(tmp_path / "still", model, batch, d, autocast="float16"))
    assert again.mode == d.mode == "evaluation; autocast to float16"


def test_rows_are_not_named_where_time_comes_first():
    class Hears(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 4)

        def forward(self, x):
            return {"loss": (self.lstm(x)[0].abs() * x.abs().sum(-1, keepdim=True)).sqrt().mean()}

    x = torch.randn(5, 3, 4)
    x[:, 1] = 0
    d = diagnose(Hears(), {"x": x})
    assert d.cause == "root at zero" and d.samples is None and "time, for lstm" in d.trials["each sample alone"]
    assert len(rows_of({"x": x})) == 5


def test_a_row_is_accused_of_the_same_thing_only():
    class Spread(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            x = self.fc(x) * x.abs().sum(-1, keepdim=True)
            spread = x.std(0) + 1e-3  # of one row: NaN
            return {"loss": (x.pow(2).sum(-1).sqrt() / spread.mean()).mean()}

    x = torch.randn(4, 4)
    x[2] = 0
    d = diagnose(Spread(), {"x": x})
    assert d.cause == "root at zero" and d.samples in ((2,), None), d


@pytest.mark.parametrize("policy,kind", [("stop", "gradient"), ("skip", "loss"), ("rollback", "gradient")])
def test_of_two_processes_the_one_that_saw_it_names_it_and_both_do_the_same(policy, kind, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    script = str(Path(__file__).parent / "nan_processes.py")
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--rdzv-endpoint=localhost:0", script, str(tmp_path), policy, kind],
        capture_output=True,
        text=True,
        env=env,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["finite"]
    [[step, cause, rows]] = first["bad"]
    assert cause == ("root at zero" if kind == "gradient" else "division by zero") and rows == [37], first
    assert (first["steps"] == step - 1) if policy == "stop" else (first["steps"] == 8)
    told = first["stopped"] if policy == "stop" else first["said"][0]
    assert f"step {step}, process " in told and "of 2" in told and str(tmp_path / "nan") in told
    [folder] = (tmp_path / "nan").iterdir()  # written once
    assert (folder / "case.json").is_file() and json.loads((folder / "case.json").read_text())["facts"]["rows"]
