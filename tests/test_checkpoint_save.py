"""Everything that was trained comes back in a fresh process; nothing that is damaged, half-written or sharded passes
for whole."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from families import FAMILIES, batch_of, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_rules import random_plan

from vlm_lora_lab.checkpoint.inspect import inspect_adapter
from vlm_lora_lab.checkpoint.merge import merge_into
from vlm_lora_lab.checkpoint.save import (
    base_sha256,
    broken_seals,
    fingerprint,
    load_adapter,
    read_provenance,
    save_adapter,
)
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.job import Job, train
from vlm_lora_lab.models.files import no_bar_if_small
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.models.published import on_meta
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan, full_modules

HERE = Path(__file__).parent
TOKENIZER = load_tokenizer("lab")


def python(script, *args, **env):
    "A fresh process, one thread, the tests' helpers importable."
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        | env,
    )


def base_folder(family, place):
    folder = place / family
    if not folder.exists():
        with no_bar_if_small(0):
            tiny_model(family).save_pretrained(folder)
    return folder


def two_steps(model, batch):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.train()(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits


CHILD = """
    import json, sys, torch
    from pathlib import Path
    from peft import PeftModel
    from safetensors.torch import load_file
    from families import batch_of
    from test_checkpoint_save import logits
    from vlm_lora_lab.checkpoint.inspect import inspect_adapter
    from vlm_lora_lab.checkpoint.save import load_adapter, read_provenance
    from vlm_lora_lab.models.load import load_vlm
    torch.set_num_threads(1)
    for folder in sys.argv[1:]:
        folder, family = Path(folder), Path(folder).name.split("+")[0]
        want, four_bit = load_file(folder.parent / (folder.name + ".safetensors")), read_provenance(folder)["four_bit"]
        model = load_adapter(folder, trainable=True)
        grads = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert grads.keys() | {"logits"} == want.keys(), (folder, grads.keys() ^ want.keys())
        assert all(torch.equal(p, want[n]) and p.dtype == want[n].dtype for n, p in grads.items()), folder
        batch, apart = batch_of(family, model), 0.0
        apart = (logits(model, batch) - want["logits"]).abs().max().item()
        calm = load_adapter(folder)
        assert not any(p.requires_grad for p in calm.parameters()) and not calm.training
        assert all(torch.equal(p, want[n]) for n, p in calm.named_parameters() if n in grads), folder
        # close, not equal: where a matrix needs no gradient some processors take another kernel (4e-6, AVX512-BF16)
        torch.testing.assert_close(logits(calm, batch), logits(model, batch), rtol=0, atol=1e-4)
        if not four_bit:
            plain = PeftModel.from_pretrained(load_vlm(read_provenance(folder)["base"]), folder)
            apart = max(apart, (logits(plain, batch) - want["logits"]).abs().max().item())
        print(json.dumps([folder.name, apart, inspect_adapter(folder).status, len(grads)]))
