"""Merging tensor by tensor gives PEFT's bits for every family and variant, and leaves nothing half."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from families import FAMILIES, batch_of, tiny_model
from safetensors.torch import load_file, save_file
from standins import noise_checkpoint

from vlm_lora_lab.checkpoint import merge
from vlm_lora_lab.checkpoint.merge import (
    CHUNK,
    Reader,
    merge_adapter,
    merge_into,
    merge_memory,
    save_merged,
)
from vlm_lora_lab.checkpoint.save import load_adapter, read_provenance, save_adapter, seal
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.files import INDEX, stored_in, weight_files
from vlm_lora_lab.models.load import lab_folder, load_tokenizer, load_vlm
from vlm_lora_lab.models.published import on_meta
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan

warnings.filterwarnings("ignore", message="Model (with|has) `tie_word_embeddings")
BY_LAYER = "lora(rank=2) on 0, lora(alpha=7) on 1"
PLANS = {
    "default": (TuningPlan(rank=4), True),
    "everything": (TuningPlan(vision="lora", connector="full", embeddings="lora", rank=4), False),
    "dora": (TuningPlan(variant="dora", language=BY_LAYER, rank=4), True),
    "rslora": (TuningPlan(variant="rslora", language=BY_LAYER, rank=4), False),
    "pissa": (TuningPlan(variant="pissa", language=BY_LAYER, rank=4), False),
    "full layers": (TuningPlan(language="lora on 0, full on 1", embeddings="full", rank=4), False),
}


def rounded(base):
    model = load_vlm(base, four_bit=True, dtype=torch.float32).dequantize(torch.float32)
    model.is_loaded_in_4bit = False
    return model


def made(base, folder, plan, four_bit, seed=0):
    "An adapter whose every trained tensor is off its start, and the model that it was saved from."
    torch.manual_seed(seed)
    model = apply_plan(load_vlm(base, four_bit=four_bit), plan)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    return model.eval(), save_adapter(model, folder, plan, base, load_tokenizer("lab"), four_bit)


def tensors(folder):
    reader = Reader(*weight_files(folder))
    return {n: reader.whole(n) for n in reader.places}


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A Q-LoRA adapter of the lab model."
    return made("lab", tmp_path_factory.mktemp("lab") / "adapter", TuningPlan(), True)[1]


# Each family meets one plan, each plan several families; all 120 pairs hold, and take minutes.
PAIRS = [(f, list(PLANS)[i % len(PLANS)]) for i, f in enumerate(FAMILIES)] + [
    (f, p) for f in ("minicpmv-2.6", "qwen", "gemma3") for p in PLANS
]


@pytest.mark.parametrize("family, name", sorted(set(PAIRS)), ids=["-".join(p) for p in sorted(set(PAIRS))])
def test_merged_is_peft_s_merge_to_the_bit_and_the_trained_model(family, name, tmp_path):
    plan, four_bit = PLANS[name]
    base = tmp_path / "base"
    tiny_model(family).bfloat16().save_pretrained(base, max_shard_size="300KB")
    model, adapter = made(base, tmp_path / "adapter", plan, four_bit)
    merged = merge_adapter(adapter)
    theirs = (
        load_adapter(adapter, model=rounded(base) if four_bit else load_vlm(base, dtype=torch.float32))
        .merge_and_unload(safe_merge=True)
        .state_dict()
    )
    ours = merged.state_dict()
    tied = getattr(on_meta(base), "all_tied_weights_keys", None) or {}
    # it writes into the memory that head and embeddings share
    wrong_in_peft = set(tied) if plan.embeddings == "lora" else set()
    assert set(ours) == set(theirs)
    assert {n for n in ours if not torch.equal(ours[n], theirs[n])} == wrong_in_peft
    batch = batch_of(family, model)
    want = logits(model, batch)
    assert ((logits(merged, batch) - want).abs().max() / want.std()).item() < 1e-4


def test_rows_give_the_same_up_to_the_last_rounding(lab, tmp_path, monkeypatch):
    plan = TuningPlan(variant="dora", language="lora", head="lora", vision="lora", connector="full", rank=4)
    for i, (adapter, _four_bit) in enumerate(
        [
            (lab, True),
            (made("lab", tmp_path / "dora", plan, True)[1], True),
            (made("lab", tmp_path / "words", TuningPlan(embeddings="lora"), False)[1], False),
        ]
    ):
        whole = tensors(merge_into(adapter, tmp_path / f"whole{i}", dtype=torch.float32).folder)
        monkeypatch.setattr(merge, "CHUNK", 20_000)
        cut = tensors(merge_into(adapter, tmp_path / f"cut{i}", dtype=torch.float32).folder)
        monkeypatch.setattr(merge, "CHUNK", CHUNK)
        assert whole.keys() == cut.keys()
        for n in whole:  # a matrix product sums in another order when it has other rows
            torch.testing.assert_close(cut[n], whole[n], rtol=0, atol=2e-7 * whole[n].abs().max().item())


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
@pytest.mark.parametrize("word", ["lora", "full"])
def test_a_tied_head_is_what_it_was_in_training(family, word, tmp_path):
    "LoRA on the embeddings leaves the head what it was; trained in full, the two stay one tensor."
    base, plan = tmp_path / "base", TuningPlan(connector="freeze", embeddings=word, rank=4)
    tiny_model(family).bfloat16().save_pretrained(base)
    before, config = tensors(base), json.loads((base / "config.json").read_text())
    assert on_meta(base).all_tied_weights_keys
    model, adapter = made(base, tmp_path / "adapter", plan, False)
    done = merge_into(adapter, tmp_path / "merged", dtype=torch.float32)
    after, model_again = tensors(done.folder), load_vlm(done.folder, dtype=torch.float32)
    embeddings = next(n for n in before if "embed_tokens" in n)
    assert done.apart == (word == "lora") and not torch.equal(after[embeddings], before[embeddings].float())
    if word == "lora":
        [head] = set(after) - set(before)
        assert torch.equal(after[head], before[embeddings].float())
    else:
        assert (
            set(after) == set(before)
            and model_again.get_output_embeddings().weight is model_again.get_input_embeddings().weight
        )
    assert config.get("tie_word_embeddings", True) and json.loads((done.folder / "config.json").read_text()).get(
        "tie_word_embeddings", True
    ) == (word == "full")
    batch = batch_of(family, model)
    torch.testing.assert_close(
        logits(model_again, batch), logits(model, batch), rtol=0, atol=1e-4 * logits(model, batch).std().item()
    )
    again = save_merged(model_again, tmp_path / "again", base)  # the whole-model way knows it, too
    torch.testing.assert_close(logits(load_vlm(again), batch), logits(model_again, batch), rtol=0, atol=0)


def test_a_tied_base_that_stores_its_head_as_well_gets_both(tmp_path):
    base, plan = tmp_path / "base", TuningPlan(connector="freeze", embeddings="full", rank=4)
    tiny_model("gemma3").save_pretrained(base)
    stored = load_file(base / "model.safetensors")
    embeddings = next(n for n in stored if "embed_tokens" in n)
    save_file(
        stored | {"lm_head.weight": stored[embeddings].clone()}, base / "model.safetensors", metadata={"format": "pt"}
    )
    model, adapter = made(base, tmp_path / "adapter", plan, False)
    done = merge_into(adapter, tmp_path / "merged", dtype=torch.float32)
    after = tensors(done.folder)
    assert torch.equal(after["lm_head.weight"], after[embeddings]) and not torch.equal(
        after[embeddings], stored[embeddings]
    )
    batch = batch_of("gemma3", model)
    want = logits(model, batch)
    torch.testing.assert_close(
        logits(load_vlm(done.folder, dtype=torch.float32), batch), want, rtol=0, atol=1e-4 * want.std().item()
    )


def test_tied_embeddings_unfrozen_by_hand_stay_one_tensor(tmp_path):
    base = tmp_path / "base"
    tiny_model("gemma3").save_pretrained(base)
    model = apply_plan(load_vlm(base, dtype=torch.float32), TuningPlan(connector="freeze", rank=4))
    weight = model.get_base_model().get_input_embeddings().weight.requires_grad_(True)
    with torch.no_grad():
        weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    adapter = save_adapter(model, tmp_path / "adapter", None, base, load_tokenizer("lab"), False)
    done = merge_into(adapter, tmp_path / "merged", dtype=torch.float32)
    batch = batch_of("gemma3", model)
    want = logits(model, batch)
    assert not done.apart
    torch.testing.assert_close(
        logits(load_vlm(done.folder, dtype=torch.float32), batch), want, rtol=0, atol=1e-4 * want.std().item()
    )


def test_a_head_trained_alone_leaves_tied_embeddings_alone(tmp_path):
    base = tmp_path / "base"
    tiny_model("gemma3").bfloat16().save_pretrained(base)
    _, adapter = made(base, tmp_path / "adapter", TuningPlan(connector="freeze", rank=4), False)
    file, learned = adapter / "adapter_model.safetensors", load_file(adapter / "adapter_model.safetensors")
    new = torch.randn(len(load_vlm(base).get_input_embeddings().weight), 64)
    save_file(learned | {"base_model.model.lm_head.weight": new}, file)
    with pytest.raises(InputError, match="adapter_model.safetensors"):
        merge_into(adapter, tmp_path / "no")  # a sealed folder that was changed
    seal(adapter, read_provenance(adapter))
    done = merge_into(adapter, tmp_path / "merged", dtype=torch.float32)
    model = load_vlm(done.folder)
    assert done.apart and torch.equal(model.lm_head.weight, new)
    assert torch.equal(
        model.get_input_embeddings().weight, load_vlm(base, dtype=torch.float32).get_input_embeddings().weight
    )


def test_layout_types_names_and_files_are_the_base_s(tmp_path):
    base = tmp_path / "base"
    tiny_model("qwen2_vl").bfloat16().save_pretrained(base, max_shard_size="200KB")
    (base / "preprocessor_config.json").write_text("{}")
    _, adapter = made(base, tmp_path / "adapter", TuningPlan(rank=4), False)
    done = merge_into(adapter, tmp_path / "merged", max_shard_size=2e5)
    was, now = stored_in(base), stored_in(done.folder)
    assert {n: (s.shape, s.dtype) for n, s in was.items()} == {n: (s.shape, s.dtype) for n, s in now.items()} and any(
        n.startswith("visual.") for n in now
    )
    assert done.shards > 1 and (done.folder / INDEX).is_file() and (done.folder / "preprocessor_config.json").is_file()
    assert all(f.stat().st_size < 2.2e5 for f in weight_files(done.folder))
    before, after = tensors(base), tensors(done.folder)
    same = {n for n in before if torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8))}
    assert len(before) - len(same) == done.touched - len(done.unmoved)
    assert json.loads((done.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert 0 < done.lost < 0.1 < 0.9 < done.kept < 1.1
    exact = merge_into(adapter, tmp_path / "fp32", dtype=torch.float32)
    assert exact.lost == 0 and exact.kept == 1


def test_a_base_published_in_4_bit(tmp_path):
    load_vlm("lab", four_bit=True, dtype=torch.float32).save_pretrained(tmp_path / "int4")
    load_tokenizer("lab").save_pretrained(tmp_path / "int4")
    model, adapter = made(tmp_path / "int4", tmp_path / "adapter", TuningPlan(), True)
    done = merge_into(adapter, tmp_path / "merged", dtype=torch.float32)
    assert "quantization_config" not in json.loads((done.folder / "config.json").read_text())
    ids = torch.arange(20, 50)[None]
    with torch.no_grad():
        want, have = model(input_ids=ids).logits, load_vlm(done.folder)(input_ids=ids).logits
    assert ((want - have).abs().max() / want.std()).item() < 1e-3
    with pytest.raises(InputError, match="no original"):
        merge_into(adapter, tmp_path / "never", onto="original")


def edited(adapter, folder, edit):
    shutil.copytree(adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    edit(weights, folder)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "adapter_model.safetensors")
    seal(folder, read_provenance(folder))  # else the seal would be what is broken
    return folder


def first(weights, part):
    return next(k for k in weights if part in k)


def config(**values):
    return lambda w, d: (d / "adapter_config.json").write_text(
        json.dumps(json.loads((d / "adapter_config.json").read_text()) | values)
    )


@pytest.mark.parametrize(
    "edit, says",
    [
        (lambda w, d: w.update({first(w, "lora_B"): w[first(w, "lora_B")] * float("inf")}), "NaN or an infinite"),
        (lambda w, d: w.update({first(w, "resampler"): w[first(w, "resampler")] * float("nan")}), "NaN or an infinite"),
        (lambda w, d: w.pop(first(w, "lora_A")), "there is only lora_B"),
        (lambda w, d: w.update({first(w, "lora_A"): w[first(w, "lora_A")][:5]}), "rank 16, and the file 5"),
        (lambda w, d: w.update({first(w, "lora_A"): w[first(w, "lora_A")][:, :5]}), "the base asks for"),
        (lambda w, d: w.update({"base_model.model.resampler.query": torch.zeros(3, 4)}), "the base has 16 × 128"),
        (lambda w, d: w.update({"base_model.model.nobody": torch.zeros(3)}), "no place"),
        (lambda w, d: w.update({"something": torch.zeros(3)}), "means nothing here"),
        (lambda w, d: w.update({first(w, "lora_A").replace("lora_A", "lora_C"): torch.zeros(3)}), "means nothing here"),
        (
            lambda w, d: w.update({first(w, "lora_A").replace(".lora_A", ""): torch.zeros(128, 128)}),
            "both replaced and added|the base has",
        ),
        (config(r=8), "rank 8, and the file 16"),
        (config(init_lora_weights="olora"), "not merged here"),
        (config(lora_bias=True), "not merged here"),
        (config(use_dora=True), "there is only"),
    ],
)
def test_an_adapter_with_a_flaw_is_refused_and_leaves_nothing(edit, says, lab, tmp_path):
    with pytest.raises(InputError, match=says):
        merge_into(edited(lab, tmp_path / "adapter", edit), tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_damaged_files_and_a_wrong_base_are_refused(lab, tmp_path):
    cut = shutil.copytree(lab, tmp_path / "cut")
    (cut / "adapter_model.safetensors").write_bytes((cut / "adapter_model.safetensors").read_bytes()[:-10])
    with pytest.raises(InputError, match="bytes, and .* were written"):
        merge_into(cut, tmp_path / "merged")
    seal(cut, read_provenance(cut))
    with pytest.raises(InputError, match="truncated"):
        merge_into(cut, tmp_path / "merged")
    other = shutil.copytree(lab_folder(), tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({n: t * 1.01 for n, t in weights.items()}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="another base"):
        merge_into(lab, tmp_path / "merged", base=other)
    with pytest.raises(InputError, match="onto is"):
        merge_into(lab, tmp_path / "merged", onto="int8")
    with pytest.raises(InputError, match="not empty"):
        merge_into(lab, cut)
    assert not (tmp_path / "merged").exists()


def test_a_base_that_ends_early_is_seen_while_it_is_read(lab, tmp_path):
    reader = Reader(lab_folder() / "model.safetensors")
    short = tmp_path / "model.safetensors"
    short.write_bytes((lab_folder() / "model.safetensors").read_bytes()[:-100])
    reader.places = {n: (short, *rest) for n, (_, *rest) in reader.places.items()}
    last = max(reader.places, key=lambda n: reader.places[n][3])
    with pytest.raises(InputError, match="ends in the middle"):
        reader.whole(last)


def test_nothing_learned_or_nothing_left_of_it_raises(lab, tmp_path):
    for name, by in (("zero", 0.0), ("swallowed", 1e-9)):
        plan = TuningPlan(connector="freeze")
        model = apply_plan(load_vlm("lab"), plan)
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.data = by * torch.randn_like(p)
        adapter = save_adapter(model, tmp_path / name, plan, "lab", load_tokenizer("lab"), False)
        with pytest.raises(RuntimeError, match="equals its base"):
            merge_into(adapter, tmp_path / "merged")
        assert not (tmp_path / "merged").exists()
    assert not merge_into(adapter, tmp_path / "merged", dtype=torch.float32).unmoved  # 32 bit holds it


def test_a_byte_that_the_disk_changes_is_found(lab, tmp_path, monkeypatch):
    close = merge._Shard.close

    def flips(self):
        self.file.close()
        with open(self.path, "r+b") as f:
            f.seek(self.size // 2)
            byte = f.read(1)
            f.seek(self.size // 2)
            f.write(bytes([byte[0] ^ 1]))
        close(self)

    monkeypatch.setattr(merge._Shard, "close", flips)
    with pytest.raises(RuntimeError, match="not what was written"):
        merge_into(lab, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def in_a_child(work):
    "Forks; the child works and leaves without cleaning up after pytest."
    if (pid := os.fork()) == 0:
        torch.set_num_threads(1)
        try:
            work()
            os._exit(0)
        except InputError as e:
            os.write(2, str(e).encode())
            os._exit(3 if "disk is full" in str(e) else 4)
        finally:
            os._exit(5)
    return pid


def test_a_full_disk_leaves_nothing(lab, tmp_path):
    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
        merge_into(lab, tmp_path / "merged")

    assert os.waitstatus_to_exitcode(os.waitpid(in_a_child(work), 0)[1]) == 3
    assert not list(tmp_path.iterdir())


def test_killed_at_any_time_it_is_whole_or_not_there(lab, tmp_path):
    start = time.perf_counter()
    whole = tensors(merge_into(lab, tmp_path / "reference").folder)
    took = time.perf_counter() - start
    killed = finished = 0
    for i in range(12):
        out = tmp_path / "merged"
        pid = in_a_child(lambda: merge_into(lab, out))
        time.sleep(took * 1.5 * (i + 1) / 12)
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        killed += os.WIFSIGNALED(status)
        if out.exists():
            finished += 1
            again = tensors(out)
            assert all(torch.equal(whole[n], again[n]) for n in whole) and {p.name for p in out.iterdir()} == {
                p.name for p in (tmp_path / "reference").iterdir()
            }
            shutil.rmtree(out)
    assert killed > 0
    merge_into(lab, tmp_path / "merged")  # what the killed ones left beside it is no hindrance
    assert not (tmp_path / "merged.partial").exists()


def test_random_plans(tmp_path):
    "Any plan that can be said merges to the trained model."
    import random

    draw, seen = random.Random(0), 0
    words = dict(
        vision=["freeze", "lora", "full"],
        connector=["freeze", "lora", "full"],
        language=["freeze", "lora", "lora on 0-1, full on 3", "lora(rank=3) on mlp"],
        embeddings=["freeze", "lora", "full"],
        head=["freeze", "lora", "full"],
    )
    for i in range(6):
        values = {k: draw.choice(v) for k, v in words.items()} | {
            "variant": draw.choice(["lora", "rslora", "dora", "pissa"]),
            "rank": draw.choice([1, 4, 16]),
        }
        if "lora" not in " ".join(str(values[k]) for k in words):
            continue
        model, adapter = made("lab", tmp_path / f"adapter{i}", TuningPlan(**values), False, seed=i)
        ids = torch.arange(20, 50)[None]
        with torch.no_grad():
            want, have = model(input_ids=ids).logits, merge_adapter(adapter)(input_ids=ids).logits
        assert ((want - have).abs().max() / want.std()).item() < 1e-3, values
        seen += 1
    assert seen >= 4


def peak(adapter, out):
    "High-water mark of memory before and after a merge, in a process of its own, bytes."
    code = (
        "import re, sys, torch, bitsandbytes\nfrom vlm_lora_lab.checkpoint.merge import merge_into\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        "before = peak()\nmerge_into(sys.argv[1], sys.argv[2])\nprint(before, peak())"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(adapter), str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split()[-2:])


def noise(width, layers, vocab):
    return dict(
        model_type="minicpmv",
        version=2.6,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=vocab,
        query_num=16,
        resampler_num_heads=8,
        vision_config=dict(
            hidden_size=112, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, image_size=224
        ),
    )


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the high-water mark")
@pytest.mark.parametrize(
    "width, layers, vocab",
    [(512, 24, 8000), pytest.param(2048, 28, 32000, marks=pytest.mark.slow)],
    ids=["0.2 GB", "2.4 GB"],
)
def test_the_peak_of_memory_is_below_the_model_s_size(width, layers, vocab, tmp_path):
    values = noise(width, layers, vocab)
    base, adapter = noise_checkpoint(tmp_path, values, TuningPlan())
    size, files = sum(f.stat().st_size for f in weight_files(base)), weight_files(base)
    before, after = peak(adapter, tmp_path / "merged")
    predicted = merge_memory(on_meta(values))
    assert len(files) == 4 and after - before < 1.2 * predicted + 150e6, (size, before, after, predicted)
    if size > 1e9:
        assert after - before < size / 2
    assert len(stored_in(tmp_path / "merged")) == len(stored_in(base))
