"""Plans one after the other: what each change of stage keeps, what it hands on, and where a stopped run goes on."""

import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from families import batch_of, tiny_model
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

from vlm_lora_lab.checkpoint.merge import merge_adapter
from vlm_lora_lab.checkpoint.save import load_adapter, save_adapter
from vlm_lora_lab.cli import main
from vlm_lora_lab.data.batch import Processor, Samples
from vlm_lora_lab.data.records import read_conversations, samples_folder
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.job import Job
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.models.names import TensorName
from vlm_lora_lab.models.published import on_meta
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan, audit, lora_layers
from vlm_lora_lab.train.run import Schedule, fit, last_checkpoint
from vlm_lora_lab.train.stages import (
    BOUND,
    BOUND_16,
    Stage,
    as_one_plan,
    bound_of,
    enter_stage,
    fit_stages,
    from_top,
    leave_stage,
    moved,
    probe_logits,
    read_stages,
    route,
    where_stopped,
)

LORA = TuningPlan(language="lora", connector="freeze", rank=4, alpha=8)
PAIRS = {
    "lora, then the connector in full": (Stage(LORA), Stage(TuningPlan(language="freeze", connector="full"))),
    "merged, then the connector in full": (
        Stage(LORA, lora="merge"),
        Stage(TuningPlan(language="freeze", connector="full")),
    ),
    "merged, then new lora there": (
        Stage(LORA, lora="merge"),
        Stage(TuningPlan(language="lora", connector="freeze", rank=2)),
    ),
    "lora, then the top layer in full": (Stage(LORA), Stage(TuningPlan(language="full on 1", connector="freeze"))),
    "lora goes on, and eyes come in": (
        Stage(LORA),
        Stage(TuningPlan(language="lora", vision="lora(rank=2)", connector="full", rank=4, alpha=8)),
    ),
    "connector in full, then frozen": (Stage(TuningPlan(language="freeze", connector="full")), Stage(LORA)),
    "connector in full, then lora": (
        Stage(TuningPlan(language="freeze", connector="full")),
        Stage(TuningPlan(language="lora", connector="freeze", vision="lora")),
    ),
    "layers one after the other": (
        Stage(TuningPlan(language="lora on 1", connector="freeze")),
        Stage(TuningPlan(language="lora on 0", connector="freeze")),
    ),
    "other layers of the same part": (
        Stage(TuningPlan(language="lora on 1", connector="freeze", rank=4)),
        Stage(TuningPlan(language="full on 0, lora on 1", connector="full", rank=4)),
    ),
    "everything, then merged at the end": (
        Stage(LORA),
        Stage(TuningPlan(language="lora", connector="full", rank=4, alpha=8), lora="merge"),
    ),
    "dora": (
        Stage(TuningPlan(language="lora", connector="freeze", rank=2, variant="dora"), lora="merge"),
        Stage(TuningPlan(language="full on 0", connector="full")),
    ),
    "rslora": (
        Stage(TuningPlan(language="lora", connector="freeze", rank=2, variant="rslora")),
        Stage(TuningPlan(language="full on 0", connector="full", variant="rslora")),
    ),
}
SOME = ["minicpmv-2.6", "minicpmv-2.0", "qwen2_vl", "qwen3_vl", "gemma3", "idefics3", "qwen"]


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


def few_steps(model, batch, n=2):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    for _ in range(n):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained


def state(model):
    return {
        TensorName.of(n).own: p.detach().clone() for n, p in model.named_parameters() if not TensorName.of(n).original
    }