"""


def train_and_save(family, i, generator, place):
    "A random plan, or LoRA and parameters unfrozen by hand; two steps; saved, with what a fresh process should find."
    base = base_folder(family, place)
    four_bit = i % 3 == 1
    hand = i % 3 == 2
    empty = on_meta(base)
    while True:
        plan = TuningPlan() if hand else random_plan(empty, generator)
        if four_bit and "lora" not in plan.said or not hand and "lora" not in plan.said:
            continue
        try:
            torch.manual_seed(i)
            model = apply_plan(load_vlm(base, four_bit=four_bit, whole=full_modules(empty, plan)), plan)
            break
        except InputError:
            continue  # a rule that means nothing here
    if hand:  # bare parameters, norms and biases, that PEFT knows nothing of
        some = [
            (n, p)
            for n, p in model.named_parameters()
            if not p.requires_grad and p.is_floating_point() and ".original_module." not in n
        ]
        for _, p in generator.sample(some, 5):
            p.requires_grad_(True)
    batch = batch_of(family, model)
    two_steps(model, batch)
    folder = save_adapter(model, place / f"{family}+{i}", None if hand else plan, base, TOKENIZER, four_bit)
    want = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad} | {
        "logits": logits(model, batch)
    }
    save_file(want, place / f"{family}+{i}.safetensors")
    assert bool(read_provenance(folder)["by_hand"]) == hand
    return folder


def many(place, families, rounds, seed):
    generator, threads = random.Random(seed), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folders = [train_and_save(f, i, generator, place) for k, f in enumerate(families) for i in rounds(k)]
    finally:
        torch.set_num_threads(threads)
    result = python(CHILD, *folders)
    assert result.returncode == 0, result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    assert [name for name, *_ in lines] == [f.name for f in folders]
    for name, apart, status, tensors in lines:
        assert apart == 0 and status < 2 and tensors > 0, (name, apart, status)
    return lines


def test_random_plans_come_back_in_a_fresh_process(tmp_path):
    "Every family once with a plan of each kind in turn: whole, in 4 bit, unfrozen by hand."
    lines = many(tmp_path, FAMILIES, lambda k: [k % 3], 0)
    assert len(lines) == len(FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_three_hundred_random_plans_come_back_in_a_fresh_process(seed, tmp_path):
    "pytest -m slow tests/test_checkpoint_save.py"
    assert len(many(tmp_path, FAMILIES, lambda k: range(3), seed + 1)) == 60


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
@pytest.mark.parametrize("how", ["plan", "whole language model", "by hand"])
def test_a_tied_head_stays_tied(family, how, tmp_path):
    base = base_folder(family, tmp_path)
    plan = {
        "plan": TuningPlan(embeddings="full"),
        "whole language model": TuningPlan(vision="lora", language="full", embeddings="full"),
        "by hand": TuningPlan(),
    }[how]
    model = apply_plan(load_vlm(base), plan)
    if how == "by hand":
        model.get_input_embeddings().weight.requires_grad_(True)
    batch = batch_of(family, model)
    two_steps(model, batch)
    folder = save_adapter(model, tmp_path / "adapter", None if how == "by hand" else plan, base, TOKENIZER, False)
    plain = PeftModel.from_pretrained(load_vlm(base), folder)
    for again in (load_adapter(folder), plain):
        assert torch.equal(logits(again, batch), logits(model, batch))
    assert inspect_adapter(folder).status == 0, inspect_adapter(folder)
    merged = load_adapter(folder).merge_and_unload()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    torch.testing.assert_close(logits(merged, batch), logits(model, batch), rtol=1e-4, atol=1e-4)


def adapter(tmp_path, name="adapter", **options):
    "A small adapter on the lab model."
    torch.manual_seed(0)
    model = apply_plan(load_vlm("lab"), TuningPlan(rank=2))
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.01 * torch.randn_like(p)
    return model, save_adapter(model, tmp_path / name, TuningPlan(rank=2), "lab", TOKENIZER, False, **options)


def test_a_flipped_bit_anywhere_is_named(tmp_path):
    _, folder = adapter(tmp_path, metrics={"loss": 0.5}, data={"train.json": "0" * 64})
    generator, tried = random.Random(0), 0
    for file in sorted(folder.iterdir()):
        original = file.read_bytes()
        for _ in range(40):
            spoilt = bytearray(original)
            spoilt[generator.randrange(len(spoilt))] ^= 1 << generator.randrange(8)
            file.write_bytes(spoilt)
            with pytest.raises(InputError, match=file.name.replace(".", r"\.")) as error:
                load_adapter(folder)
            assert error.value.remedy
            tried += 1
        file.write_bytes(original)
    assert tried >= 300 and broken_seals(folder) == {}
    load_adapter(folder, verify=True)


def test_truncated_and_missing_files_are_named(tmp_path):
    _, folder = adapter(tmp_path)
    for file in sorted(folder.iterdir()):
        original = file.read_bytes()
        for size in {0, 1, len(original) // 2, len(original) - 1}:
            file.write_bytes(original[:size])
            with pytest.raises(InputError, match=file.name.replace(".", r"\.")):
                load_adapter(folder)
        file.unlink()
        with pytest.raises(InputError, match=file.name.replace(".", r"\.")):
            load_adapter(folder)
        file.write_bytes(original)


def test_a_base_that_lost_a_shard_or_changed_is_refused(tmp_path):
    _, folder = adapter(tmp_path)
    base = load_vlm("lab", dtype="stored")
    base.save_pretrained(tmp_path / "cut", max_shard_size="1MB")
    shards = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert (
        len(shards) > 2
        and fingerprint(tmp_path / "cut") != fingerprint("lab")
        and base_sha256(tmp_path / "cut") == base_sha256("lab")
    )
    load_adapter(folder, tmp_path / "cut", verify=True)  # the same weights in other files
    merge_into(folder, tmp_path / "merged", tmp_path / "cut")
    assert not [f for f in inspect_adapter(folder, tmp_path / "cut").findings if "is not the base" in f.text]
    kept = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(InputError, match=shards[1].name):
        load_adapter(folder, tmp_path / "cut")
    spoilt = bytearray(kept)
    spoilt[len(spoilt) // 2] ^= 1
    shards[1].write_bytes(spoilt)
    with pytest.raises(InputError, match="another base"):
        load_adapter(folder, tmp_path / "cut")
    with pytest.raises(InputError, match="another base"):
        merge_into(folder, tmp_path / "merged again", tmp_path / "cut")
    assert [f for f in inspect_adapter(folder, tmp_path / "cut").findings if "is not the base" in f.text]
    with pytest.raises(InputError, match="base=FOLDER"):
        load_adapter(folder, tmp_path / "nowhere")
    _, unhashed = adapter(tmp_path, "unhashed", hash_base=False)
    with pytest.raises(InputError, match="not stored"):
        load_adapter(unhashed, verify=True)


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_a_tied_tensor_has_one_word(family):
    with pytest.raises(InputError, match="cannot have LoRA as well"):
        apply_plan(tiny_model(family), TuningPlan(embeddings="full", head="lora"))


def test_what_nobody_asked_to_train_is_an_error_under_a_plan_and_saved_without(tmp_path):
    model = apply_plan(load_vlm("lab"), TuningPlan(connector="freeze", rank=2))
    model.base_model.model.resampler.requires_grad_(True)
    with pytest.raises(RuntimeError, match="resampler.query is trained under the word 'freeze'"):
        save_adapter(model, tmp_path / "a", TuningPlan(connector="freeze", rank=2), "lab", TOKENIZER, False)
    # a plan that says so, without modules_to_save
    folder = save_adapter(model, tmp_path / "b", TuningPlan(rank=2), "lab", TOKENIZER, False)
    assert len(read_provenance(folder)["by_hand"]) == 13
    again = load_adapter(folder, trainable=True)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert not list(tmp_path.glob("a*"))


@pytest.mark.parametrize("trained, whole", [(True, False), (False, True)], ids=["nf4-to-whole", "whole-to-nf4"])
def test_onto_the_other_kind_of_base(trained, whole, tmp_path):
    plan = TuningPlan(language="lora on 0-3, full on 4", rank=2)
    model = apply_plan(load_vlm("lab", four_bit=trained, whole=full_modules(on_meta("lab"), plan)), plan)
    ids = torch.arange(20, 60)[None]
    two_steps(model, dict(input_ids=ids, labels=ids))
    folder = save_adapter(model, tmp_path / "adapter", plan, "lab", TOKENIZER, trained)
    other = load_adapter(folder, four_bit=not trained, trainable=True)
    mine, theirs = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, other))
    assert mine.keys() == theirs.keys() and all(torch.equal(p, theirs[n]) for n, p in mine.items())
    packed = [n for n, p in other.named_parameters() if hasattr(p, "quant_state")]
    assert bool(packed) == whole and not any("layers.4." in n for n in packed)
    if whole:
        with pytest.raises(InputError, match="layers.4.* is in 4 bit, and the adapter holds it in full"):
            load_adapter(folder, model=load_vlm("lab", four_bit=True))


def test_one_of_several_adapters(tmp_path):
    options = dict(target_modules=r"llm\..*\.(q_proj|v_proj)", modules_to_save=["resampler"])
    model = get_peft_model(load_vlm("lab"), LoraConfig(r=2, **options))
    model.add_adapter("second", LoraConfig(r=4, **options))
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.01 * torch.randn_like(p)
    base = load_vlm("lab")
    for name, rank in (("default", 2), ("second", 4)):
        folder = (
            save_adapter(model, tmp_path / name, None, "lab", TOKENIZER, False, adapter=name)
            if name == "default"
            else None
        )
        if folder is None:
            model.set_adapter("second")
            folder = save_adapter(model, tmp_path / name, None, "lab", TOKENIZER, False)  # the active one
        again = dict(load_adapter(folder).named_parameters())
        live = {n: p for n, p in model.named_parameters() if f".{name}." in n}
        assert len(live) == 33 and all(
            torch.equal(p, again[n.replace(f".{name}.", ".default.")]) for n, p in live.items()
        )
        assert read_provenance(folder)["adapter"] == name and read_provenance(folder)["other_adapters"] == [
            {"default": "second", "second": "default"}[name]
        ]
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == rank
    both = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    both.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    both.base_model.set_adapter(["default", "second"])  # PEFT allows it without modules_to_save
    with pytest.raises(InputError, match="2 adapters are active"):
        save_adapter(both, tmp_path / "both", None, "lab", TOKENIZER, False)
    with pytest.raises(InputError, match="no adapter 'third'"):
        save_adapter(model, tmp_path / "both", None, "lab", TOKENIZER, False, adapter="third")
    with pytest.raises(InputError, match="carries no adapter"):
        save_adapter(load_vlm("lab"), tmp_path / "both", None, "lab", TOKENIZER, False)
    with pytest.raises(InputError, match="carries an adapter already"):
        load_adapter(tmp_path / "default", model=model)


def test_empty_tensors_are_refused_and_gathered_ones_accepted(tmp_path):
    "ZeRO-3 leaves an empty tensor behind where a parameter was; the gathered state stands in for it."
    model, folder = adapter(tmp_path)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    name, p = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    p.data = torch.empty(0)
    with pytest.raises(InputError, match="1 trained tensors are not here"):
        save_adapter(model, tmp_path / "never", None, "lab", TOKENIZER, False)
    again = save_adapter(model, tmp_path / "again", None, "lab", TOKENIZER, False, state=state)
    a, b = (load_file(f / "adapter_model.safetensors") for f in (folder, again))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and not (tmp_path / "never").exists()
    del state[name]
    with pytest.raises(InputError, match="1 trained tensors are not here"):
        save_adapter(model, tmp_path / "never", None, "lab", TOKENIZER, False, state=state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_an_adapter_that_holds_no_numbers_is_not_written(tmp_path, value):
    model, _ = adapter(tmp_path)
    next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = value
    with pytest.raises(InputError, match="1 of [0-9]+ trained tensors hold NaN or infinity"):
        save_adapter(model, tmp_path / "nan", None, "lab", TOKENIZER, False)
    assert not (tmp_path / "nan").exists()


def test_nothing_trained_is_said(tmp_path):
    model, _ = adapter(tmp_path)
    with pytest.warns(UserWarning, match="nothing of the adapter"):
        save_adapter(model.requires_grad_(False), tmp_path / "frozen", None, "lab", TOKENIZER, False)


def test_a_job_writes_what_it_learned_from_and_how_it_went(tmp_path):
    data = samples_folder() / "mixed.json"
    job = Job.of({"data": str(data), "output": str(tmp_path / "out"), "schedule": {"max_steps": 2, "batch_size": 2}})
    report = train(job, say=lambda line: None)
    provenance = read_provenance(report["adapter"])
    assert provenance["data"] == {str(data): hashlib.sha256(data.read_bytes()).hexdigest()}
    assert provenance["metrics"] == {"steps": 2, "loss": report["loss"]} and provenance["base_sha256"] == base_sha256(
        "lab"
    )
    assert inspect_adapter(report["adapter"]).status == 0


FORKED = """
    import json, os, random, resource, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    from vlm_lora_lab.checkpoint.save import broken_seals, read_provenance, save_adapter
    from vlm_lora_lab.errors import InputError
    from vlm_lora_lab.models.load import load_tokenizer, load_vlm
    from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
    place, tokenizer, plan = Path(sys.argv[1]), load_tokenizer("lab"), TuningPlan(rank=2)
    model = apply_plan(load_vlm("lab"), plan)
    def child(name, limit=None):
        pid = os.fork()
        if pid: return pid
        if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try: save_adapter(model, place / name, plan, "lab", tokenizer, False)
        except InputError as e: os._exit(7 if "disk is full" in str(e) else 8)
        except BaseException: os._exit(9)
        os._exit(0)
    def complete(name):
        folder = place / name
        if not folder.exists(): return False
        assert broken_seals(folder) == {} and read_provenance(folder)["base"] == "lab", folder
        return True
