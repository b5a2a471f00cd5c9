"""The native MiniCPM-V 2.6 against tensors made by the original code (see golden/README.md)."""

import json

import pytest
import torch
from safetensors.torch import load_file

from vlm_lora_lab.models.minicpmv import MiniCPMV, MiniCPMVConfig, position_buckets

CASES = ("two_images", "multi_and_text_only", "no_image_training")
FORWARD = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def golden(golden_root):
    folder = golden_root / "minicpmv26"
    read = lambda name: {k: v.float() if v.is_floating_point() else v for k, v in load_file(folder / name).items()}  # noqa: E731
    return {
        "config": json.loads((folder / "config.json").read_text()),
        "weights": read("weights.safetensors"),
        "inputs": read("inputs.safetensors"),
        "outputs": read("outputs.safetensors"),
        "ragged": json.loads((folder / "inputs.json").read_text()),
        "grad_stats": json.loads((folder / "grad_stats.json").read_text()),
    }


@pytest.fixture(scope="module")
def checkpoint(golden, tmp_path_factory):
    "The reference weights in a folder, so that every test goes through `from_pretrained`."
    folder = tmp_path_factory.mktemp("minicpmv26")
    model = MiniCPMV(MiniCPMVConfig(**golden["config"]))
    model.load_state_dict(golden["weights"], strict=True)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def model(checkpoint):
    model, report = MiniCPMV.from_pretrained(checkpoint, attn_implementation="eager", output_loading_info=True)
    assert not any(report.values()), report
    return model.train()  # dropout is 0 throughout; the references were made in training mode


def batch_of(golden, case):
    "The nested lists of the references as one flat batch; labels as transformers wants them, not shifted."
    inputs, ragged = golden["inputs"], golden["ragged"][case]
    ids, shifted = inputs[f"{case}.input_ids"], inputs[f"{case}.labels_preshifted"]
    assert (shifted[:, -1] == -100).all()
    batch = {"input_ids": ids, "labels": torch.cat([torch.full_like(shifted[:, :1], -100), shifted[:, :-1]], 1)}
    sizes = [size for row in ragged["tgt_sizes"] for size in row]
    if sizes:
        pixels = [inputs[f"{case}.pixel_values.{r}.{i}"] for r, n in enumerate(ragged["num_images"]) for i in range(n)]
        longest = max(p.shape[-1] for p in pixels)
        batch["pixel_values"] = torch.stack([torch.nn.functional.pad(p, (0, longest - p.shape[-1])) for p in pixels])
        batch["tgt_sizes"] = torch.tensor(sizes)
        batch["image_bound"] = torch.tensor([[r, *bound] for r, row in enumerate(ragged["image_bound"]) for bound in row])
    return batch


def real_rows(x, sizes):
    "Drop the rows that pad a picture."
    return [x[i, : h * w] for i, (h, w) in enumerate(sizes.tolist())]


@pytest.mark.parametrize("case", CASES[:2])
def test_vision_tower(golden, model, case):
    batch, out = batch_of(golden, case), golden["outputs"]
    sizes = batch["tgt_sizes"]
    ids = model.vpm.embeddings.position_ids(sizes)
    for ours, theirs in zip(real_rows(ids, sizes), real_rows(out[f"{case}.vpm_position_ids"], sizes), strict=True):
        assert torch.equal(ours, theirs)
    seen = model.vpm(batch["pixel_values"], sizes)
    for ours, theirs in zip(real_rows(seen, sizes), real_rows(out[f"{case}.vpm_last_hidden_state"], sizes), strict=True):
        torch.testing.assert_close(ours, theirs, **FORWARD)
    if case == "two_images":
        embedded = model.vpm.embeddings(batch["pixel_values"], sizes)
        for ours, theirs in zip(real_rows(embedded, sizes), real_rows(out[f"{case}.vpm_embeddings"], sizes), strict=True):
            torch.testing.assert_close(ours, theirs, **FORWARD)


@pytest.mark.parametrize("case", CASES[:2])
def test_resampler(golden, model, case):
    batch, out = batch_of(golden, case), golden["outputs"]
    ours = model.resampler(out[f"{case}.vpm_last_hidden_state"], batch["tgt_sizes"])
    torch.testing.assert_close(ours, out[f"{case}.resampler_output"], **FORWARD)


@pytest.mark.parametrize("case", CASES)
def test_embeddings_logits_and_loss(golden, model, case):
    batch, out = batch_of(golden, case), golden["outputs"]
    pictures = {k: batch[k] for k in ("pixel_values", "tgt_sizes", "image_bound") if k in batch}
    torch.testing.assert_close(model.embed(batch["input_ids"], **pictures), out[f"{case}.inputs_embeds"], **FORWARD)
    result = model(**batch)
    if f"{case}.logits" in out:
        torch.testing.assert_close(result.logits, out[f"{case}.logits"], **FORWARD)
    torch.testing.assert_close(result.loss, out[f"{case}.loss"], **FORWARD)
    assert abs(result.loss.item() - golden["ragged"][case]["loss"]) < 1e-5


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_of_every_parameter(golden, model, case, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch_of(golden, case), use_cache=False).loss.backward()
    stats, compared = golden["grad_stats"][case], 0
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert set(stats) == set(grads)
    for name, grad in grads.items():
        want = stats[name]
        assert abs(grad.double().norm().item() - want["l2"]) <= 1e-4 * want["l2"] + 1e-7, name
        assert abs(grad.abs().max().item() - want["absmax"]) <= 1e-4 * want["absmax"] + 1e-7, name
        assert abs(grad.double().sum().item() - want["sum"]) <= 1e-4 * want["l2"] * grad.numel() ** 0.5 + 1e-7, name
        full = golden["outputs"].get(f"{case}.grad.{name}")
        if full is not None:
            compared += 1
            assert (grad - full).norm() <= 1e-4 * full.norm() + 1e-7, name
    assert compared > 0 or case == "no_image_training"  # for that case the references hold statistics only
    if case == "no_image_training":
        assert all(grad is not None and not grad.any() for name, grad in grads.items() if not name.startswith("llm."))


@pytest.mark.parametrize("implementation", ["sdpa"])
def test_fast_attention_agrees_with_the_reference(golden, checkpoint, implementation):
    model = MiniCPMV.from_pretrained(checkpoint, attn_implementation=implementation)
    assert model.vpm.config._attn_implementation == implementation
    case = "multi_and_text_only"
    with torch.no_grad():
        logits = model(**batch_of(golden, case)).logits
    torch.testing.assert_close(logits, golden["outputs"][f"{case}.logits"], rtol=1e-4, atol=1e-4)


def test_position_buckets_equal_the_original_table(golden_root):
    table = json.loads((golden_root / "preprocess" / "navit_position_buckets.json").read_text())
    for side, by_n in table.items():
        if side != "meta":
            for n, buckets in by_n.items():
                assert position_buckets(int(n), int(side)).tolist() == buckets, f"side {side}, n {n}"
