"""Loading from folders, from the hub's cache and from a hub, and everything that can be wrong with a checkpoint."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from families import tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from vlm_lora_lab.cli import main
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.files import convert_pickles, save_vlm, stored_in, weight_files
from vlm_lora_lab.models.load import check_nf4, lab_folder, load_tokenizer, load_vlm, model_folder
from vlm_lora_lab.models.minicpmv import MiniCPMV
from vlm_lora_lab.models.parts import linear_layers
from vlm_lora_lab.models.published import model_config, on_meta


FEW_WORDS = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2}  # fewer than the lab model's tokenizer has


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    tiny_model("minicpmv-2.6", **FEW_WORDS).bfloat16().save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not None}))


def rewrite(folder, change):
    "Change the tensors of the last shard."
    file = weight_files(folder)[-1]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file.name


def truncate(folder):
    file = weight_files(folder)[1]
    file.write_bytes(file.read_bytes()[:-1000])
    return file.name


def garbage(folder):
    file = weight_files(folder)[0]
    file.write_bytes(b"\xff" * 1000)
    return file.name


def lose_file(folder):
    file = weight_files(folder)[1]
    file.unlink()
    return f"is in {file.name}, but there is no such file"


def lose_tensor(folder):
    name = next(n for n, s in stored_in(folder).items() if s.file == weight_files(folder)[-1])
    rewrite(folder, lambda t: t.pop(name))
    return f"the index says that {name} is in"


def unexpected(folder):
    rewrite(folder, lambda t: t.update({"llm.extra": torch.zeros(2)}))
    return "1 tensors are not asked for by config.json, such as llm.extra"


def twice(folder):
    tensors = {k: v for f in weight_files(folder) for k, v in load_file(f).items()}
    for file in weight_files(folder):
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(
        {"llm.lm_head.weight": tensors["llm.lm_head.weight"]}, folder / "older.safetensors", metadata={"format": "pt"}
    )
    return "the tensor llm.lm_head.weight is in model.safetensors, too"


def no_index(folder):
    (folder / "model.safetensors.index.json").unlink()
    return f"{len(list(folder.glob('*.safetensors')))} files of weights and no model.safetensors.index.json"


def adapter_inside(folder):
    (folder / "adapter_config.json").write_text("{}")
    return "there is an adapter in the model's folder"


def impossible_size(folder):
    change_config(folder, num_attention_heads=0)
    return "configuration"


def integers(folder):
    name = next(iter(load_file(weight_files(folder)[-1])))
    rewrite(folder, lambda t: t.update({name: t[name].to(torch.int8)}))
    return f"{name} is stored as I8"


def wrong_shape(folder):
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    change_config(folder, vocab_size=rows + 80)
    return f"llm.model.embed_tokens.weight is {rows} × 64, but config.json asks for {rows + 80} × 64"


def other_version(folder):
    change_config(folder, version=4.5)
    return "weights of MiniCPM-V 2.6 beside a config.json of MiniCPM-V 4.5"


def unknown_version(folder):
    change_config(folder, version=3.3)
    return "version is 3.3"


def unknown_family(folder):
    change_config(folder, model_type="bert")
    return "model_type is 'bert'"


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "minicpmv",\n oops')
    return "line 2"


def broken_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    return "no weight_map from tensors to files"


def gptq(folder):
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    return "quantised with gptq"


def not_in_4_bit(folder):
    change_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    return "none of them is"


MISTAKES = [
    truncate,
    garbage,
    lose_file,
    lose_tensor,
    unexpected,
    twice,
    integers,
    wrong_shape,
    other_version,
    unknown_version,
    unknown_family,
    broken_config,
    broken_index,
    gptq,
    not_in_4_bit,
    no_index,
    adapter_inside,
    impossible_size,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.__name__)
def test_a_damaged_checkpoint_gets_one_sentence_that_names_file_and_tensor(folder, mistake):
    expected = mistake(folder)
    with pytest.raises(InputError) as error:
        load_vlm(folder)
    assert expected in str(error.value) and str(folder) in str(error.value)


def test_damage_is_found_before_any_training_starts(tmp_path, capsys):
    lab = Path(shutil.copytree(lab_folder(), tmp_path / "lab"))
    (lab / "model.safetensors").write_bytes((lab / "model.safetensors").read_bytes()[:-1000])
    data = Path(__file__).parent.parent / "data_samples" / "handwriting" / "train.json"
    assert main(["train", "--model", str(lab), "--data", str(data), "--output", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert (
        "model.safetensors: this file is truncated" in message
        and "Traceback" not in message
        and not (tmp_path / "out").exists()
    )


def test_a_tokenizer_of_another_model_is_refused(folder):
    for file in (f for f in lab_folder().iterdir() if "token" in f.name or "template" in f.name):
        shutil.copy(file, folder)
    with pytest.raises(InputError, match="the embedding has 320 rows, and the tokenizer can produce .*id 320"):
        load_tokenizer(folder)


def test_4_bit_takes_the_language_model_and_nothing_else(original):
    model = load_vlm(original, four_bit=True)
    assert sorted(check_nf4(model)) == sorted(linear_layers(model)["language"])
    assert {n for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)} == set(
        linear_layers(model)["language"]
    )
    wish = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    with pytest.raises(RuntimeError, match="vpm.encoder"):
        check_nf4(
            MiniCPMV.from_pretrained(
                original,
                config=model_config(json.loads((original / "config.json").read_text())),
                quantization_config=wish,
            )
        )


@pytest.mark.parametrize(
    "skip", [["out_proj", "kv_proj", "lm_head"], ["vpm", "resampler", "lm_head"]], ids=["openbmb", "parts"]
)
def test_a_published_int4_checkpoint_is_loaded_as_it_was_packed(original, tmp_path, skip):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=skip,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    config = model_config(json.loads((original / "config.json").read_text()))
    packed = MiniCPMV.from_pretrained(original, config=config, quantization_config=quantization, dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path / "int4")
    names = {n for n, m in packed.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert {n.removesuffix(".weight") for n, s in stored_in(tmp_path / "int4").items() if s.dtype == "NF4"} == names
    again = load_vlm(tmp_path / "int4", dtype=torch.bfloat16)
    assert {n for n, m in again.named_modules() if isinstance(m, bnb.nn.Linear4bit)} == names
    for name in names:  # bitsandbytes' own repacking for fast inference stumbles over matrices as small as these
        packed.get_submodule(name).support_avx512bf16_for_cpu = False
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, packed.eval()(input_ids=ids).logits)
    with pytest.raises(InputError, match="in 4 bit; its rounded weights"):
        save_vlm(again, tmp_path / "whole", tmp_path / "int4")


def test_a_packed_weight_without_its_scales_is_named(original, tmp_path):
    config = model_config(json.loads((original / "config.json").read_text()))
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["vpm", "resampler", "lm_head"],
    )
    MiniCPMV.from_pretrained(original, config=config, quantization_config=quantization).save_pretrained(
        tmp_path / "int4"
    )
    rewrite(tmp_path / "int4", lambda t: t.pop("llm.model.layers.0.mlp.up_proj.weight.absmax"))
    with pytest.raises(InputError, match="llm.model.layers.0.mlp.up_proj.weight is in 4 bit, but absmax is missing"):
        load_vlm(tmp_path / "int4")


@pytest.fixture
def pickled(original, tmp_path):
    "A checkpoint as Qwen-VL publishes it: pickles and an index of them."
    folder, state = tmp_path / "pickled", {k: v for f in weight_files(original) for k, v in load_file(f).items()}
    folder.mkdir()
    shutil.copy(original / "config.json", folder)
    halves = [dict(list(state.items())[i::2]) for i in (0, 1)]
    names = [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in (0, 1)]
    for half, name in zip(halves, names):
        torch.save(half, folder / name)
    index = {"weight_map": {k: name for half, name in zip(halves, names) for k in half}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder, state


def test_pickles_are_opened_only_when_allowed_and_only_once(pickled):
    folder, state = pickled
    with pytest.raises(InputError, match="allow-pickle"):
        load_vlm(folder)
    assert not list(folder.glob("*.safetensors"))
    model = load_vlm(folder, allow_pickle=True, dtype="stored")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    for bin_ in folder.glob("*.bin"):
        bin_.write_bytes(b"must not be read again")
    load_vlm(folder)
    assert all(f.stat().st_mtime_ns == t for f, t in before.items() if f.suffix != ".bin")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_with_a_program_is_refused_and_leaves_nothing(pickled, tmp_path):
    folder, state = pickled
    torch.save(
        {"llm.lm_head.weight": state["llm.lm_head.weight"], "x": Evil(tmp_path / "ran")},
        folder / "pytorch_model-00002-of-00002.bin",
    )
    with pytest.raises(InputError, match="pytorch_model-00002-of-00002.bin: this pickle holds more than tensors"):
        load_vlm(folder, allow_pickle=True)
    assert not (tmp_path / "ran").exists() and not list(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    "content, message",
    [(b"", "truncated or damaged|more than tensors"), (b"PK\x03\x04 broken", "truncated or damaged|more than tensors")],
)
def test_damaged_pickles(pickled, content, message):
    folder, _ = pickled
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(content)
    with pytest.raises(InputError, match=message):
        convert_pickles(folder)
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(InputError, match="there is no such file"):
        convert_pickles(folder)


@pytest.mark.parametrize(
    "field, value",
    [
        ("hidden_size", -1),
        ("num_attention_heads", 0),
        ("torch_dtype", "bf16"),
        ("model_type", ["x"]),
        ("vision_config", 3),
        ("query_num", 2.5),
        ("quantization_config", "none"),
        ("vocab_size", None),
        ("rope_theta", "big"),
    ],
)
def test_strange_values_in_a_configuration_never_show_a_traceback(folder, field, value, capsys):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    status = main(["parts", str(folder)])
    shown = capsys.readouterr()
    assert status in (0, 2) and "Traceback" not in shown.err and (status == 0 or str(folder) in shown.err)


def test_types_and_devices(original):
    for dtype in ("bfloat16", torch.float16, "stored"):
        model = load_vlm(original, dtype=dtype, four_bit=True)
        assert torch.isfinite(model(input_ids=torch.arange(3, 20)[None]).logits).all()
        assert all(p.dtype == torch.uint8 for p in model.parameters() if hasattr(p, "quant_state"))
    assert load_vlm(original, device="cpu:0").dtype == torch.float32
    for wrong in (dict(dtype="int8"), dict(dtype="nonsense"), dict(device="gpu7"), dict(device="cuda:99")):
        with pytest.raises(InputError, match="dtype is|cannot be used"):
            load_vlm(original, **wrong)


def test_a_tied_head_comes_back(tmp_path):
    from families import tiny_config

    config = tiny_config("minicpmv-2.6")
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = MiniCPMV(config)
    model.save_pretrained(tmp_path / "tied")  # transformers leaves the head out
    again = load_vlm(tmp_path / "tied")
    assert again.llm.lm_head.weight is again.llm.model.embed_tokens.weight
    save_vlm(again, tmp_path / "again", tmp_path / "tied")
    load_vlm(tmp_path / "again")


def test_a_conversion_that_is_killed_can_be_done_again(pickled):
    folder, _ = pickled
    code = (
        "import os, sys, pathlib; from vlm_lora_lab.models import files\n"
        "save = files.save_file\n"
        "def once(*a, **k):\n    save(*a, **k); os._exit(9)\n"
        "files.save_file = once\n"
        "files.convert_pickles(pathlib.Path(sys.argv[1]))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == 9
    assert not list(folder.glob("*.safetensors"))
    load_vlm(folder, allow_pickle=True)


def test_generation_settings_of_the_checkpoint_are_heard(folder):
    (folder / "generation_config.json").write_text(
        json.dumps({"max_new_tokens": 3, "do_sample": False, "eos_token_id": None})
    )
    answer = load_vlm(folder).generate(input_ids=torch.arange(3, 20)[None])
    assert answer.shape[1] <= 3


def test_names_that_are_no_model(tmp_path):
    for name in ("labb", "a/b/c", str(tmp_path / "nowhere"), "x" * 5000, "y" * 300 + "/z"):
        with pytest.raises(InputError, match="there is no model"):
            model_folder(name)
    with pytest.raises(InputError, match="no config.json"):
        model_folder(tmp_path)
    with pytest.raises(InputError, match="Did you mean openbmb/MiniCPM-V-2_6"):
        on_meta("openbmb/MiniCPM-V-26")
    with pytest.raises(InputError, match="has no eyes"):
        model_config({"model_type": "qwen", "hidden_size": 64})


RUN = (
    "import sys; from vlm_lora_lab.models.load import load_vlm; from vlm_lora_lab.errors import InputError\n"
    "try: print(sum(p.numel() for p in load_vlm('owner/tiny').parameters()))\n"
    "except InputError as e: sys.exit(str(e))"
)


def in_a_process(environment, tmp_path):
    import os

    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", RUN], env=clean | environment, capture_output=True, text=True, timeout=120
    )


def test_offline_and_not_in_the_cache_is_one_sentence(tmp_path):
    done = in_a_process({"HF_HUB_OFFLINE": "1"}, tmp_path)
    assert (
        done.returncode == 1
        and "owner/tiny is not on this machine and could not be fetched" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_hub_is_asked_for_weights_and_configuration_and_never_for_code(original, tmp_path):
    "A real server that speaks the hub's protocol; then the same model offline, from the cache."
    commit, asked = "0" * 40, []
    files = {f.name: f.read_bytes() for f in original.iterdir()} | {
        "modeling_minicpmv.py": b"raise SystemExit",
        "weights.bin": b"\0" * 10,
    }

    class Hub(BaseHTTPRequestHandler):
        def answer(self, body=True):
            path = self.path.split("?")[0]
            asked.append(path)
            if "/resolve/" in path and (content := files.get(path.rpartition("/")[2])) is not None:
                self.send_response(200)
                self.send_header("X-Repo-Commit", commit)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            elif path.startswith("/api/models/owner/tiny"):
                if "/tree/" in path:
                    listed = [
                        {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                        for n, c in files.items()
                    ]
                else:
                    listed = {
                        "id": "owner/tiny",
                        "modelId": "owner/tiny",
                        "sha": commit,
                        "siblings": [{"rfilename": n} for n in files],
                        "tags": [],
                    }
                content = json.dumps(listed).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
            else:
                content = b""
                self.send_response(404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        do_GET = answer

        def do_HEAD(self):
            self.answer(body=False)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        done = in_a_process(
            {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "NO_PROXY": "127.0.0.1"}, tmp_path
        )
    finally:
        server.shutdown()
    expected = str(sum(p.numel() for p in tiny_model("minicpmv-2.6", **FEW_WORDS).parameters()))
    assert done.returncode == 0 and done.stdout.split()[-1] == expected, done.stderr[-2000:]
    fetched = {p.rpartition("/")[2] for p in asked if "/resolve/" in p}
    assert "config.json" in fetched and not any(f.endswith((".py", ".bin")) for f in fetched)
    again = in_a_process({"HF_HUB_OFFLINE": "1"}, tmp_path)
    assert again.returncode == 0 and again.stdout.split()[-1] == expected


def test_the_parts_command_needs_neither_weights_nor_a_network(capsys):
    assert main(["parts", "openbmb/MiniCPM-V-2_6"]) == 0
    shown = capsys.readouterr().out
    assert "8,099,175,152" in shown and "resampler" in shown and "q_proj 3584→3584 ×28" in shown
    assert main(["parts", "openbmb/minicpm-v-9"]) == 2
    assert "Did you mean" in capsys.readouterr().err
    assert main(["parts", str(lab_folder())]) == 0 and "1,996,288" in capsys.readouterr().out
    assert main(["parts"]) == 0 and "Qwen/Qwen-VL " in capsys.readouterr().out


def test_saving_refuses_what_it_would_lose(original, tmp_path):
    model = load_vlm(original, dtype="stored")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        save_vlm(model, tmp_path / "used", original)
    small = save_vlm(model, tmp_path / "f32", original, dtype=torch.float32)
    with safe_open(weight_files(small)[0], "pt") as f:
        assert all(f.get_slice(n).get_dtype() == "F32" for n in f.keys())
    values = json.loads((small / "config.json").read_text())
    assert values.get("dtype", values.get("torch_dtype")) == "float32"


def test_a_stand_in_takes_the_place_of_a_name_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vlm_lora_lab.models.load._said", set())
    monkeypatch.setenv("VLM_LORA_LAB_STAND_IN", f"some/model={lab_folder()}{os.pathsep}other/model={tmp_path}")
    assert model_folder("some/model") == lab_folder() and model_folder("some/model", weights=False) == lab_folder()
    said = capsys.readouterr().err
    assert (
        said.count("VLM_LORA_LAB_STAND_IN is set: some/model is not the model of that name") == 1
        and str(lab_folder()) in said
    )
    assert load_vlm("some/model").config.model_type == "minicpmv"
    with pytest.raises(InputError, match="no config.json"):  # a stand-in is looked at as any folder is
        model_folder("other/model")
    for bad in ("some/model", "some/model=", f"some/model={tmp_path / 'nowhere'}"):
        monkeypatch.setenv("VLM_LORA_LAB_STAND_IN", bad)
        with pytest.raises(InputError, match="puts no folder in place of a model"):
            model_folder("some/model")
