"""What other scripts wrote is read without losing a tensor, what they lost is named, and what is hostile or strange is
refused."""

import json
import random
import shutil
import warnings
from errno import ENOSPC
from pathlib import Path

import foreign
import pytest
import torch
from families import batch_of, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_golden_minicpmv import CASES as GOLDEN
from test_golden_minicpmv import FORWARD, checkpoints  # noqa: F401
from test_golden_minicpmv import batch_of as golden_batch

from vlm_lora_lab.checkpoint.inspect import inspect_adapter
from vlm_lora_lab.checkpoint.rescue import write
from vlm_lora_lab.checkpoint.merge import merge_adapter
from vlm_lora_lab.checkpoint.rescue import FORMATS, place, plain_key, recognise, rescue
from vlm_lora_lab.checkpoint.rescue.read import Base
from vlm_lora_lab.checkpoint.save import load_adapter, read_provenance
from vlm_lora_lab.cli import main
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import load_vlm
from vlm_lora_lab.models.names import plain_name
from vlm_lora_lab.models.parts import PARTS, layout_of
from vlm_lora_lab.models.published import on_meta
from vlm_lora_lab.plan.exact import lora_rules, modules_around, plan_of
from vlm_lora_lab.plan.tuning import TuningPlan, lora_layers

# name -> format, family, what re-enacts it
CASES = {
    "minicpmv-2024": ("minicpmv-2024", "minicpmv-2.6", lambda d, b: foreign.minicpmv(d, b, "nothing")),
    "minicpmv-side": ("minicpmv-side", "minicpmv-2.6", lambda d, b: foreign.minicpmv(d, b, "side")),
    "minicpmv": ("minicpmv", "minicpmv-2.6", foreign.minicpmv),
    "minicpmv-frozen-eyes": (
        "minicpmv-side",
        "minicpmv-2.6",
        lambda d, b: foreign.minicpmv(d, b, "side", torch.float32, tune_vision=False),
    ),
    "minicpmv-dump": ("minicpmv", "minicpmv-2.6", foreign.dump),
    "qwenvl": ("qwenvl", "qwen", foreign.qwenvl),
    "qwenvl-chat": ("qwenvl", "qwen", lambda d, b: foreign.qwenvl(d, b, q_lora=True)),
    "qwen3vl": ("qwen3vl", "qwen3_vl", foreign.qwen3vl),
    "2u1": ("2u1", "qwen2_5_vl", foreign.series_finetune),
    "2u1-older": ("2u1", "qwen2_5_vl", lambda d, b: foreign.series_finetune(d, b, older=True)),
    "2u1-checkpoint": ("2u1", "qwen2_5_vl", lambda d, b: foreign.series_finetune(d, b, whole=True)),
    "2u1-vision-lora": ("2u1", "qwen2_5_vl", lambda d, b: foreign.series_finetune(d, b, vision_lora=True)),
    "swift-vit": ("swift-vit", "qwen2_5_vl", foreign.swift_llm),
    "swift": ("swift", "qwen3_vl", foreign.swift),
    "llamafactory": ("llamafactory", "qwen2_vl", foreign.llamafactory),
    "llamafactory-zero3": ("llamafactory", "qwen2_vl", lambda d, b: foreign.llamafactory(d, b, zero3=True)),
    "llamafactory-tied": (
        "llamafactory",
        "qwen2_5_vl",
        lambda d, b: foreign.llamafactory(d, b, family="qwen2_5_vl"),
    ),
    "llamafactory-tied-head": (
        "llamafactory",
        "qwen3_vl",
        lambda d, b: foreign.llamafactory(d, b, family="qwen3_vl", additional=["lm_head"]),
    ),
    "llamafactory-tied-embeddings": (
        "llamafactory",
        "qwen3_vl",
        lambda d, b: foreign.llamafactory(d, b, family="qwen3_vl", additional=["embed_tokens"]),
    ),
    "llamafactory-tied-zero3": (
        "llamafactory",
        "qwen3_vl",
        lambda d, b: foreign.llamafactory(d, b, zero3=True, family="qwen3_vl"),
    ),
    "llamafactory-freeze": ("whole", "qwen2_vl", foreign.llamafactory_freeze),
    "recipe": ("recipe", "qwen", foreign.recipe),
}
LOST = {
    "minicpmv-2024": {"vision", "connector", "embeddings"},
    "qwenvl": {"embeddings", "head"},
    "llamafactory-zero3": {"embeddings", "head"},
    "llamafactory-tied-zero3": {"embeddings", "head"},
}
# LoRA and weight were trained side by side, or a tie came apart: their sum is rounded once
APART = {"llamafactory-tied", "llamafactory-tied-head", "llamafactory-tied-embeddings"}
FOLDED = {"2u1-vision-lora", "llamafactory-tied-zero3", *APART}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(family):
        if family not in made:
            made[family] = foreign.base_of(family, tmp_path_factory.mktemp("base") / family)
        return made[family]

    return base


