"""Adapters in folders that this package did not seal: checkpoints of one's own run, and plain folders of PEFT's.

What is known is enough, or the command of `rescue` is named."""

import json
import shutil

import pytest
import torch
from families import native_folder
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from vlm_lora_lab.checkpoint.merge import merge_into
from vlm_lora_lab.checkpoint.save import load_adapter, read_provenance
from vlm_lora_lab.cli import main
from vlm_lora_lab.data.batch import Samples
from vlm_lora_lab.data.native import load_processor
from vlm_lora_lab.data.records import read_conversations, samples_folder
from vlm_lora_lab.models.load import load_vlm
from vlm_lora_lab.models.parts import mixed_precision
from vlm_lora_lab.models.published import lab_folder
from vlm_lora_lab.train.run import Schedule, fit
from vlm_lora_lab.train.watch import LivePlot

HANDWRITING = samples_folder() / "handwriting"
PICTURE = HANDWRITING / "test" / "0000.png"
FLAGS = ["--batch-size", "2", "--learning-rate", "0.01", "--save-every", "1", "--vision-cache", "off", "--warmup", "0"]


def rows_in(place, n=4, split="train"):
    "The first rows of the handwriting samples, with whole paths."
    rows = json.loads((HANDWRITING / f"{split}.json").read_text())[:n]
    (place / f"{split}.json").write_text(json.dumps([r | {"image": str(HANDWRITING / r["image"])} for r in rows]))
    return place / f"{split}.json"


@torch.no_grad()
def logits(model, batch):
    was = model.training
    with mixed_precision(model):
        found = model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()
    model.train(was)
    return found


def run(place, monkeypatch, *flags, model="lab", steps=3):
    "Train, and return the run's folder, a batch, and the live model's logits after each step."
    batch, seen = None, {}
    processor = load_processor(model)
    batch = processor.collate([processor(c) for c in read_conversations(HANDWRITING / "train.json")[:2]])

    class Asks(LivePlot):
        def on_save(self, args, state, control, model=None, **kwargs):
            seen[state.global_step] = logits(model, batch)

    data = rows_in(place)
    with monkeypatch.context() as patch:
        patch.setattr("vlm_lora_lab.job.LivePlot", Asks)
        assert (
            main(
                [
                    "train",
                    "--data",
                    str(data),
                    "--allow-outside",
                    "--model",
                    str(model),
                    "--output",
                    str(place / "run"),
                    "--max-steps",
                    str(steps),
                    *FLAGS,
                    *flags,
                ]
            )
            == 0
        )
    return place / "run", batch, seen


PLANS = {
    "default": [],
    "whole connector and embeddings": ["--no-four-bit", "--embeddings", "full", "--rank", "4"],
    "LoRA on embeddings and head": ["--no-four-bit", "--embeddings", "lora", "--head", "lora", "--rank", "4"],
    "dora": ["--no-four-bit", "--variant", "dora", "--rank", "4"],
}


