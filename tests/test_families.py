"""Every family the package knows, on tiny random models: parts, load, 4 bit, LoRA and full training, adapter, round
trip."""

import json
import warnings

import pytest
import torch
from families import FAMILIES, NATIVE, OURS, batch_of, tiny_config, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlm_lora_lab.checkpoint.merge import merge_adapter
from vlm_lora_lab.checkpoint.save import load_adapter, save_adapter
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.families import base
from vlm_lora_lab.families.base import families
from vlm_lora_lab.models.files import save_vlm, weight_files
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.models.parts import (
    PARTS,
    Layout,
    PartsTable,
    count,
    infer_layout,
    layout_of,
    linear_layers,
    register,
    stored_tensors,
)
from vlm_lora_lab.models.published import PUBLISHED, model_class, on_meta
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan, full_modules, lora_layers

NOT_INFERRED = {"qwen"}  # its language model and its vision tower share one module; registered, so nobody asks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A tiny checkpoint of a family in the hub's layout, in several shards and 16 bit."
    made = {}

    def of(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            model = tiny_model(family).bfloat16()
            model.save_pretrained(made[family], max_shard_size="300KB")
        return made[family]

    return of


def tensors_of(folder):
    found = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as f:
            found |= {k: f.get_tensor(k) for k in f.keys()}
    return found


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_one_part_and_every_part_is_where_it_should_be(family):
    model = tiny_model(family)
    layout = layout_of(model)
    total = count(model)
    modules = dict(model.named_modules())
    assert not layout.inferred
    assert sum(total.values()) == sum(t.numel() for _, t in stored_tensors(model))
    assert all(total[part] > 0 for part in PARTS if part != "head") and (total["head"] > 0) != bool(
        model.all_tied_weights_keys
    )
    assert (
        modules[layout.embeddings[0]] is model.get_input_embeddings()
        and modules[layout.head[0]] is model.get_output_embeddings()
    )
    layers = linear_layers(model)
    assert (
        layers["language"]
        and layers["vision"]
        and all(isinstance(modules[n], torch.nn.Linear) for names in layers.values() for n in names)
    )
    assert {n.rpartition(".")[2] for n in layers["language"]} & {"q_proj", "c_attn"}
    assert ("(tied to the embeddings)" in repr(PartsTable.of(model))) == (total["head"] == 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_structure_alone_gives_the_same_parts(family):
    model = tiny_model(family)
    if family in NOT_INFERRED:
        with pytest.raises(InputError, match="register"):
            infer_layout(model)
        return
    guess, known = infer_layout(model), layout_of(model)
    assert guess.inferred
    assert {n: guess.part_of(n) for n, _ in stored_tensors(model)} == {
        n: known.part_of(n) for n, _ in stored_tensors(model)
    }


def test_an_unknown_architecture_is_inferred_registered_or_refused(monkeypatch):
    model = tiny_model("llava")
    monkeypatch.setattr(base, "_KNOWN", {})
    assert layout_of(model).inferred and layout_of(model).family == "llava (inferred)"
    register(
        Layout(
            "mine",
            "model.vision_tower",
            "model.multi_modal_projector",
            "model.language_model",
            "model.language_model.embed_tokens",
            "lm_head",
        ),
        "llava",
    )
    assert layout_of(model).family == "mine"
    with pytest.raises(InputError, match="no module with a list of layers. Register it: register.*'llama'"):
        infer_layout(model.model.language_model)


@pytest.mark.parametrize("four_bit", [False, True], ids=["whole", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_the_language_model_and_the_connector_in_full(family, four_bit, folder, tmp_path):
    plan, base = TuningPlan(rank=4), folder(family)
    torch.manual_seed(0)
    model = apply_plan(load_vlm(base, four_bit=four_bit), plan).train()
    part_of, batch = layout_of(model).part_of, batch_of(family, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):  # LoRA's first matrix only moves once the second has left zero
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    promised = {n for n, p in model.named_parameters() if p.requires_grad}
    assert moved == promised and {part_of(n) for n in moved} == {"language", "connector"}
    adapter = save_adapter(model, tmp_path / "adapter", plan, base, load_tokenizer("lab"), four_bit)
    again = load_adapter(adapter)
    torch.testing.assert_close(logits(again, batch), logits(model, batch), rtol=0, atol=0)
    merged = merge_adapter(adapter)
    spread = logits(model, batch).std()
    assert ((logits(merged, batch) - logits(model, batch)).abs().max() / spread).item() < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_and_saving_keeps_every_byte(family, folder, tmp_path):
    base = folder(family)
    (base / "modeling_remote.py").write_text("raise SystemExit('remote code ran')\n")
    reference, model = tiny_model(family), load_vlm(base)
    reference.load_state_dict({k: v.bfloat16() for k, v in reference.state_dict().items()})
    torch.testing.assert_close(
        logits(model, batch_of(family, model)), logits(reference, batch_of(family, model)), rtol=1e-4, atol=1e-4
    )
    model = load_vlm(base, dtype="stored")
    again = save_vlm(model, tmp_path / "again", base, max_shard_size="200KB")
    one, two = tensors_of(base), tensors_of(again)
    assert one.keys() == two.keys()
    assert all(
        one[k].dtype == two[k].dtype and torch.equal(one[k].view(torch.uint8), two[k].view(torch.uint8)) for k in one
    )
    assert (again / "modeling_remote.py").is_file()
    was, now = (json.loads((d / "config.json").read_text()) for d in (base, again))
    assert {k: v for k, v in now.items() if k not in ("dtype", "torch_dtype")} == {
        k: v for k, v in was.items() if k not in ("dtype", "torch_dtype")
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_are_translated_on_the_meta_device_as_on_the_model(family):
    with torch.device("meta"):
        empty = model_class(tiny_config(family))(tiny_config(family))
    model = tiny_model(family)
    for plan in (
        TuningPlan(),
        TuningPlan(vision="lora", connector="freeze"),
        TuningPlan(embeddings="lora", head="lora"),
    ):
        assert lora_layers(empty, plan) == lora_layers(model, plan) and full_modules(empty, plan) == full_modules(
            model, plan
        )


def test_a_target_that_matches_nothing_says_what_there_is():
    with pytest.raises(InputError, match="Choose among c_attn, c_proj, w1, w2"):
        lora_layers(tiny_model("qwen"), TuningPlan(targets=("q_proj", "v_proj")))


def test_a_bare_parameter_is_refused_and_not_forgotten():
    with pytest.raises(InputError, match="image_newline is a bare parameter"):
        full_modules(tiny_model("llava_onevision"), TuningPlan(embeddings="full"))
    with pytest.raises(InputError, match="tied to the embeddings"):
        full_modules(tiny_model("gemma3"), TuningPlan(head="full"))
    mergers = [f"model.visual.deepstack_merger_list.{i}" for i in range(3)]
    assert full_modules(tiny_model("qwen3_vl"), TuningPlan()) == ["model.visual.merger", *mergers]


def test_the_voice_of_minicpm_o_stays_on_the_disk_and_comes_back(folder, tmp_path):
    base = tmp_path / "o"
    model = tiny_model("minicpmo-2.6").bfloat16()
    model.save_pretrained(base)
    voice = {"apm.conv1.weight": torch.randn(8, 4, 3).bfloat16(), "tts.emb_text.weight": torch.randn(5, 4).bfloat16()}
    file = base / "model.safetensors"
    save_file(load_file(file) | voice, file, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="2 tensors of apm, tts stay on the disk"):
        loaded = load_vlm(base, dtype="stored")
    again = tensors_of(save_vlm(loaded, tmp_path / "again", base))
    assert set(again) == set(tensors_of(base)) and all(torch.equal(again[k], v) for k, v in voice.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_vlm(folder("minicpmv-2.6"))


def test_every_published_checkpoint_is_of_a_tested_family():
    tested = {tiny_config(f).model_type for f in FAMILIES}
    assert {p.config["model_type"] for p in PUBLISHED.values()} <= tested
    assert {t for f in families() for t in f.model_types} - tested == {
        "minicpm_ocr"
    }  # the classes of minicpmv4_6 under another name
    assert len(NATIVE) + len(OURS) == len(FAMILIES)


@pytest.mark.parametrize(
    "name, weights",
    [
        ("openbmb/MiniCPM-V-2", 3_434_965_792),
        ("openbmb/MiniCPM-Llama3-V-2_5", 8_537_092_336),
        ("openbmb/MiniCPM-V-2_6", 8_099_175_152),
        ("openbmb/MiniCPM-V-4_5", 8_695_895_280),
        ("Qwen/Qwen-VL", 9_656_935_168),
    ],
)
def test_published_sizes(name, weights):
    model = on_meta(name)
    assert (
        sum(t.numel() for t in model.state_dict().values())
        == weights
        == sum(count(model).values())
        == PUBLISHED[name].weights
    )


@pytest.mark.parametrize("family", OURS)
def test_a_batch_is_its_rows(family):
    "Pictures of two sizes in one row, one in the next, none in the third: together as alone."
    config = tiny_config(family)
    torch.manual_seed(0)
    model = model_class(config)(config).eval()
    if family == "minicpmv-2.5":
        model.vpm.see_padding = False  # as published it does look at its neighbours' padding; the references pin that
    ids = torch.randint(3, 290, (3, 44))
    if family == "qwen":
        pixels, sizes = torch.randn(3, 3, 56, 56), None
    else:
        sizes = torch.tensor([[4, 3], [2, 4], [1, 5]])
        pixels = torch.zeros(3, 3, 14, 12 * 14)
        for i, (h, w) in enumerate(sizes.tolist()):
            pixels[i, ..., : h * w * 14] = torch.randn(3, 14, h * w * 14)
    bounds = torch.tensor([[0, 2, 18], [0, 20, 36], [1, 5, 21]])

    def row(*pictures, rows=(0,), shift=0):
        batch = {"input_ids": ids[list(rows)]}
        if pictures:
            keep = list(pictures)
            batch |= {"pixel_values": pixels[keep], "image_bound": bounds[keep] - torch.tensor([shift, 0, 0])}
            if sizes is not None:
                batch["tgt_sizes"] = sizes[keep]
                batch["pixel_values"] = batch["pixel_values"][..., : int(sizes[keep].prod(-1).max()) * 14]
        return batch

    together = logits(model, row(0, 1, 2, rows=(0, 1, 2)))
    alone = [row(0, 1), row(2, rows=(1,), shift=1), row(rows=(2,))]
    for i, one in enumerate(alone):
        torch.testing.assert_close(together[i : i + 1], logits(model, one), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", OURS)
def test_text_alone_trains_with_zeros_for_the_eyes_and_not_with_nothing(family):
    model, ids = tiny_model(family).train(), torch.randint(3, 290, (2, 12))
    model(input_ids=ids, labels=ids).loss.backward()
    part_of = layout_of(model).part_of
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any() == (part_of(name) in ("language", "embeddings", "head")), name


def test_a_checkpoint_published_in_4_bit_can_be_trained_and_merged(folder, tmp_path):
    from transformers import BitsAndBytesConfig

    skip = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["out_proj", "kv_proj", "lm_head"],
    )
    base, config = tmp_path / "int4", tiny_config("minicpmv-2.6")
    # In float32, so that the comparison below is one of merging; packed from 16 bit, bitsandbytes multiplies in 16 bit,
    # too.
    model_class(config).from_pretrained(
        folder("minicpmv-2.6"), config=config, quantization_config=skip, dtype=torch.float32
    ).save_pretrained(base)
    plan = TuningPlan(rank=4)
    model = apply_plan(load_vlm(base), plan).train()
    batch = batch_of("minicpmv-2.6", model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapter = save_adapter(model, tmp_path / "adapter", plan, base, load_tokenizer("lab"), True)
    difference = (logits(merge_adapter(adapter), batch) - logits(model, batch)).abs().max() / logits(model, batch).std()
    assert difference < 1e-3
    with pytest.raises(InputError, match="no original to merge onto"):
        merge_adapter(adapter, onto="original")
