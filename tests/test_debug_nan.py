"""The doctor: every specimen, healthy steps of six families, and what happens to the weights."""

import json
import subprocess
import sys
import warnings

import pytest
import torch
from families import batch_of, tiny_model
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from vlm_lora_lab.debug.causes import CAUSES
from vlm_lora_lab.debug.nan import NanDoctor, NonFiniteStep, diagnose, replay, save_case
from vlm_lora_lab.debug.specimens import SPECIMENS, lab
from vlm_lora_lab.debug.trace import extents, trace
from vlm_lora_lab.debug.trials import healthy, rows_of
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

SIX = ["minicpmv-2.6", "qwen", "minicpmv4_6", "qwen2_5_vl", "llava", "idefics3"]
pytestmark = pytest.mark.filterwarnings("ignore:std")


@pytest.mark.parametrize("name", SPECIMENS)
def test_every_specimen_gets_its_cause_direction_module_and_samples(name):
    s, case = SPECIMENS[name], SPECIMENS[name].make()
    before = {n: t.clone() for n, t in case.model.state_dict().items()}
    memory = {k: v.clone() for s in (case.optimizer.state.values() if case.optimizer else ()) for k, v in s.items()}
    d = diagnose(case.model, case.batch, optimizer=case.optimizer, scale=case.scale, start=case.start)
    assert (d.cause, d.event.phase, d.event.module, d.samples) == (s.cause, s.phase, s.module, s.samples), d
    assert CAUSES[d.cause][1] in str(d) and d.remedy
    after = case.model.state_dict()
    assert all(torch.equal(before[n].view(-1).view(torch.uint8), after[n].view(-1).view(torch.uint8)) for n in before)
    assert not case.optimizer or {k: v for s in case.optimizer.state.values() for k, v in s.items()} == memory
    assert all(p.grad is None for p in case.model.parameters())


def test_the_cabinet_is_full():
    assert len(SPECIMENS) >= 12 and len({s.cause for s in SPECIMENS.values()}) >= 12
    assert {s.phase for s in SPECIMENS.values()} == {"given", "forward", "backward", "clipping", "optimizer"}
    for s in SPECIMENS.values():  # nothing is NaN from the start but where that is the case's point
        case = s.make()
        if isinstance(case.batch, dict):
            tensors = list(case.batch.values())
        else:
            tensors = list(case.batch) if isinstance(case.batch, tuple) else [case.batch]
        assert all(t.isfinite().all() for t in [*tensors, *case.model.parameters()]) == (s.phase != "given")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", SIX)
def test_a_healthy_step_is_called_healthy_and_replayed_exactly(family, dtype):
    model = tiny_model(family).to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch_of(family, model).items()}
    model.train()
    torch.manual_seed(3)
    plain = model(**batch).loss.item()
    torch.manual_seed(3)
    found = trace(model, batch, optimizer=torch.optim.AdamW(model.parameters()))
    assert found.ok and found.loss == plain and found.operations > 100
    assert diagnose(model, batch) is None


@pytest.mark.parametrize("family", SIX)
def test_an_overflow_is_found_wherever_it_is_put(family):
    "Held out: modules that no specimen uses, in families that no specimen is of."
    model = tiny_model(family).half()
    batch = {k: v.half() if v.is_floating_point() else v for k, v in batch_of(family, model).items()}
    layers = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and n.endswith(("fc2", "down_proj", "w1", "linear_fc2"))
    ]
    found = 0
    for name in (layers[0], layers[-1]):
        layer = model.get_submodule(name)
        kept = layer.weight.data.clone()
        seen = []
        handle = layer.register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
        model(**batch)
        handle.remove()
        tokens = seen[0].reshape(-1, layer.in_features)
        layer.weight.data = (6e4 * tokens[tokens.float().abs().sum(-1).argmax()].sign()).expand_as(kept).clone()
        if layer(seen[0]).isfinite().all():  # the input is too small for any weight to overflow
            layer.weight.data = kept
            continue
        found += 1
        d = diagnose(model, batch, try_remedies=True)
        layer.weight.data = kept
        assert (d.event.phase, d.event.module, d.event.made, d.event.output.dtype) == (
            "forward",
            name,
            "inf",
            "float16",
        )
        assert d.cause == "fp16 overflow" and d.trials["float32"] == "heals"
    assert found


