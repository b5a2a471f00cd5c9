"""What lies in a folder is said as it is, and what is wrong with it is found, without loading a model."""

import json
import shutil

import pytest
import torch
from families import FAMILIES, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from vlm_lora_lab.checkpoint.inspect import inspect_adapter
from vlm_lora_lab.checkpoint.save import read_provenance, save_adapter, seal
from vlm_lora_lab.cli import main
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.files import no_bar_if_small
from vlm_lora_lab.models.load import lab_folder, load_tokenizer, load_vlm
from vlm_lora_lab.models.parts import layout_of
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

TOKENIZER = load_tokenizer("lab")


def moved(model):
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.01 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    plan = TuningPlan(
        vision="lora(rank=2)", embeddings="full", language="lora(rank=8) on 0-2, lora(rank=4, alpha=4) on 3-4"
    )
    return save_adapter(
        moved(apply_plan(load_vlm("lab"), plan)),
        tmp_path_factory.mktemp("good") / "adapter",
        plan,
        "lab",
        TOKENIZER,
        False,
        data={"train.json": "x"},
    )


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


def edit(folder, change, sealed=True):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    if sealed:
        seal(folder, read_provenance(folder))


def found(folder, text, level="error", **options):
    report = inspect_adapter(folder, **options)
    hits = [f for f in report.findings if text in f.text]
    assert hits and hits[0].level == level, report
    assert report.status == max({"error": 2, "warning": 1, "note": 0}[f.level] for f in report.findings)
    assert hits[0].text.split()[0] in repr(report) and hits[0].remedy.split(" ")[0] in report._repr_html_()
    return report


