"""Checkpoints that transformers and bitsandbytes saved in 4 bit, under older names; packed copies known by their names;
experts that a plan does not reach."""

import json
import shutil

import pytest
import torch
from families import batch_of, native_folder, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig
from transformers import initialization as init

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.debug.preflight import check_plan
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.files import stored_in
from vlm_lora_lab.models.load import load_vlm, model_folder
from vlm_lora_lab.models.names import StoredNames
from vlm_lora_lab.models.parts import infer_layout, layout_of
from vlm_lora_lab.models.published import on_meta, packed_copy
from vlm_lora_lab.plan.tuning import PlanTable, TuningPlan, apply_plan, experts_left
from vlm_lora_lab.plan.preview import Preview
from vlm_lora_lab.quant.memory import estimate

PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "idefics3", "minicpmv4_6")
OLDER = {
    "qwen2_vl": "model.layers.0.self_attn.q_proj",
    "qwen2_5_vl": "visual.blocks.0.attn.qkv",
    "llava": "language_model.model.layers.0.self_attn.q_proj",
}
NOT_PACKED = ["lm_head", "modality_projection", "multi_modal_projector"]


def pack(whole, folder, **options):
    "What transformers' own `save_pretrained` writes of a model that it loaded in 4 bit."
    four = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **options
    )
    AutoModelForImageTextToText.from_pretrained(whole, quantization_config=four, dtype=torch.float32).save_pretrained(
        folder
    )
    for file in whole.iterdir():
        if ".safetensors" not in file.name and not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place, made = tmp_path_factory.mktemp("packed"), {}

    def folder(family):
        if family not in made:
            whole = place / f"{family}-whole"
            if family in ("llava", "idefics3"):
                tiny_model(family).save_pretrained(whole)
            else:
                native_folder(family, whole)
            made[family] = pack(whole, place / family)
        return made[family]

    return folder


def run(capsys, *args):
    status = main([str(a) for a in args])
    said = capsys.readouterr()
    return status, said.out + said.err


@pytest.mark.parametrize("family", PACKED)
def test_what_transformers_packed_is_read_under_its_older_names(family, folders):
    folder = folders(family)
    stored = stored_in(folder)
    packed = {n.removesuffix(".weight") for n, s in stored.items() if s.dtype == "NF4"}
    model = load_vlm(folder, dtype=torch.float32)
    here = {n.removesuffix(".weight") for n, p in model.named_parameters() if hasattr(p, "quant_state")}
    assert len(here) == len(packed) > 10 and {layout_of(model).part_of(n) for n in here} >= {
        "vision",
        "connector",
        "language",
    }
    names = StoredNames(on_meta(folder), stored).in_model
    assert {names[f"{n}.weight"].removesuffix(".weight") for n in packed} == here
    if family in OLDER:
        assert OLDER[family] in packed and OLDER[family] not in here
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    for layer in here:  # bitsandbytes' kernel for AVX512 wants widths that small models have not
        theirs.get_submodule(layer).support_avx512bf16_for_cpu = False
    theirs.eval()
    if family in ("llava", "idefics3"):
        batch = {k: v for k, v in batch_of(family, model).items() if k != "labels"}
    else:
        batch = {"input_ids": torch.arange(20, 40)[None]}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "minicpmv4_6"])