@pytest.fixture(scope="module")
def written(bases, tmp_path_factory):
    """Every re-enacted folder, made once: (folder, base, logits of what was trained, logits of it with the lost parts
    as in the base)."""
    made = {}

    def make(name):
        if name not in made:
            _, family, write = CASES[name]
            folder = tmp_path_factory.mktemp("foreign") / name
            model = write(folder, bases(family))
            trained = foreign.logits(model, family)
            original = load_vlm(bases(family)).state_dict()
            for n, p in model.named_parameters():
                if layout_of(model).part_of(n) in LOST.get(name, ()) and "lora_" not in n:
                    p.data = original[plain_name(n)].clone()
            made[name] = (folder, bases(family), trained, foreign.logits(model, family))
        return made[name]

    return make


@pytest.fixture
def copied(written, tmp_path):
    return lambda name: (Path(shutil.copytree(written(name)[0], tmp_path / "copy" / name)), written(name)[1])


@pytest.mark.parametrize("name", CASES)
def test_what_is_in_the_files_comes_back_to_the_last_bit_and_what_is_not_is_named(name, written, tmp_path):
    folder, base, trained, without = written(name)
    fmt, family, _ = CASES[name]
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    report = rescue(folder, base, tmp_path / "out", allow_pickle=True)
    assert report.found.format == fmt and before == {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert {x.part for x in report.lost} == LOST.get(name, set()), report
    assert ("trained apart" in repr(report)) == bool(report.plan is None and "tied" in name)
    again = load_adapter(report.written) if report.plan else load_vlm(report.written)
    if report.plan:
        assert set(load_file(report.written / "adapter_model.safetensors")) and not [
            k for k, t in load_file(report.written / "adapter_model.safetensors").items() if t.dtype != torch.float32
        ]
    difference = (foreign.logits(again, family) - without).abs().max().item()
    assert difference < 2e-5 if name in FOLDED else difference == 0
    lost = (trained - without).abs().max().item()
    assert lost > 0.1 if name in LOST else lost == 0
    if report.plan and name not in LOST:
        plain = PeftModel.from_pretrained(load_vlm(base), report.written, autocast_adapter_dtype=False)
        assert torch.equal(foreign.logits(plain, family), foreign.logits(again, family))  # PEFT alone reads the folder
        merged = foreign.logits(merge_adapter(report.written), family)
        assert (merged - trained).abs().max() < 1e-3 * trained.std()


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_every_file_is_accounted_for(name, written):
    folder, base, *_ = written(name)
    report = rescue(folder, base, allow_pickle=True)
    keys = set()
    for file in report.found.weights:
        tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        keys |= {f"{file.name}: {k}" for k in tensors}
    assert keys == set(report.fates) and report.written is None
    text = repr(report)
    assert all(str(x.part) in text and x.link in text for x in report.lost) and (
        "Nothing is known to be lost" in text
    ) == (not report.lost)
    assert "<table>" in report._repr_html_()


@pytest.mark.parametrize("fmt", [f for f in FORMATS if f not in ("peft", "whole")])
def test_the_table_of_formats_says_what_the_files_show(fmt, written):
    folder, base, *_ = written(fmt)
    report, measured = rescue(folder, base, allow_pickle=True), {}
    side = {"adapter_model.safetensors": "adapter", "adapter_model.bin": "adapter"}
    for key, fate in report.fates.items():
        kind, _, name = fate.partition(": ")
        if kind in ("LoRA", "in full"):
            file = side.get(key.partition(":")[0], "beside")
            measured.setdefault(layout_of(on_meta(base)).part_of(name.rpartition(" of ")[2]), set()).add(
                ("lora" if kind == "LoRA" else "full", file)
            )
    measured |= {x.part: {(x.word, "lost")} for x in report.lost}
    assert measured == {p: {kept} for p, kept in FORMATS[fmt].keeps.items()}
    assert all(link.startswith("https://") for link in FORMATS[fmt].sources)


@pytest.mark.parametrize("name", ["finetune_py_default", "finetune_lora_sh"])
def test_an_adapter_of_the_original_script_and_model(name, golden_root, checkpoints, tmp_path):
    """Independent of the re-enactments: names, loss and merged weight as upstream's code and PEFT 0.15.2 gave them.

    Of modules_to_save nothing is in the reference's file."""
    root, base = golden_root / "minicpmv26_lora", checkpoints(GOLDEN[3])
    reference, outputs = json.loads((root / "lora.json").read_text())[name], load_file(root / "outputs.safetensors")
    state = {
        k.removeprefix(f"{name}."): v
        for k, v in load_file(root / "lora_weights.safetensors").items()
        if k.startswith(f"{name}.")
    }
    (tmp_path / "run").mkdir()
    save_file(state, tmp_path / "run" / "adapter_model.safetensors")
    fields = {k: reference[k] for k in ("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")}
    (tmp_path / "run" / "adapter_config.json").write_text(
        json.dumps(
            fields | {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "openbmb/MiniCPM-V-2_6"}
        )
    )
    report = rescue(tmp_path / "run", base, tmp_path / "out")
    assert report.found.format == "minicpmv" and len(report.fates) == len(state)
    assert {x.part for x in report.lost} == {"connector", "embeddings"} | (
        {"vision"} if "vpm" in reference["modules_to_save"] else set()
    )
    batch = {k: v for k, v in golden_batch(golden_root, GOLDEN[3]).items()}
    model = load_adapter(report.written)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, use_cache=False).loss, outputs[f"{name}.loss"].squeeze(), **FORWARD)
    merged = merge_adapter(report.written).llm.model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(merged, outputs[f"{name}.merged_q_proj_layer0"], **FORWARD)


