"""The native MiniCPM-V 2.0, 2.5, 2.6 and 4.5 against tensors made by the original code (see golden/README.md)."""

import json
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import pad

from vlm_lora_lab.models.minicpmv import VERSIONS, MiniCPMV, MiniCPMVConfig, position_buckets

FORWARD = dict(rtol=1e-5, atol=1e-5)


@dataclass(frozen=True)
class Case:
    folder: str
    name: str = ""  # prefix in the files; 2.0 has none
    inputs: str | None = None  # prefix of the inputs where it is another
    change: tuple = ()  # to the configuration

    def __str__(self):
        return f"{self.folder}-{self.name}".rstrip("-")


CASES = [
    Case("minicpmv20"),
    Case("minicpmv25", "batch_vision_true", ""),
    Case("minicpmv25", "batch_vision_false", "", (("batch_vision_input", False),)),
    Case("minicpmv26", "two_images"),
    Case("minicpmv26", "multi_and_text_only"),
    Case("minicpmv26", "no_image_training"),
    Case("minicpmv26_unmodified", "two_images"),
    Case("minicpmv45", "images_no_temporal"),
    Case("minicpmv45", "temporal_batched"),
    Case("minicpmv45", "temporal_foreach", "temporal_batched", (("batch_3d_resampler", False),)),
]
WITH_PICTURES = [c for c in CASES if c.name != "no_image_training"]


@cache
def golden(root, folder):
    def read(name):
        return {k: v.float() if v.is_floating_point() else v for k, v in load_file(root / folder / name).items()}

    def data(name):
        return json.loads((root / folder / name).read_text())

    return {
        "config": data("config.json"),
        "weights": read("weights.safetensors"),
        "inputs": read("inputs.safetensors"),
        "outputs": read("outputs.safetensors"),
        "ragged": data("inputs.json"),
        "grad_stats": data("grad_stats.json"),
        "shapes": data("state_dict_shapes.json"),
    }


def config_of(reference, change=()):
    config = reference["config"] | dict(change)
    # 2.0: its tower has a name, and the reference's tower has none that is published
    if timm := config.pop("vision_timm", None):
        config["vision_config"] = dict(
            hidden_size=timm["embed_dim"],
            intermediate_size=int(timm["embed_dim"] * timm["mlp_ratio"]),
            num_hidden_layers=timm["depth_before_drop"],
            num_attention_heads=timm["num_heads"],
            image_size=timm["img_size"],
            patch_size=timm["patch_size"],
            hidden_act="gelu",
            layer_norm_eps=timm["norm_eps"],
        )
    return MiniCPMVConfig.from_dict(config)


@pytest.fixture(scope="module")
def checkpoints(golden_root, tmp_path_factory):
    "The reference weights in folders, so that every test goes through `from_pretrained`."

    @cache
    def folder_of(case):
        reference, folder = golden(golden_root, case.folder), tmp_path_factory.mktemp(case.folder)
        model = MiniCPMV(config_of(reference, case.change))
        model.load_state_dict(reference["weights"], strict=True)
        model.save_pretrained(folder)
        return folder

    return folder_of


def load(folder, implementation="eager"):
    model, report = MiniCPMV.from_pretrained(folder, attn_implementation=implementation, output_loading_info=True)
    assert not any(report.values()), report
    return model.train()  # dropout is 0 throughout; the references were made in training mode


def strip(image, patch=14):
    "A picture (3, height, width) as patches side by side."
    h, w = image.shape[1] // patch, image.shape[2] // patch
    return image.reshape(3, h, patch, w, patch).permute(0, 2, 1, 3, 4).reshape(3, patch, -1)


