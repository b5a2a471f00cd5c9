"""The whole road on stand-ins of the published checkpoints: `pytest -m slow tests/test_roads.py` walks all of them and
writes ROADS.md; the rest holds a few to it."""

import json

import pytest
from roads import CI, COLUMNS, TABLE, TIED_PLANS, Road, remember, rows, table, walk
from standins import shrunk, stand_in

from vlm_lora_lab.checkpoint.inspect import inspect_adapter
from vlm_lora_lab.checkpoint.serve import export_adapter
from vlm_lora_lab.data.native import load_processor
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import load_tokenizer
from vlm_lora_lab.models.published import PUBLISHED, on_meta
from vlm_lora_lab.plan.tuning import TuningPlan
from vlm_lora_lab.plan.preview import Preview
from vlm_lora_lab.quant.memory import estimate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*stay on the disk"),
    pytest.mark.filterwarnings("ignore:Model (with|has) `tie_word_embeddings"),
]


def test_the_table_is_what_the_rows_say_and_has_no_gap():
    known = rows()
    assert list(known) == list(PUBLISHED) and TABLE.read_text(encoding="utf-8") == table(known)
    for name, row in known.items():
        assert list(row["cells"]) == list(COLUMNS), name
        for column, (word, says) in row["cells"].items():
            assert word != "FAILS" and bool(says) == (word not in ("✓", "–")), f"{name}, {column}: {word} {says}"
    assert "real" in {row["words"] for row in known.values()}


@pytest.mark.parametrize("name", CI)
def test_the_road_is_what_the_table_says(name, tmp_path):
    assert walk(name, tmp_path)["cells"] == rows()[name]["cells"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_road(name, tmp_path):
    row = walk(name, tmp_path, whole=True)
    remember(name, row)
    failed = {c: says for c, (word, says) in row["cells"].items() if word == "FAILS"}
    assert not failed, failed


@pytest.mark.parametrize("name", ["OpenGVLab/InternVL3-1B-hf", "google/gemma-3-4b-it"])
def test_a_rope_that_depends_on_the_length_changes_no_estimate(name, tmp_path):
    """InternVL3 asks how long a text is, to compute its frequencies anew; Gemma 3 has one kind of frequencies for each
    kind of layer."""
    values, plain = shrunk(name), shrunk(name)
    text = plain["text_config"]
    text["rope_scaling"] = None
    for folder, config in (("scaled", values), ("plain", plain)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    assert (
        values["text_config"]["rope_scaling"]
        and estimate(str(tmp_path / "scaled"), tokens=64).rows == estimate(str(tmp_path / "plain"), tokens=64).rows
    )


def test_a_family_without_data_here_is_told_by_name_and_its_tokenizer_needs_no_template(tmp_path):
    "PaliGemma publishes none."
    base = stand_in("google/paligemma-3b-pt-224", tmp_path / "base", small=True)
    assert load_tokenizer(base).chat_template is None
    with pytest.raises(InputError, match="nothing here prepares data for model_type 'paligemma'"):
        load_processor(base)
    known = stand_in("Qwen/Qwen2-VL-2B-Instruct", tmp_path / "known", small=True)
    for file in known.glob("chat_template*"):
        file.unlink()
    said = json.loads((known / "tokenizer_config.json").read_text())
    (known / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "chat_template"}))
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        load_processor(known)


def test_embeddings_that_are_the_head_are_counted_once_and_lie_on_the_disk_twice(tmp_path):
    road = Road("Qwen/Qwen3-VL-2B-Instruct", tmp_path, small=True)
    road.train(**TIED_PLANS[0])  # holds the size of the file to that of the plan
    rows = {(r.part, r.kind): r for r in inspect_adapter(tmp_path / "run" / "adapter").rows}
    trained, copy = rows["embeddings", "in full"], rows["head", "tied copy"]
    assert copy.weights == 0 and copy.nbytes == trained.nbytes == 4 * trained.weights
    seen = Preview.of(on_meta(road.base), TuningPlan(**TIED_PLANS[0]))
    assert sum(r.weights for r in rows.values()) == seen.trained and seen.adapter_bytes == 4 * (
        seen.trained + trained.weights
    )
    assert (
        Preview.of(on_meta(road.base), TuningPlan()).copied
        == 0
        == Preview.of(on_meta("Qwen/Qwen3-VL-8B-Instruct"), TuningPlan(embeddings="full")).copied
    )


def test_a_bare_parameter_beside_embeddings_says_which_words_train_them():
    model = on_meta("llava-hf/llava-onevision-qwen2-0.5b-ov-hf")
    with pytest.raises(InputError, match="model.image_newline is a bare parameter.*embeddings: full on embed_tokens"):
        Preview.of(model, TuningPlan(embeddings="full"))
    assert (
        Preview.of(model, TuningPlan(embeddings="full on embed_tokens")).trained
        > model.get_input_embeddings().weight.numel()
    )


def test_a_rule_that_does_not_hold_names_the_folder_that_is_there(tmp_path):
    road = Road("openbmb/MiniCPM-V-2_6", tmp_path, small=True)
    road.train()
    done = export_adapter(tmp_path / "run" / "adapter", tmp_path / "out", "vllm")
    assert done.ok and ".partial" not in str(done), str(done)
    (road.base / "tokenizer.json").write_text("{}")  # a broken download
    broken = export_adapter(tmp_path / "run" / "adapter", tmp_path / "other", "vllm")
    assert not broken.ok and ".partial" not in str(broken) and str(tmp_path / "other") in str(broken), str(broken)