"""


def test_fifty_processes_killed_while_saving_leave_a_complete_folder_or_none(tmp_path):
    result = python(
        FORKED
        + """
    started = time.time(); os.waitpid(child("first"), 0); took = time.time() - started
    assert complete("first")
    generator, outcomes, partial = random.Random(0), [], 0
    for i in range(50):
        pid = child(f"{i}"); time.sleep(generator.uniform(0, 1.4 * took))
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        outcomes.append(complete(f"{i}")); partial += (place / f"{i}.partial").exists()
    again = [i for i in range(50) if not outcomes[i] and (place / f"{i}.partial").exists()][:3]
    for i in again:
        os.waitpid(child(f"{i}"), 0)
        assert complete(f"{i}") and not (place / f"{i}.partial").exists()  # what a killed process left is no obstacle
    print(json.dumps([sum(outcomes), partial, len(again)]))
    """,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    whole, partial, again = json.loads(result.stdout.splitlines()[-1])
    assert 0 < whole < 50 and partial > 0 and again > 0, (whole, partial)  # some came through, some died in the midst
    for leftover in tmp_path.glob("*.partial"):
        with pytest.raises(InputError):
            inspect_adapter(leftover)


def test_a_full_disk_says_so_and_leaves_nothing(tmp_path):
    "A real limit on the size of a file, at several sizes: in the weights, in the tokenizer, in the small files."
    result = python(
        FORKED
        + """
    for limit in (100, 1_000, 10_000, 100_000, 300_000):
        _, status = os.waitpid(child(f"{limit}", limit), 0)
        there = [(place / name).exists() for name in (f"{limit}", f"{limit}.partial")]
        print(json.dumps([limit, os.waitstatus_to_exitcode(status), *there]))
    """,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert [json.loads(line)[1:] for line in result.stdout.splitlines() if line.startswith("[")] == [
        [7, False, False]
    ] * 5


def test_two_processes_under_ddp_and_fsdp2(tmp_path):
    """Two processes over gloo train a step; one writes, both return; a failure of the first reaches the second.

    FSDP2's shards are collected."""
    script = (
        FORKED
        + """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from vlm_lora_lab.checkpoint.save import load_adapter
    def work(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
        dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
        ids = torch.arange(20 + 30 * rank, 50 + 30 * rank)[None]
        pixels = dict(pixel_values=torch.linspace(-1, 1, 3 * 8 * 96).view(1, 3, 8, 96))
        pixels |= dict(tgt_sizes=torch.tensor([[3, 4]]), image_bound=torch.tensor([[0, 2, 18]]))
        mesh = init_device_mesh("cpu", (2,))
        for kind in ("ddp", "fsdp2"):
            torch.manual_seed(0)
            inner = apply_plan(load_vlm("lab"), plan)
            outer = DistributedDataParallel(inner) if kind == "ddp" else inner
            if kind == "fsdp2":
                for layer in inner.base_model.model.llm.model.layers: fully_shard(layer, mesh=mesh)
                fully_shard(inner, mesh=mesh)
            optimizer = torch.optim.SGD([p for p in outer.parameters() if p.requires_grad], 0.1)
            outer.train()(input_ids=ids, labels=ids, **pixels).loss.backward(); optimizer.step()
            folder = save_adapter(outer, place / kind, plan, "lab", tokenizer, False)
            dist.barrier()
            assert broken_seals(folder) == {}
            try: save_adapter(outer, place / kind, plan, "lab", tokenizer, False)
            except (InputError, RuntimeError) as e: assert "not empty" in str(e), e
            else: raise AssertionError("overwritten")
        os._exit(0)  # all was done; gloo's threads now and then abort or hold an interpreter that ends in the usual way
    work(int(sys.argv[2]))
    """
    )
    # processes of their own: a forked one would inherit the threads that load models
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda rank: python(script, tmp_path, rank), (0, 1)))
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-3000:] + results[1].stderr[-3000:]
    a, b = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("ddp", "fsdp2"))
    assert a.keys() == b.keys() and len(a) == 83 and any(t.any() for k, t in a.items() if "lora_B" in k)
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-5)  # the two average gradients in different orders
    assert not [k for k in a if "module." in k]
    shutil.rmtree(tmp_path / "ddp")