def batch_of(root, case):
    "The nested lists of the references as one flat batch; labels as transformers wants them, not shifted."
    reference = golden(root, case.folder)
    inputs, ragged = reference["inputs"], reference["ragged"]
    ragged = ragged[case.name] if case.name else ragged
    prefix = case.name if case.inputs is None else case.inputs

    def get(key):
        return inputs[f"{prefix}.{key}" if prefix else key]

    shifted = get("labels_preshifted")
    assert (shifted[:, -1] == -100).all()
    batch = {
        "input_ids": get("input_ids"),
        "labels": torch.cat([torch.full_like(shifted[:, :1], -100), shifted[:, :-1]], 1),
    }
    sizes = [(r, i, size) for r, row in enumerate(ragged["tgt_sizes"]) for i, size in enumerate(row)]
    if sizes:
        name = "image_chw" if case.folder == "minicpmv20" else "pixel_values"
        pixels = [get(f"{name}.{r}.{i}") for r, i, _ in sizes]
        pixels = [strip(p) for p in pixels] if name == "image_chw" else pixels
        longest = max(p.shape[-1] for p in pixels)
        batch["pixel_values"] = torch.stack([pad(p, (0, longest - p.shape[-1])) for p in pixels])
        batch["tgt_sizes"] = torch.tensor([size for *_, size in sizes])
        batch["image_bound"] = torch.tensor(
            [[r, *bound] for r, row in enumerate(ragged["image_bound"]) for bound in row]
        )
    if ragged.get("temporal_ids"):
        groups = [group for row in ragged["temporal_ids"] for group in row]
        batch["temporal_ids"] = torch.tensor([(g, t) for g, group in enumerate(groups) for t in group])
    return batch


def pictures(batch):
    return {k: v for k, v in batch.items() if k not in ("input_ids", "labels")}


def output_of(root, case, key):
    "A reference tensor, or the tensors of single pictures put together; None when there is none."
    outputs, name = golden(root, case.folder)["outputs"], f"{case.name}.{key}" if case.name else key
    if name in outputs:
        return outputs[name]
    parts = [outputs[k] for k in sorted(outputs) if k.startswith(f"{name}.") and k.removeprefix(f"{name}.").isdigit()]
    longest = max((p.shape[1] for p in parts), default=0)
    return torch.cat([pad(p, (0, 0) * (p.dim() - 2) + (0, longest - p.shape[1])) for p in parts]) if parts else None


def real_rows(x, sizes):
    "Drop the rows that pad a picture."
    return torch.cat([x[i, : h * w] for i, (h, w) in enumerate(sizes.tolist())])


@pytest.mark.parametrize("folder", sorted({c.folder for c in CASES}))
def test_names_and_shapes_are_the_originals(golden_root, folder):
    reference = golden(golden_root, folder)
    ours = {k: list(v.shape) for k, v in MiniCPMV(config_of(reference)).state_dict().items()}
    assert ours == reference["shapes"]


@pytest.mark.parametrize("case", WITH_PICTURES, ids=str)
def test_vision_tower(golden_root, checkpoints, case):
    model, batch = load(checkpoints(case)), batch_of(golden_root, case)
    sizes, compared = batch["tgt_sizes"], 0
    seen = model.vpm(batch["pixel_values"], sizes)
    for key in ("vpm_last_hidden_state", "vpm_forward_features"):
        if (theirs := output_of(golden_root, case, key)) is not None:
            torch.testing.assert_close(real_rows(seen, sizes), real_rows(theirs, sizes), **FORWARD)
            compared += 1
    assert compared == 1
    if (theirs := output_of(golden_root, case, "vpm_position_ids")) is not None and model.config.rows_and_columns:
        assert torch.equal(real_rows(model.vpm.embeddings.position_ids(sizes), sizes), real_rows(theirs, sizes))
    if (theirs := output_of(golden_root, case, "vpm_embeddings")) is not None and case.name == "two_images":
        torch.testing.assert_close(
            real_rows(model.vpm.embeddings(batch["pixel_values"], sizes), sizes), real_rows(theirs, sizes), **FORWARD
        )


