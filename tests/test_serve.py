"""What is exported for a server is the trained model, and the checks of its files can fail."""

import json
import shutil

import pytest
import torch
from families import FAMILIES, batch_of, tiny_model
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from vlm_lora_lab.checkpoint.save import load_adapter, save_adapter
from vlm_lora_lab.checkpoint.serve import RANKS, check_export, check_llama_cpp, check_lora, check_model, export_adapter
from vlm_lora_lab.cli import main
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import lab_folder, load_tokenizer, load_vlm
from vlm_lora_lab.models.parts import layout_of
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

IDS = torch.arange(20, 50)[None]


def made(base, folder, plan, four_bit=False):
    torch.manual_seed(0)
    model = apply_plan(load_vlm(base, four_bit=four_bit), plan)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    return model.eval(), save_adapter(model, folder, plan, base, load_tokenizer("lab"), four_bit)


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


def complete(folder, base=lab_folder()):
    "A base with everything beside it that a download has."
    if base != folder:
        shutil.copytree(base, folder)
    values = json.loads((folder / "config.json").read_text())
    if values["model_type"] in ("minicpmv", "minicpmo", "qwen"):
        values["auto_map"] = {
            "AutoConfig": "configuration_minicpm.MiniCPMVConfig",
            "AutoModel": "openbmb/MiniCPM-V-2_6--modeling_minicpmv.MiniCPMV",
        }
        for name in ("configuration_minicpm.py", "modeling_minicpmv.py"):
            (folder / name).write_text("raise SystemExit('remote code ran')")
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "preprocessor_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "A complete export of the lab model for vLLM."
    place = tmp_path_factory.mktemp("served")
    base = complete(place / "base")
    _, adapter = made(base, place / "adapter", TuningPlan(), True)
    done = export_adapter(adapter, place / "vllm", "vllm")
    assert done.ok, str(done)
    return base, adapter, done


@pytest.mark.parametrize(
    "plan, four_bit",
    [
        (TuningPlan(), True),
        (TuningPlan(language="lora(rank=4, alpha=9) on 0-1, lora(rank=7) on mlp, full on 4", connector="full"), False),
        (
            TuningPlan(
                variant="rslora",
                language="lora(rank=4) on 0-1, lora on 2-4",
                vision="lora",
                connector="lora",
                embeddings="lora",
                head="lora",
            ),
            True,
        ),
        (TuningPlan(variant="pissa", language="lora(rank=4) on 0-1, lora on 2-4", vision="lora on 0"), False),
    ],
    ids=["default", "by layer", "rslora everywhere", "pissa"],
)
def test_lora_alone_on_the_folded_base_is_the_trained_model(plan, four_bit, tmp_path):
    model, adapter = made("lab", tmp_path / "adapter", plan, four_bit)
    done = export_adapter(adapter, tmp_path / "out", "vllm", dtype=torch.float32)
    again = PeftModel.from_pretrained(load_vlm(tmp_path / "out" / "model"), tmp_path / "out" / "adapter").eval()
    want, have = logits(model, dict(input_ids=IDS)), logits(again, dict(input_ids=IDS))
    assert ((want - have).abs().max() / want.std()).item() < 1e-3
    without = logits(load_vlm(tmp_path / "out" / "model"), dict(input_ids=IDS))
    assert ((want - without).abs().max() / want.std()).item() > 1e-2  # the adapter does something
    config = LoraConfig.from_pretrained(tmp_path / "out" / "adapter")
    assert not (
        config.modules_to_save or config.rank_pattern or config.alpha_pattern or config.use_rslora or config.use_dora
    )
    part = layout_of(model).part_of
    assert {
        part(k.removeprefix("base_model.model."))
        for k in load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    } == {"language"}
    assert all(r.ok for r in done.rules[:10])


@pytest.mark.parametrize("family", ["minicpmv-2.5", "minicpmv-4.5", "qwen", "qwen2_vl", "gemma3", "llava"])
def test_every_family_s_adapter_passes_vllm_s_rules_and_is_the_model(family, tmp_path):
    base = tmp_path / "base"
    tiny_model(family).bfloat16().save_pretrained(base)
    model, adapter = made(base, tmp_path / "adapter", TuningPlan(rank=4))
    export_adapter(adapter, tmp_path / "out", "vllm", dtype=torch.float32)
    assert all(r.ok for r in check_lora(tmp_path / "out" / "adapter", tmp_path / "out" / "model"))
    again = PeftModel.from_pretrained(load_vlm(tmp_path / "out" / "model"), tmp_path / "out" / "adapter")
    batch = batch_of(family, model)
    want, have = logits(model, batch), logits(again, batch)
    assert ((want - have).abs().max() / want.std()).item() < 1e-3