def test_the_whole_road_on_a_packed_base(family, folders, tmp_path, capsys):
    """The default plan trains the connector in full, which transformers packed: plan, doctor and train say so alike;
    with LoRA there all goes through."""
    base, data = folders(family), tmp_path / "six.json"
    data.write_text(json.dumps(json.loads((samples_folder() / "handwriting" / "train.json").read_text())[:6]))
    job = ["--model", base, "--data", data, "--image-root", samples_folder() / "handwriting"]
    for command in (["plan", base], ["doctor", *job], ["train", *job, "--max-steps", "2", "--output", tmp_path / "no"]):
        status, said = run(capsys, *command)
        assert (
            status == 2
            and "is stored in 4 bit and should be whole, to be trained in full: integers have no gradient" in said
            and "connector: lora" in said
        ), said
    assert not (tmp_path / "no").exists()
    assert run(capsys, "plan", base, "--connector", "lora")[0] == 0
    status, said = run(capsys, "train", *job, "--max-steps", "2", "--connector", "lora", "--output", tmp_path / "run")
    assert status == 0, said
    adapter = tmp_path / "run" / "adapter"
    status, said = run(capsys, "merge", adapter, "--output", tmp_path / "merged")
    assert status == 0 and "tensors merged" in said, said
    merged, ids = load_vlm(tmp_path / "merged", dtype=torch.float32), torch.arange(20, 40)[None]
    from vlm_lora_lab.checkpoint.save import load_adapter

    with torch.no_grad():
        wanted, got = load_adapter(adapter)(input_ids=ids).logits.float(), merged(input_ids=ids).logits.float()
    assert ((got - wanted).abs().max() / wanted.std()).item() < 0.02
    assert not any(hasattr(p, "quant_state") for p in merged.parameters())