@pytest.mark.parametrize("case", WITH_PICTURES, ids=str)
def test_resampler(golden_root, checkpoints, case):
    model, batch = load(checkpoints(case)), batch_of(golden_root, case)
    seen = output_of(golden_root, case, "vpm_last_hidden_state")
    seen = output_of(golden_root, case, "vpm_forward_features") if seen is None else seen
    ours = model.resampler(seen, batch["tgt_sizes"], batch.get("temporal_ids"))
    torch.testing.assert_close(ours, output_of(golden_root, case, "resampler_output"), **FORWARD)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_embeddings_logits_and_loss(golden_root, checkpoints, case):
    model, batch = load(checkpoints(case)), batch_of(golden_root, case)
    embeds = model.embed(batch["input_ids"], **pictures(batch))
    torch.testing.assert_close(embeds, output_of(golden_root, case, "inputs_embeds"), **FORWARD)
    result = model(**batch)
    if case.name != "no_image_training":  # for that case the references hold no logits
        torch.testing.assert_close(result.logits, output_of(golden_root, case, "logits"), **FORWARD)
    torch.testing.assert_close(result.loss, output_of(golden_root, case, "loss").squeeze(), **FORWARD)
    ragged = golden(golden_root, case.folder)["ragged"]
    assert abs(result.loss.item() - (ragged[case.name] if case.name else ragged)["loss"]) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradient_of_every_parameter(golden_root, checkpoints, case, checkpointing):
    reference, model = golden(golden_root, case.folder), load(checkpoints(case))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch_of(golden_root, case), use_cache=False).loss.backward()
    stats = reference["grad_stats"][case.name] if case.name else reference["grad_stats"]
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    # the stored table of 2.0 has no gradient upstream either
    assert {name for name, want in stats.items() if want} == set(grads)
    compared = 0
    for name, grad in grads.items():
        want = stats[name]
        assert abs(grad.double().norm().item() - want["l2"]) <= 1e-4 * want["l2"] + 1e-7, name
        assert abs(grad.abs().max().item() - want["absmax"]) <= 1e-4 * want["absmax"] + 1e-7, name
        assert abs(grad.double().sum().item() - want["sum"]) <= 1e-4 * want["l2"] * grad.numel() ** 0.5 + 1e-7, name
        if (full := output_of(golden_root, case, f"grad.{name}")) is not None:
            compared += 1
            assert (grad - full).norm() <= 1e-4 * full.norm() + 1e-7, name
    assert compared > 0 or case.name in ("no_image_training", "temporal_foreach")  # statistics only
    if case.name == "no_image_training":
        assert all(grad is not None and not grad.any() for name, grad in grads.items() if not name.startswith("llm."))


@pytest.mark.parametrize(
    "case",
    [c for c in WITH_PICTURES if c.name in ("", "batch_vision_true", "multi_and_text_only", "temporal_batched")],
    ids=str,
)
def test_fast_attention_agrees_with_the_reference(golden_root, checkpoints, case):
    model = load(checkpoints(case), "sdpa")
    assert model.vpm.config._attn_implementation == "sdpa"
    with torch.no_grad():
        logits = model(**batch_of(golden_root, case)).logits
    torch.testing.assert_close(logits, output_of(golden_root, case, "logits"), rtol=1e-4, atol=1e-4)


def test_position_buckets_equal_the_original_table(golden_root):
    table = json.loads((golden_root / "preprocess" / "navit_position_buckets.json").read_text())
    for side, by_n in table.items():
        if side != "meta":
            for n, buckets in by_n.items():
                assert position_buckets(int(n), int(side)).tolist() == buckets, f"side {side}, n {n}"


def test_positions_of_2_5_are_those_of_one_line(golden_root, checkpoints):
    for case in CASES[1:3]:
        sizes, theirs = batch_of(golden_root, case)["tgt_sizes"], output_of(golden_root, case, "vpm_position_ids")
        lines = [int(sizes.prod(-1).max())] * 2 if case.name == "batch_vision_true" else sizes.prod(-1).tolist()
        for row, n in zip(theirs, lines, strict=True):
            assert torch.equal(row[:n], position_buckets(n, 5)), case


