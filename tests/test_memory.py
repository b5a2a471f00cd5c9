"""The prediction of memory, against tensors that are really alive."""

import pytest
import torch
from families import batch_of, tiny_config, tiny_model

from vlm_lora_lab.cli import main
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import load_vlm
from vlm_lora_lab.models.published import on_meta
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.quant.memory import CARDS, PIECE, Alive, estimate, shapes_of_batch, shapes_only, step_bytes
from vlm_lora_lab.models.precision import precision_for
from vlm_lora_lab.train.loss import AT_ONCE, label_only


def test_what_is_alive_is_counted_once_and_let_go():
    x = torch.zeros(1000)
    with Alive([x]) as alive:
        a = x.view(10, 100).t()  # of what was there before
        b = a + 1
        c, d = b[:5], b.detach()  # the same storage
        assert alive.now == 4000
        del b, c
        assert alive.now == 4000
        del d
    assert alive.now == 0 and alive.peak == 4000


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "plan",
    [TuningPlan(rank=4, alpha=8), TuningPlan(vision="full", language="lora on 0, full on 1")],
    ids=["default", "mixed"],
)
def test_a_step_on_shapes_keeps_alive_what_a_real_one_does(plan, autocast, checkpointing):
    dtype, family = autocast or torch.float32, "minicpmv-2.6"
    model = tiny_model(family).to(dtype)
    batch = batch_of(family, model)
    real = step_bytes(apply_plan(model, plan), batch, autocast, checkpointing)
    shapes = {k: v if k in ("tgt_sizes", "image_bound") else v.to("meta") for k, v in batch.items()}
    guess = step_bytes(
        shapes_only(apply_plan(on_meta(tiny_config(family)).to(dtype), plan)), shapes, autocast, checkpointing
    )
    assert guess == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "idefics3", "llava", "gemma3", "internvl"])
def test_the_text_of_other_families_is_predicted(family):
    plan = TuningPlan(connector="freeze", rank=4, alpha=8)
    guess_model = shapes_only(apply_plan(on_meta(tiny_config(family)), plan))
    batch, seen = shapes_of_batch(guess_model, 2, 64, 1, torch.float32)
    assert not seen
    guess = step_bytes(guess_model, batch, None, False)
    real = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in batch.items()} | {
        "position_ids": torch.arange(64).expand(2, -1)
    }
    assert guess == pytest.approx(step_bytes(apply_plan(tiny_model(family), plan), real, None, False), rel=0.1)


def test_a_model_is_measured_in_both_ways_whatever_was_before():
    model = shapes_only(apply_plan(on_meta("lab").to(torch.bfloat16), TuningPlan()))
    batch = shapes_of_batch(model, 2, 128, 1, torch.bfloat16)[0]
    kept, lean, again = (step_bytes(model, batch, torch.bfloat16, c, PIECE) for c in (False, True, False))
    assert (
        kept > 1.5 * lean
        and again == pytest.approx(kept, rel=0.02)
        and step_bytes(model, batch, torch.bfloat16, True, PIECE) == pytest.approx(lean, rel=0.02)
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert step_bytes(model, batch, torch.bfloat16, False, PIECE) == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
def test_both_figures_of_the_account_are_those_of_a_real_step(checkpointing):
    "The lab model in NF4, eight rows of 128 tokens with a picture, on a CPU: within an eighth."
    real = apply_plan(load_vlm("lab", four_bit=True, dtype=torch.bfloat16), TuningPlan())
    batch, _ = shapes_of_batch(shapes_only(apply_plan(on_meta("lab"), TuningPlan())), 8, 128, 1, torch.bfloat16)
    batch = {k: torch.zeros(v.shape, dtype=v.dtype) if v.is_meta else v for k, v in batch.items()}
    with label_only(real, PIECE):
        measured = step_bytes(real, batch, torch.bfloat16, checkpointing)
    said = dict(estimate("lab", batch_size=8, tokens=128, checkpointing=checkpointing).rows)
    # else gradients would be the larger
    assert 4 * sum(p.numel() for p in real.parameters() if p.requires_grad) < measured
    assert said["logits and loss, in pieces"] + said["activations, or gradients if larger"] == pytest.approx(
        measured, rel=0.125
    )


def test_without_checkpointing_more_is_needed_and_the_change_says_how_much():
    lean, kept = (estimate("openbmb/MiniCPM-V-2_6", gpu="T4", pictures=10, checkpointing=c) for c in (True, False))
    assert lean.fits and not kept.fits and kept.total > 2 * lean.total
    [saved] = [s for what, s in kept.changes if what == "gradient checkpointing"]
    assert kept.total - saved == pytest.approx(lean.total, rel=0.01)


def test_the_account_adds_up_and_says_what_to_change():
    small, large = (
        estimate("lab", gpu="T4", tokens=128),
        estimate("lab", gpu=0.5, tokens=128, batch_size=4, four_bit=False, checkpointing=False),
    )
    assert small.fits and small.total == sum(b for _, b in small.rows) < large.total and "fits" in repr(small)
    assert large.fits is False and len(large.changes) == 3
    before = large.total
    for _, saved in large.changes:
        assert 0 < saved < before
        before -= saved
    assert "does not fit" in repr(large) and estimate("lab", tokens=128).fits is None


def test_a_plan_without_lora_counts_its_weights_once():
    plan = TuningPlan(vision="full", connector="full", language="full", embeddings="full", head="full")
    rows = dict(estimate("lab", plan, tokens=128, four_bit=False).rows)
    weights = sum(p.numel() for p in on_meta("lab").parameters())
    assert (
        "other weights in bfloat16" not in rows
        and rows["trained weights, 32 bit"] == 4 * weights
        and rows["optimizer (AdamW)"] == 8 * weights
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(gpu="Voodoo"), "Voodoo"),
        (dict(plan=TuningPlan(language="full")), "no part gets LoRA"),
        (dict(pictures=1000), "1000 pictures are"),
        (dict(batch_size=10**15), "batch_size is 1000000000000000"),
        (dict(tokens=10**12), "max_length is 1000000000000"),
        (dict(tokens=10**7), "accumulation"),
        (dict(batch_size=1000), "No card holds that"),
        (dict(batch_size=1000, tokens=1000, pictures=100), "No card holds that"),
        (dict(batch_size=True), "batch_size is True"),
        (dict(tokens=0), "max_length is 0"),
        (dict(pictures=-1), "pictures is -1"),
        *(
            (dict(gpu=g), "GiB above 0")
            for g in (0, -3, "0", "-1", float("nan"), float("inf"), True, "9" * 5000, 10**5000, "1.2.3", "1e400")
        ),
    ],
)
def test_what_cannot_be_estimated_is_said(options, message):
    with pytest.raises(InputError, match=message):
        estimate("lab", **options)


