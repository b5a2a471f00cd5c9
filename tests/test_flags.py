"""Old flags as plans, and plans as previews, held to what is really applied."""

import itertools

import pytest
from families import FAMILIES, tiny_config, tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

from vlm_lora_lab.checkpoint.rescue import recognise
from vlm_lora_lab.checkpoint.save import save_adapter
from vlm_lora_lab.cli import main
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import load_tokenizer, load_vlm
from vlm_lora_lab.models.parts import count
from vlm_lora_lab.models.published import on_meta
from vlm_lora_lab.plan.tuning import TuningPlan, apply_plan
from vlm_lora_lab.plan.preview import Preview
from vlm_lora_lab.scripts.known import FORMATS, SCRIPTS, flags_in, from_flags, register_script
from vlm_lora_lab.scripts.script import OWN_FILE, Format, Script, Translation, full_at, plan_in_words, reached

TABLE = [  # script, flags, words for vision, connector, language, embeddings, head; or what the error must say
    ("minicpmv", {}, "full full full full full"),
    ("minicpmv", dict(use_lora=True), "--use_lora true and --tune_llm true.*cannot simultaneously.*language: lora"),
    ("minicpmv", dict(use_lora=True, tune_llm=False), "full full lora full freeze"),
    ("minicpmv", dict(use_lora=True, tune_llm=False, tune_vision=False), "freeze full lora full freeze"),
    ("minicpmv", dict(tune_llm=False), "full full freeze freeze freeze"),
    ("minicpmv", dict(tune_llm=False, tune_vision=False), "freeze full freeze freeze freeze"),
    ("qwenvl", {}, "freeze full full full full"),
    ("qwenvl", dict(fix_vit=False), "full full full full full"),
    ("qwenvl", dict(use_lora=True), "freeze freeze lora freeze freeze"),
    ("qwenvl", dict(use_lora=True, chat=False), "freeze freeze lora full full"),
    ("qwenvl", dict(use_lora=True, q_lora=True, chat=False), "freeze freeze lora freeze freeze"),
    ("qwen3vl", dict(tune_mm_mlp=True), "freeze full freeze freeze freeze"),
    ("qwen3vl", dict(tune_mm_mlp=True, tune_mm_llm=True), "freeze full full full full"),
    ("qwen3vl", dict(lora_enable=True), "freeze freeze lora freeze freeze"),
    ("qwen3vl", dict(lora_enable=True, tune_mm_vision=True), "--lora_enable true and --tune_mm_vision true contradict"),
    ("qwen3vl", {}, "nothing would be trained"),
    ("llamafactory", {}, "freeze freeze lora freeze freeze"),
    ("llamafactory", dict(freeze_vision_tower=False), "lora freeze lora freeze freeze"),
    (
        "llamafactory",
        dict(freeze_multi_modal_projector=False),
        "freeze_multi_modal_projector: false contradict.*connector: full",
    ),
    ("llamafactory", dict(finetuning_type="full", freeze_multi_modal_projector=False), "freeze full full full full"),
    ("swift", {}, "freeze freeze lora freeze freeze"),
    ("swift", dict(freeze_aligner=False), "freeze lora lora freeze freeze"),
    ("swift", dict(train_type="full", freeze_llm=True, freeze_aligner=False), "freeze full freeze freeze freeze"),
    ("swift", dict(tuner_type="full", freeze_llm=True, freeze_aligner=False), "freeze full freeze freeze freeze"),
    ("swift", dict(tuner_type="lora_llm"), "full full lora freeze freeze"),
    ("swift", dict(tuner_type="adalora"), "tuner_type is 'adalora'.*Write lora, lora_llm or full"),
    ("swift", dict(init_weights="pissa", use_dora=True), "PiSSA with use_dora"),
    ("llamafactory", dict(finetuning_type="freeze"), "freeze freeze full freeze freeze"),
    ("llamafactory", dict(finetuning_type="oft"), "finetuning_type is 'oft'.*Write lora, freeze or full"),
    ("llamafactory", dict(additional_target="embed_tokens,lm_head"), "freeze freeze lora full full"),
    ("llamafactory", dict(pissa_init=True), "pissa_init.*variant: pissa"),
    ("trl", {}, "full full full full full"),
    ("trl", dict(use_peft=True, lora_target_modules="all-linear"), "lora lora lora freeze freeze"),
    ("axolotl", {}, "full full full full full"),
    ("axolotl", dict(adapter="lora", lora_r=8, lora_alpha=8), "no layer is a target.*lora_target_linear=true"),
    ("axolotl", dict(adapter="lora", lora_target_linear=True), "lora_r and lora_alpha are not both given"),
    ("unsloth", {}, "lora freeze lora freeze freeze"),
    ("unsloth", dict(finetune_vision_layers=False, finetune_language_layers=False), "no part is to be trained"),
]


