"""The vision cache serves what the tower would say; when anything that matters changes, it serves nothing."""

import copy
import json
import math

import pytest
import torch
from families import FAMILIES, batch_of, tiny_model
from peft import LoraConfig, get_peft_model

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.batch import Collator, Processor, Samples
from vlm_lora_lab.data.records import read_conversations, samples_folder
from vlm_lora_lab.debug.nan import NanDoctor, NonFiniteStep
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.families.base import families_of
from vlm_lora_lab.job import Job
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.models.parts import layout_of
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.train.cache import VisionCache, cache_folder, choose_cache, is_random, why_not
from vlm_lora_lab.train.run import Schedule, fit

OPEN = [f for f in FAMILIES if families_of(f.partition("-")[0])[0].seam]
QUIET = dict(say=lambda line: None)


def frozen(family, connector=True, seed=0):
    model, layout = tiny_model(family, seed).train(), layout_of(tiny_model(family))
    for n, p in model.named_parameters():
        p.requires_grad_(layout.part_of(n) != "vision" and (connector or layout.part_of(n) != "connector"))
    return model


def step(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(found, expected, rtol=1e-5):
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=0)
    assert found[1].keys() == expected[1].keys()
    largest = max(g.norm() for g in expected[1].values())
    for n, g in expected[1].items():
        assert (found[1][n] - g).norm() <= rtol * max(10 * g.norm(), largest), n


@pytest.mark.parametrize("connector", (True, False))
@pytest.mark.parametrize("family", OPEN)
def test_every_family_learns_the_same(family, connector):
    model = frozen(family, connector)
    batch = batch_of(family, model)
    expected, cache = step(model, batch), VisionCache(check_every=1)
    with cache.at(model):
        close(step(model, batch), expected)
        n = cache.asked
        close(step(model, batch), expected)
        assert cache.found == n and cache.asked == 2 * n
    assert any("weight" in n for n in expected[1]) and not any(
        layout_of(model).part_of(n) == "vision" for n in expected[1]
    )


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in OPEN])
def test_other_families_are_refused_by_name(family):
    model = frozen(family)
    with pytest.raises(InputError, match="does not hand over picture by picture.*off"), VisionCache().at(model):
        pass
    assert choose_cache("auto", model, [], 3) is None


def ragged(model, rows):
    "Pictures of several sizes, some of them in both rows."
    g = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[4, 3], [2, 2], [4, 4], [1, 5]])
    strips = [torch.randn(3, 14, int(h * w) * 14, generator=g) for h, w in sizes]
    strips, sizes = [strips[i] for i in rows], sizes[rows]
    width = max(s.shape[-1] for s in strips)
    pixels = torch.stack([torch.nn.functional.pad(s, (0, width - s.shape[-1])) for s in strips])
    ids = torch.randint(3, 290, (len(rows), 24), generator=g)
    bound = torch.tensor([[i, 2, 18] for i in range(len(rows))])
    return dict(input_ids=ids, labels=ids, pixel_values=pixels, tgt_sizes=sizes, image_bound=bound)


@pytest.mark.parametrize("family", ["minicpmv-2.0", "minicpmv-2.5", "minicpmv-2.6", "minicpmv-4.5"])
def test_ragged_pictures_in_changing_company(family):
    model, cache = frozen(family), VisionCache(check_every=1)
    batches = [ragged(model, rows) for rows in ([0, 1], [1, 2], [3, 2], [0, 1], [2, 1, 0, 3])]
    expected = [step(model, b) for b in batches]
    with cache.at(model):
        for b, e in zip(batches * 2, expected * 2):
            close(step(model, b), e)
    # 2.5 sees padding, so the same picture beside a longer one is another: lengths 12: {0, 1}; 16: {1, 2}, {3, 2}, {0 …
    # 3}
    assert len(cache.store.entries) == (6 if family == "minicpmv-2.5" else 4)


def test_padding_changes_what_25_sees_and_the_cache_knows():
    model = frozen("minicpmv-2.5")
    a, b = ragged(model, [1, 0]), ragged(model, [1, 2])
    with torch.no_grad():
        assert (
            model.vpm(a["pixel_values"], a["tgt_sizes"])[0, :4] - model.vpm(b["pixel_values"], b["tgt_sizes"])[0, :4]
        ).abs().max() > 1e-3
        with VisionCache().at(model):
            for x in (a, b, a):
                known = type(model.vpm).forward(model.vpm, x["pixel_values"], x["tgt_sizes"])
                torch.testing.assert_close(
                    model.vpm(x["pixel_values"], x["tgt_sizes"])[0, :4], known[0, :4], rtol=1e-4, atol=1e-5
                )


