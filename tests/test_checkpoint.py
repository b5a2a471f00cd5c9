"""What is saved is what was trained; a wrong base is refused."""

import json

import pytest
import torch
from peft import PeftModel
from peft.utils import load_peft_weights

from vlm_lora_lab.checkpoint.merge import merge_adapter, same_model, save_merged
from vlm_lora_lab.checkpoint.save import fingerprint, load_adapter, read_provenance, save_adapter, seal
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import lab_folder, load_vlm, load_tokenizer
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

IDS = torch.arange(20, 50)[None]
BATCH = dict(
    input_ids=IDS,
    attention_mask=torch.ones_like(IDS),
    pixel_values=torch.linspace(-1, 1, 3 * 8 * 96).view(1, 3, 8, 96),
    tgt_sizes=torch.tensor([[3, 4]]),
    image_bound=torch.tensor([[0, 2, 18]]),
)


def trained(plan, four_bit):
    torch.manual_seed(0)
    model = apply_plan(load_vlm("lab", four_bit=four_bit), plan)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(3):
        model(**BATCH, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize(
    "plan",
    [
        TuningPlan(),
        TuningPlan(connector="lora", head="full"),
        TuningPlan(vision="full", embeddings="full"),
        TuningPlan(embeddings="lora", head="lora"),
    ],
    ids=lambda p: "-".join(p.words.values()),
)
def test_trained_reloaded_and_merged_are_one_model(plan, four_bit, tmp_path):
    model = trained(plan, four_bit)
    folder = save_adapter(model, tmp_path / "adapter", plan, "lab", load_tokenizer("lab"), four_bit)
    merged = load_vlm(save_merged(merge_adapter(folder), tmp_path / "merged", "lab"))
    proof = same_model(model, load_adapter(folder), merged, BATCH)
    assert proof.reloaded == 0 and proof.ok, proof
    plain = PeftModel.from_pretrained(load_vlm("lab", four_bit=four_bit), folder, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        assert torch.equal(plain(**BATCH).logits, model(**BATCH).logits)  # PEFT alone can read the folder
    stored = sum(t.numel() for t in load_peft_weights(str(folder), device="cpu").values())
    # all that was trained, nothing of the base
    assert stored == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_same_model_can_fail(tmp_path):
    model = trained(TuningPlan(), True)
    other = load_vlm("lab", four_bit=True)
    assert not same_model(model, other, other, BATCH).ok


def test_a_wrong_base_is_refused(tmp_path):
    folder = save_adapter(
        trained(TuningPlan(), True), tmp_path / "adapter", TuningPlan(), "lab", load_tokenizer("lab"), True
    )
    other = load_vlm("lab")
    other.vpm.post_layernorm.weight.data += 0.1
    save_merged(other, tmp_path / "other", "lab")
    assert fingerprint(tmp_path / "other") != fingerprint("lab") == fingerprint(lab_folder())
    with pytest.raises(InputError, match="another base"):
        load_adapter(folder, tmp_path / "other")


def test_missing_keys_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_adapter(
        trained(TuningPlan(), True), tmp_path / "adapter", TuningPlan(), "lab", load_tokenizer("lab"), True
    )
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    lost = next(k for k in weights if "resampler" in k)
    del weights[lost]
    save_file(weights, file)
    with pytest.raises(InputError, match="adapter_model.safetensors has .* bytes"):
        load_adapter(folder)
    seal(folder, read_provenance(folder))
    with pytest.raises(InputError, match=f"1 only in the model: .*{lost}"):
        load_adapter(folder)
    save_file(weights | {lost: torch.zeros(3)}, file)
    seal(folder, read_provenance(folder))
    with pytest.raises(InputError, match="shapes do not match"):
        load_adapter(folder)
    save_file(load_file(file) | {"base_model.model.nowhere": torch.zeros(3)}, file)
    seal(folder, read_provenance(folder))
    with pytest.raises(InputError, match="1 only in the file: .*nowhere"):
        load_adapter(folder)


def test_nothing_is_overwritten_and_provenance_is_complete(tmp_path):
    model = trained(TuningPlan(), True)
    folder = save_adapter(model, tmp_path / "adapter", TuningPlan(), "lab", load_tokenizer("lab"), True)
    with pytest.raises(InputError, match="not empty"):
        save_adapter(model, folder, TuningPlan(), "lab", load_tokenizer("lab"), True)
    assert read_provenance(folder)["four_bit"] is True
    assert TuningPlan.of(json.loads((folder / "plan.json").read_text())) == TuningPlan()
    with pytest.raises(InputError, match="no adapter_config.json"):
        read_provenance(tmp_path)


def test_a_16_bit_base_reloads_what_was_trained_in_32(tmp_path):
    torch.manual_seed(0)
    model = apply_plan(load_vlm("lab", dtype=torch.bfloat16), TuningPlan())
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.01 * torch.randn_like(p)  # values that 16 bit cannot hold
    folder = save_adapter(model, tmp_path / "adapter", TuningPlan(), "lab", load_tokenizer("lab"), four_bit=False)
    again = load_adapter(folder, model=load_vlm("lab", dtype=torch.bfloat16))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    reloaded = dict(again.named_parameters())
    assert trained and all(torch.equal(p, reloaded[n]) for n, p in trained.items())


def test_a_damaged_model_folder_is_named(tmp_path):
    import shutil

    for name, spoil in {
        "cut": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:1000]),
        "shapes": lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"intermediate_size": 384', '"intermediate_size": 320')
        ),
        "types": lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"query_num": 16', '"query_num": "many"')
        ),
        "version": lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"version": 2.6', '"version": 4.5')
        ),
        "config": lambda f: (f / "config.json").write_text("{"),
        "tokenizer": lambda f: (f / "tokenizer.json").unlink(),
    }.items():
        shutil.copytree(lab_folder(), tmp_path / name)
        spoil(tmp_path / name)
        with pytest.raises(InputError, match=name):
            load_tokenizer(tmp_path / name)
            load_vlm(tmp_path / name)