@pytest.mark.parametrize("i, name", list(enumerate(PAIRS)), ids=list(PAIRS))
def test_a_change_of_stage_keeps_the_model_and_trains_what_the_plan_says(i, name):
    "Every pair on two families of seven, so that each family meets several."
    for family in (SOME[i % len(SOME)], SOME[(i + 3) % len(SOME)]):
        model, stages = tiny_model(family), PAIRS[name]
        batch, way = batch_of(family, model), route(model, stages)
        lora = {}
        before = logits(model, batch)
        for turn in way.turns:
            was = state(model) | lora
            model = enter_stage(model, turn, lora, seed=3)
            after = state(model)
            bound = bound_of(model, turn.folded, turn.stage.plan.variant)
            assert moved(before, logits(model, batch), bound, name) <= bound
            touched = {f"{n}.weight" for n in turn.folded}
            same = [
                n for n in was.keys() & after.keys() if n not in touched and n.partition(".lora_")[0] not in turn.folded
            ]
            # kept LoRA and weights, to the last bit
            assert all(torch.equal(was[n], after[n]) for n in same) and len(same) > 20
            asks = {TensorName.of(n).own for n, p in model.named_parameters() if p.requires_grad}
            assert {n for n in asks if ".lora_" not in n} == turn.full and {
                n.partition(".lora_")[0] for n in asks if ".lora_" in n
            } == set(turn.trained)
            few_steps(model, batch)
            now = state(model)
            assert {n for n in now if not torch.equal(now[n], after[n])} == asks
            before = logits(model, batch)
            model, lora = leave_stage(model)
            assert torch.equal(before, logits(model, batch)) or lora
        model = as_one_plan(model, way, lora)
        assert moved(before, logits(model, batch), BOUND, name) <= (BOUND if way.folded else 0)
        if way.plan is not None:
            audit(model, way.plan)
        base = state(tiny_model(family))
        off = {n for n, p in state(model).items() if n in base and not torch.equal(p, base[n])}
        beside = {n for n in way.changed if n.endswith(".bias") and n not in off}  # of a merged layer, saved with it
        assert off == way.changed - beside and not beside & frozenset().union(*(t.full for t in way.turns)), (
            name,
            family,
        )


def test_a_merge_is_peft_s():
    for variant in ("lora", "rslora", "dora"):
        for embeddings in ("freeze",) if variant == "dora" else ("freeze", "lora"):
            plan = TuningPlan(language="lora", embeddings=embeddings, connector="freeze", rank=3, variant=variant)
            way = route(
                on_meta("lab"), [Stage(plan, lora="merge"), Stage(TuningPlan(language="freeze", connector="full"))]
            )
            model = enter_stage(load_vlm("lab"), way.turns[0], {})
            torch.manual_seed(1)
            for p in model.parameters():
                p.data += 0.05 * torch.randn_like(p) if p.requires_grad else 0
            bare, lora = leave_stage(model)
            ours = state(enter_stage(bare, way.turns[1], lora))
            theirs = apply_plan(load_vlm("lab"), plan)
            for n, p in theirs.named_parameters():
                p.data = lora.get(TensorName.of(n).own, p.data)
            for n, p in theirs.merge_and_unload(safe_merge=True).named_parameters():
                torch.testing.assert_close(ours[n], p, rtol=1e-6, atol=1e-7)


def test_a_merge_out_of_four_bit_is_the_layer_that_was_trained():
    "Dequantised, LoRA added, whole: the same logits, while what is not merged stays in 4 bit."
    stages = (
        Stage(TuningPlan(language="lora on 0-2", connector="freeze", rank=4), lora="merge"),
        Stage(TuningPlan(language="lora on 3-4", connector="full", rank=4)),
    )
    way = route(on_meta("lab"), stages, four_bit=True)
    train = samples()
    model = enter_stage(load_vlm("lab", four_bit=True, whole=way.whole), way.turns[0], {})
    few_steps(model, batch_for(train))
    before = probe_logits(model, train)
    model, lora = leave_stage(model)
    model = enter_stage(model, way.turns[1], lora)
    assert 0 < moved(before, probe_logits(model, train), BOUND, "merge") < 1e-4

    def layer(i):
        return model.get_base_model().llm.model.layers[i].mlp.up_proj

    assert (
        type(layer(0)) is torch.nn.Linear
        and layer(0).weight.dtype == torch.float32
        and hasattr(layer(3).weight, "quant_state")
    )