def test_order_and_history_do_not_change_a_bit():
    model = frozen("minicpmv-2.6")
    batches = [ragged(model, rows) for rows in ([0, 1], [2, 3], [3, 0])]
    seen = []
    for order in ((0, 1, 2), (2, 1, 0)):
        with VisionCache().at(model):
            losses = {i: step(model, batches[i])[0] for i in order}
        seen.append([losses[i] for i in range(3)])
    with VisionCache(limit=0, **QUIET).at(model):  # no room at all
        seen.append([step(model, b)[0] for b in batches])
    assert seen[0] == seen[1] == seen[2]


def changed_weight(m, b):
    m.vpm.encoder.layers[1].mlp.fc1.weight.add_(0.1)


def changed_data(m, b):
    m.vpm.encoder.layers[1].mlp.fc1.weight.data += 0.1


def replaced(m, b):
    m.vpm.post_layernorm = torch.nn.LayerNorm(48).requires_grad_(False)


def changed_pixel(m, b):
    b["pixel_values"][0, 0, 0, 0] += 1e-3


def changed_grid(m, b):
    b["tgt_sizes"] = b["tgt_sizes"].flip(1)


def changed_type(m, b):
    m.vpm.double()


def changed_setting(m, b):
    m.config.vision_config.num_attention_heads = 2
    for layer in m.vpm.encoder.layers:
        layer.self_attn.num_heads = 2
        layer.self_attn.head_dim = 24
        layer.self_attn.scale = 24**-0.5


def changed_kernel(m, b):
    m.config.vision_config._attn_implementation = m.vpm.config._attn_implementation = "eager"


@pytest.mark.parametrize("where", ("memory", "disk"))
@pytest.mark.parametrize(
    "change",
    (
        changed_weight,
        changed_data,
        replaced,
        changed_pixel,
        changed_grid,
        changed_type,
        changed_setting,
        changed_kernel,
    ),
    ids=lambda f: f.__name__,
)
def test_what_has_changed_is_looked_at_again(change, where, tmp_path):
    "Also by a new process, which finds the old entries on disk."
    model = frozen("minicpmv-2.6")
    batch = ragged(model, [0])

    def make():
        return VisionCache(tmp_path if where == "disk" else None, **QUIET)

    cache = make()
    with torch.no_grad():
        with cache.at(model):
            before = model.vpm(batch["pixel_values"], batch["tgt_sizes"]).clone()
        model = copy.deepcopy(model)
        change(model, batch)
        truth = model.vpm(batch["pixel_values"], batch["tgt_sizes"])
        cache = make() if where == "disk" else cache
        found = cache.found
        with cache.at(model):
            now = model.vpm(batch["pixel_values"], batch["tgt_sizes"])
    assert cache.found == found and torch.equal(now, truth)
    assert change in (changed_type, changed_kernel) or (now - before).abs().max() > 1e-6  # the change was one


def test_a_change_within_a_block():
    model, said = frozen("minicpmv-2.6"), []
    batch = ragged(model, [0, 1])
    with torch.no_grad(), VisionCache(check_every=1, say=said.append).at(model):
        for change in (changed_weight, changed_data, changed_weight):
            model(**batch)
            change(model, batch)
            now = model.vpm(batch["pixel_values"], batch["tgt_sizes"])
            truth = type(model.vpm).forward(model.vpm, batch["pixel_values"], batch["tgt_sizes"])
            torch.testing.assert_close(now[0], truth[0], rtol=1e-4, atol=1e-5)
    assert len(said) == 1 and "weights were changed" in said[0]  # the one that nothing but the check can see


def test_something_unforeseen_is_an_error():
    model = frozen("minicpmv-2.6")
    batch = ragged(model, [0])
    with torch.no_grad(), VisionCache(check_every=1).at(model):
        model(**batch)
        handle = model.vpm.post_layernorm.register_forward_hook(lambda m, a, out: out * 1.5)
        with pytest.raises(InputError, match="differs from what the vision tower says now"):
            model(**batch)
        handle.remove()
        model(**batch)