class Rows(torch.utils.data.Dataset):
    def __init__(self, n, bad=()):
        g = torch.Generator().manual_seed(5)
        self.x, self.bad = torch.randn(n, 6, generator=g), set(bad)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i] * (i not in self.bad), "number": torch.tensor(i)}


class Unit(nn.Module):
    "A root at zero, for rows of zeros."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 6, bias=False)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, 1)
        self.saw = []

    def forward(self, x, number):
        self.saw.append(number.tolist())
        x = self.drop(self.fc(x))
        loss = (self.head(x / x.pow(2).sum(-1, keepdim=True).sqrt().clamp(min=1e-6)) - 1).pow(2).mean()
        return {"loss": loss}


def unit():
    return Unit()


def trainer(model, data, folder, doctor=None, collator=None, **kwargs):
    settings = (
        dict(
            max_steps=12,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            seed=1,
        )
        | kwargs
    )
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy=settings.pop("save_strategy", "no"),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **settings,
    )
    made = Trainer(model, args, train_dataset=data, data_collator=collator, callbacks=[doctor] if doctor else None)
    made.callback_handler.callbacks = [
        c for c in made.callback_handler.callbacks if type(c).__name__ != "PrinterCallback"
    ]
    return made


@pytest.mark.parametrize("family", SIX)
def test_a_hundred_healthy_steps_without_an_alarm(family, tmp_path):
    model = tiny_model(family)
    batch = batch_of(family, model)
    model = apply_plan(model, TuningPlan(vision="lora", rank=2))

    def collate(rows):
        g = torch.Generator().manual_seed(rows[0])
        text = batch["labels"] != -100
        ids = torch.where(text, torch.randint(3, 290, batch["input_ids"].shape, generator=g), batch["input_ids"])
        return batch | {"input_ids": ids, "labels": torch.where(text, ids, -100)}

    doctor = NanDoctor()
    run = trainer(
        model,
        list(range(100)),
        tmp_path,
        doctor,
        collate,
        max_steps=100,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
    )
    run.train()
    assert run.state.global_step == 100 and doctor.bad_steps == [] and doctor.zeros_examined == 0
    assert not model._forward_hooks and not model._forward_pre_hooks


@pytest.mark.parametrize("accumulation", [1, 3])
def test_stop_leaves_the_weights_of_the_step_before_bit_for_bit(accumulation, tmp_path):
    bad = 37
    model, doctor = Unit(), NanDoctor(folder=tmp_path / "case", build="test_debug_nan:unit")
    run = trainer(
        model,
        Rows(60, {bad}),
        tmp_path / "a",
        doctor,
        gradient_accumulation_steps=accumulation,
        max_steps=15 // accumulation,
    )
    assert run.args.logging_nan_inf_filter
    with pytest.raises(NonFiniteStep) as stopped:
        run.train()
    steps = run.state.global_step
    d = stopped.value.diagnosis
    assert d.cause == "root at zero" and d.samples == (bad,) and d.event.forward_of == "sqrt"
    assert not run.args.logging_nan_inf_filter
    assert steps > 0 and f"step {steps + 1}" in str(stopped.value)
    reference = Unit()
    trainer(
        reference, Rows(60, {bad}), tmp_path / "b", gradient_accumulation_steps=accumulation, max_steps=steps
    ).train()
    for (n, p), q in zip(model.named_parameters(), reference.parameters()):
        assert torch.equal(p, q), n
    ruined = Unit()
    trainer(
        ruined, Rows(60, {bad}), tmp_path / "c", gradient_accumulation_steps=accumulation, max_steps=steps + 1
    ).train()
    assert any(p.isnan().any() for p in ruined.parameters())  # what it was saved from
    script = tmp_path / "case" / f"step-{steps + 1}" / "replay.py"
    out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd="tests")
    assert out.returncode == 0 and out.stdout.startswith("root at zero"), out.stderr

    def plain(text):
        return [line for line in text.splitlines() if not line.startswith("  samples")]

    assert plain(out.stdout) == plain((script.parent / "report.txt").read_text())  # to the last digit that is shown
    case = json.loads((script.parent / "case.json").read_text())
    assert (
        case["facts"]["rows"] == load_file(script.parent / "batch.safetensors")["number"].tolist()
        and bad in case["facts"]["rows"]
    )