def test_the_row_after_a_video_gets_its_picture(golden_root, checkpoints):
    "Upstream counts frames where it should count groups, and leaves this row's picture out; mended here on purpose."
    model, video = load(checkpoints(CASES[8])).eval(), pictures(batch_of(golden_root, CASES[8]))
    ids = batch_of(golden_root, CASES[8])["input_ids"]
    still = {
        "pixel_values": video["pixel_values"][3:, ..., : 10 * 14],
        "tgt_sizes": video["tgt_sizes"][3:],
        "image_bound": torch.tensor([[0, 2, 18]]),
    }
    both = {
        "pixel_values": torch.cat([video["pixel_values"], video["pixel_values"][3:]]),
        "tgt_sizes": torch.cat([video["tgt_sizes"], still["tgt_sizes"]]),
    }
    both["image_bound"] = torch.cat([video["image_bound"], torch.tensor([[1, 2, 18]])])
    both["temporal_ids"] = torch.cat([video["temporal_ids"], torch.tensor([[2, -1]])])
    together = model(input_ids=ids.repeat(2, 1), **both).logits
    torch.testing.assert_close(together[0], model(input_ids=ids, **video).logits[0], **FORWARD)
    torch.testing.assert_close(together[1], model(input_ids=ids, **still).logits[0], **FORWARD)


def test_every_version_is_covered():
    covered = {type(MiniCPMVConfig.from_dict({"version": v})).__name__ for v in ("2.5", "2.6", "4.5")} | {
        "MiniCPMV20Config"
    }
    # no reference exists; see test_families.py
    assert {c.__name__ for c in VERSIONS.values()} - covered == {"MiniCPMV40Config"}


@pytest.mark.parametrize("name", ["finetune_py_default", "finetune_lora_sh"])
def test_lora_as_the_original_script_sets_it_up(golden_root, checkpoints, name):
    """The two LoRA targets of upstream's finetune.py and finetune_lora.sh, through today's PEFT: names, loss and
    gradients."""
    folder, case = golden_root / "minicpmv26_lora", CASES[3]
    reference = json.loads((folder / "lora.json").read_text())[name]
    outputs, weights = load_file(folder / "outputs.safetensors"), load_file(folder / "lora_weights.safetensors")
    config = LoraConfig(
        r=reference["r"],
        lora_alpha=reference["lora_alpha"],
        target_modules=reference["target_modules"],
        modules_to_save=reference["modules_to_save"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load(checkpoints(case)), config, autocast_adapter_dtype=False)
    trainable = {n: list(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == reference["trainable"]
    state = {
        k.removeprefix(f"{name}.").replace(".weight", ".default.weight"): v.float()
        for k, v in weights.items()
        if k.startswith(f"{name}.")
    }
    missing = model.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and not any("lora_" in k for k in missing.missing_keys) and len(state) >= 8
    result = model(**batch_of(golden_root, case), use_cache=False)
    torch.testing.assert_close(result.loss, outputs[f"{name}.loss"].squeeze(), **FORWARD)
    result.loss.backward()
    params = dict(model.named_parameters())
    assert set(reference["grad_l2"]) == set(trainable)
    for parameter, norm in reference["grad_l2"].items():
        assert abs(params[parameter].grad.norm().item() - norm) <= 1e-4 * norm + 1e-7, parameter
    full = {k.removeprefix(f"{name}.grad."): v for k, v in outputs.items() if k.startswith(f"{name}.grad.")}
    assert full
    for parameter, grad in full.items():
        assert (params[parameter].grad - grad).norm() <= 1e-4 * grad.norm(), parameter
    merged = model.merge_and_unload().llm.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(merged, outputs[f"{name}.merged_q_proj_layer0"], **FORWARD)