def test_autocast_and_its_type_are_part_of_the_key():
    model, cache = frozen("minicpmv-2.6"), VisionCache()
    batch = ragged(model, [0])
    with torch.no_grad(), cache.at(model):
        exact = model.vpm(batch["pixel_values"], batch["tgt_sizes"])
        with torch.autocast("cpu", torch.bfloat16):
            for k in range(2):
                rough = model.vpm(batch["pixel_values"], batch["tgt_sizes"])
                assert cache.found == k
                torch.testing.assert_close(
                    rough,
                    type(model.vpm).forward(model.vpm, batch["pixel_values"], batch["tgt_sizes"]),
                    rtol=1e-3,
                    atol=1e-3,
                )
    assert 1e-4 < (exact - rough.float()).abs().max() < 0.3
    kinds = {e["x"].dtype for e in cache.store.entries.values()}
    assert kinds <= {torch.float32, torch.float16, torch.bfloat16} and len(cache.store.entries) == 2


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_towers_in_sixteen_bit(dtype):
    model = frozen("minicpmv-2.6").to(dtype)
    batch = batch_of("minicpmv-2.6", model)
    batch["pixel_values"], cache = batch["pixel_values"].to(dtype), VisionCache()
    expected = step(model, batch)
    with cache.at(model):
        for _ in range(2):
            close(step(model, batch), expected, 2e-2)
    assert {e["x"].dtype for e in cache.store.entries.values()} == {dtype}


def test_a_tower_in_four_bit_and_its_constants():
    bnb = pytest.importorskip("bitsandbytes")
    model = frozen("minicpmv-2.6")
    for layer in model.vpm.encoder.layers:
        new = bnb.nn.Linear4bit(
            layer.mlp.fc1.in_features, layer.mlp.fc1.out_features, compute_dtype=torch.float32, quant_type="nf4"
        )
        new.load_state_dict({"weight": layer.mlp.fc1.weight.data, "bias": layer.mlp.fc1.bias.data})
        layer.mlp.fc1 = new.to("cpu").requires_grad_(False)
    batch, cache = ragged(model, [0]), VisionCache(check_every=10**6)

    def look():
        return model.vpm(batch["pixel_values"], batch["tgt_sizes"])

    with torch.no_grad(), cache.at(model):
        first = look()
        assert torch.equal(look(), first) and cache.found == 1
    model.vpm.encoder.layers[0].mlp.fc1.weight.quant_state.offset.add_(0.05)
    with torch.no_grad(), cache.at(model):  # seen when it is opened
        assert not torch.allclose(look(), first) and cache.found == 1


def files(folder):
    return sorted(folder.glob("*/*"))