def test_every_card_has_a_row_of_precision():
    for card in CARDS:
        assert precision_for(card).autocast in (torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch-size", str(10**15)],
        ["--max-length", str(10**12)],
        ["--batch-size", "1.5"],
        ["--pictures", "many"],
        ["--max-length", "9" * 5000],
        ["--rank", "1e9"],
        ["--gpu", "nan"],
        ["--gpu", "1e999"],
        ["--alpha", "nan"],
        ["--batch-size", "4096"],
    ],
)
def test_a_number_that_cannot_be_is_refused_at_once(flags, capsys):
    try:
        status = main(["estimate", "lab", *flags])
    except SystemExit as e:
        status = e.code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2 and len(said) < 400 and ("expected a" in said or "Write" in said or "No card" in said), said


def test_the_command(capsys):
    assert main(["estimate", "lab", "--gpu", "T4", "--max-length", "128", "--rank", "4"]) == 0
    out = capsys.readouterr().out
    assert "decoder in 4 bit" in out and "It fits into 15 GiB" in out
    assert (
        main(["estimate", "lab", "--gpu", "0.1", "--max-length", "128"]) == 1
        and "does not fit" in capsys.readouterr().out
    )
    assert main(["estimate", "lab", "--gpu", "Voodoo"]) == 2 and "Write one of T4" in capsys.readouterr().err


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("family", ["minicpmv-2.6", "minicpmv-2.0", "qwen2_5_vl", "gemma3", "qwen"])
def test_the_loss_in_pieces_is_predicted(family, checkpointing):
    # several pieces, and the last one shorter
    plan, at_once = TuningPlan(connector="freeze", rank=4, alpha=8), 40 * 320
    guess_model = shapes_only(apply_plan(on_meta(tiny_config(family)), plan))
    width = guess_model.config.get_text_config().hidden_size
    batch = {
        "inputs_embeds": torch.empty(1, 128, width, device="meta"),
        "labels": torch.zeros(1, 128, dtype=torch.long, device="meta"),
    }
    batch = batch | {"position_ids": torch.zeros(1, 128, dtype=torch.long, device="meta")}
    guess, whole = (step_bytes(guess_model, batch, None, checkpointing, n) for n in (at_once, None))
    real = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in batch.items()} | {
        "position_ids": torch.arange(128)[None]
    }
    model = apply_plan(tiny_model(family), plan)
    with label_only(model, at_once):
        assert guess == pytest.approx(step_bytes(model, real, None, checkpointing), rel=0.1)
    assert guess <= whole and "forward" not in guess_model.get_base_model().get_output_embeddings().__dict__


def test_the_account_knows_the_pieces_of_the_loss():
    assert PIECE == AT_ONCE
    found = estimate("openbmb/MiniCPM-V-2_6", tokens=2048)
    assert dict(found.rows)["logits and loss, in pieces"] == 12 * PIECE
    assert any("with all logits at once, as the Trainer does it, 2." in note for note in found.notes), found.notes
    assert not any("GiB more" in note for note in estimate("lab", tokens=512).notes)


def test_what_a_vision_cache_keeps_is_said_where_there_can_be_one():
    patches, width = 32 * 32, 1152  # of a slice of 448 x 448 pixels, and of MiniCPM-V's vision tower
    note = f"keeps {2 * patches * width / 2**20:.2f} MiB for each picture or slice"
    assert any(note in n for n in estimate("openbmb/MiniCPM-V-2_6", tokens=256).notes)
    assert not any(
        "vision cache" in n for n in estimate("openbmb/MiniCPM-V-2_6", TuningPlan(vision="lora"), tokens=256).notes
    )