def test_flags_that_the_user_knows_settle_what_the_files_do_not_tell(written):
    folder, base, *_ = written("minicpmv-2024")
    assert not any(x.certain for x in rescue(folder, base).lost)
    known = rescue(folder, base, flags=("minicpmv", {"use_lora": True, "tune_llm": False, "tune_vision": False}))
    assert {x.part: x.certain for x in known.lost} == {"connector": True, "embeddings": True}
    folder, base, *_ = written("qwen3vl")
    ignored = rescue(folder, base, flags=("qwen3vl", {"lora_enable": True, "tune_mm_vision": True}))
    assert ignored.ok and any("ignores the second" in n for n in ignored.notes)  # issue #1952: it never was trained
    stopped = rescue(folder, base, flags=("minicpmv", {"use_lora": True}))
    assert any("contradict each other; upstream stops" in n and "never trained" not in n for n in stopped.notes)
    with pytest.raises(InputError, match="is no flag of minicpmv"):
        rescue(folder, base, flags=("minicpmv", {"tune_visoin": True}))


def test_what_the_trainer_kept_in_between_is_pointed_at_and_the_rest_explained(copied, bases, tmp_path):
    folder, base = copied("qwenvl")
    report = rescue(folder, base, allow_pickle=True)
    assert {x.part: "checkpoint-2 still holds 1 tensors" in x.elsewhere for x in report.lost} == {
        "embeddings": True,
        "head": True,
    } and "lost for good" not in repr(report)
    between = rescue(folder / "checkpoint-2", base, tmp_path / "out")
    assert between.ok and between.plan.words["embeddings"] == between.plan.words["head"] == "full"
    assert "no weights" in recognise(folder / "checkpoint-2").others["optimizer.pt"]
    shutil.rmtree(folder / "checkpoint-2")
    assert "lost for good" in repr(rescue(folder, base, allow_pickle=True))
    (folder / "global_step2").mkdir()
    assert "zero_to_fp32" in repr(
        rescue(folder, base, allow_pickle=True)
    ) and "DeepSpeed or FSDP left may hold it" in repr(rescue(folder, base, allow_pickle=True))


