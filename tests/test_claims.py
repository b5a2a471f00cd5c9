"""The claims: each has a place, numbers and a rule that other numbers would turn; and a small run today agrees with the
ledger."""

import json
from pathlib import Path

import pytest

from vlm_lora_lab.errors import InputError
from vlm_lora_lab.study import evidence
from vlm_lora_lab.study.claims import CLAIMS, LEDGER, WORDS, Ledger, Verdict, disagrees, judge, main
from vlm_lora_lab.study.experiments import results

ROOT = Path(__file__).parent.parent
NO = [-0.01, 0.01, 0.0, 0.02, -0.02]
UP = [0.3, 0.31, 0.29, 0.3, 0.32]
DOWN = [-0.3, -0.31, -0.29, -0.3, -0.32]
OTHER = {  # numbers that nobody has measured, and the word that they would give
    "C1": ({"moved": 13}, "refuted"),
    "C2": ({"back": 0}, "refuted"),
    "C3": ({"back": 13}, "confirmed"),
    "C4": ({"old words": NO, "old places": NO, "old pictures": NO}, "confirmed"),
    "C5": ({"fine_without": 4}, "refuted"),
    "C6": ({"raised": 0}, "refuted"),
    "C7": ({"back_other_adapter_name": 33, "back_bare_base": 33}, "confirmed"),
    "C8": ({"back": 0}, "refuted"),
    "C9": ({"head names": NO, "embeddings letters": NO, "embeddings sides": NO}, "refuted"),
    "C10": ({"base_moved": 0}, "confirmed"),
    "C11": ({"same_gradients": 3, "both over full": DOWN}, "confirmed"),
    "C12": ({"both": 1e13}, "confirmed"),
    "C13": ({"script": 0.01}, "confirmed"),
    "C14": ({"full over LoRA": UP, "LoRA and resampler over full": DOWN, "step_time_ratio": 0.5}, "confirmed"),
    "C15": ({"over both together": NO}, "confirmed"),
    "C16": ({"methods_in_a_model": 1, "stages": 1, "adapter_same": 0}, "confirmed"),
    "C17": ({"rank 8": NO}, "depends"),
    "C18": ({"lora_in_torch": 1}, "confirmed"),
    "C19": ({"vpm_out": 3584}, "confirmed"),
    "C20": ({"new pictures": NO, "new words": UP}, "refuted"),
    "C21": ({"causes_that_write_it": 0}, "refuted"),
    "C22": ({"nan_from_freezing_alone": 1}, "confirmed"),
    "C23": ({"unfiltered_is_nan": 0}, "confirmed"),
    "C24": ({"share_lost": 0}, "confirmed"),
    "C25": ({"healed_tune_vision": 3, "healed_bf16": 3}, "confirmed"),
    "C26": ({"healed": 3}, "confirmed"),
    "C27": ({"gpu_steps": 4}, "confirmed"),
    "C28": ({"layers_in_4_bit": 10, "bytes_with": 1}, "confirmed"),
    "C29": ({f"lost {t}": NO for t in ("words", "places", "pictures")}, "confirmed"),
}


@pytest.fixture(scope="module")
def ledger():
    return Ledger.read()


def markdown(name):
    return "\n".join(
        "".join(c["source"])
        for c in json.loads((ROOT / "nbs" / name).read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "markdown"
    )


def test_every_claim_has_a_row_and_no_cell_is_empty(ledger):
    assert list(CLAIMS) == list(ledger.entries) == [f"C{i}" for i in range(1, 30)]
    for entry in ledger.entries.values():
        assert all(entry.cells) and entry.numbers and entry.facts["date"] and entry.facts["versions"]["peft"]
        assert entry.verdict.main is None or entry.verdict.seeds >= 3


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=list(CLAIMS))
def test_a_claim_names_a_heading_that_its_chapter_has(claim):
    assert any(
        line.lstrip("#") == f" {claim.heading}"
        for line in markdown(f"{claim.chapter}.ipynb").splitlines()
        if line.startswith("#")
    )