@pytest.mark.parametrize("script, flags, expected", TABLE, ids=lambda v: str(v)[:40])
def test_what_old_flags_amount_to(script, flags, expected):
    if set(expected.split()) <= {"freeze", "lora", "full"}:
        assert " ".join(from_flags(script, **flags).plan.words.values()) == expected
    else:
        with pytest.raises(InputError, match=expected):
            from_flags(script, **flags)


def test_every_combination_is_a_plan_or_one_sentence():
    tried = 0
    for script, known in SCRIPTS.items():
        if not known.translate:
            continue
        switches = [n for n, v in known.flags.items() if isinstance(v, bool)]
        for values in itertools.product((False, True), repeat=len(switches)):
            tried += 1
            try:
                assert isinstance(from_flags(script, **dict(zip(switches, values))).plan, TuningPlan)
            except InputError as e:
                assert e.found and e.remedy
    assert tried == 4 * 16 + 32 + 64 + 16 + 64  # four with four switches, swift, llamafactory, axolotl, unsloth


@pytest.mark.parametrize(
    "script, flags",
    [
        ("mystery", {}),
        ("trl", {"lora_rank": 8}),
        ("minicpmv", {"tune_vit": True}),
        ("minicpmv", {"use_lora": "yes"}),
        ("swift", {"tuner_type": "dora"}),
    ],
)
def test_unknown_scripts_flags_and_values(script, flags):
    with pytest.raises(InputError, match="Known are|Write"):
        from_flags(script, **flags)


def trained_by(script, model, **flags):
    "How many weights the plan of some flags trains in a model."
    return Preview.of(model, from_flags(script, model, **flags).plan).trained


def test_llamafactory_on_qwen3_vl_trains_what_its_own_lines_say():
    """Version 0.9.5, rank 4, on a tiny Qwen3-VL with two deepstack mergers.

    22,656 with the vision tower, of which 3,584 on these mergers; 24,448 with the projector as well; 24,832 for the
    projector in full."""
    model = on_meta(tiny_config("qwen3_vl", vision_config={"deepstack_visual_indexes": [0, 1]}))
    words = from_flags("llamafactory", freeze_vision_tower=False, lora_rank=4).plan
    assert words.words == dict(vision="lora", connector="freeze", language="lora", embeddings="freeze", head="freeze")
    opened = dict(lora_rank=4, freeze_vision_tower=False)
    vision = trained_by("llamafactory", model, **opened)
    assert vision - Preview.of(model, words).trained == 22_656 - 19_072
    both = trained_by("llamafactory", model, **opened, freeze_multi_modal_projector=False)
    assert both - vision == 24_448 - 22_656
    projector = dict(finetuning_type="full", freeze_multi_modal_projector=False, freeze_language_model=True)
    assert trained_by("llamafactory", model, **projector) == 24_832
    with pytest.raises(InputError, match="does not train the projector"):  # no target is a piece of its names
        from_flags("llamafactory", model, freeze_multi_modal_projector=False)
    last = from_flags("llamafactory", model, finetuning_type="freeze", freeze_trainable_layers=1).plan
    assert last.language == "full on model.language_model.layers.3" and last.connector == last.vision == "freeze"