def test_a_packed_layer_that_is_not_the_models_is_named(folders, tmp_path):
    folder = shutil.copytree(folders("qwen2_vl"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    config["text_config"]["layer_types"] = config["text_config"]["layer_types"][:1]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match="model.layers.1.* is stored in 4 bit under a name that the model does not have"
    ):
        load_vlm(folder)


# ---- packed copies, by name


@pytest.mark.parametrize(
    ("name", "of", "by"),
    [
        ("openbmb/MiniCPM-V-2_6-int4", "openbmb/MiniCPM-V-2_6", "bitsandbytes"),
        ("openbmb/MiniCPM-Llama3-V-2_5-int4", "openbmb/MiniCPM-Llama3-V-2_5", "bitsandbytes"),
        ("openbmb/MiniCPM-o-2_6-int4", "openbmb/MiniCPM-o-2_6", "GPTQ"),
        ("Qwen/Qwen-VL-Chat-Int4", "Qwen/Qwen-VL-Chat", "GPTQ"),
        ("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "Qwen/Qwen2.5-VL-7B-Instruct", "AWQ"),
        ("Qwen/Qwen2-VL-7B-Instruct-GPTQ-Int8", "Qwen/Qwen2-VL-7B-Instruct", "GPTQ"),
        ("unsloth/Qwen2.5-VL-7B-Instruct-bnb-4bit", "Qwen/Qwen2.5-VL-7B-Instruct", "bitsandbytes"),
        ("unsloth/Qwen3-VL-8B-Instruct-unsloth-bnb-4bit", "Qwen/Qwen3-VL-8B-Instruct", "bitsandbytes"),
        ("Qwen/Qwen3-VL-8B-Instruct-FP8", "Qwen/Qwen3-VL-8B-Instruct", "FP8"),
    ],
)
def test_a_packed_copy_answers_with_the_shapes_of_the_whole_model(name, of, by, capsys):
    copy = packed_copy(name)
    assert (copy.of, copy.by, copy.read) == (of, by, by == "bitsandbytes")
    if copy.read:
        assert {n: t.shape for n, t in on_meta(name).state_dict().items()} == {
            n: t.shape for n, t in on_meta(of).state_dict().items()
        }
    else:
        with pytest.raises(InputError, match=f"is packed by {by}, and that is not read here. Give {of}"):
            model_folder(name)
    if name.endswith(("-int4", "-AWQ")):
        status, said = run(capsys, "parts", name)
        assert status == 0 and str(copy) in said and of in said


@pytest.mark.parametrize("name", ["openbmb/MiniCPM-V-2_6", "somebody/else-AWQ", "lab", "-int4"])
def test_other_names_are_no_packed_copies(name):
    assert packed_copy(name) is None


# ---- experts, and towers that are no connectors


def on_shapes(model_type, **values):
    config = AutoConfig.for_model(model_type, **values)
    with torch.device("meta"), init.no_init_weights():
        return AutoModelForImageTextToText.from_config(config)


MOE = dict(
    text_config=dict(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=320,
        rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
    ),
    vision_config=dict(
        depth=2,
        hidden_size=32,
        out_hidden_size=64,
        intermediate_size=48,
        num_heads=4,
        deepstack_visual_indexes=[0],
        num_position_embeddings=16,
    ),
)


def test_experts_that_a_plan_does_not_reach_are_counted_aloud(tmp_path):
    experts = 2 * 4 * (64 * 2 * 32 + 32 * 64)  # layers, experts, gate and up, down
    model = on_shapes("qwen3_vl_moe", **MOE)
    said = experts_left(model, TuningPlan())
    assert (
        said.startswith(f"{experts:,} of {sum(p.numel() for p in model.parameters()):,} weights are experts")
        and "gate_up_proj" in said
        and "in 16 bit also" in said
    )
    assert said in repr(Preview.of(model, TuningPlan()))
    assert (
        experts_left(model, TuningPlan(language="full")) == ""
        and experts_left(on_meta("Qwen/Qwen3-VL-2B-Instruct"), TuningPlan()) == ""
    )
    # a kernel of a convolution has three dimensions, too
    assert experts_left(on_meta(tiny_config("minicpmv4_6")), TuningPlan()) == ""
    live = AutoModelForImageTextToText.from_config(AutoConfig.for_model("qwen3_vl_moe", **MOE)).float()
    live.config.save_pretrained(tmp_path)
    check, wrapped = check_plan(live, TuningPlan(rank=4))  # as the doctor does
    assert check.verdict == "ok" and said.partition(" of ")[0] in check.says
    assert f"{experts:,} of " in repr(PlanTable.of(wrapped, TuningPlan(rank=4)))
    assert any(n.startswith(f"{experts:,} of ") for n in estimate(str(tmp_path), TuningPlan(rank=4), tokens=32).notes)


def test_a_kernel_is_no_expert_under_lora():
    model = apply_plan(tiny_model("minicpmv4_6"), TuningPlan(rank=4))
    assert PlanTable.of(model, TuningPlan(rank=4)).left == ""


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("qwen2_5_omni_thinker", "'model.audio_tower' is no connector: it reads sound of its own"),
        ("janus", "'model.vqmodel' is no connector: it reads pictures of its own"),
        ("pi0", "has its own list of layers, and none of them takes the 1152 numbers"),
    ],
)
def test_a_tower_that_is_no_connector_is_refused_with_the_reason(model_type, why):
    with pytest.raises(InputError, match=f"{why}.*Register it"):
        infer_layout(on_shapes(model_type))


def test_a_second_eye_is_vision_and_a_q_former_a_connector():
    layout = infer_layout(on_shapes("video_llava"))
    assert set(layout.vision) == {"model.video_tower", "model.image_tower"} and layout.connector == (
        "model.multi_modal_projector",
    )
    assert infer_layout(on_shapes("blip-2")).connector == ("qformer", "language_projection")


def test_a_linear_layer_can_read_patches():
    layout = infer_layout(on_shapes("lfm2_vl"))
    assert (layout.vision, layout.connector) == (("model.vision_tower",), ("model.multi_modal_projector",))
    gemma = infer_layout(on_shapes("gemma4", vision_config={"model_type": "gemma4_vision"}, audio_config=None))
    assert (gemma.vision, gemma.connector) == (("model.vision_tower",), ("model.embed_vision",))
    with pytest.raises(InputError, match="'model.audio_tower' is no connector"):
        infer_layout(
            on_shapes(
                "gemma4", vision_config={"model_type": "gemma4_vision"}, audio_config={"model_type": "gemma4_audio"}
            )
        )
