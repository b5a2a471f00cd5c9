"""Edge cases of the native model that no reference tensor covers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from vlm_lora_lab.models.load import lab_folder, load_vlm
from vlm_lora_lab.models.minicpmv import MiniCPMV, MiniCPMV26Config, MiniCPMVConfig
from vlm_lora_lab.models.resampler import Resampler, attention_maps

TINY = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=128,
    query_num=4,
    resampler_num_heads=4,
    pad_token_id=0,
    eos_token_id=1,
    initializer_range=0.2,
    vision_config=dict(
        hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=70, patch_size=14
    ),
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MiniCPMV(MiniCPMV26Config(**TINY)).eval()


def picture_row(start=2, length=12, row=0):
    return dict(
        input_ids=torch.randint(2, 128, (1, length), generator=torch.Generator().manual_seed(row)),
        pixel_values=torch.randn(1, 3, 14, 6 * 14, generator=torch.Generator().manual_seed(row)),
        tgt_sizes=torch.tensor([[2, 3]]),
        image_bound=torch.tensor([[0, start, start + 4]]),
    )


def test_generate_pads_on_the_left_without_changing_answers(model):
    short, long = picture_row(length=9, row=1), picture_row(length=14, row=2)
    alone = [model.generate(**row, max_new_tokens=6, do_sample=False) for row in (short, long)]
    batch = {
        "input_ids": torch.cat(
            [torch.cat([torch.zeros(1, 5, dtype=torch.long), short["input_ids"]], 1), long["input_ids"]]
        ),
        "attention_mask": torch.tensor([[0] * 5 + [1] * 9, [1] * 14]),
        "pixel_values": torch.cat([short["pixel_values"], long["pixel_values"]]),
        "tgt_sizes": torch.cat([short["tgt_sizes"], long["tgt_sizes"]]),
        "image_bound": torch.tensor([[0, 7, 11], [1, 2, 6]]),
    }
    together = model.generate(**batch, max_new_tokens=6, do_sample=False)
    for i, one in enumerate(alone):
        assert together[i, : one.shape[1]].tolist() == one[0].tolist()


def test_beam_search_keeps_each_row_with_its_picture(model):
    rows = [picture_row(row=1), picture_row(row=2)]
    batch = {k: torch.cat([r[k] for r in rows]) for k in ("input_ids", "pixel_values", "tgt_sizes")}
    batch["image_bound"] = torch.tensor([[0, 2, 6], [1, 2, 6]])
    together = model.generate(**batch, max_new_tokens=4, num_beams=3, do_sample=False)
    for i, row in enumerate(rows):
        alone = model.generate(**row, max_new_tokens=4, num_beams=3, do_sample=False)
        assert together[i, : alone.shape[1]].tolist() == alone[0].tolist()


def test_generate_equals_greedy_decoding_by_hand(model):
    row = picture_row(row=3)
    ids, expected = row["input_ids"], []
    for _ in range(5):
        token = model(**{**row, "input_ids": ids}).logits[:, -1].argmax(-1)
        expected.append(token.item())
        ids = torch.cat([ids, token[:, None]], 1)
    assert model.generate(**row, max_new_tokens=5, do_sample=False, eos_token_id=-1)[0].tolist() == expected


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_number_of_pictures_in_a_row(model, count):
    bounds = torch.tensor([[1, 1 + 5 * i, 5 + 5 * i] for i in range(count)]).reshape(-1, 3)
    pictures = (
        dict(pixel_values=torch.randn(count, 3, 14, 28), tgt_sizes=torch.tensor([[1, 2]] * count), image_bound=bounds)
        if count
        else {}
    )
    out = model(input_ids=torch.randint(2, 128, (2, 20)), **pictures)
    assert out.logits.shape == (2, 20, 128) and out.logits.isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image_bound=torch.tensor([[0, 2, 5]])), "room for"),
        (dict(image_bound=torch.zeros(0, 3, dtype=torch.long)), "1 pictures"),
        (dict(pixel_values=None), "0 pictures"),
    ],
)
def test_pictures_and_places_must_agree(model, change, message):
    with pytest.raises(ValueError, match=message):
        model(**{**picture_row(), **change})


def test_reload_is_exact_and_positions_are_not_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    again, report = MiniCPMV.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    row = picture_row()
    assert torch.equal(again.eval()(**row).logits, model(**row).logits)

    def plain(m):
        return {k: v for k, v in m.config.to_dict()["vision_config"].items() if k != "dtype"}

    assert plain(again) == plain(model)
    assert not any("pos_embed" in key for key in again.state_dict())


def test_positions_grow_and_stay_right_when_a_larger_picture_comes():
    torch.manual_seed(0)
    resampler, x = Resampler(4, 32, 4, 16), torch.randn(1, 6, 16)
    before = resampler(x, torch.tensor([[2, 3]]))
    resampler(torch.randn(1, 40, 16), torch.tensor([[10, 4]]))
    resampler(torch.randn(1, 40, 16), torch.tensor([[4, 10]]))
    assert torch.equal(resampler(x, torch.tensor([[2, 3]])), before)


@pytest.mark.parametrize("stored_table", [False, True])
@pytest.mark.parametrize("temporal_ids", [None, torch.tensor([[0, 3], [0, 4], [1, -1]])])
def test_attention_maps_are_the_weights_that_the_resampler_uses(stored_table, temporal_ids):
    torch.manual_seed(0)
    resampler = Resampler(4, 32, 4, 16, stored_table=stored_table)
    x, sizes = torch.randn(3, 6, 16), torch.tensor([[2, 3], [2, 2], [1, 3]])
    maps = attention_maps(resampler, x, sizes, temporal_ids)
    lengths = [6, 4, 3] if temporal_ids is None else [10, 3]
    assert maps.shape == (len(lengths), 4, 4, max(lengths))
    assert [int((m > 0).any(0).any(0).sum()) for m in maps] == lengths  # nothing on padding
    query, _, value, _ = resampler._inputs(x, sizes, temporal_ids)
    *_, v = resampler.attn._heads(query, value, value)
    taken = resampler.attn.out_proj((maps @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(resampler.ln_post(taken) @ resampler.proj, resampler(x, sizes, temporal_ids))


def test_equal_widths_leave_the_projection_out_as_upstream_does():
    assert not any("kv_proj" in name for name in Resampler(4, 32, 4, 32).state_dict())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_lora_gradients(model, reentrant):
    """UPSTREAM: an in-place scatter raises 'a view of a leaf Variable …' here."""
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules=r"llm\..*q_proj", r=2, init_lora_weights=False))
    labels = picture_row()["input_ids"]

    def grads():
        model.zero_grad()
        model(**picture_row(), labels=labels, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    model.train()
    plain = grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    for name, grad in grads().items():
        torch.testing.assert_close(grad, plain[name])


def test_frozen_vision_and_text_only_training_need_no_picture(model):
    model.requires_grad_(False).train()
    model.llm.lm_head.weight.requires_grad_(True)
    ids = torch.randint(2, 128, (1, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.llm.lm_head.weight.grad.abs().sum() > 0


def test_other_versions_are_refused():
    for version in (3.7, "next", None):
        with pytest.raises(ValueError, match="2.0, 2.5, 2.6, 4.0, 4.5"):
            MiniCPMVConfig.from_dict(TINY | {"version": version})
    with pytest.raises(ValueError, match="cannot hold version"):
        MiniCPMV26Config.from_dict(TINY | {"version": 4.5})
    with pytest.raises(ValueError, match="from_dict"):
        MiniCPMVConfig(query_num=4)


def test_the_lab_model_is_what_the_course_says():
    files = list(lab_folder().glob("*.safetensors"))
    model = MiniCPMV.from_pretrained(lab_folder())
    assert sum(f.stat().st_size for f in files) <= 8_000_000
    assert 1_900_000 <= sum(p.numel() for p in model.parameters()) <= 4_000_000


def test_evaluating_a_4_bit_model_first_changes_no_gradient():
    """bitsandbytes 0.50 repacks weights for inference on CPUs with AVX512-BF16, and the packed layers have no backward
    pass."""
    import bitsandbytes as bnb

    grads = []
    for evaluate in (False, True):
        model, ids = load_vlm("lab", four_bit=True), torch.arange(20, 40)[None]
        if evaluate:
            with torch.no_grad():
                model(input_ids=ids)
        assert not any(
            getattr(m.weight.quant_state, "packing_format_for_cpu", False)
            for m in model.modules()
            if isinstance(m, bnb.nn.Linear4bit)
        )
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        model.train()(inputs_embeds=embeds, labels=ids).loss.backward()
        grads.append(embeds.grad)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0