def test_over_16_bit_what_was_learned_stays_in_32():
    stages = (
        Stage(TuningPlan(language="lora on 0-1", connector="full", rank=4), lora="merge"),
        Stage(TuningPlan(language="lora on 3", connector="freeze", rank=4)),
    )
    way, train = route(on_meta("lab"), stages), samples()
    model = load_vlm("lab", dtype=torch.bfloat16)
    model = enter_stage(model, way.turns[0], {})
    torch.manual_seed(0)
    for p in (p for p in model.parameters() if p.requires_grad):
        p.data += 0.01 * torch.randn_like(p)
    before = probe_logits(model, train)
    model, lora = leave_stage(model)
    query = model.resampler.query.clone()
    model = enter_stage(model, way.turns[1], lora)
    assert 0 < moved(before, probe_logits(model, train), bound_of(model, way.turns[1].folded), "stage 2") < BOUND_16
    base = model.get_base_model()
    folded = base.llm.model.layers[0].mlp.up_proj.weight
    # 16 bit could not hold it
    assert folded.dtype == torch.float32 and not torch.equal(folded, folded.bfloat16().float())
    assert (
        base.resampler.query.dtype == torch.float32
        and torch.equal(base.resampler.query, query)
        and not base.resampler.query.requires_grad
    )
    assert base.llm.model.layers[4].mlp.up_proj.weight.dtype == torch.bfloat16


def samples(n=12):
    tokenizer = load_tokenizer("lab")
    return Samples(
        read_conversations(samples_folder() / "handwriting" / "train.json")[:n],
        Processor.of(load_vlm("lab").config, tokenizer),
    )


def batch_for(train):
    from vlm_lora_lab.data.batch import Collator

    return Collator(train.processor.tokenizer.pad_token_id)([train[i] for i in range(4)])


def test_random_stages_become_one_plan_that_says_exactly_what_was_trained():
    """Route by route: the plan under which a result is saved names every layer that holds LoRA and every weight that
    changed, and nothing else."""
    rng, routed = random.Random(0), 0
    models = {f: tiny_model(f).to("meta") for f in SOME}

    def word():
        return rng.choice(
            [
                "freeze",
                "full",
                "lora",
                "lora(rank=2)",
                "full on 0",
                "lora on 1",
                "lora on 0, full on 1",
                "lora(targets=q_proj)",
            ]
        )

    why = set()
    for _ in range(250):
        family = rng.choice(SOME)
        try:
            stages = [
                Stage(
                    TuningPlan(vision=word(), language=word(), connector=rng.choice(["freeze", "full", "lora"])),
                    lora=rng.choice(["keep", "merge"]),
                )
                for _ in range(rng.randint(1, 4))
            ]
            way = route(models[family], stages)
        except InputError as e:
            why.add(e.found.split()[0])
            continue
        routed += 1
        if way.plan is not None:
            assert set(lora_layers(models[family], way.plan)) == set(way.held)
        assert way.changed >= frozenset().union(*(t.full for t in way.turns))
    assert routed > 80 and len(why) >= 3, (routed, why)


# ---- the whole run, on the lab model ----

THREE = (
    Stage(TuningPlan(language="lora", connector="freeze", rank=4), steps=4, learning_rate=3e-3),
    Stage(TuningPlan(language="lora on 0-2, full on 3-4", connector="full", rank=4), steps=4, lora="merge"),
    Stage(TuningPlan(language="lora", vision="lora on 2", connector="freeze", rank=2), steps=4, warmup=0.5),
)
SCHEDULE = Schedule(batch_size=2, learning_rate=2e-3, save_every=3)