def test_nothing_is_written_when_nothing_has_to_be_folded(tmp_path):
    base = complete(tmp_path / "base")
    _, adapter = made(base, tmp_path / "adapter", TuningPlan(connector="freeze"))
    done = export_adapter(adapter, tmp_path / "out", "vllm")
    assert done.ok and done.merged is None and sorted(p.name for p in done.folder.iterdir()) == ["SERVE.md", "adapter"]
    assert f"vllm serve {base} --trust-remote-code" in done.commands and "--max-lora-rank 16" in done.commands


@pytest.mark.parametrize(
    "plan, says",
    [(TuningPlan(variant="dora"), "DoRA"), (TuningPlan(language="freeze", vision="lora"), "no adapter is left")],
)
def test_what_vllm_cannot_be_given_is_refused_before_anything_is_written(plan, says, tmp_path):
    _, adapter = made("lab", tmp_path / "adapter", plan)
    with pytest.raises(InputError, match=says):
        export_adapter(adapter, tmp_path / "out", "vllm")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert export_adapter(adapter, tmp_path / "out", "transformers").ok
    with pytest.raises(InputError, match="no server"):
        export_adapter(adapter, tmp_path / "other", "ollama")


def json_edit(file, **values):
    file.write_text(json.dumps({k: v for k, v in (json.loads(file.read_text()) | values).items() if v is not ...}))


def weights_edit(file, edit):
    found = load_file(file)
    edit(found)
    save_file({k: v.contiguous() for k, v in found.items()}, file, metadata={"format": "pt"})


