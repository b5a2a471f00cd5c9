"""PEFT's other parts: AdaLoRA and trained rows of embeddings are rescued, tied or not; what is not read is refused with
something that can be done; and `inspect` finds nothing wrong with what is not wrong."""

import json
import shutil
import warnings

import foreign
import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, PeftModel, PromptTuningConfig, ShiraConfig
from peft import TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, ViTConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel

from vlm_lora_lab.checkpoint.inspect import inspect_adapter
from vlm_lora_lab.checkpoint.merge import merge_adapter, merge_into
from vlm_lora_lab.checkpoint.rescue import rescue
from vlm_lora_lab.checkpoint.save import load_adapter
from vlm_lora_lab.cli import main
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import load_vlm
from vlm_lora_lab.models.parts import Layout, register

FAMILY = {"tied": "qwen2_5_vl", "untied": "qwen2_vl"}
SMALL = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
ADALORA = {"init_r": 4, "target_r": 2, "total_step": 9, "lora_alpha": 8}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {tie: foreign.base_of(f, tmp_path_factory.mktemp("base") / f) for tie, f in FAMILY.items()}


def trained(base, config, folder):
    "What PEFT makes of a base and a configuration, moved and saved; PEFT speaks of ties and embeddings."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(load_vlm(base, dtype=torch.float32), config)
        torch.manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn(p.shape)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(folder)
    return model.eval()


def held(folder, base, tie, wanted, output):
    "Rescued: as the trained model was; and what was written is whole."
    report = rescue(folder, base, output)
    assert report.ok, report
    again = (load_vlm if report.plan is None else load_adapter)(report.written)
    assert (foreign.logits(again, FAMILY[tie]) - wanted).abs().max() < 1e-5
    return report