def staged(folder, stages=THREE, resume=False, callbacks=lambda number: (), four_bit=False, schedule=SCHEDULE):
    torch.manual_seed(5 if resume else 0)  # what random numbers there are before a resume must not matter
    train = samples()
    way = route(on_meta("lab"), stages, four_bit)
    lines = []
    done = fit_stages(
        load_vlm("lab", four_bit=four_bit, whole=way.whole),
        stages,
        train,
        schedule,
        folder,
        resume,
        callbacks,
        lines.append,
        log_every=1,
    )
    return done, lines


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return staged(tmp_path_factory.mktemp("unbroken"))[0]


def losses(done):
    return [(r["step"], r["loss"]) for r in done.history if "loss" in r]


class At(TrainerCallback):
    "Does something in the middle of a step."

    def __init__(self, step, do=lambda: None):
        self.step, self.do = step, do

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.do()


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stage, step", [(1, 2), (1, 4), (2, 1), (2, 3), (3, 3), (3, 4)])
def test_a_run_stopped_in_any_stage_ends_where_an_unbroken_one_ends(stage, step, unbroken, tmp_path):
    "A real SIGTERM, also in the last step of a stage."
    stopped, _ = staged(tmp_path, callbacks=lambda number: [At(step, terminate)] if number == stage else [])
    assert stopped.stopped and len(stopped.runs) == stage and stopped.runs[-1].steps == step and stopped.moved is None
    done, said = staged(tmp_path, resume=True)
    assert not done.stopped and done.plan == unbroken.plan and [r.steps for r in done.runs] == [4, 4, 4]
    a, b = state(unbroken.model), state(done.model)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert losses(done) == losses(unbroken)
    assert any(f"Stage {stage} of 3" in line for line in said) and not any(
        f"Stage {stage - 1} of 3" in line for line in said
    )


BARE = (
    Stage(TuningPlan(language="freeze", connector="full"), steps=3),
    Stage(TuningPlan(language="lora", connector="lora", rank=2), steps=3),
)
PACKED = (
    Stage(TuningPlan(language="lora on 0-2", rank=2), steps=3, lora="merge"),
    Stage(TuningPlan(language="lora", connector="freeze", rank=2), steps=3),
)


@pytest.mark.parametrize(
    "stages, four_bit, stage",
    [(BARE, False, 1), (BARE, False, 2), (PACKED, True, 2)],
    ids=["no wrapper", "after no wrapper", "merged out of 4 bit"],
)
def test_a_resume_without_a_wrapper_and_in_four_bit(stages, four_bit, stage, tmp_path):
    whole, _ = staged(tmp_path / "a", stages, four_bit=four_bit)
    assert staged(
        tmp_path / "b",
        stages,
        callbacks=lambda number: [At(2, terminate)] if number == stage else [],
        four_bit=four_bit,
    )[0].stopped
    done, _ = staged(tmp_path / "b", stages, resume=True, four_bit=four_bit)
    a, b = state(whole.model), state(done.model)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("stage, step", [(2, 2), (3, 4)])
def test_a_run_that_was_killed_goes_on_from_the_last_complete_state(stage, step, unbroken, tmp_path):
    "SIGKILL leaves no time to save: in stage 2 before its first checkpoint, in stage 3 after one."
    script = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_stages import At, staged