SPOIL = {
    "modules_to_save": lambda d: json_edit(d / "adapter/adapter_config.json", modules_to_save=["resampler"]),
    "DoRA": lambda d: json_edit(d / "adapter/adapter_config.json", use_dora=True),
    "biases": lambda d: json_edit(d / "adapter/adapter_config.json", bias="all"),
    "PiSSA": lambda d: json_edit(d / "adapter/adapter_config.json", init_lora_weights="pissa_niter_4"),
    "one rank": lambda d: json_edit(d / "adapter/adapter_config.json", alpha_pattern={"q_proj": 8}),
    "lora_alpha and target": lambda d: json_edit(d / "adapter/adapter_config.json", lora_alpha=...),
    "can be read": lambda d: (d / "adapter/adapter_model.safetensors").write_bytes(b"nothing"),
    "linear layers of the language": lambda d: weights_edit(
        d / "adapter/adapter_model.safetensors",
        lambda t: t.update({f"base_model.model.resampler.kv_proj.lora_{m}.weight": torch.zeros(16, 16) for m in "AB"}),
    ),
    "shapes of their layer": lambda d: weights_edit(
        d / "adapter/adapter_model.safetensors", lambda t: t.pop(next(iter(t)))
    ),
    "every key": lambda d: weights_edit(
        d / "adapter/adapter_model.safetensors", lambda t: t.update({"lm_head.weight": torch.zeros(2, 2)})
    ),
    "Python files": lambda d: (d / "model/modeling_minicpmv.py").unlink(),
    "auto_map, through": lambda d: json_edit(d / "model/config.json", auto_map=...),
    "preprocessor_config": lambda d: (d / "model/preprocessor_config.json").unlink(),
    "architecture": lambda d: json_edit(d / "model/config.json", architectures=...),
    "with its point": lambda d: json_edit(d / "model/config.json", version="2.60"),
    "tokenizer": lambda d: (d / "model/tokenizer.json").unlink(),
    "files and configuration": lambda d: weights_edit(
        d / "model/model.safetensors", lambda t: t.pop("resampler.query")
    ),
    "no tensor is in 4 bit": lambda d: json_edit(d / "model/config.json", quantization_config={}),
    "adapter beside": lambda d: (d / "model/adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("asks", SPOIL)
def test_each_rule_of_vllm_can_be_broken(asks, served, tmp_path):
    folder = shutil.copytree(served[2].folder, tmp_path / "export")
    assert all(r.ok for r in check_export(folder, "vllm"))
    SPOIL[asks](folder)
    broken = [r.asks for r in check_export(folder, "vllm") if not r.ok]
    assert broken and any(asks in b for b in broken), broken


def test_a_rank_above_vllm_s_largest_is_noticed(served, tmp_path):
    folder = shutil.copytree(served[2].folder, tmp_path / "export")
    json_edit(folder / "adapter/adapter_config.json", r=RANKS[-1] + 1)
    assert "the rank is at most 512" in [r.asks for r in check_export(folder, "vllm") if not r.ok]


def gguf_base(folder):
    "A tiny MiniCPM-V 2.6 with a grid of 70 × 70 positions, as published ones have."
    tiny_model("minicpmv-2.6", vocab_size=419).bfloat16().save_pretrained(folder)
    for file in lab_folder().iterdir():
        if "token" in file.name:
            shutil.copy(file, folder)
    return complete(folder, folder)


def test_llama_cpp_s_rules_hold_on_a_whole_merge_and_can_be_broken(tmp_path):
    base = gguf_base(tmp_path / "base")
    _, adapter = made(base, tmp_path / "adapter", TuningPlan(rank=4))
    done = export_adapter(adapter, tmp_path / "out", "llama.cpp")
    assert done.ok, str(done)
    assert "--minicpmv_version 3" in done.commands and (done.folder / "SERVE.md").read_text().strip() == done.commands
    vision = json.loads((done.folder / "model/config.json").read_text())["vision_config"]
    for asks, spoil in {
        "the tower that the script builds": lambda d: json_edit(
            d / "config.json", vision_config={k: v for k, v in vision.items() if k != "hidden_size"}
        ),
        "a number for this version": lambda d: json_edit(d / "config.json", version="4.6"),
        "query_num and hidden_size": lambda d: weights_edit(
            d / "model.safetensors", lambda t: t.update({"resampler.query": torch.zeros(7, 64)})
        ),
        "below llm, vpm or resampler": lambda d: weights_edit(
            d / "model.safetensors", lambda t: t.update({"extra.weight": torch.zeros(3)})
        ),
        "Python files": lambda d: (d / "configuration_minicpm.py").unlink(),
    }.items():
        folder = shutil.copytree(done.folder / "model", tmp_path / "spoiled")
        spoil(folder)
        broken = [r.asks for r in check_llama_cpp(folder) if not r.ok]
        shutil.rmtree(folder)
        assert broken and (any(asks in b for b in broken) or asks == "a number for this version"), (asks, broken)


@pytest.mark.parametrize(
    "family, known",
    [("qwen2_vl", True), ("minicpmv4_6", True), ("smolvlm", True), ("qwen", False), ("paligemma", False)],
)
def test_llama_cpp_knows_some_architectures(family, known, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "model")
    [rule] = [r for r in check_llama_cpp(tmp_path / "model") if "converters" in r.asks]
    assert rule.ok == known


@pytest.mark.parametrize("family", FAMILIES[::4])
def test_a_whole_model_of_any_family_passes_but_for_its_tokenizer(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "model")
    assert {r.asks for r in check_model(tmp_path / "model") if not r.ok} == {"there is a tokenizer"}


def test_the_command(served, tmp_path, capsys):
    base, adapter, _ = served
    assert main(["export", str(adapter), "--for", "vllm", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "vllm serve" in said and "rules of vllm hold" in said
    assert main(["export", str(adapter), "--for", "vllm", str(tmp_path / "out"), "--check"]) == 0
    (tmp_path / "out" / "model" / "preprocessor_config.json").unlink()
    capsys.readouterr()
    assert main(["export", str(adapter), "--for", "vllm", str(tmp_path / "out"), "--check"]) == 1
    assert "NO  there is a preprocessor_config.json" in capsys.readouterr().out
    assert (
        main(["export", str(adapter), "--for", "vllm", str(tmp_path / "out")]) == 2
        and "not empty" in capsys.readouterr().err
    )
    assert (
        main(["export", str(adapter), "--for", "vllm", str(adapter), "--check"]) == 2
        and "neither model nor adapter" in capsys.readouterr().err
    )
    assert (
        main(["merge", str(adapter), "--output", str(tmp_path / "merged")]) == 0
        and "tensors merged" in capsys.readouterr().out
    )
    assert load_adapter(adapter) is not None