def test_the_chapter_shows_the_ledger(ledger):
    outputs = [
        o
        for c in json.loads((ROOT / "nbs" / "reference" / "study.claims.ipynb").read_text(encoding="utf-8"))["cells"]
        for o in c.get("outputs", ())
    ]
    assert ledger._repr_markdown_() in ["".join(o.get("data", {}).get("text/markdown", "")) for o in outputs]


@pytest.mark.parametrize("name", OTHER)
def test_other_numbers_would_give_another_verdict(ledger, name):
    entry, (changes, word) = ledger.entries[name], OTHER[name]
    assert set(changes) <= set(entry.numbers) and word in WORDS
    assert entry.claim.rule(entry.numbers | changes).word == word != entry.verdict.word


def test_what_has_seeds_is_what_the_experiments_hold(ledger):
    for entry in ledger.entries.values():
        if entry.claim.experiments:
            today = {k: v for k, v in entry.claim.numbers(results).items() if isinstance(v, list)}
            assert today == {k: v for k, v in entry.numbers.items() if isinstance(v, list)}, entry.claim.id


def test_a_verdict_that_is_none_cannot_be_written():
    for wrong in (
        lambda: Verdict("maybe", "x"),
        lambda: Verdict("depends", "x"),
        lambda: Verdict("confirmed", "x", "y"),
        lambda: judge(True, True, "x", "y"),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_a_small_run_may_be_smaller_and_not_the_other_way(ledger):
    entry = ledger.entries["C4"]
    assert (
        disagrees(entry, {"new places": [0.1]}) == ""
        and "new places" in disagrees(entry, {"new places": [-0.1]})
        and disagrees(entry, {"new places": [0.01]})
    )
    assert disagrees(entry, {"new words": [-0.1]}) == "" and disagrees(entry, {"new words": [0.3]})
    assert "confirmed today" in disagrees(ledger.entries["C24"], {"share_lost": 0})


def test_a_ledger_with_a_typed_verdict_is_refused(tmp_path, capsys):
    said = json.loads(LEDGER.read_text(encoding="utf-8"))
    said["C19"]["verdict"] = "confirmed"
    (path := tmp_path / "typed.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match="C19"):
        Ledger.read(path)
    said["C19"] |= {
        "verdict": "confirmed",
        "numbers": said["C19"]["numbers"] | {"vpm_out": said["C19"]["numbers"]["llm_in"]},
    }
    path.write_text(json.dumps(said))
    assert main(["--claims", "C18,C19", "--quick", "--output", str(path)]) == 1
    assert "C19  DISAGREES" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--claims", "C30"], "C30"),
        (["--claims", ""], "C29"),
        (["--claims", "C1", "--quick", "--stored"], "one of them"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, says, capsys):
    assert main(arguments) == 2 and says in capsys.readouterr().err


def test_measuring_keeps_the_other_entries_and_refuses_another_file(tmp_path, capsys):
    path = tmp_path / "claims.json"
    assert (
        main(["--claims", "C19", "--output", str(path)]) == 0
        and main(["--claims", "c18", "--stored", "--output", str(path)]) == 0
    )
    assert list(Ledger.read(path).entries) == ["C18", "C19"]
    (other := tmp_path / "other.json").write_text('{"C1": 3}')
    assert main(["--claims", "C19", "--output", str(other)]) == 2 and other.read_text() == '{"C1": 3}'
    assert (
        main(["--claims", "C1", "--quick", "--output", str(path)]) == 2
        and "does not hold C1" in capsys.readouterr().err
    )


TRAINED = ("C9", "C14", "C15", "C17", "C20")  # those with ten trainings of their own; C4 and C29 share two with others


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([c for c in CLAIMS if c not in TRAINED], id="looked at"),
        pytest.param(list(TRAINED), id="trained", marks=pytest.mark.slow),
    ],
)
def test_the_ledger_agrees_with_a_quick_run_today(ids, capsys):
    assert main(["--claims", ",".join(ids), "--quick"]) == 0, capsys.readouterr().out
    assert set(TRAINED) < set(evidence.REDUCED) <= set(CLAIMS)