def test_an_idle_adapter_an_untrained_part_and_nan_are_suspicious(copied):
    folder, base = copied("minicpmv")
    state, original = load_file(folder / "adapter_model.safetensors"), load_vlm(base).state_dict()
    for k in state:
        if "lora_B" in k:
            state[k] = torch.zeros_like(state[k])
        if ".resampler." in k:
            state[k] = original[k.removeprefix("base_model.model.")]
    next(v for k, v in state.items() if "vpm" in k).view(-1)[0] = float("nan")
    save_file(state, folder / "adapter_model.safetensors")
    said = "\n".join(rescue(folder, base).suspicious)
    assert "all zero in 6 of 6" in said and "connector was to be trained in full" in said and "no number" in said


def test_a_run_in_four_bit_with_the_base_packed_beside_it(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(
        load_vlm("lab", four_bit=True),
        LoraConfig(r=4, target_modules=foreign.MINICPMV, task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False,
    )
    model.base_model.model.resampler.requires_grad_(True)
    for p in model.parameters():
        p.data = p.data + 0.01 * torch.randn_like(p) if p.requires_grad else p.data
    model.save_pretrained(tmp_path / "run")
    torch.save(
        {n: p.detach() for n, p in model.named_parameters() if "lora_" not in n},
        tmp_path / "run" / "non_lora_state_dict.bin",
    )
    report = rescue(tmp_path / "run", "lab", tmp_path / "out", four_bit=True, allow_pickle=True)
    assert (
        sum(f.startswith("packed base") for f in report.fates.values()) > 10
        and read_provenance(report.written)["four_bit"]
    )
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        assert torch.equal(load_adapter(report.written)(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    (tmp_path / "run" / "args.json").write_text('{"quant_bits": 4}')
    again = rescue(tmp_path / "run", "lab", tmp_path / "again", allow_pickle=True)
    assert read_provenance(again.written)["four_bit"] and not any("4 bit" in n for n in again.notes)


@pytest.mark.parametrize(
    "option",
    [
        dict(use_rslora=True),
        dict(use_dora=True),
        dict(use_dora=True, use_rslora=True),
        dict(rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 32}),
        dict(layers_to_transform=[1]),
    ],
    ids=str,
)
def test_variants_and_patterns_of_peft(option, bases, tmp_path):
    base = bases("minicpmv-2.6")
    names = ["q_proj", "v_proj"]
    model = get_peft_model(
        load_vlm(base),
        LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM", **option),
        autocast_adapter_dtype=False,
    )
    foreign.train(model, "minicpmv-2.6").save_pretrained(tmp_path / "run")
    report = rescue(tmp_path / "run", base, tmp_path / "out")
    assert report.ok and torch.equal(
        foreign.logits(load_adapter(report.written), "minicpmv-2.6"), foreign.logits(model, "minicpmv-2.6")
    )


@pytest.mark.parametrize(
    "change",
    [
        dict(bias="all"),
        dict(peft_type="IA3"),
        dict(init_lora_weights="pissa"),
        dict(layer_replication=[[0, 2]]),
        dict(use_dora=True, init_lora_weights="pissa"),
        dict(lora_alpha=None),
    ],
    ids=str,
)
def test_what_a_plan_cannot_say_is_refused(change, copied):
    folder, base = copied("minicpmv")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match="|".join(change)):
        rescue(folder, base)


class Bomb:
    "A pickle that leaves a trace when it is run."

    trace: Path

    def __reduce__(self):
        return Path.touch, (self.trace,)


@pytest.mark.parametrize(
    "file", ["adapter_model.bin", "vpm_resampler_embedtokens.pt", "non_lora_state_dict.bin", "lora_adapter_model.pth"]
)
def test_a_pickle_with_a_program_is_refused_and_not_run(file, copied, tmp_path):
    folder, base = copied("minicpmv")
    Bomb.trace = tmp_path / "BOOM"
    torch.save(Bomb(), folder / "training_args.bin")  # nobody asked for this one: it is never opened
    assert rescue(folder, base).ok
    torch.save({"base_model.model.resampler.query": Bomb()}, folder / file)
    with pytest.raises(InputError, match="say --allow-pickle"):
        rescue(folder, base, tmp_path / "out")
    with pytest.raises(InputError, match="holds more than tensors, and was not run"):
        rescue(folder, base, tmp_path / "out", allow_pickle=True)
    assert not Bomb.trace.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name,file",
    [
        ("minicpmv-side", "adapter_model.safetensors"),
        ("minicpmv-side", "vpm_resampler_embedtokens.pt"),
        ("qwenvl", "adapter_model.bin"),
    ],
)
def test_a_truncated_file_is_refused_wherever_it_ends(name, file, copied, tmp_path):
    folder, base = copied(name)
    whole = (folder / file).read_bytes()
    for share in (0, 0.001, 0.1, 0.5, 0.9, 0.999):
        (folder / file).write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InputError, match="truncated or damaged|holds more than tensors|no dictionary"):
            rescue(folder, base, tmp_path / "out", allow_pickle=True)
    assert not list(tmp_path.glob("out*"))