def test_a_head_that_would_leave_its_tie_is_no_plan():
    model = on_meta(tiny_config("qwen3_vl"))
    for script, flags in (
        ("llamafactory", dict(additional_target="lm_head")),
        ("swift", dict(modules_to_save="embed_tokens")),
        ("trl", dict(use_peft=True, lora_target_modules="q_proj", lora_modules_to_save="lm_head")),
    ):
        with pytest.raises(InputError, match="one tensor in this model.*Write embeddings: full"):
            from_flags(script, model, **flags)
    with pytest.raises(InputError, match="lm_hed, which this model does not have"):
        from_flags("llamafactory", model, additional_target="lm_hed")
    untied = from_flags("llamafactory", on_meta(tiny_config("qwen2_vl")), additional_target="lm_head").plan
    assert untied.head == "full" and untied.embeddings == "freeze"


@pytest.mark.parametrize("family", ["minicpmv-2.6", "qwen2_vl", "qwen3_vl"])
def test_names_reach_what_peft_reaches(family):
    "PEFT is the judge of lists of names, wherever a tool hands them on."
    for names in ("q_proj,v_proj", "all-linear"):
        listed = names if names == "all-linear" else names.split(",")
        wrapped = get_peft_model(tiny_model(family), LoraConfig(r=4, target_modules=listed))
        real = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        model = on_meta(tiny_config(family))
        assert trained_by("trl", model, use_peft=True, lora_r=4, lora_target_modules=names) == real
        if names != "all-linear":
            assert trained_by("swift", model, lora_rank=4, target_modules=names) == real
            keys = dict(adapter="lora", lora_r=4, lora_alpha=8, lora_target_modules=names)
            assert trained_by("axolotl", model, **keys) == real


def test_unsloth_s_booleans_and_swift_s_rates():
    model = on_meta(tiny_config("qwen2_vl"))
    every = from_flags("unsloth", model).plan
    assert (every.vision, every.connector, every.language) == ("lora", "freeze", "lora")
    attention = from_flags("unsloth", model, finetune_mlp_modules=False, finetune_vision_layers=False).plan
    assert set(attention.language.removeprefix("lora(targets=").rstrip(")").split("+")) == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    with pytest.raises(InputError, match="reach nothing"):
        from_flags("unsloth", on_meta(tiny_config("minicpmv-2.6")), finetune_mlp_modules=False)
    rates = from_flags("swift", freeze_vit=False, freeze_aligner=False, vit_lr=1e-5, aligner_lr=2e-5).plan
    assert (rates.vision, rates.connector) == ("lora(lr=1e-05)", "lora(lr=2e-05)")
    llm = from_flags("swift", tuner_type="lora_llm", vit_lr=1e-5, lora_dropout=0.1).plan
    assert (llm.vision, llm.connector, llm.dropout) == ("full(lr=1e-05)", "full", 0)
    both = from_flags("llamafactory", use_dora=True, use_rslora=True).plan
    assert both.variant == "rsdora"


def test_names_that_reach_more_than_linear_layers_are_refused():
    "The merger of a Qwen2-VL has layers that are called 0 and 2, as whole layers are."
    words = {n.rpartition(".")[2] for n, m in tiny_model("qwen2_vl").named_modules() if isinstance(m, nn.Linear)}
    with pytest.raises(ValueError, match="is not supported"):
        get_peft_model(tiny_model("qwen2_vl"), LoraConfig(r=4, target_modules=sorted(words - {"lm_head"})))
    keys = dict(adapter="lora", lora_r=4, lora_alpha=8, lora_target_linear=True)
    with pytest.raises(InputError, match="is no linear layer: no plan can say that"):
        from_flags("axolotl", on_meta(tiny_config("qwen2_vl")), **keys)
    plan = from_flags("axolotl", on_meta(tiny_config("minicpmv-2.6")), **keys).plan
    assert plan.vision == plan.language == "lora" and plan.connector != "freeze" and plan.head == "freeze"


def test_every_description_says_its_version():
    assert [s.name for s in SCRIPTS.values() if s.translate and not s.version] == []