CASES = {
    "adalora": AdaLoraConfig(**ADALORA, target_modules=["q_proj", "v_proj"]),
    "adalora, rsLoRA said": AdaLoraConfig(**ADALORA, target_modules=["q_proj"], use_rslora=True),
    "adalora, merger": AdaLoraConfig(**ADALORA, target_modules=["q_proj"], modules_to_save=["merger"]),
    "adalora on the head": AdaLoraConfig(**ADALORA, target_modules=["q_proj", "lm_head"]),
    "adalora, rows": AdaLoraConfig(**ADALORA, target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    "rows": LoraConfig(**SMALL, trainable_token_indices=[3, 9]),
    "rows, tying": LoraConfig(**SMALL, trainable_token_indices=[3, 9], ensure_weight_tying=True),
    "rows of both": LoraConfig(**SMALL, trainable_token_indices={"embed_tokens": [3], "lm_head": [3]}),
    "other rows of both": LoraConfig(**SMALL, trainable_token_indices={"embed_tokens": [3], "lm_head": [9, 2]}),
    "rows of the head": LoraConfig(**SMALL, trainable_token_indices={"lm_head": [9, 2]}),
    "rows, LoRA on the head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], trainable_token_indices=[3]),
    "LoRA on both": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"]),
}


BOTH_WAYS = ("adalora", "rows", "other rows of both", "rows of the head", "rows, LoRA on the head")


@pytest.mark.parametrize("name, tie", [(n, t) for n in CASES for t in FAMILY if t == "tied" or n in BOTH_WAYS])
def test_what_peft_offers_beside_plain_lora_comes_back(name, tie, bases, tmp_path):
    model = trained(bases[tie], CASES[name], tmp_path / "run")
    wanted = foreign.logits(model, FAMILY[tie])
    base = foreign.logits(load_vlm(bases[tie], dtype=torch.float32), FAMILY[tie])
    assert (wanted - base).abs().max() > 1e-3  # else nothing is shown
    held(tmp_path / "run", bases[tie], tie, wanted, tmp_path / "out")
    seen = inspect_adapter(tmp_path / "run", bases[tie])
    assert seen.status == ("adalora" in name), seen  # a warning that it is AdaLoRA, and nothing is wrong
    kinds = {(r.part, r.kind) for r in seen.rows}
    assert ("embeddings", "some rows") in kinds or "rows" not in name or name == "rows of the head", kinds


def pruned(folder, drop):
    "AdaLoRA as PEFT writes it after training: without the directions that were dropped."
    file, config = folder / "adapter_model.safetensors", json.loads((folder / "adapter_config.json").read_text())
    tensors, config["rank_pattern"] = load_file(file), {}
    for key in [k for k in tensors if k.endswith("lora_E")]:
        layer = key.removesuffix(".lora_E")
        kept = torch.tensor(drop(len(config["rank_pattern"])))
        config["rank_pattern"][f"{layer.removeprefix('base_model.model.')}.lora_E"] = kept.tolist()
        for kind in ("lora_A", "lora_E"):
            tensors[f"{layer}.{kind}"] = tensors[f"{layer}.{kind}"][kept].clone()
        tensors[f"{layer}.lora_B"] = tensors[f"{layer}.lora_B"][:, kept].clone()
    save_file(tensors, file)
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_adalora_drops_directions_and_a_layer_may_keep_none(bases, tmp_path):
    base, config = bases["tied"], AdaLoraConfig(**ADALORA, target_modules=["q_proj", "v_proj"])
    trained(base, config, tmp_path / "run")
    kept = [[True, False, True, True], [False] * 4, [True] * 4]
    pruned(tmp_path / "run", lambda i: kept[i % 3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes AdaLoRA's rank_pattern for LoRA's
        model = PeftModel.from_pretrained(load_vlm(base, dtype=torch.float32), tmp_path / "run")
    report = held(tmp_path / "run", base, "tied", foreign.logits(model, FAMILY["tied"]), tmp_path / "out")
    assert "AdaLoRA dropped all directions of" in str(report) and "Nothing is known to be lost" in str(report)
    seen = inspect_adapter(tmp_path / "run", base)
    assert seen.status == 1 and "vlm-lora-lab rescue" in repr(seen), seen
    file = tmp_path / "run" / "adapter_model.safetensors"  # but what rank_pattern does not explain is lost
    save_file({k: t[:0] if ".0.self_attn.q_proj" in k else t for k, t in load_file(file).items()}, file)
    assert "ZeRO-3" in repr(inspect_adapter(tmp_path / "run", base))
    assert "ZeRO-3" in str(rescue(tmp_path / "run", base).lost[0])
    path = tmp_path / "run" / "adapter_config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps(said | {"rank_pattern": {"x.lora_E": 3}}))
    for read in (rescue, load_adapter):
        with pytest.raises(InputError, match="rank_pattern"):
            read(tmp_path / "run", base)
    assert "rank_pattern" in repr(inspect_adapter(tmp_path / "run", base))


@pytest.mark.parametrize(
    "said, match",
    [
        (None, "nobody knows whose rows"),
        ([3], "Give the base that it was trained on"),
        ([3, 3], "nobody knows whose rows"),
        ([3, 10**6], "Give the base that it was trained on"),
        ({"embed_tokens": "all"}, "nobody knows whose rows"),
        ({"other": [1, 2]}, "nobody knows whose rows"),
    ],
)
def test_rows_that_nobody_can_place_are_refused(said, match, bases, tmp_path):
    trained(bases["tied"], CASES["rows"], tmp_path / "run")
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"trainable_token_indices": said}))
    with pytest.raises(InputError, match=match):
        rescue(tmp_path / "run", bases["tied"])


def test_rows_that_were_promised_and_are_not_there_are_lost(bases, tmp_path):
    trained(bases["tied"], CASES["rows"], tmp_path / "run")
    file = tmp_path / "run" / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if "trainable_tokens" not in k}, file)
    (lost,) = rescue(tmp_path / "run", bases["tied"]).lost
    assert lost.part == "embeddings" and "trainable_token_indices" in lost.why
    assert "promises and the file does not hold" in repr(inspect_adapter(tmp_path / "run", bases["tied"]))


OTHERS = {
    "IA3": (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "then merge_and_unload"),
    "OFT": (OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]), "then merge_and_unload"),
    "SHIRA": (ShiraConfig(r=2, target_modules=["q_proj"]), "then merge_and_unload"),
    "TRAINABLE_TOKENS": (TrainableTokensConfig(token_indices=[1, 2]), "then merge_and_unload"),
    "PROMPT_TUNING": (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "nothing can merge it"),
}


