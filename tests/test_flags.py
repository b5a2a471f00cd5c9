"""Old flags as plans, and plans as previews, held to what is really applied."""

import itertools

import pytest
from families import FAMILIES, tiny_config, tiny_model

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
from vlm_lora_lab.scripts.script import OWN_FILE, Format, Script, Translation, full_at, plan_in_words

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
    assert tried == 64 + 8 - 8


@pytest.mark.parametrize(
    "script, flags",
    [
        ("axolotl", {}),
        ("minicpmv", {"tune_vit": True}),
        ("minicpmv", {"use_lora": "yes"}),
        ("swift", {"train_type": "dora"}),
    ],
)
def test_unknown_scripts_flags_and_values(script, flags):
    with pytest.raises(InputError, match="Known are|Write"):
        from_flags(script, **flags)


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