def test_another_base_and_another_family_are_refused_by_name(written, bases, tmp_path):
    folder, base, *_ = written("minicpmv")
    with pytest.raises(
        InputError, match=r"(?s)no place in .*\(Qwen-VL\).*look like MiniCPM-V.*adapter_config.json names"
    ):
        rescue(folder, bases("qwen"), tmp_path / "out")
    wider = tiny_model("minicpmv-2.6").config
    rows = wider.vocab_size
    wider.vocab_size = rows + 32
    type(tiny_model("minicpmv-2.6"))(wider).save_pretrained(tmp_path / "wider")
    with pytest.raises(
        InputError, match=rf"embed_tokens.weight is {rows} × 64, but .* is {rows + 32} × 64.*words were added"
    ):
        rescue(folder, tmp_path / "wider", tmp_path / "out")
    other = written("2u1")[0]
    with pytest.raises(InputError, match="Qwen2-VL or later"):
        rescue(other, base, tmp_path / "out", allow_pickle=True)
    assert not (tmp_path / "out").exists()


def spoil(folder, **changes):
    for name, text in changes.items():
        path = folder / name.replace("__", ".")
        path.unlink() if text is None else path.write_text(text)


def test_folders_that_are_not_what_they_seem(copied, bases, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"(?s)found: nothing.*MiniCPM-V finetune.py.*vit.safetensors beside"):
        recognise(tmp_path / "empty")
    with pytest.raises(InputError, match="no such folder"):
        recognise(tmp_path / "nowhere")
    folder, base = copied("minicpmv")
    with pytest.raises(InputError, match="not empty"):
        rescue(folder, base, folder)
    (tmp_path / "run").mkdir()
    shutil.copytree(folder, tmp_path / "run" / "checkpoint-7")
    with pytest.raises(InputError, match="There are checkpoint-7 in it; give one of those"):
        recognise(tmp_path / "run")
    ours = rescue(folder, base, tmp_path / "ours").written
    with pytest.raises(InputError, match="needs no rescue"):
        rescue(ours, base)
    torch.save({}, folder / "projector.bin")
    with pytest.raises(InputError, match="projector.bin may hold weights"):
        rescue(folder, base)
    (folder / "projector.bin").unlink()
    state = load_file(folder / "adapter_model.safetensors")
    half = {k: v for k, v in state.items() if "layers.1.self_attn.q_proj.lora_B" not in k}
    save_file(half, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="has lora_A and should have lora_A, lora_B"):
        rescue(folder, base)
    save_file(
        state
        | {k.replace("lora_A.weight", "lora_A.second.weight"): v.clone() for k, v in state.items() if "lora_A" in k},
        folder / "adapter_model.safetensors",
    )
    with pytest.raises(InputError, match="another value|several adapters"):
        rescue(folder, base)
    save_file(state, folder / "adapter_model.safetensors")
    torch.save({"resampler.query": torch.zeros(16, 64)}, folder / "non_lora_state_dict.bin")
    with pytest.raises(
        InputError,
        match="resampler.query has another value in non_lora_state_dict.bin than in adapter_model.safetensors",
    ):
        rescue(folder, base, allow_pickle=True)
    (folder / "non_lora_state_dict.bin").unlink()
    spoil(folder, adapter_config__json='{"peft_type": ')
    with pytest.raises(InputError, match="not valid JSON"):
        recognise(folder)
    spoil(folder, adapter_config__json=None)
    with pytest.raises(InputError, match="no script known here"):
        recognise(folder)


def test_a_shard_that_is_missing_is_named(bases, tmp_path):
    base = bases("qwen2_vl")
    load_vlm(base).save_pretrained(tmp_path / "whole", max_shard_size="300KB")
    shards = sorted((tmp_path / "whole").glob("*.safetensors"))
    part, said = rescue(tmp_path / "whole", base).rows[0][:2]
    model = load_vlm(base)
    there = sum(layout_of(model).part_of(n) == part for n, _ in model.named_parameters())
    assert len(shards) > 1 and said == f"{there} tensors as in the base"
    with pytest.raises(InputError, match="nothing in it that was trained"):
        rescue(tmp_path / "whole", base, tmp_path / "out")
    shards[0].unlink()
    with pytest.raises(InputError, match=shards[0].name):
        recognise(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=f"is one of {len(shards)} files, and {len(shards) - 1} are here"):
        recognise(tmp_path / "whole")