def test_the_help_of_the_commands_names_every_script(capsys):
    for command in ("plan", "rescue"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = capsys.readouterr().out
        assert [name for name, s in SCRIPTS.items() if s.translate and name not in said] == []


def test_a_script_is_added_from_outside(tmp_path):
    name = "mine.bin"
    form = Format("mine", name, full_at("beside", "connector"), ("https://example.org",), OWN_FILE, files=(name,))
    plan = plan_in_words("freeze", "full", "freeze", "freeze", "freeze")
    mine = Script("mine", "mine", {"mine": form}, {"deep": True}, lambda flags: Translation(plan, False, ()), "deep")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="no script 'mine'"):
        from_flags("mine")
    with pytest.raises(InputError, match="mine.bin may hold weights"):
        recognise(tmp_path)
    register_script(mine)
    try:
        assert from_flags("mine", deep=False).plan == plan and flags_in({"deep": True}) == ("mine", {"deep": True})
        assert recognise(tmp_path).format == "mine"
        with pytest.raises(InputError, match="'mine' is known already"):
            register_script(mine)
    finally:
        del SCRIPTS["mine"], FORMATS["mine"]


def test_flags_are_still_found_where_they_were():
    from vlm_lora_lab.flags import from_flags as old

    assert old is from_flags


def test_translated_plans_can_be_applied_where_their_script_ran():
    for script, flags, model in (
        ("minicpmv", dict(use_lora=True, tune_llm=False), "minicpmv-2.6"),
        ("qwenvl", dict(use_lora=True, chat=False), "qwen"),
        ("qwen3vl", dict(lora_enable=True), "qwen3_vl"),
    ):
        plan = from_flags(script, **flags).plan
        assert (
            sum(count(apply_plan(tiny_model(model), plan), trainable=True).values())
            == Preview.of(tiny_model(model), plan).trained
        )


PLANS = [
    TuningPlan(rank=3),
    TuningPlan(vision="lora", connector="freeze"),
    TuningPlan(head="lora", embeddings="lora"),
    TuningPlan(vision="full", connector="full"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_preview_on_the_meta_device_is_what_is_applied(family):
    for plan in PLANS:
        try:
            seen = Preview.of(on_meta(tiny_config(family)), plan)
        except InputError as e:
            with pytest.raises(InputError, match=e.found[:20]):
                apply_plan(tiny_model(family), plan)
            continue
        assert {r[0]: r[3] for r in seen.rows} == count(apply_plan(tiny_model(family), plan), trainable=True)


def test_the_size_on_disk_is_the_file(tmp_path):
    plan = TuningPlan(vision="lora", rank=8)
    model = apply_plan(load_vlm("lab"), plan)
    folder = save_adapter(model, tmp_path / "adapter", plan, "lab", load_tokenizer("lab"), False)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert 0 <= size - Preview.of(on_meta("lab"), plan).adapter_bytes < 50_000  # the header


def test_the_plan_command(capsys):
    assert main(["plan", "openbmb/MiniCPM-V-2_6", "--rank", "32", "--vision", "lora"]) == 0
    shown = capsys.readouterr().out
    assert "resampler" in shown and "adapter on disk" in shown and "8,099,175,152" in shown
    assert (
        main(["plan", "Qwen/Qwen-VL", "--targets", "q_proj"]) == 2 and "Choose among c_attn" in capsys.readouterr().err
    )
    assert (
        main(["plan", "lab", "--flags", "minicpmv", "use_lora=true"]) == 2
        and "--tune_llm true" in capsys.readouterr().err
    )
    assert (
        main(["plan", "lab", "--flags", "minicpmv", "use_lora=true", "tune_llm=false", "lora_r=8"]) == 0
        and "modules_to_save is fixed" in capsys.readouterr().out
    )
    assert (
        main(["plan", "lab", "--flags", "minicpmv", "use_lora"]) == 2
        and main(["plan", "lab", "--rank", "4", "--flags", "minicpmv"]) == 2
    )


def test_the_order_in_which_names_come_does_not_matter():
    model = on_meta("lab")
    layers = [n for n, _ in model.named_modules() if n.endswith(("q_proj", "v_proj"))]
    plans = [reached(model, names, (), 8, 16) for names in (layers, layers[::-1], sorted(layers, key=hash))]
    assert plans[0] == plans[1] == plans[2] and plans[0].language == "lora(targets=q_proj+v_proj)"