def test_skip_leaves_out_the_bad_rows_and_counts_them(tmp_path):
    said, bad = [], {5, 37, 50}
    model, doctor = Unit(), NanDoctor("skip", say=said.append)
    run = trainer(model, Rows(60, bad), tmp_path, doctor, max_steps=15)
    run.train()
    assert run.state.global_step == 15 and all(p.isfinite().all() for p in model.parameters())
    rows = {r for _, d in doctor.bad_steps for r in d.samples or ()}
    assert rows <= bad and 2 <= len(doctor.bad_steps) <= 3 and len(said) == len(doctor.bad_steps) + 1
    logged = [r for r in run.state.log_history if "loss" in r]
    assert logged[-1]["bad_steps"] == len(doctor.bad_steps) and "bad_steps" not in logged[0]
    spoiled = {s for s, _ in doctor.bad_steps}
    assert {r["step"] for r in logged if r["grad_norm"] != r["grad_norm"]} == spoiled  # the log tells the truth


def test_a_step_that_depends_on_chance_is_replayed_with_the_same_chance(tmp_path):
    class Lucky(Unit):
        "A root at zero, once in a while: when dropout takes all of a row."

        def forward(self, x, number):
            x = nn.functional.dropout(self.fc(x)[:, :1] + 9, 0.01)
            return {"loss": self.head(x.expand(-1, 6) / x.pow(2).sqrt().clamp(min=1e-6)).pow(2).mean()}

    for seed in (1, 2, 3):
        model = Lucky()
        run = trainer(model, Rows(60), tmp_path, NanDoctor(), max_steps=400, seed=seed)
        with pytest.raises(NonFiniteStep) as e:
            run.train()
        assert e.value.diagnosis.cause == "root at zero", e.value


def test_rows_are_named_in_every_epoch(tmp_path):
    doctor, order = NanDoctor("skip", say=lambda line: None), Unit()
    trainer(order, Rows(16, {5}), tmp_path / "a", max_steps=12).train()
    trainer(Unit(), Rows(16, {5}), tmp_path / "b", doctor, max_steps=12).train()
    assert [s for s, _ in doctor.bad_steps] == [i + 1 for i, numbers in enumerate(order.saw) if 5 in numbers] and len(
        doctor.bad_steps
    ) == 3
    assert all(d.samples == (5,) for _, d in doctor.bad_steps)


def test_skip_gives_up_when_nothing_helps(tmp_path):
    with pytest.raises(NonFiniteStep):
        trainer(
            Unit(),
            Rows(60, set(range(60))),
            tmp_path,
            NanDoctor("skip", patience=3, say=lambda line: None),
            max_steps=15,
        ).train()
    model = Unit()
    model.head.bias.data.fill_(3e38).mul_(10)
    with pytest.raises(NonFiniteStep, match="corrupt weights"):
        trainer(model, Rows(60), tmp_path, NanDoctor("skip"), max_steps=15).train()