def test_a_full_disk_leaves_nothing(written, tmp_path, monkeypatch):
    folder, base, *_ = written("minicpmv")

    def full(*_, **__):
        raise OSError(ENOSPC, "No space left on device")

    with_text = Path(shutil.copytree(base, tmp_path / "with-text"))
    (with_text / "tokenizer.json").write_text("{}")
    for target, name in ((write, "save_file"), (write.shutil, "copyfile"), (write, "write_json")):
        with monkeypatch.context() as m:
            m.setattr(target, name, full)
            with pytest.raises(InputError, match="disk is full"):
                rescue(folder, with_text, tmp_path / "out")
        assert not list(tmp_path.glob("out*"))
    assert (rescue(folder, with_text, tmp_path / "out").written / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("seed", range(12))
def test_rules_give_lora_to_exactly_the_layers_that_have_it(seed, bases):
    "Random layers, ranks and alphas; the plan is read back by another road than it was written."
    dice, family = random.Random(seed), ["minicpmv-2.6", "qwen", "qwen3_vl", "minicpmv-4.5"][seed % 4]
    m = Base(bases(family))
    layers = sorted(m.adaptable)
    chosen = (
        dice.sample(layers, dice.randint(1, len(layers)))
        if seed % 3
        else [n for n in layers if n.endswith(dice.choice(["proj", "c_proj", "attn", "1"]))] or layers[:1]
    )
    sizes = {n: dice.choice([(4, 8.0), (8, 8.0)] if seed % 2 else [(4, 8.0)]) for n in chosen}
    plan = plan_of(m.model, sizes, [], {"dropout": 0.0, "variant": "lora"})
    plan = TuningPlan.of(json.loads(json.dumps(plan.to_dict())))
    assert {n: (r.rank, float(r.alpha)) for n, r in lora_layers(m.model, plan).items()} == sizes


def test_one_rule_is_enough_where_one_can_say_it():
    every = [f"model.layers.{i}.{n}" for i in range(12) for n in ("attn.q_proj", "attn.c_proj", "mlp.c_proj")]
    size = (8, 16.0)
    assert [str(r) for r in lora_rules(dict.fromkeys(every, size), every, size)] == ["lora"]
    assert [str(r) for r in lora_rules({n: size for n in every if "attn.c_proj" in n}, every, size)] == [
        "lora(targets=attn.c_proj)"
    ]
    assert [str(r) for r in lora_rules({every[3]: (4, 4.0)}, every, size)] == [
        "lora(rank=4, alpha=4.0, targets=1.attn.q_proj)"
    ]


@pytest.mark.parametrize(
    "key,name,kind",
    [
        (
            "base_model.model.llm.model.layers.0.self_attn.q_proj.lora_A.weight",
            "llm.model.layers.0.self_attn.q_proj",
            "lora_A",
        ),
        ("module.base_model.model.lm_head.lora_B.default.weight", "lm_head", "lora_B"),
        ("base_model.model.transformer.wte.lora_embedding_A", "transformer.wte", "lora_embedding_A"),
        ("base_model.model.transformer.wte.lora_embedding_B.default", "transformer.wte", "lora_embedding_B"),
        ("base_model.model.a.q.lora_magnitude_vector.default.weight", "a.q", "lora_magnitude_vector"),
        ("base_model.model.resampler.modules_to_save.default.attn.in_proj_weight", "resampler.attn.in_proj_weight", ""),
        ("base_model.model.resampler.original_module.query", "resampler.query", "copy"),
        (".base_model.model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight", ""),
        ("_orig_mod.model.layers.1.mlp.up_proj.base_layer.weight", "model.layers.1.mlp.up_proj.weight", ""),
    ],
)
def test_keys_are_read_as_they_were_written(key, name, kind):
    assert plain_key(key)[:2] == (name, kind)


def test_places_of_older_names():
    names = set(on_meta("Qwen/Qwen2.5-VL-7B-Instruct").state_dict())
    assert place("visual.merger.mlp.0.weight", names) == "model.visual.merger.mlp.0.weight"
    assert place("model.layers.3.mlp.up_proj.weight", names) == "model.language_model.layers.3.mlp.up_proj.weight"
    assert (
        place("model.visual.merger.mlp.0.weight", names) == "model.visual.merger.mlp.0.weight"
        and place("resampler.query", names) is None
    )
    with pytest.raises(InputError, match="language_model.a could be a or model.language_model.a"):
        place("language_model.a", {"a", "model.language_model.a"})


def test_modules_are_as_small_as_peft_allows(bases):
    model = on_meta(bases("minicpmv-2.6"))
    assert modules_around(model, {n for n, _ in model.resampler.named_parameters(prefix="resampler")}) == ["resampler"]
    # bare: PEFT keeps the whole module, and the rest comes from the base
    assert modules_around(model, {"resampler.query"}) == ["resampler"]
    assert modules_around(model, {"vpm.encoder.layers.1.mlp.fc1.weight", "llm.lm_head.weight"}) == [
        "vpm.encoder.layers.1.mlp.fc1",
        "llm.lm_head",
    ]
    qwen = on_meta(bases("qwen"))
    # takes the connector inside it along
    assert modules_around(qwen, {"transformer.visual.positional_embedding"}) == ["transformer.visual"]
    with pytest.raises(InputError, match="image_newline was trained in full"):
        modules_around(on_meta(bases("llava_onevision")), {"model.image_newline"})


def test_a_single_bare_parameter_is_kept_with_its_module(bases, tmp_path):
    base = bases("minicpmv-2.6")
    model = get_peft_model(
        load_vlm(base),
        LoraConfig(r=4, target_modules=foreign.MINICPMV, task_type="CAUSAL_LM"),
        autocast_adapter_dtype=False,
    )
    model.base_model.model.resampler.query.requires_grad_(True)
    foreign.train(model, "minicpmv-2.6").save_pretrained(tmp_path / "run")
    save_file(
        {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n},
        tmp_path / "run" / "vit.safetensors",
    )
    report = rescue(tmp_path / "run", base, tmp_path / "out")
    assert any("12 tensors that were not trained come from the base" in n for n in report.notes)
    assert torch.equal(
        foreign.logits(load_adapter(report.written), "minicpmv-2.6"), foreign.logits(model, "minicpmv-2.6")
    )


def test_the_command_line(copied, tmp_path, capsys):
    folder, base = copied("minicpmv-2024")
    assert main(["rescue", str(folder), "--base", str(base)]) == 1
    said = capsys.readouterr().out
    assert "issues/222" in said and "Nothing was written" in said
    folder, base = copied("minicpmv-side")
    held = len(load_file(folder / "adapter_model.safetensors")) + len(
        torch.load(folder / "vpm_resampler_embedtokens.pt", weights_only=True)
    )
    assert main(["rescue", str(folder), "--base", str(base), "--output", str(tmp_path / "out")]) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert (
        main(
            [
                "rescue",
                str(folder),
                "--base",
                str(base),
                "--output",
                str(tmp_path / "out"),
                "--allow-pickle",
                "--flags",
                "minicpmv",
                "use_lora=true",
                "tune_llm=false",
            ]
        )
        == 0
    )
    assert "Nothing is known to be lost" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "rescue.json").read_text())
    assert report["format"] == "minicpmv-side" and report["lost"] == [] and len(report["tensors"]) == held
    assert main(["merge", str(tmp_path / "out"), "--output", str(tmp_path / "merged")]) == 0
    assert batch_of("minicpmv-2.6", load_vlm(tmp_path / "merged"))
    with pytest.raises(SystemExit):
        main(["rescue", "--help"])
    assert "lost for good" in capsys.readouterr().out and set(PARTS) >= set(LOST["qwenvl"])