killed = At({step}, lambda: os.kill(os.getpid(), signal.SIGKILL))
staged({str(tmp_path)!r}, callbacks=lambda number: [killed] if number == {stage} else [])
"""
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr[-2000:]
    assert where_stopped(tmp_path)[0] == stage - 1
    done, _ = staged(tmp_path, resume=True)
    a, b = state(unbroken.model), state(done.model)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_run_killed_at_a_boundary_or_after_the_last_stage_goes_on(unbroken, tmp_path):
    "Between two stages there is only what the first handed over; after the last one nothing is trained again."

    class Killed(Exception):
        pass

    def die(number):
        if number == 2:
            raise Killed
        return []

    with pytest.raises(Killed):
        staged(tmp_path, callbacks=die)
    assert where_stopped(tmp_path) == (1, tmp_path / "stage-1" / "end") and not list(
        tmp_path.glob("stage-1/checkpoint-*")
    )
    for _ in range(2):
        done, said = staged(tmp_path, resume=True)
        a, b = state(unbroken.model), state(done.model)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
        assert losses(done) == losses(unbroken)
    assert said == []
    with pytest.raises(InputError, match="other stages"):
        staged(tmp_path, (replace(THREE[0], steps=5), *THREE[1:]), resume=True)


def test_moments_are_carried_exactly_and_only_where_a_tensor_goes_on(tmp_path):
    stages = (
        Stage(TuningPlan(language="lora", connector="full", rank=4), steps=3),
        Stage(TuningPlan(language="lora on 0-2", vision="lora on 0", connector="full", rank=4), steps=3),
        Stage(TuningPlan(language="lora", connector="freeze", rank=4), steps=3),
    )
    seen = {}

    class Look(TrainerCallback):
        def __init__(self, number):
            self.number = number

        def note(self, when, model, optimizer):
            names = {p: TensorName.of(n).own for n, p in model.named_parameters()}
            seen[self.number, when] = {
                names[p]: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items() if s
            }

        def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.note("begin", model, optimizer)
            seen[self.number, "trained"] = {
                TensorName.of(n).own for n, p in model.named_parameters() if p.requires_grad
            }

        def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            self.note("end", model, optimizer)

    done, _ = staged(tmp_path, stages, callbacks=lambda number: [Look(number)])
    assert seen[1, "begin"] == {}
    for number in (2, 3):
        before, after = seen[number - 1, "end"], seen[number, "begin"]
        trained = seen[number, "trained"]
        assert after.keys() == before.keys() & trained and after.keys() < trained
        assert all(torch.equal(after[n][k], before[n][k]) for n in after for k in ("exp_avg", "exp_avg_sq", "step"))
        assert (done.runs[number - 1].carried, done.runs[number - 1].fresh) == (len(after), len(trained) - len(after))
    steps = {n.split(".layers.")[-1][:2]: int(s["step"]) for n, s in seen[3, "end"].items() if "lora_B" in n}
    assert steps["0."] == 9 and steps["4."] == 6 - 3  # went on all the time; dropped in stage 2, so new in stage 3


def test_the_first_step_after_a_change_is_adamw_s_own(tmp_path):
    "From the carried moments and the gradient, by hand; a new optimizer would step by the whole rate."
    stages = (Stage(LORA, steps=5), Stage(LORA, steps=1, warmup=0.0, learning_rate=1e-3))
    noted = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            noted.update(
                {
                    TensorName.of(n).own: (
                        p.detach().clone(),
                        p.grad.clone(),
                        {k: v.clone() for k, v in optimizer.state[p].items()},
                    )
                    for n, p in model.named_parameters()
                    if p.requires_grad
                }
            )

    done, _ = staged(tmp_path, stages, callbacks=lambda number: [Look()] if number == 2 else [])
    after = state(done.model)
    for name, (p, g, s) in noted.items():
        t = s["step"] + 1
        m, v = 0.9 * s["exp_avg"] + 0.1 * g, 0.999 * s["exp_avg_sq"] + 0.001 * g * g
        by_hand = p * (1 - 1e-3 * 0.01) - 1e-3 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(after[name], by_hand, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("four_bit", [False, True])
def test_what_was_trained_in_any_stage_is_saved_loaded_and_merged(four_bit, tmp_path):
    "A connector that was full and then frozen, layers that were merged, LoRA that was kept: all of it is in the file."
    stages = (
        Stage(TuningPlan(language="lora on 0-1", connector="full", rank=4), steps=3, lora="merge"),
        Stage(TuningPlan(language="lora", vision="full on 2", connector="freeze", rank=4), steps=3),
        Stage(TuningPlan(language="full on 4, lora(targets=q_proj) on 0", connector="freeze", rank=4), steps=3),
    )
    done, _ = staged(tmp_path / "run", stages, four_bit=four_bit)
    train = samples()
    saved = save_adapter(done.model, tmp_path / "adapter", done.plan, "lab", load_tokenizer("lab"), four_bit)
    again, merged = load_adapter(saved), merge_adapter(saved)
    logits = probe_logits(done.model, train)
    assert torch.equal(probe_logits(again, train), logits)
    assert moved(logits, probe_logits(merged, train), BOUND, "merge") <= BOUND
    names = set(json.loads((saved / "plan.json").read_text()))
    assert names == set(TuningPlan().to_dict())
    base = state(load_vlm("lab"))
    learned = {
        n for n, p in state(again).items() if n in base and p.dtype == torch.float32 and not torch.equal(p, base[n])
    }
    assert {
        "resampler.query",
        "vpm.encoder.layers.2.mlp.fc1.weight",
        "llm.model.layers.4.mlp.up_proj.weight",
        "llm.model.layers.0.self_attn.v_proj.weight",
    } <= learned


def test_without_any_lora_the_model_is_whole(tmp_path):
    stages = (Stage(LORA, steps=2, lora="merge"), Stage(TuningPlan(language="freeze", connector="full"), steps=2))
    done, _ = staged(tmp_path, stages)
    assert done.plan is None and not isinstance(done.model, PeftModel)
    base = state(load_vlm("lab"))
    off = {n for n, p in state(done.model).items() if not torch.equal(p, base[n])}
    assert {n.split(".")[0] for n in off} == {"llm", "resampler"}


def test_from_top_thaws_layer_by_layer():
    model = on_meta("lab")  # five layers
    stages = from_top(model, TuningPlan(language="lora", vision="lora", connector="full"), layers=2, steps=10)
    assert [s.plan.language for s in stages] == ["lora, full on 3-4", "lora, full on 1-4", "full on 0-4"]
    way = route(model, stages, four_bit=True)
    assert [sum(n.startswith("llm.") for n in t.trained) for t in way.turns] == [21, 7, 0]
    assert [len(t.folded) for t in way.turns] == [0, 14, 7] and way.plan.language == "full on 0-4"
    assert (
        from_top(model, TuningPlan(vision="freeze"), "vision", layers=1, word="lora", epochs=1)[0].plan.vision
        == "lora on 4"
    )
    for options in (
        dict(layers=0, steps=1),
        dict(layers=1, part="mouth"),
        dict(layers=1, word="freeze"),
        dict(layers=1, part="head"),
    ):
        with pytest.raises(InputError):
            from_top(model, TuningPlan(), **options)


def test_resuming_from_the_very_last_checkpoint_takes_no_step_more(tmp_path):
    "The Trainer alone would: 3 steps of 6 in an epoch are not its end."
    train, schedule = samples(), Schedule(max_steps=3, batch_size=2, save_every=10)
    model = apply_plan(load_vlm("lab"), LORA)
    fit(model, train, schedule, tmp_path, log_every=1)
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    other = apply_plan(load_vlm("lab"), LORA)
    assert fit(other, train, schedule, tmp_path, resume=True, log_every=1).steps == 3
    a, b = state(model), state(other)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_stages_from_a_file_by_the_command_line(tmp_path, capsys):
    data = str(samples_folder() / "mixed.json")
    stages = [
        {"plan": {"connector": "freeze"}, "steps": 2},
        {"plan": {"language": "lora on 0-2, full on 3-4"}, "steps": 2, "learning_rate": 0.001},
    ]
    (tmp_path / "stages.json").write_text(json.dumps(stages))
    common = ["train", "--data", data, "--batch-size", "2", "--rank", "4"]
    assert main(["plan", "lab", "--rank", "4", "--stages", str(tmp_path / "stages.json")]) == 0
    told = capsys.readouterr().out
    assert (
        "stage 2 of 2: 2 steps, learning_rate 0.001" in told
        and "LoRA of 14 layers is merged first" in told
        and "full on 3-4" in told
    )
    assert main([*common, "--output", str(tmp_path / "a"), "--stages", str(tmp_path / "stages.json")]) == 0
    said = capsys.readouterr().out
    assert "Stage 1 of 2" in said and "14 layers took in their LoRA" in said
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["steps"] == 4 and [(s["steps"], s["folded"]) for s in report["stages"]] == [(2, 0), (2, 14)]
    assert (
        report["stages"][0]["words"]["connector"] == "freeze"
        and report["stages"][1]["carried"] > 0 < report["stages"][1]["fresh"]
    )
    assert report["stages"][0]["moved"] == 0 and report["job"]["stages"][1]["plan"]["rank"] == 4
    assert json.loads((tmp_path / "a" / "adapter" / "plan.json").read_text())["language"] == "lora on 0-2, full on 3-4"
    assert main(["merge", str(tmp_path / "a" / "adapter"), "--output", str(tmp_path / "merged")]) == 0
    (tmp_path / "job.yaml").write_text(
        json.dumps({"data": data, "output": str(tmp_path / "b"), "stages": stages, "schedule": {"max_steps": 9}})
    )
    assert (
        main(["train", str(tmp_path / "job.yaml")]) == 2 and "each stage says its own length" in capsys.readouterr().err
    )
    assert main(["train", "--resume", "--output", str(tmp_path / "a")]) == 2 and "finished" in capsys.readouterr().err
    assert main(["doctor", "--data", data, "--stages", str(tmp_path / "stages.json")]) == 0
    assert "The first of 2 stages is examined" in capsys.readouterr().out
    (tmp_path / "stages.json").write_text('{"plan": {}}')
    assert main([*common, "--output", str(tmp_path / "c"), "--stages", str(tmp_path / "stages.json")]) == 2
    assert "expected a list" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_a_staged_job_goes_on_after_a_signal(tmp_path, monkeypatch, capsys):
    """SIGTERM in the second stage of a job, and --resume; the report tells of both stages, and the file is that of an
    unbroken run."""
    data = str(samples_folder() / "mixed.json")
    stages = [{"plan": {"connector": "freeze"}, "steps": 3}, {"plan": {}, "steps": 4}]
    (tmp_path / "job.json").write_text(
        json.dumps({"data": data, "output": "", "stages": stages, "plan": {"rank": 4}, "schedule": {"batch_size": 2}})
    )
    flags = ["train", str(tmp_path / "job.json"), "--output"]
    assert main([*flags, str(tmp_path / "whole")]) == 0
    import vlm_lora_lab.job as job

    class Doctor(job.NanDoctor):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            if state.max_steps == 4 and state.global_step == 1:
                terminate()

    with monkeypatch.context() as m:
        m.setattr(job, "NanDoctor", Doctor)
        assert main([*flags, str(tmp_path / "cut")]) == 130
    assert "Stopped in stage 2, after its step 2" in capsys.readouterr().out
    assert main([*flags, str(tmp_path / "cut")]) == 2 and "--resume" in capsys.readouterr().err
    assert main(["train", "--resume", "--output", str(tmp_path / "cut")]) == 0
    a, b = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    report = json.loads((tmp_path / "cut" / "report.json").read_text())
    assert report["steps"] == 7 and [s["steps"] for s in report["stages"]] == [3, 4]


@pytest.mark.parametrize(
    "stages, message",
    [
        ({"plan": {}}, "Write a list"),
        ([5], "stages, 1: 5 is not a stage"),
        ([{"plans": {}}], "stages, 1: 'plans' is unknown. 'plans': did you mean 'plan'"),
        ([{"plan": {}, "epochs": 1, "steps": 5}], "how long the stage is once"),
        ([{"plan": {}, "steps": 0}], "whole number from 1"),
        ([{"plan": {}, "steps": 2.5}], "whole number from 1"),
        ([{"plan": {}, "epochs": -1}], "above 0"),
        ([{"plan": {}, "lora": "melt"}], "keep, merge"),
        ([{"plan": {}}, {"plan": {"language": "both"}}], "stages, 2, plan, language"),
        ([{"plan": {"rank": 4}}, {"plan": {"rank": 8}}], "lora: merge in the stage before"),
        ([{"plan": {"variant": "dora"}}, {"plan": {}}], "the same variant"),
        ([{"plan": {"variant": "pissa"}}, {"plan": {}}], "PiSSA"),
        ([{"plan": {}}, {"plan": {"language": "lora on 7"}}], "layers 0-4"),
        ([{"plan": {"language": "freeze"}}, {"plan": {}}], "no layer holds LoRA in this stage"),
        ([{"plan": {}, "lora": "merge"}, {"plan": {"language": "freeze"}}], "no layer holds LoRA in this stage"),
        ([{"plan": {}}, {"plan": {}, "lora": "merge"}], "after the last stage"),
        ([{"plan": {"variant": "dora", "embeddings": "lora"}, "lora": "merge"}, {"plan": {}}], "cannot be merged"),
    ],
)
def test_stages_that_cannot_be_are_refused_before_a_weight_is_loaded(stages, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        job = Job.of({"data": str(samples_folder() / "mixed.json"), "output": str(tmp_path / "out"), "stages": stages})
        route(on_meta(job.model), job.stages, job.four_bit)
    assert "stages" in str(caught.value) or "plan" in str(caught.value)


def test_a_stage_s_plan_starts_from_the_job_s():
    first, second = read_stages(
        [{"plan": {"connector": "freeze"}, "epochs": 2}, {"steps": 5, "warmup": 0.5}], {"rank": 4, "vision": "lora"}
    )
    assert (first.plan.rank, first.plan.vision, first.plan.connector, second.plan.connector) == (
        4,
        "lora",
        "freeze",
        "full",
    )
    whole = Schedule(max_steps=50, learning_rate=1e-3, seed=7)
    a, b = first.schedule(whole, 0), second.schedule(whole, 1)
    assert (a.epochs, a.max_steps, a.seed, a.warmup) == (2, -1, 7, whole.warmup) and (
        b.max_steps,
        b.seed,
        b.warmup,
        b.learning_rate,
    ) == (5, 8, 0.5, 1e-3)
    assert Stage(LORA).schedule(whole, 0) == whole  # no length of its own: the schedule's
    with pytest.raises(InputError, match="Write a list"):
        read_stages([])


def test_tied_embeddings_are_refused():
    model = tiny_model("gemma3")
    for stages in (
        [Stage(TuningPlan(embeddings="full"))],
        [Stage(TuningPlan(embeddings="lora"), lora="merge"), Stage(LORA)],
    ):
        with pytest.raises(InputError, match="one tensor"):
            route(model, stages)


def test_another_run_s_stages_are_not_written_over(tmp_path):
    (tmp_path / "stage-1").mkdir()
    with pytest.raises(InputError, match="stage-1 of another run"):
        staged(tmp_path)
    with pytest.raises(InputError, match="no stage to resume from"):
        staged(tmp_path, resume=True)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        staged(tmp_path)


def test_a_model_that_moves_at_a_change_is_an_error():
    with pytest.raises(RuntimeError, match="not the one that was trained"):
        moved(torch.randn(3, 4), torch.randn(3, 4), BOUND, "stage 2")
    with pytest.raises(RuntimeError, match="moved by nan"):
        moved(torch.randn(3, 4), torch.full((3, 4), torch.nan), BOUND, "stage 2")