def test_a_healthy_adapter_is_described_as_it_is(good):
    report = inspect_adapter(good)
    assert report.status == 0 and not report.findings and "Nothing suspicious" in repr(report)
    rows = {(r.part, r.kind): r for r in report.rows}
    assert set(rows) == {("vision", "LoRA"), ("connector", "in full"), ("language", "LoRA"), ("embeddings", "in full")}
    assert (
        rows["vision", "LoRA"].rank == "2"
        and rows["language", "LoRA"].rank == "4+8"
        and rows["language", "LoRA"].alpha == "4+16"
    )
    tensors = load_file(good / "adapter_model.safetensors")
    assert sum(r.tensors for r in report.rows) == len(tensors) and sum(r.nbytes for r in report.rows) == sum(
        t.nbytes for t in tensors.values()
    )
    assert dict(report.about)["data"] == "train.json" and json.loads(json.dumps(report.to_dict()))["status"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_part_by_part(family, tmp_path):
    with no_bar_if_small(0):
        tiny_model(family).save_pretrained(tmp_path / "base")
    plan = TuningPlan(rank=2)
    model = moved(apply_plan(load_vlm(tmp_path / "base"), plan))
    folder = save_adapter(model, tmp_path / "adapter", plan, tmp_path / "base", TOKENIZER, False)
    report = inspect_adapter(folder)
    rows = [r for r in report.rows if r.kind != "table"]
    assert report.findings == () and {(r.part, r.kind) for r in rows} == {
        ("connector", "in full"),
        ("language", "LoRA"),
    }, report
    # a stored table of positions goes with its module
    assert (len(rows) < len(report.rows)) == (family in ("minicpmv-2.0", "qwen"))
    part_of = layout_of(model).part_of
    for row in rows:
        assert row.weights == sum(
            p.numel() for n, p in model.named_parameters() if p.requires_grad and part_of(n) == row.part
        )
    moved_away = (tmp_path / "base").rename(tmp_path / "elsewhere")
    alone = inspect_adapter(folder)
    # the family is in provenance.json
    assert alone.rows == report.rows and any("not at hand" in f.text for f in alone.findings)
    assert inspect_adapter(folder, base=moved_away).findings == ()


def test_untrained_and_half_trained(copy):
    edit(copy, lambda t: [t[k].zero_() for k in t if "lora_B" in k and "layers.3" in k])
    found(copy, "never learned", "warning")
    edit(copy, lambda t: [t[k].zero_() for k in t if "lora_B" in k])
    found(copy, "never trained")


def test_identical_to_base_is_counted_and_named(copy):
    name = "base_model.model.resampler.query"
    edit(copy, lambda t: t.update({name: load_file(lab_folder() / "model.safetensors")["resampler.query"].float()}))
    report = found(copy, "the base's own bit for bit", "warning")
    assert "out of 14 tensors in full: 1" in report.findings[0].text and name in report.findings[0].text


@pytest.mark.parametrize(
    "change, text",
    [
        (
            lambda t: t["base_model.model.resampler.query"].fill_(float("inf")),
            "NaN or infinity: 1 (base_model.model.resampler.query)",
        ),
        (
            lambda t: t.pop("base_model.model.resampler.query"),
            "layers that plan.json promises and the file does not hold: 1 (resampler.query)",
        ),
        (
            lambda t: [t.pop(k) for k in list(t) if "resampler" in k],
            "modules that modules_to_save names and the file does not hold: 1 (resampler)",
        ),
        (
            lambda t: [t.pop(k) for k in list(t) if "layers.2.mlp.up_proj.lora" in k],
            "promises and the file does not hold: 1 (llm.model.layers.2.mlp.up_proj)",
        ),
        (lambda t: [t.pop(k) for k in list(t) if "layers.2.mlp.up_proj.lora_A" in k], "without a partner: 1"),
        (
            lambda t: t.update({k: t[k][:1].clone() for k in t if "layers.2.mlp.up_proj.lora_A" in k}),
            "rank is not what adapter_config.json says: 1",
        ),
        (
            lambda t: t.update({k.replace("lora_A", "lora_A.default"): t.pop(k) for k in list(t) if "lora_A" in k}),
            "still carry the adapter's name",
        ),
        (lambda t: t.update({"base_model.model.nowhere": torch.ones(3)}), "without a place in the base"),
        (
            lambda t: t.update({"base_model.model.resampler.query": torch.ones(3, 3)}),
            "of another shape than in 'lab': 1",
        ),
        (lambda t: t.update({"base_model.model.resampler.query": torch.ones(0)}), "empty tensors"),
    ],
)
def test_what_is_wrong_with_the_tensors(change, text, copy):
    edit(copy, change)
    found(copy, text)


def test_what_lies_beside(copy):
    (copy / "non_lora_state_dict.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    found(copy, "pickles beside, which can hold programs and were not opened: non_lora_state_dict.bin", "warning")
    (copy / "non_lora_state_dict.bin").unlink()
    raw = bytearray((copy / "adapter_model.safetensors").read_bytes())
    raw[-1] ^= 1
    (copy / "adapter_model.safetensors").write_bytes(raw)
    found(copy, "adapter_model.safetensors has the right size, but other bytes")
    for size in (0, 7, 1000, len(raw) - 1):
        (copy / "adapter_model.safetensors").write_bytes(raw[:size])
        found(copy, "adapter_model.safetensors is truncated or damaged")
    (copy / "adapter_model.safetensors").unlink()
    found(copy, "there is no adapter_model.safetensors")
    (copy / "adapter_config.json").write_text("{")
    found(copy, "adapter_config.json cannot be read")
    (copy / "provenance.json").write_text("{")
    found(copy, "provenance.json cannot be read")


def test_a_wrong_base_and_an_unknown_one(copy, tmp_path):
    base = load_vlm("lab", dtype="stored")
    base.vpm.post_layernorm.weight.data += 0.1
    base.save_pretrained(tmp_path / "other")
    found(copy, "is not the base that this adapter was trained on", base=tmp_path / "other")
    found(copy, "of another shape", base="openbmb/MiniCPM-V-2_6")
    found(copy, "the base is not at hand", "note", base="somebody/else")


def test_adapters_of_peft_itself(tmp_path):
    model = moved(
        get_peft_model(
            load_vlm("lab"),
            LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["resampler"], use_rslora=True),
        )
    )
    model.save_pretrained(tmp_path / "foreign", save_embedding_layers=False)
    report = found(tmp_path / "foreign", "no provenance.json", "note", base="lab")
    assert (
        report.status == 0
        and dict(report.about)["variant"] == "rsLoRA"
        and {r.part for r in report.rows} == {"vision", "connector", "language"}
    )
    tensors = load_file(tmp_path / "foreign" / "adapter_model.safetensors")
    by_hand = tensors | {"base_model.model.llm.lm_head.weight": torch.randn(419, 128)}
    save_file(by_hand, tmp_path / "foreign" / "adapter_model.safetensors")
    report = found(tmp_path / "foreign", "tensors in full outside of modules_to_save", "note", base="lab")
    assert ("head", "by hand") in {(r.part, r.kind) for r in report.rows}
    config = json.loads((tmp_path / "foreign" / "adapter_config.json").read_text())
    (tmp_path / "foreign" / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["c_attn"], "a_key_of_the_future": 1})
    )
    found(tmp_path / "foreign", "PEFT cannot put this adapter on the base", base="lab")
    whole = tensors | {
        f"base_model.model.{k}": v.clone()
        for k, v in load_file(lab_folder() / "model.safetensors").items()
        if k.startswith("llm.model.layers")
    }
    save_file(whole, tmp_path / "foreign" / "adapter_model.safetensors")
    assert any(
        "this is a model rather than an adapter" in f.text and f.level == "warning"
        for f in inspect_adapter(tmp_path / "foreign", base="lab").findings
    )


def test_whole_models(tmp_path):
    shutil.copytree(lab_folder(), tmp_path / "merged")
    report = found(tmp_path / "merged", "all 161 tensors equal those of 'lab'", base="lab")
    assert report.kind == "whole model" and inspect_adapter(tmp_path / "merged").status == 0
    model = load_vlm("lab", dtype="stored")
    model.resampler.query.data += 1
    model.llm.lm_head.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "changed")
    report = found(tmp_path / "changed", "2 of 161 tensors differ from 'lab'", "note", base="lab")
    assert any("NaN or infinity: 1 (llm.lm_head.weight)" in f.text for f in report.findings)
    (tmp_path / "changed" / "model.safetensors").unlink()
    found(tmp_path / "changed", "no weights in safetensors format")


def test_the_command(good, copy, tmp_path, capsys):
    assert main(["inspect", str(good)]) == 0 and "Nothing suspicious" in capsys.readouterr().out
    edit(copy, lambda t: [t[k].zero_() for k in t if "lora_B" in k])
    assert main(["inspect", str(copy), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["findings"][0]["level"] == "error"
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2 and "no such folder" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    shutil.copytree(good, tmp_path / "run" / "adapter")
    with pytest.raises(InputError, match="There are adapters in it: adapter"):
        inspect_adapter(tmp_path / "run")