def test_rollback_survives_a_blow_up(tmp_path):
    class Fits(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(6, 1)

        def forward(self, x, number):
            return {"loss": (self.fc(x) - 1).pow(2).mean()}

    options = dict(max_steps=150, learning_rate=20.0, optim="sgd", max_grad_norm=0, logging_steps=10)
    with pytest.raises(NonFiniteStep) as e:
        trainer(Fits(), Rows(60), tmp_path / "a", NanDoctor(), **options).train()
    assert e.value.diagnosis.cause == "learning rate too high"
    said, model = [], Fits()
    doctor = NanDoctor("rollback", say=said.append, copy_every=10)
    run = trainer(model, Rows(60), tmp_path / "b", doctor, **options)
    run.train()
    assert (
        run.state.global_step == 150
        and doctor.bad_steps
        and all("half the learning rate" in line for line in said[:-1])
    )
    assert all(p.isfinite().all() for p in model.parameters()) and healthy(
        model, {"x": torch.randn(2, 6), "number": torch.zeros(2)}
    )
    with pytest.raises(NonFiniteStep):
        trainer(
            Fits(),
            Rows(60),
            tmp_path / "c",
            NanDoctor("rollback", patience=1, say=lambda line: None),
            **options | {"learning_rate": 1e6},
        ).train()


def test_rows_are_named_after_a_resume(tmp_path):
    options = dict(max_steps=15, save_strategy="steps", save_steps=2)
    order = Unit()
    trainer(order, Rows(60), tmp_path / "a", **options | {"save_strategy": "no"}).train()
    bad = order.saw[8][1]  # a row of the ninth step
    trainer(Unit(), Rows(60, {bad}), tmp_path / "b", **options | {"max_steps": 4}).train()
    run = trainer(Unit(), Rows(60, {bad}), tmp_path / "b", NanDoctor(), **options)
    with pytest.raises(NonFiniteStep) as e:
        run.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert e.value.diagnosis.samples == (bad,) and run.state.global_step == 8


def test_half_precision_without_help_is_refused_before_the_first_step(tmp_path):
    model = Unit().half()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InputError, match="epsilon of 1e-08 is zero in torch.float16"):
        trainer(model, Rows(60), tmp_path, NanDoctor(), optim="adamw_torch").train()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before)) and not model._forward_hooks


def test_a_norm_that_overflows_is_found_though_clipping_makes_zeros_of_it(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1)).half()
    nn.init.constant_(model[1].weight, 1.0)

    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return {"loss": self.net(4000 * x).mean()}

    run = trainer(
        Big(),
        [{"x": torch.ones(64).half()}] * 8,
        tmp_path,
        NanDoctor(),
        optim="sgd",
        max_steps=3,
        per_device_train_batch_size=2,
    )
    with pytest.raises(NonFiniteStep, match="gradient norm overflow"):
        run.train()


def test_a_gradient_of_zero_is_no_alarm(tmp_path):
    class Still(Unit):
        def forward(self, x, number):
            return {"loss": 0 * super().forward(x, number)["loss"] + 1}

    doctor = NanDoctor()
    trainer(Still(), Rows(60), tmp_path, doctor, max_steps=10).train()
    assert doctor.bad_steps == [] and doctor.zeros_examined == 3


def test_a_gradient_scaler_may_skip_by_itself():
    class Mean(nn.Linear):
        def forward(self, x):
            return {"loss": super().forward(x).mean()}

    doctor, model = NanDoctor(), Mean(2, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)

    class Wrapped:
        def __init__(self, optimizer):
            self.optimizer, self.scaler = optimizer, scaler

    optimizer, state = (
        torch.optim.SGD(model.parameters(), lr=0.1),
        type("S", (), {"global_step": 0, "epoch": 0.0, "log_history": []})(),
    )
    doctor.on_train_begin(
        type("A", (), {"gradient_accumulation_steps": 1, "train_batch_size": 2})(), state, None, model, optimizer
    )
    for _ in range(8):
        doctor.on_step_begin(None, state, None)
        before = model.weight.detach().clone()
        out = model(torch.full((2, 2), 1e6))
        scaler.scale(out["loss"]).backward()
        scaler.unscale_(optimizer)
        bad = not model.weight.grad.isfinite().all()
        doctor.on_pre_optimizer_step(None, state, None, model, Wrapped(optimizer))
        scaler.step(optimizer), scaler.update(), optimizer.zero_grad()
        assert torch.equal(model.weight, before) == bad
    assert doctor.bad_steps == [] and scaler.get_scale() < 2.0**120