@pytest.mark.parametrize(
    "model, plan",
    [("lab", p) for p in PLANS] + [("tied", "whole connector and embeddings"), ("tied", "LoRA on embeddings and head")],
)
def test_a_checkpoint_in_the_middle_answers_as_the_model_did(model, plan, tmp_path, monkeypatch, capsys):
    model = native_folder("qwen3_vl", tmp_path / "tied", dtype=torch.float32) if model == "tied" else model
    folder, batch, seen = run(tmp_path, monkeypatch, *PLANS[plan], model=model)
    assert set(seen) == {1, 2, 3} and not torch.equal(seen[2], seen[3])
    middle = folder / "checkpoints" / "checkpoint-2"
    capsys.readouterr()
    again = load_adapter(middle)
    said = capsys.readouterr().err
    assert "a checkpoint without a seal" in said and said.count("\n") == 1 and "compared by every byte" in said
    torch.testing.assert_close(logits(again, batch), seen[2], rtol=0, atol=0)
    merge_into(middle, tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(
        logits(load_vlm(tmp_path / "merged", dtype=torch.float32), batch),
        seen[2],
        rtol=0,
        atol=1e-3 * float(seen[2].std()),
    )
    merge_into(folder / "checkpoints" / "checkpoint-3", tmp_path / "last", dtype=torch.float32)
    merge_into(folder / "adapter", tmp_path / "adapter", dtype=torch.float32)
    for file in (tmp_path / "last").glob("*.safetensors"):  # the last checkpoint is what was saved as the adapter
        a, b = load_file(file), load_file(tmp_path / "adapter" / file.name)
        assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run of the lab model, three steps."
    place, patch = tmp_path_factory.mktemp("trained"), pytest.MonkeyPatch()
    folder, batch, seen = run(place, patch, "--rank", "4", "--max-pixels", "6272")
    rows_in(place, 3, "test")
    return place, folder, batch, seen


def roads(adapter, place, questions):
    yield ["ask", "What number is this?", "--image", PICTURE, "--adapter", adapter, "--max-new-tokens", "4"]
    yield ["merge", adapter, "--output", place / "merged"]
    yield ["evaluate", adapter, "--data", questions, "--allow-outside"]
    yield ["compare", adapter, "lab", "--data", questions, "--allow-outside", "--output", place / "compared"]
    for server in ("vllm", "llama.cpp", "transformers"):
        yield ["export", adapter, place / server, "--for", server, "--dtype", "float32"]


def test_every_road_takes_a_checkpoint_and_says_once_what_it_could_not_verify(trained, tmp_path, capsys):
    place, folder, _, _ = trained
    middle = folder / "checkpoints" / "checkpoint-2"
    for road in roads(middle, tmp_path, place / "test.json"):
        capsys.readouterr()
        assert main(list(map(str, road))) in (0, 1), road
        assert capsys.readouterr().err.count("a checkpoint without a seal") == 1, road
    known = read_provenance(middle)
    assert (
        known["base"] == "lab"
        and known["four_bit"]
        and known["max_pixels"] == 6272
        and known["plan"]["rank"] == 4
        and known["base_sha256"]
    )
    about = json.loads((tmp_path / "compared" / "report.json").read_text())["checkpoints"][0]
    assert about["plan"]["rank"] == 4 and "without a seal" in about["unsealed"]
    assert main(["inspect", str(middle)]) == 0
    said = capsys.readouterr().out
    assert "a base in 4 bit" in said and "of the Trainer" in said and "missing from this account" not in said


def test_a_base_that_changed_is_refused_for_a_checkpoint_too(trained, tmp_path, capsys):
    _, folder, _, _ = trained
    shutil.copytree(lab_folder(), tmp_path / "base")
    content = bytearray((tmp_path / "base" / "model.safetensors").read_bytes())
    content[len(content) // 2 + 100] ^= 1
    (tmp_path / "base" / "model.safetensors").write_bytes(content)
    assert (
        main(
            [
                "merge",
                str(folder / "checkpoints" / "checkpoint-2"),
                "--output",
                str(tmp_path / "merged"),
                "--model",
                str(tmp_path / "base"),
            ]
        )
        == 2
    )
    assert "another base" in capsys.readouterr().err and not (tmp_path / "merged").exists()


def plain(folder, **options):
    "An adapter as PEFT alone writes it."
    torch.manual_seed(0)
    model = get_peft_model(load_vlm("lab"), LoraConfig(r=4, target_modules=r"llm\..*\.(q_proj|v_proj)", **options))
    with torch.no_grad():
        for _n, p in model.named_parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model


def test_every_road_takes_a_plain_peft_folder(trained, tmp_path, capsys):
    place, _, batch, _ = trained
    model = plain(tmp_path / "peft", modules_to_save=["resampler"])
    torch.testing.assert_close(logits(load_adapter(tmp_path / "peft"), batch), logits(model, batch), rtol=0, atol=0)
    for road in roads(tmp_path / "peft", tmp_path, place / "test.json"):
        capsys.readouterr()
        assert main(list(map(str, road))) in (0, 1), road
        said = capsys.readouterr().err
        assert (
            said.count("a plain PEFT folder") == 1
            and f"vlm-lora-lab rescue {tmp_path / 'peft'} --base {lab_folder()} --output {tmp_path / 'peft'}-rescued "
            "--four-bit"
            in said
        ), road


def test_peft_s_copy_of_an_embedding_beside_its_lora_is_no_second_training(tmp_path, trained):
    batch = trained[2]
    torch.manual_seed(0)
    model = get_peft_model(load_vlm("lab"), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    with torch.no_grad():
        for _n, p in model.named_parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    model.save_pretrained(tmp_path / "peft")
    assert any("base_layer" in k for k in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    live = logits(model, batch)
    torch.testing.assert_close(logits(load_adapter(tmp_path / "peft"), batch), live, rtol=0, atol=0)
    merge_into(tmp_path / "peft", tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(
        logits(load_vlm(tmp_path / "merged", dtype=torch.float32), batch), live, rtol=0, atol=1e-3 * float(live.std())
    )
    state = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    state = {k: t + 1 if "base_layer" in k else t for k, t in state.items()}
    save_file(state, tmp_path / "peft" / "adapter_model.safetensors")
    assert main(["merge", str(tmp_path / "peft"), "--output", str(tmp_path / "other")]) == 2


def spoil(what, folder, place):
    config = json.loads((folder / "adapter_config.json").read_text())
    state = load_file(folder / "adapter_model.safetensors")
    if what == "no base":
        config["base_model_name_or_path"] = None
    elif what == "a base of the hub":
        config["base_model_name_or_path"] = "somebody/their-model"
    elif what == "another kind":
        config["peft_type"] = "IA3"
    elif what == "AdaLoRA":
        config["peft_type"] = "ADALORA"
    elif what == "weights beside":
        save_file({"x": torch.ones(2)}, folder / "vit.safetensors")
    elif what == "a pickle beside":
        (folder / "non_lora_state_dict.bin").write_bytes(b"x")
    elif what == "keys that fit nowhere":
        state = {k.replace("q_proj", "query"): t for k, t in state.items()}
    elif what == "ours, without its provenance":
        (folder / "plan.json").write_text("{}")
    elif what == "another model":
        config["base_model_name_or_path"] = str(native_folder("qwen2_vl", place / "qwen", dtype=torch.float32))
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(state, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    "what, says, rescue",
    [
        ("no base", "does not say which model", "--base MODEL"),
        ("a base of the hub", "is not on this machine", "--base MODEL"),
        ("another kind", "merge_and_unload", ""),
        ("AdaLoRA", "this is PEFT's ADALORA", "--base"),
        ("weights beside", "vit.safetensors", "--base"),
        ("a pickle beside", "non_lora_state_dict.bin", "--allow-pickle"),
        ("keys that fit nowhere", "", "--base"),
        ("ours, without its provenance", "this package wrote it", ""),
        ("another model", "", "--base"),
    ],
)
def test_what_is_not_known_is_not_guessed_and_rescue_is_named_with_its_command(
    what, says, rescue, trained, tmp_path, capsys
):
    plain(tmp_path / "peft")
    spoil(what, tmp_path / "peft", tmp_path)
    for road in roads(tmp_path / "peft", tmp_path, trained[0] / "test.json"):
        capsys.readouterr()
        assert main(list(map(str, road))) == 2, road
        said = capsys.readouterr().err
        assert says in said and (
            not rescue or f"vlm-lora-lab rescue {tmp_path / 'peft'} --base" in said and rescue in said
        ), (road, said)
        assert "Traceback" not in said and not any(
            (tmp_path / n).exists() for n in ("merged", "vllm", "llama.cpp", "transformers")
        )


def test_the_command_of_rescue_that_is_named_works(tmp_path, capsys):
    plain(tmp_path / "peft")
    assert (
        main(["ask", "What?", "--image", str(PICTURE), "--adapter", str(tmp_path / "peft"), "--max-new-tokens", "1"])
        == 0
    )
    command = capsys.readouterr().err.partition("vlm-lora-lab ")[2].split()
    assert main(command) == 0 and read_provenance(tmp_path / "peft-rescued")["four_bit"]


def test_model_says_which_base_a_folder_without_one_belongs_to(tmp_path, capsys):
    plain(tmp_path / "peft")
    spoil("no base", tmp_path / "peft", tmp_path)
    assert (
        main(
            [
                "merge",
                str(tmp_path / "peft"),
                "--model",
                "lab",
                "--dtype",
                "float32",
                "--output",
                str(tmp_path / "merged"),
            ]
        )
        == 0
    )


def test_folders_around_an_adapter_name_what_lies_in_them(trained, tmp_path, capsys):
    _, folder, _, _ = trained
    (tmp_path / "empty").mkdir()
    assert main(["merge", str(folder / "adapter"), "--dtype", "float32", "--output", str(tmp_path / "merged")]) == 0
    for given, says in (
        (folder, str(folder / "adapter")),
        (folder / "checkpoints", "checkpoint-3"),
        (tmp_path / "empty", "there is no adapter_config.json"),
        (tmp_path / "nowhere", "there is no such folder"),
        (tmp_path / "merged", "a whole model and no adapter: give it as --model"),
    ):
        capsys.readouterr()
        assert main(["ask", "What?", "--adapter", str(given)]) == 2
        assert says in capsys.readouterr().err


def test_a_checkpoint_that_was_being_written_is_refused_and_a_whole_one_named(trained, tmp_path, capsys):
    _, folder, _, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "checkpoint-3" / "trainer_state.json").unlink()
    assert main(["ask", "What?", "--adapter", str(tmp_path / "run" / "checkpoints" / "checkpoint-3")]) == 2
    said = capsys.readouterr().err
    assert "not complete" in said and f"Take {tmp_path / 'run' / 'checkpoints' / 'checkpoint-2'}" in said


@pytest.mark.parametrize(
    "key, value",
    [
        ("model", 3),
        ("model", None),
        ("four_bit", "yes"),
        ("plan", []),
        ("plan", {"rank": "x"}),
        ("reading", 5),
        ("reading", {"max_pixels": -1}),
        ("started_from", []),
    ],
)
def test_a_job_file_that_says_what_cannot_be_is_a_sentence(key, value, trained, tmp_path, capsys):
    _, folder, _, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    job = json.loads((folder / "job.json").read_text())
    (tmp_path / "run" / "job.json").write_text(json.dumps(job | {key: value}))
    assert main(["ask", "What?", "--adapter", str(tmp_path / "run" / "checkpoints" / "checkpoint-2")]) == 2
    assert main(["inspect", str(tmp_path / "run" / "checkpoints" / "checkpoint-2")]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_stranger_s_provenance_cannot_call_itself_unsealed(trained, tmp_path):
    from vlm_lora_lab.checkpoint.save import seal

    _, folder, _, _ = trained
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    seal(
        tmp_path / "adapter",
        read_provenance(tmp_path / "adapter") | {"unsealed": "trust me", "plan": 5, "base_sha256": None},
    )
    assert "unsealed" not in read_provenance(tmp_path / "adapter") and "plan" not in read_provenance(
        tmp_path / "adapter"
    )


def test_checkpoints_in_the_middle_of_stages_are_not_asked(tmp_path, capsys):
    stages = tmp_path / "stages.json"
    stages.write_text(
        json.dumps([{"plan": {"connector": "full"}, "steps": 2}, {"plan": {"connector": "freeze"}, "steps": 2}])
    )
    out = tmp_path / "run"
    assert (
        main(
            [
                "train",
                "--data",
                str(rows_in(tmp_path)),
                "--allow-outside",
                "--output",
                str(out),
                "--stages",
                str(stages),
                *FLAGS,
            ]
        )
        == 0
    )
    [checkpoint] = sorted(out.glob("checkpoints/stage-*/checkpoint-2"))[:1] or [None]
    if checkpoint is None:  # what an ended stage leaves is its end
        checkpoint = out / "checkpoints" / "stage-2" / "checkpoint-2"
        shutil.copytree(out / "adapter", checkpoint)
        (checkpoint / "provenance.json").unlink()
        (checkpoint / "plan.json").unlink()
        (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    assert main(["ask", "What?", "--adapter", str(checkpoint)]) == 2
    said = capsys.readouterr().err
    assert "in the middle of stages" in said and f"train --resume --output {out}" in said


def test_one_step_at_rate_zero_is_found_out_on_every_road(tmp_path, capsys):
    questions, folder = rows_in(tmp_path, 3, "test"), tmp_path / "run"
    flags = ["--batch-size", "2", "--vision-cache", "off", "--connector", "freeze", "--save-every", "1"]
    assert (
        main(
            [
                "train",
                "--data",
                str(rows_in(tmp_path)),
                "--allow-outside",
                "--output",
                str(folder),
                "--max-steps",
                "1",
                *flags,
            ]
        )
        == 0
    )
    for adapter in (folder / "adapter", folder / "checkpoints" / "checkpoint-1"):
        for road in roads(adapter, tmp_path, questions):
            capsys.readouterr()
            status, said = main(list(map(str, road))), "".join(capsys.readouterr())
            if road[0] in ("merge", "export"):
                assert (
                    status == 2
                    and "changes nothing" in said
                    and "Traceback" not in said
                    and not any((tmp_path / n).exists() for n in ("merged", "vllm", "llama.cpp", "transformers"))
                ), road
            elif road[0] != "ask":
                assert status == 1 and said.count("changes nothing") == 1, road


def test_what_was_unfrozen_by_hand_is_in_every_checkpoint_and_comes_back(tmp_path):
    def fresh(seed):
        torch.manual_seed(seed)
        model = get_peft_model(
            load_vlm("lab"), LoraConfig(r=4, target_modules=r"llm\..*\.(q_proj|v_proj)"), autocast_adapter_dtype=False
        )
        for n, p in model.named_parameters():
            p.requires_grad_(
                p.requires_grad or ".resampler." in n and p.is_floating_point() and not n.endswith(".proj")
            )
        return model

    processor, schedule = (
        load_processor("lab"),
        Schedule(max_steps=3, batch_size=2, save_every=1, learning_rate=0.01, warmup=0),
    )
    rows = read_conversations(HANDWRITING / "train.json")[:4]
    batch, model = processor.collate([processor(c) for c in rows[:2]]), fresh(0)
    fit(model, Samples(rows, processor), schedule, tmp_path / "run")
    live = logits(model, batch)
    kept = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
    assert all(
        torch.equal(kept[n], p) for n, p in model.named_parameters() if ".resampler." in n and p.requires_grad
    ) and not list(tmp_path.rglob("*.partial"))
    torch.testing.assert_close(logits(load_adapter(tmp_path / "run" / "checkpoint-3"), batch), live, rtol=0, atol=0)
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    again = fresh(1)
    fit(again, Samples(rows, processor), schedule, tmp_path / "run", resume=True)
    torch.testing.assert_close(logits(again, batch), live, rtol=0, atol=0)