@pytest.mark.parametrize("method", OTHERS)
def test_another_method_is_named_with_what_can_be_done_and_nothing_is_wrong_with_it(method, bases, tmp_path):
    config, remedy = OTHERS[method]
    model = trained(bases["tied"], config, tmp_path / "run")
    assert hasattr(model.base_model, "merge_and_unload") == ("merge_and_unload" in remedy)
    for read in (rescue, load_adapter, merge_adapter):
        with pytest.raises(InputError, match=f"{method}.*{remedy}"):
            read(tmp_path / "run", bases["tied"])
    seen = inspect_adapter(tmp_path / "run", bases["tied"])
    assert seen.status == 1 and f"this is PEFT's {method}" in repr(seen), seen


MERGED = {
    "pissa": LoraConfig(**SMALL, init_lora_weights="pissa"),
    "pissa, DoRA": LoraConfig(**SMALL, init_lora_weights="pissa", use_dora=True),
    "biases": LoraConfig(**SMALL, bias="lora_only"),
}


@pytest.mark.parametrize("name", MERGED)
def test_the_command_that_a_refusal_names_does_what_it_says(name, bases, tmp_path, capsys):
    wanted = foreign.logits(trained(bases["untied"], MERGED[name], tmp_path / "run"), FAMILY["untied"])
    with pytest.raises(InputError) as refused:
        rescue(tmp_path / "run", bases["untied"])
    command = refused.value.remedy.partition("vlm-lora-lab ")[2].split()
    assert command[0] == "merge" and main(command) == 0, refused.value
    merged = foreign.logits(load_vlm(tmp_path / "run-merged"), FAMILY["untied"])
    assert (merged - wanted).abs().max() < 2e-5
    shutil.copy(tmp_path / "run" / "adapter_model.safetensors", tmp_path / "run" / "vit.safetensors")
    with pytest.raises(InputError) as refused:  # which merge would not read
        rescue(tmp_path / "run", bases["untied"])
    assert "vlm-lora-lab merge" not in str(refused.value)


@pytest.mark.parametrize("start, remedy", [("olora", "merge_and_unload"), ("pissa_niter_4", "Go back to the run")])
def test_a_start_is_sent_to_peft_only_where_peft_finds_it_again(start, remedy, bases, tmp_path):
    model = trained(bases["tied"], LoraConfig(**SMALL, init_lora_weights=start), tmp_path / "run")
    torch.manual_seed(1)
    again = PeftModel.from_pretrained(load_vlm(bases["tied"], dtype=torch.float32), tmp_path / "run")
    found = foreign.logits(again, FAMILY["tied"]) - foreign.logits(model, FAMILY["tied"])
    assert (found.abs().max() < 1e-4) == (remedy == "merge_and_unload")
    for read in (rescue, merge_adapter):
        with pytest.raises(InputError, match=f"{start}'.*{remedy}"):
            read(tmp_path / "run", bases["tied"])


def test_lora_with_biases_of_its_own_is_refused_and_the_base_is_not_blamed(bases, tmp_path):
    trained(bases["tied"], LoraConfig(**SMALL, lora_bias=True), tmp_path / "run")
    with pytest.raises(InputError, match="lora_bias is True, which no plan can say"):
        rescue(tmp_path / "run", bases["tied"])


def test_a_family_that_cannot_be_untied_is_refused_before_anything_is_written(tmp_path):
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    eyes = ViTConfig(**tiny, image_size=16, patch_size=8)
    words = BertConfig(**tiny, vocab_size=50, is_decoder=True, add_cross_attention=True)
    model = VisionEncoderDecoderModel(VisionEncoderDecoderConfig.from_encoder_decoder_configs(eyes, words))
    model.save_pretrained(tmp_path / "base")
    places = {"vision": ("encoder",), "connector": (), "language": ("decoder",)}
    places |= {"embeddings": ("decoder.bert.embeddings",), "head": ("decoder.cls",)}
    register(Layout("ViT and BERT", **places), "vision-encoder-decoder")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["word_embeddings"]))
    adapted.get_submodule(
        "base_model.model.decoder.bert.embeddings.word_embeddings"
    ).modules_to_save.default.weight.data += 1
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "run", save_embedding_layers=False)
    for read in (rescue, lambda *a: merge_into(tmp_path / "run", tmp_path / "out", tmp_path / "base")):
        with pytest.raises(InputError, match="ties the head to the embeddings, whatever"):
            read(tmp_path / "run", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()