def test_a_case_of_a_published_family_is_rebuilt_from_its_folder(tmp_path):
    for family, plan in (("minicpmv-2.6", None), ("llava", None), ("qwen2_5_vl", TuningPlan(vision="lora", rank=2))):
        model = tiny_model(family)
        batch = batch_of(family, model)
        model = apply_plan(model, plan) if plan else model
        batch["pixel_values"] = batch["pixel_values"] / (batch["pixel_values"] * 0).max()
        d = diagnose(model, batch)
        assert d.cause == "corrupt input" and d.event.module == "batch['pixel_values']"
        folder = save_case(tmp_path / family, model, batch, d)
        again = replay(folder)
        assert (again.cause, again.event.module, again.trials) == (d.cause, d.event.module, d.trials)
        assert set(again.bad) == set(d.bad)


def test_what_cannot_be_rebuilt_says_so(tmp_path):
    model, batch = Unit(), {"x": torch.zeros(2, 6), "number": torch.tensor([0, 1])}
    d = diagnose(model, batch)
    folder = save_case(tmp_path / "case", model, batch, d)
    with pytest.raises(InputError, match="a model of your own"):
        replay(folder)
    assert replay(folder, Unit()).cause == "root at zero"
    with pytest.raises(InputError, match="no tensor"):
        replay(folder, nn.Linear(2, 2))
    with pytest.raises(InputError, match="not empty"):
        save_case(folder, model, batch, d)
    with pytest.raises(InputError, match="no case.json"):
        replay(tmp_path)
    with pytest.raises(InputError, match="is no policy"):
        NanDoctor("explode")


@pytest.mark.parametrize("family", ["minicpmv-2.6", "qwen"])
def test_rows_of_a_batch_with_pictures_are_its_rows(family):
    model = tiny_model(family)
    one = batch_of(family, model)
    batch = {k: torch.cat([v, v.flip(-1) if k == "pixel_values" else v]) for k, v in one.items()}
    batch["image_bound"][1, 0] = 1
    rows = rows_of(batch)
    assert len(rows) == 2 and all(torch.equal(rows[0][k], v) for k, v in one.items())
    assert torch.equal(rows[1]["pixel_values"], one["pixel_values"].flip(-1)) and rows[1]["image_bound"][0, 0] == 0
    text = {k: v for k, v in batch.items() if k in ("input_ids", "labels", "attention_mask")}
    only = rows_of(
        batch
        | {"image_bound": batch["image_bound"][:1], "pixel_values": batch["pixel_values"][:1]}
        | ({"tgt_sizes": batch["tgt_sizes"][:1]} if "tgt_sizes" in batch else {})
    )
    assert set(only[1]) == set(text)
    with pytest.raises(ValueError, match="different lengths"):
        rows_of({"a": torch.ones(2), "b": torch.ones(3)})


def test_extents_see_what_fp16_would_lose():
    model, batch = lab()
    rows = {e.module: e for e in extents(model, batch)}
    assert rows["vpm.encoder.layers.4"].forward > 10 and 0 < rows["vpm.encoder.layers.4"].headroom < 16
    assert 0 < rows["llm.lm_head"].lost < 1
    scaled = {e.module: e for e in extents(model, batch, scale=2.0**10)}
    assert scaled["resampler"].backward == pytest.approx(2**10 * rows["resampler"].backward, rel=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(not m._forward_hooks for m in model.modules())
