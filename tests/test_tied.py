"""A head that is tied to the embeddings, as in the checkpoints that fit small cards: plan, training, and everything
that is written agree with the trained model."""

import json

import pytest
import torch
from families import native_folder

from vlm_lora_lab.checkpoint.merge import merge_into
from vlm_lora_lab.checkpoint.save import load_adapter, save_adapter
from vlm_lora_lab.cli import main
from vlm_lora_lab.data.native import load_processor
from vlm_lora_lab.data.records import read_conversations, samples_folder
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.files import stored_in
from vlm_lora_lab.models.load import load_vlm
from vlm_lora_lab.models.parts import PartsTable, count
from vlm_lora_lab.models.published import PUBLISHED, on_meta
from vlm_lora_lab.plan.tuning import PlanTable, TuningPlan, apply_plan
from vlm_lora_lab.plan.preview import Preview

TIED = [name for name in PUBLISHED if not count(on_meta(name))["head"]]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "minicpmv4_6"])
def tied(request, tmp_path_factory):
    # so that a merged weight is not rounded
    return native_folder(request.param, tmp_path_factory.mktemp("tied") / request.param, dtype=torch.float32)


def test_ten_of_the_published_checkpoints_are_tied_and_every_table_says_so():
    assert len(TIED) == 10 and "Qwen/Qwen3-VL-2B-Instruct" in TIED and "openbmb/MiniCPM-V-4.6" in TIED
    for name in TIED:
        model = on_meta(name)
        for table in (PlanTable.of(model, TuningPlan()), Preview.of(model, TuningPlan()), PartsTable.of(model)):
            [row] = [line for line in str(table).splitlines() if line.startswith("head") and "–" in line]
            assert (
                "tied to the embeddings" in str(table)
                and "0.0%" not in row
                and "tied to the embeddings" in table._repr_html_()
            )


def test_a_tied_head_cannot_be_trained_in_full_by_itself():
    with pytest.raises(InputError, match="has no weights of its own; it is tied to the embeddings.*embeddings: full"):
        Preview.of(on_meta(TIED[0]), TuningPlan(head="full"))


def test_a_job_on_a_tied_model_runs_from_doctor_to_merge(tied, tmp_path, capsys):
    data, out = samples_folder() / "handwriting" / "train.json", tmp_path / "run"
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads(data.read_text())[:6]))
    flags = [
        "--data",
        str(few),
        "--image-root",
        str(data.parent),
        "--model",
        str(tied),
        "--batch-size",
        "2",
        "--max-steps",
        "2",
    ]
    assert main(["doctor", *flags]) < 2
    assert main(["train", *flags, "--output", str(out)]) == 0
    assert "tied to the embeddings" in capsys.readouterr().out
    assert main(["inspect", str(out / "adapter")]) < 2
    assert main(["merge", str(out / "adapter"), "--output", str(out / "merged")]) == 0


def _logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


@pytest.mark.parametrize(
    "words",
    [{}, {"embeddings": "full"}, {"embeddings": "lora"}, {"head": "lora"}, {"embeddings": "lora", "head": "lora"}],
    ids=str,
)
def test_what_a_plan_trains_on_a_tied_model_is_what_is_saved_loaded_and_merged(tied, tmp_path, words):
    processor = load_processor(tied)
    rows = [processor(c) for c in read_conversations(samples_folder() / "handwriting" / "train.json")[:2]]
    batch, plan = processor.collate(rows), TuningPlan(**words)
    torch.manual_seed(0)
    model = apply_plan(load_vlm(tied, dtype=torch.float32), plan)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("embed_tokens" in n for n in trained) == ("embeddings" in words) and any(
        "lm_head" in n for n in trained
    ) == ("head" in words)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    live = _logits(model, batch)
    save_adapter(model, tmp_path / "adapter", plan, tied, processor.tokenizer, False)
    torch.testing.assert_close(_logits(load_adapter(tmp_path / "adapter", four_bit=False), batch), live, rtol=0, atol=0)
    merge_into(tmp_path / "adapter", tmp_path / "merged")
    close = 1e-3 * float(live.std())
    # something was learned
    assert (_logits(load_vlm(tied, dtype=torch.float32), batch) - live).abs().max() > 100 * close
    torch.testing.assert_close(
        _logits(load_vlm(tmp_path / "merged", dtype=torch.float32), batch), live, rtol=0, atol=close
    )
    own = [n for n in stored_in(tmp_path / "merged") if n.endswith("lm_head.weight")]
    says = json.loads((tmp_path / "merged" / "config.json").read_text())
    # a head of its own only where the configuration says that it has one
    assert bool(own) != says["tie_word_embeddings"]
