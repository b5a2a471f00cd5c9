"""How much of a picture is looked at in training is what merged and exported models look at, whoever prepares the
pictures."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from standins import stand_in
from transformers import AutoImageProcessor

from vlm_lora_lab.checkpoint.merge import merge_into
from vlm_lora_lab.checkpoint.rescue import rescue
from vlm_lora_lab.checkpoint.save import adapter_processor, save_adapter
from vlm_lora_lab.checkpoint.serve import export_adapter
from vlm_lora_lab.cli import main
from vlm_lora_lab.evaluate.compare import Checkpoint
from vlm_lora_lab.data.native import NativeProcessor, keep_limits, load_processor
from vlm_lora_lab.data.records import ask
from vlm_lora_lab.models.load import lab_folder, load_vlm
from vlm_lora_lab.models.tokenizer import picture_file
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

SLICED = (
    "openbmb/MiniCPM-V-2",
    "openbmb/MiniCPM-Llama3-V-2_5",
    "openbmb/MiniCPM-V-2_6",
    "openbmb/MiniCPM-V-4",
    "openbmb/MiniCPM-V-4_5",
    "openbmb/MiniCPM-o-2_6",
    "openbmb/MiniCPM-V-4.6",
    "openbmb/MiniCPM-V-4.7-1B",
)
RESIZED = ("Qwen/Qwen2-VL-2B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen3-VL-2B-Instruct")
LIMITS = {n: 2 * 448**2 for n in SLICED} | dict.fromkeys(RESIZED, 300 * 300)
SIZES = [(640, 480), (2000, 1500), (1500, 2000), (3000, 400), (64, 64), (449, 448)]
# an older family, and transformers' own of both kinds
WHOLE = ("openbmb/MiniCPM-V-2_6", "openbmb/MiniCPM-V-4.6", "Qwen/Qwen2.5-VL-3B-Instruct")


def learned(base, folder, tokenizer, max_pixels=0):
    "An adapter on the language model that changes what is answered."
    torch.manual_seed(0)
    plan = TuningPlan(vision="freeze", connector="freeze", language="lora")
    model = apply_plan(load_vlm(base, dtype=torch.float32), plan)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.1)
    save_adapter(model, folder, plan, base, tokenizer, False, max_pixels=max_pixels)


def grids(processor):
    return [processor.grid(size) for size in SIZES]


def edit(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_kept_in_the_files(name, tmp_path):
    base = stand_in(name, tmp_path / "base", small=True)
    copied, limit = shutil.copytree(base, tmp_path / "copied"), LIMITS[name]
    few = load_processor(base, max_pixels=limit)
    assert grids(few) != grids(load_processor(base))
    assert keep_limits(copied, few) == few.limits()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also about files that contradict each other
        after = load_processor(copied)
    assert grids(after) == grids(few) and after.limits() == few.limits()
    assert grids(load_processor(copied, max_pixels=limit)) == grids(few)
    values, _ = picture_file(copied)
    if name in SLICED:
        assert values["max_slice_nums"] == 2
    else:
        size = values.get("size") or {"longest_edge": values["max_pixels"]}
        assert size["longest_edge"] == values.get("max_pixels", limit) == limit
    if isinstance(few, NativeProcessor):
        assert AutoImageProcessor.from_pretrained(copied, backend="pil").to_dict() == few.images.to_dict()


@pytest.mark.parametrize("notation", ["older", "newer", "older in size", "both files", "nested"])
def test_every_notation_of_qwen_is_kept(notation, tmp_path):
    base = stand_in("Qwen/Qwen2-VL-2B-Instruct", tmp_path / "base", small=True)
    flat, nested = base / "preprocessor_config.json", base / "processor_config.json"
    values = json.loads(flat.read_text())
    plain = {k: v for k, v in values.items() if k not in ("min_pixels", "max_pixels", "size")}
    size, older = {"shortest_edge": 3136, "longest_edge": 12845056}, {"min_pixels": 3136, "max_pixels": 12845056}
    said = {"older": older, "newer": {"size": size}, "older in size": {"size": older} | older}.get(
        notation, {"size": size} | older
    )
    flat.write_text(json.dumps(plain | said))
    if notation in ("both files", "nested"):
        nested.write_text(
            json.dumps({"processor_class": "Qwen2VLProcessor", "image_processor": plain | {"size": size}})
        )
    if notation == "nested":
        flat.unlink()
    few = load_processor(base, max_pixels=200 * 200)
    keep_limits(base, few)
    assert flat.exists() == (notation != "nested")
    for file in (flat, nested):
        assert "12845056" not in (file.read_text() if file.exists() else "")
    assert grids(load_processor(base)) == grids(few)
    picture_file(base)


@pytest.mark.parametrize(
    "name", ["lab", "openbmb/MiniCPM-V-2_6", "openbmb/MiniCPM-Llama3-V-2_5", "openbmb/MiniCPM-V-2"]
)
def test_a_base_without_a_file_of_its_own_gets_one(name, tmp_path):
    base = (
        shutil.copytree(lab_folder(), tmp_path / "base")
        if name == "lab"
        else stand_in(name, tmp_path / "base", small=True)
    )
    (base / "preprocessor_config.json").unlink(missing_ok=True)
    if name == "lab":
        edit(base / "config.json", lambda v: v | {"slice_config": v["slice_config"] | {"max_slice_nums": 9}})
    few = load_processor(base, max_pixels=2 * load_processor(base).scale_resolution ** 2)
    assert few.max_slice_nums == 2
    keep_limits(base, few)
    written, config = (json.loads((base / f).read_text()) for f in ("preprocessor_config.json", "config.json"))
    assert (
        written["max_slice_nums"] == 2
        and written["scale_resolution"] == few.scale_resolution
        and written["image_feature_size"] == few.query_num
    )
    assert (
        config.get("max_slice_nums", 2) == 2
        and (config.get("slice_config") or {"max_slice_nums": 2})["max_slice_nums"] == 2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_processor(base)
    assert replace(again, tokenizer=few.tokenizer) == few


def test_a_family_that_always_looks_at_the_same_has_nothing_to_keep(tmp_path):
    base = stand_in("Qwen/Qwen-VL-Chat", tmp_path / "base", small=True)
    before = {f.name: f.read_bytes() for f in base.iterdir()}
    assert keep_limits(base, load_processor(base)) == {} and {f.name: f.read_bytes() for f in base.iterdir()} == before


@pytest.fixture(scope="module", params=WHOLE)
def adapter(request, tmp_path_factory):
    "Folder of a base, folder of an adapter with LoRA that says something, and the limit."
    place, limit = tmp_path_factory.mktemp("adapter"), LIMITS[request.param]
    base = stand_in(request.param, place / "base", small=True)
    processor = load_processor(base, max_pixels=limit)
    learned(base, place / "adapter", processor.tokenizer, limit)
    Image.effect_noise((900, 700), 90).convert("RGB").save(place / "a.png")
    return place, limit, grids(processor), request.param


def test_the_adapters_own_files_carry_it(adapter):
    place, limit, few, name = adapter
    values, _ = picture_file(place / "adapter")
    assert (
        values["max_slice_nums"] == 2
        if name in SLICED
        else (values.get("size") or {"longest_edge": values["max_pixels"]})["longest_edge"] == limit
    )
    assert grids(load_processor(place / "base")) != few  # the base keeps its own


def test_a_merged_model_looks_and_answers_as_the_adapter_does(adapter, tmp_path, capsys):
    place, limit, few, name = adapter
    merged = merge_into(place / "adapter", tmp_path / "merged", onto="original")
    assert (
        f"{limit:,} pixels" in str(merged)
        and json.loads((tmp_path / "merged" / "merge.json").read_text())["max_pixels"] == limit
    )
    assert grids(load_processor(tmp_path / "merged")) == few
    assert (
        grids(Checkpoint.of(tmp_path / "merged").processor())
        == grids(Checkpoint.of(place / "adapter").processor())
        == few
    )
    said = []
    for given in (
        ["--adapter", str(place / "adapter")],
        ["--model", str(tmp_path / "merged")],
        ["--model", str(place / "base")],
    ):
        assert main(["ask", "What is this?", "--image", str(place / "a.png"), "--max-new-tokens", "6", *given]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


def test_the_three_exports_carry_it(adapter, tmp_path):
    place, limit, few, name = adapter
    for target in ("transformers", "llama.cpp", "vllm"):
        done = export_adapter(place / "adapter", tmp_path / target, target, onto="original")
        if (tmp_path / target / "model").is_dir():
            assert grids(load_processor(tmp_path / target / "model")) == few
        assert (tmp_path / target / "SERVE.md").read_text() == done.commands + "\n"
        said = {
            "vllm": [f"--mm-processor-kwargs '{json.dumps(load_processor(place / 'base', max_pixels=limit).limits())}'"]
        }
        if name in RESIZED:
            said["llama.cpp"] = ["--image-min-tokens 4 ", f"--image-max-tokens {limit // 28**2} "]
        assert all(words in done.commands for words in said.get(target, []))
        if target == "llama.cpp" and name in SLICED:
            assert [r.found for r in done.rules if "9 slices" in r.asks and not r.ok] == [
                "this model looks at 2; serve it with vLLM, or make pictures smaller yourself"
            ]


def test_without_a_limit_the_commands_say_what_the_files_say(tmp_path):
    base = stand_in("Qwen/Qwen3-VL-2B-Instruct", tmp_path / "base", small=True)
    learned(base, tmp_path / "adapter", load_processor(base).tokenizer)
    assert "mm-processor-kwargs" not in export_adapter(tmp_path / "adapter", tmp_path / "vllm", "vllm").commands
    assert (
        "--image-min-tokens 64 --image-max-tokens 16384 "
        in export_adapter(tmp_path / "adapter", tmp_path / "gguf", "llama.cpp").commands
    )
    assert picture_file(tmp_path / "gguf" / "model") == picture_file(base)


def test_a_model_trained_in_full_carries_it(tmp_path):
    base = stand_in("Qwen/Qwen2.5-VL-3B-Instruct", tmp_path / "base", small=True)
    Image.effect_noise((400, 300), 90).convert("RGB").save(tmp_path / "a.png")
    record = {
        "image": "a.png",
        "conversations": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "one"}],
    }
    (tmp_path / "d.json").write_text(json.dumps([record]))
    parts = [x for part in ("vision", "connector") for x in (f"--{part}", "freeze")] + ["--language", "full"]
    given = [
        "--model",
        str(base),
        "--data",
        str(tmp_path / "d.json"),
        "--output",
        str(tmp_path / "run"),
        "--max-steps",
        "1",
        "--no-four-bit",
        "--max-pixels",
        "90000",
        *parts,
    ]
    assert main(["train", *given]) == 0
    assert (
        grids(load_processor(tmp_path / "run" / "model"))
        == grids(load_processor(base, max_pixels=90000))
        != grids(load_processor(base))
    )


def with_own_words(place, change):
    """An adapter on a base with a spare row, whose tokenizer was changed before training; the base, and the processor
    of training."""
    base = stand_in("Qwen/Qwen2.5-VL-3B-Instruct", place / "base", small=True)

    def rest(m):
        return m | {"vocab": {t: i for t, i in m["vocab"].items() if t != "<|file_sep|>"}}

    edit(
        base / "tokenizer.json",
        lambda v: (
            v
            | {
                "model": rest(v["model"]),
                "added_tokens": [t for t in v["added_tokens"] if t["content"] != "<|file_sep|>"],
            }
        ),
    )
    edit(
        base / "tokenizer_config.json",
        lambda v: (
            v
            | {
                "added_tokens_decoder": {
                    i: t for i, t in v["added_tokens_decoder"].items() if t["content"] != "<|file_sep|>"
                }
            }
        ),
    )
    processor = load_processor(base)
    change(processor.tokenizer)
    learned(base, place / "adapter", processor.tokenizer, 90000)
    return base, processor


def test_a_tokenizer_of_its_own_goes_with_the_adapter(tmp_path, capsys):
    base, processor = with_own_words(
        tmp_path, lambda t: t.add_special_tokens({"additional_special_tokens": ["<lamp>"]})
    )
    question = ask("Is it a <lamp>?", "yes <lamp>")
    want = processor(question)["input_ids"]
    assert (
        processor.tokenizer.convert_tokens_to_ids("<lamp>") in want
        and load_processor(base)(question)["input_ids"] != want
    )
    assert json.loads((tmp_path / "adapter" / "provenance.json").read_text())["own_tokenizer"].startswith(
        "1 tokens that the base has not, such as <lamp>"
    )
    assert adapter_processor(tmp_path / "adapter")(question)["input_ids"] == want
    merged = merge_into(tmp_path / "adapter", tmp_path / "merged", onto="original")
    assert "<lamp>" in str(merged) and load_processor(tmp_path / "merged")(question)["input_ids"] == want
    # and the limit as well
    assert grids(load_processor(tmp_path / "merged")) == grids(load_processor(base, max_pixels=90000))
    assert Checkpoint.of(tmp_path / "adapter").processor()(question)["input_ids"] == want
    for target in ("transformers", "vllm"):  # vLLM looks for words beside the model, which is therefore written
        export_adapter(tmp_path / "adapter", tmp_path / target, target, onto="original")
        assert load_processor(tmp_path / target / "model")(question)["input_ids"] == want
    said = []
    for given in (["--adapter", str(tmp_path / "adapter")], ["--model", str(tmp_path / "merged")]):
        assert main(["ask", "Is it a <lamp>?", "--max-new-tokens", "6", *given]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_chat_template_of_its_own_goes_with_the_adapter(tmp_path):
    def change(tokenizer):
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|>the ")

    base, processor = with_own_words(tmp_path, change)
    question = ask("What?", "yes")
    assert (
        adapter_processor(tmp_path / "adapter")(question)["input_ids"]
        == processor(question)["input_ids"]
        != load_processor(base)(question)["input_ids"]
    )
    assert "chat template" in str(merge_into(tmp_path / "adapter", tmp_path / "merged", onto="original"))
    assert load_processor(tmp_path / "merged")(question)["input_ids"] == processor(question)["input_ids"]


def test_the_bases_own_tokenizer_is_left_as_it_is(adapter, tmp_path):
    place, limit, few, name = adapter
    assert json.loads((place / "adapter" / "provenance.json").read_text())["own_tokenizer"] == ""
    merged = merge_into(place / "adapter", tmp_path / "merged", onto="original")
    assert not merged.tokenizer
    for file in place.joinpath("base").iterdir():
        if "token" in file.name or "template" in file.name:
            assert (tmp_path / "merged" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("what", ["merge", "ask", "evaluate", "export"])
def test_a_base_whose_picture_settings_changed_is_refused(what, adapter, tmp_path, capsys):
    "The weights are the same, and the model would see other pixels."
    place, limit, few, name = adapter
    base = shutil.copytree(place / "base", tmp_path / "base")
    key = "image_mean" if name != "openbmb/MiniCPM-V-2_6" else "norm_mean"
    edit(base / "preprocessor_config.json", lambda v: v | {key: [0.1, 0.2, 0.3]})
    record = {"conversations": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "one"}]}
    (tmp_path / "d.json").write_text(json.dumps([record]))
    given = {
        "merge": ["merge", str(place / "adapter"), "--output", str(tmp_path / "out")],
        "ask": ["ask", "What?", "--adapter", str(place / "adapter")],
        "evaluate": ["evaluate", str(place / "adapter"), "--data", str(tmp_path / "d.json")],
        "export": ["export", str(place / "adapter"), str(tmp_path / "out"), "--for", "vllm"],
    }
    assert main([*given[what], "--model", str(base)]) == 2
    assert (
        f"{key} is [0.1, 0.2, 0.3], and the adapter in" in capsys.readouterr().err and not (tmp_path / "out").exists()
    )


def foreign(place, **said):
    "A plain PEFT folder on a Qwen2.5-VL, as another script leaves it, with what its files say of pictures."
    base = stand_in("Qwen/Qwen2.5-VL-3B-Instruct", place / "base", small=True)
    torch.manual_seed(0)
    model = get_peft_model(
        load_vlm(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules=r".*language_model.*q_proj", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(place / "run", save_embedding_layers=False)
    for file, values in said.items():
        (place / "run" / f"{file}.json").write_text(json.dumps(values))
    return base, place / "run"


@pytest.mark.parametrize(
    "said",
    [
        {"preprocessor_config": {"min_pixels": 3136, "max_pixels": 90000}},
        {"preprocessor_config": {"size": {"shortest_edge": 3136, "longest_edge": 90000}}},
        {"processor_config": {"image_processor": {"size": {"shortest_edge": 3136, "longest_edge": 90000}}}},
        {"args": {"freeze_vit": True, "freeze_aligner": True, "max_pixels": 90000}},
    ],
)
def test_what_another_script_looked_at_is_rescued_too(said, tmp_path):
    base, run = foreign(tmp_path, **said)
    report = rescue(run, base, tmp_path / "out", four_bit=False)
    assert any("90,000 pixels" in n and "keeps that" in n for n in report.notes)
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["max_pixels"] == 90000
    few = grids(load_processor(base, max_pixels=90000))
    assert grids(adapter_processor(tmp_path / "out")) == few
    merge_into(tmp_path / "out", tmp_path / "merged")
    assert grids(load_processor(tmp_path / "merged")) == few


def test_a_limit_that_cannot_be_kept_is_named(tmp_path):
    base, run = foreign(tmp_path, preprocessor_config={"min_pixels": 49, "max_pixels": 100})
    report = rescue(run, base, tmp_path / "out", four_bit=False)
    assert any("100 pixels" in n and "cannot be kept: max_pixels is 100" in n for n in report.notes) and report.written
    assert not any("pixels" in n for n in rescue(foreign(tmp_path / "plain")[1], base).notes)


def test_llama_factory_s_own_limit_is_told(tmp_path):
    base, run = foreign(tmp_path)
    (run / "trainer_log.jsonl").write_text('{"loss": 1.0}\n')
    assert any("--max-pixels 589824" in n for n in rescue(run, base).notes)
    (run / "training_args.yaml").write_text("image_max_pixels: 90000\n")
    assert any("90,000 pixels" in n for n in rescue(run, base).notes)


def test_a_plain_folder_of_peft_is_asked_as_its_own_files_say(tmp_path):
    base, run = foreign(tmp_path, preprocessor_config={"min_pixels": 3136, "max_pixels": 90000})
    few = grids(load_processor(base, max_pixels=90000))
    assert grids(adapter_processor(run)) == few == grids(Checkpoint.of(run).processor())
    assert grids(adapter_processor(run, max_pixels=200000)) == grids(load_processor(base, max_pixels=200000)) != few


def test_going_on_from_an_adapter_keeps_its_settings_or_says_why_not(tmp_path, capsys):
    base, _ = with_own_words(tmp_path, lambda t: t.add_tokens(["<lamp>"]))
    record = {"conversations": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "one"}]}
    (tmp_path / "d.json").write_text(json.dumps([record]))
    given = [
        "train",
        "--from-adapter",
        str(tmp_path / "adapter"),
        "--data",
        str(tmp_path / "d.json"),
        "--output",
        str(tmp_path / "run"),
        "--max-steps",
        "1",
    ]
    assert (
        main(given) == 2
        and "a tokenizer of its own (1 tokens" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )
    edit(base / "preprocessor_config.json", lambda v: v | {"image_mean": [0.1, 0.2, 0.3]})
    assert (
        main(given) == 2
        and "image_mean is [0.1, 0.2, 0.3]" in capsys.readouterr().err
        and not (tmp_path / "run").exists()
    )