def test_an_embedding_that_left_its_tie_is_two_tensors_and_one_that_stayed_comes_back(tmp_path):
    base = tmp_path / "base"
    tiny_model("gemma3").save_pretrained(base)
    for tying in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(
            r=2,
            target_modules=["q_proj"],
            exclude_modules=".*vision.*",
            modules_to_save=["embed_tokens"],
            ensure_weight_tying=tying,
            task_type="CAUSAL_LM",
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT speaks of the tie
            model = get_peft_model(load_vlm(base, dtype=torch.float32), config)
        with torch.no_grad():
            for _name, p in model.named_parameters():
                if p.requires_grad:
                    p += 0.05 * torch.randn(p.shape)
        folder = tmp_path / f"trained-{tying}"
        model.save_pretrained(folder, save_embedding_layers=False)
        report = rescue(folder, base, tmp_path / f"out-{tying}")
        assert report.ok and (report.plan is not None) == tying
        again = (load_adapter if tying else load_vlm)(report.written)
        difference = (foreign.logits(again, "gemma3") - foreign.logits(model, "gemma3")).abs().max()
        assert difference == 0 if tying else difference < 1e-5
        config = json.loads((base if tying else report.written).joinpath("config.json").read_text())
        assert load_vlm(report.written if not tying else base).config.tie_word_embeddings == tying, config


def test_names_of_older_transformers_are_read_alike_by_all(bases, tmp_path):
    base, family = bases("qwen2_5_vl"), "qwen2_5_vl"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["merger"])
    model = foreign.train(get_peft_model(load_vlm(base), config, autocast_adapter_dtype=False), family)
    model.save_pretrained(tmp_path / "run", save_embedding_layers=False)
    file = tmp_path / "run" / "adapter_model.safetensors"
    older = {
        k.replace(".model.language_model.", ".model.").replace(".model.visual.", ".visual."): t
        for k, t in load_file(file).items()
    }
    assert not set(older) & set(load_file(file))
    save_file(older, file, metadata={"format": "pt"})
    seen = inspect_adapter(tmp_path / "run", base)
    assert seen.status == 0 and "names of another version of transformers" in repr(seen), seen
    assert {(r.part, r.kind, r.tensors) for r in seen.rows} == {("language", "LoRA", 8), ("connector", "in full", 5)}
    trained = foreign.logits(model, family)
    report = rescue(tmp_path / "run", base, tmp_path / "out")
    assert report.ok and torch.equal(foreign.logits(load_adapter(report.written), family), trained)
    assert torch.equal(foreign.logits(load_adapter(tmp_path / "run", base), family), trained)
    assert (foreign.logits(merge_adapter(tmp_path / "run", base), family) - trained).abs().max() < 2e-5