def test_any_byte_of_a_file(tmp_path):
    model = frozen("minicpmv-2.6")
    batch = ragged(model, [0])

    def look():
        return model.vpm(batch["pixel_values"], batch["tgt_sizes"])

    with torch.no_grad():
        with VisionCache(tmp_path).at(model):
            truth = look()
        (file,) = files(tmp_path)
        good, said = file.read_bytes(), []
        for k in [*range(0, 400, 7), *range(400, len(good), 211), len(good) - 1]:
            file.write_bytes(good[:k] + bytes([good[k] ^ 16]) + good[k + 1 :])
            cache = VisionCache(tmp_path, say=said.append)
            with cache.at(model):
                assert torch.equal(look(), truth), k
            # found: white space in the header
            assert cache.found in (0, 1) and (cache.found or cache.store.damaged == 1), k
        assert said and all("damaged" in line for line in said)
        for half in (b"", good[:8], good[: len(good) // 2], good + b"more", b"\xff" * 100):
            file.write_bytes(half)
            cache = VisionCache(tmp_path, **QUIET)
            with cache.at(model):
                assert torch.equal(look(), truth)
            assert cache.store.damaged == 1 and file.read_bytes() == good


def test_an_entry_under_another_key_is_not_believed(tmp_path):
    model, cache = frozen("minicpmv-2.6"), VisionCache(tmp_path, **QUIET)
    a, b = ragged(model, [0]), ragged(model, [2])
    with torch.no_grad(), cache.at(model):
        truth = model.vpm(b["pixel_values"], b["tgt_sizes"])
        (of_b,) = files(tmp_path)
        model.vpm(a["pixel_values"], a["tgt_sizes"])
        (of_a,) = set(files(tmp_path)) - {of_b}
        of_b.write_bytes(of_a.read_bytes())
        assert torch.equal(model.vpm(b["pixel_values"], b["tgt_sizes"]), truth) and cache.store.damaged == 1


def test_a_second_run_finds_what_the_first_saw(tmp_path):
    for expected in (0, 1):
        model, cache = frozen("minicpmv-2.6"), VisionCache(tmp_path)
        with torch.no_grad(), cache.at(model):
            model(**ragged(model, [0]))
        assert cache.found == expected and not list(tmp_path.glob("**/*.partial"))
    assert VisionCache(tmp_path).used == files(tmp_path)[0].stat().st_size


def test_a_full_cache_says_so_once_and_goes_on(tmp_path):
    model = frozen("minicpmv-2.6")
    for folder in (None, tmp_path / "a"):
        said = []
        cache = VisionCache(folder, limit=12 * 48 * 4 + 500, say=said.append)
        with torch.no_grad(), cache.at(model):
            for _ in range(3):
                for rows in ([0], [2], [3], [1]):
                    model(**ragged(model, rows + [0]))
        assert (
            len(said) == 1
            and "nothing more is kept" in said[0]
            and 0 < cache.found < cache.asked
            and cache.used <= cache.limit
        )
    blocked = tmp_path / "b"
    blocked.write_text("a file where a folder should be")
    said = []
    with torch.no_grad(), VisionCache(blocked, say=said.append).at(model):
        model(**ragged(model, [0]))
    assert len(said) == 1
    for wrong in (-1, "much", 1.5):
        with pytest.raises(InputError):
            VisionCache(limit=wrong)


def test_what_is_not_finite_is_not_kept():
    model, cache = frozen("minicpmv-2.6"), VisionCache()
    batch = ragged(model, [0])
    batch["pixel_values"][0, 0, 0, 0] = math.nan
    with torch.no_grad(), cache.at(model):
        assert model(**batch).loss.isnan() and not cache.store.entries


def test_a_tower_that_is_not_a_constant():
    model = frozen("minicpmv-2.6")
    model.vpm.post_layernorm.bias.requires_grad_(True)
    assert "post_layernorm.bias" in why_not(model)
    with pytest.raises(InputError, match="trained"), VisionCache().at(model):
        pass
    model = frozen("minicpmv-2.6")
    model.config.vision_config.attention_dropout = 0.1
    assert "attention_dropout" in why_not(model)
    model = frozen("minicpmv-2.6")
    model.vpm.post_layernorm = torch.nn.Sequential(model.vpm.post_layernorm, torch.nn.Dropout(0.1))
    assert "random" in why_not(model)
    model = get_peft_model(tiny_model("minicpmv-2.6"), LoraConfig(target_modules=r"vpm.*q_proj"))
    model.requires_grad_(False)
    assert "adapter sits" in why_not(model)


def test_a_tower_that_is_unfrozen_on_the_way_is_an_error():
    model = frozen("minicpmv-2.6")
    batch = ragged(model, [0])
    with VisionCache().at(model):
        model(**batch)
        model.vpm.requires_grad_(True)
        with pytest.raises(InputError, match="to be trained now"):
            model(**batch)


def test_copies_nesting_and_what_is_left():
    model, cache = frozen("minicpmv-2.6"), VisionCache()
    batch = ragged(model, [0])
    with torch.no_grad(), cache.at(model):
        loss = model(**batch).loss
        twin = copy.deepcopy(model)
        twin.vpm.post_layernorm.bias.data += 1
        with torch.no_grad():
            assert (twin(**batch).loss - loss).abs() > 1e-3
        with pytest.raises(InputError, match="already"), cache.at(model):
            pass
        pixels = batch["pixel_values"].clone().requires_grad_()
        with torch.enable_grad():
            model(**batch | {"pixel_values": pixels}).loss.backward()
        assert pixels.grad.abs().max() > 0
    assert "forward" not in model.vpm.__dict__


@pytest.fixture(scope="module")
def rows():
    return read_conversations(samples_folder() / "handwriting" / "train.json")[:12]


def lab(plan=TuningPlan(rank=4), **kwargs):
    torch.manual_seed(0)
    return apply_plan(load_vlm("lab", **kwargs), plan)


class Flipped(Samples):
    def __getitem__(self, i):
        row = super().__getitem__(i)
        return row | {"patches": [(x.flip(-1) if torch.rand(()) < 0.5 else x, size) for x, size in row["patches"]]}


def test_who_decides(rows):
    model, said = lab(), []
    samples = Samples(rows, Processor.of(model.config, load_tokenizer("lab")))
    assert (
        isinstance(choose_cache("auto", model, samples, 3), VisionCache)
        and choose_cache("auto", model, samples, 1) is None
    )
    assert choose_cache("memory", model, samples, 1) is not None and choose_cache("off", model, samples, 3) is None
    for choice in ("auto", "memory", "disk"):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        assert choose_cache(choice, model, Flipped(samples.conversations, samples.processor), 3, said.append) is None
        assert torch.equal(torch.get_rng_state(), before)
    assert len(said) == 3 and all("other pixels every time" in line for line in said)
    samples.augments = True
    assert is_random(samples)
    with pytest.raises(InputError, match="off, memory, disk"):
        choose_cache("RAM", model, samples, 3)
    trained = lab(TuningPlan(vision="lora"))
    assert choose_cache("auto", trained, samples, 3) is None
    with pytest.raises(InputError, match="vision: freeze"):
        choose_cache("disk", trained, samples, 3)


def test_a_training_with_the_cache_is_the_training_without(rows, tmp_path):
    "Pictures of one size: bit for bit, with the connector trained, evaluation and a resume included."
    schedule = Schedule(epochs=3, batch_size=4, learning_rate=1e-3, save_every=4)
    losses = {}
    weights = {}
    for name in ("without", "memory", "disk", "resumed"):
        model = lab().float()
        samples = Samples([r for r in rows], Processor.of(model.config, load_tokenizer("lab")))
        cache = {"without": None, "disk": VisionCache(tmp_path / "cache")}.get(name, VisionCache())
        folder = tmp_path / ("memory" if name == "resumed" else name)
        if name == "resumed":
            for late in sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[1:]:
                late.rename(tmp_path / late.name)
        run = fit(
            model,
            samples,
            schedule,
            folder,
            evaluation=samples,
            log_every=1,
            cache=cache,
            resume=name == "resumed",
            plan=TuningPlan(rank=4),
        )
        losses[name] = [h.get("loss", h.get("eval_loss")) for h in run.history]
        weights[name] = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if cache:
            assert cache.found >= 4 * 12 if name != "resumed" else cache.found
        assert "forward" not in model.get_base_model().vpm.__dict__
    assert any("resampler" in n for n in weights["memory"])
    for name in ("memory", "disk"):
        torch.testing.assert_close(
            torch.tensor(losses[name][:-1]), torch.tensor(losses["without"][:-1]), rtol=1e-5, atol=0
        )
    assert losses["memory"][:-1] == losses["disk"][:-1]
    for n, p in weights["memory"].items():
        assert torch.equal(p, weights["disk"][n]) and torch.equal(p, weights["resumed"][n])
        torch.testing.assert_close(p, weights["without"][n], rtol=1e-3, atol=1e-5)


def test_the_same_batches_are_the_same_bits(rows):
    model = lab().float()
    processor, collate = Processor.of(model.config, load_tokenizer("lab")), Collator(1)
    batches = [collate([processor(r)]) for r in rows[:6]]  # one picture each: alone, with or without a cache
    plain = [step(model, b) for b in batches]
    with VisionCache().at(model):
        for _ in range(2):
            for b, (loss, grads) in zip(batches, plain):
                found = step(model, b)
                assert found[0] == loss and all(torch.equal(found[1][n], g) for n, g in grads.items())


def test_the_doctor_works_behind_it(rows, tmp_path):
    class Pipeline(Samples):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return row if i != 5 else row | {"patches": [(x * math.nan, size) for x, size in row["patches"]]}

    model = lab().float()
    samples, cache = Pipeline(rows, Processor.of(model.config, load_tokenizer("lab"))), VisionCache()
    with pytest.raises(NonFiniteStep) as caught:
        fit(
            model,
            samples,
            Schedule(epochs=2, batch_size=4),
            tmp_path,
            save=False,
            cache=cache,
            callbacks=[NanDoctor(folder=tmp_path / "nan", say=lambda line: None)],
        )
    assert caught.value.diagnosis.cause == "corrupt input" and caught.value.diagnosis.samples == (5,)
    assert all(t.isfinite().all() for e in cache.store.entries.values() for t in e.values())


def test_a_job(rows, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VLM_LORA_LAB_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    data = str(samples_folder() / "mixed.json")
    (tmp_path / "job.yaml").write_text(
        f"data: {data}\noutput: {tmp_path / 'a'}\nvision_cache: disk\nfour_bit: false\n"
        "schedule: {max_steps: 8, batch_size: 2}\n"
    )
    assert main(["train", str(tmp_path / "job.yaml")]) == 0
    assert "pictures from the cache" in capsys.readouterr().out and list((tmp_path / "cache").glob("*/*.safetensors"))
    (tmp_path / "off.yaml").write_text(f"data: {data}\noutput: {tmp_path / 'b'}\nvision_cache: off\n")
    import yaml

    assert Job.of(yaml.safe_load((tmp_path / "off.yaml").read_text())).vision_cache == "off"  # YAML's off is false
    assert (
        main(["train", "--data", data, "--output", str(tmp_path / "c"), "--vision-cache", "memory", "--vision", "lora"])
        == 2
    )
    assert "vision: lora" in capsys.readouterr().err and not (tmp_path / "c").exists()
    with pytest.raises(InputError, match="auto, off, memory, disk"):
        Job.of({"data": data, "output": "x", "vision_cache": "RAM"})
    assert json.loads((tmp_path / "a" / "job.json").read_text())["vision_cache"] == "disk"