@pytest.mark.parametrize("twin", ["checkpoint-2/converted/default", "checkpoint-2/pissa_converted", "pissa_converted"])
def test_the_plain_twin_of_a_pissa_adapter_is_named(twin, bases, tmp_path):
    base, family, run = bases("qwen2_5_vl"), "qwen2_5_vl", tmp_path / "run" / "checkpoint-2"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    model = get_peft_model(load_vlm(base), config, autocast_adapter_dtype=False)
    model.peft_config["default"].init_lora_weights = True  # both tools write the start so
    model.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    model.peft_config["default"].init_lora_weights = "pissa"
    foreign.train(model, family).save_pretrained(run, save_embedding_layers=False)
    with pytest.raises(InputError, match="init_lora_weights 'pissa'.*vlm-lora-lab merge"):
        rescue(run, base)
    trained = foreign.logits(model, family)
    plain, start = tmp_path / "run" / twin, tmp_path / "start"
    model.save_pretrained(plain, save_embedding_layers=False, path_initial_model_for_weight_conversion=start)
    with pytest.raises(InputError, match=f"{plain.name} holds the same training as plain LoRA: give that one"):
        rescue(run, base)
    assert "holds the same training as plain LoRA" in repr(inspect_adapter(run, base))
    report = rescue(plain, base, tmp_path / "out")
    assert report.ok and (foreign.logits(load_adapter(report.written), family) - trained).abs().max() < 1e-4


def test_what_a_run_s_settings_say_of_the_base_is_told(copied, bases):
    folder, base = copied("swift")
    assert dict(inspect_adapter(folder, base).about)["trained beside"] == "a whole base"
    (folder / "args.json").write_text('{"quant_bits": 4}')
    assert dict(inspect_adapter(folder, base).about)["trained beside"] == "a base in 4 bit"
    (folder / "args.json").unlink()
    assert dict(inspect_adapter(folder, base).about)["trained beside"] == "not said; taken as a whole base"
    (folder / "args.json").write_text("{")
    assert "settings were cannot be read" in repr(inspect_adapter(folder, base))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth"):
        torch.save({}, folder / name)
    said = repr(inspect_adapter(folder, base))
    assert "no weights of the model: optimizer.pt" in said and "missing from this account" not in said
