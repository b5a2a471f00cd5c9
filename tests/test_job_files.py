"""Files of settings: equal keys, repetitions, encodings, and what is no file of settings at all."""

import os
import re
import shutil

import pytest

from vlm_lora_lab.cli import main
from vlm_lora_lab.data.records import samples_folder
from vlm_lora_lab.models.published import lab_folder


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("job.yaml", "data: a.json\noutput: o\ndata: b.json", "line 3: the key 'data' is there twice, first in line 1"),
        (
            "job.yaml",
            "data: a.json\noutput: o\nplan:\n  rank: 8\n  alpha: 3\n  rank: 8",
            "line 6: the key 'rank' is there twice, first in line 4",
        ),
        ("job.yaml", "data: a.json\noutput: o\nplan: {rank: 8, rank: 9}", "line 3: the key 'rank' is there twice."),
        (
            "job.yaml",
            "data: a.json\noutput: o\n'output': p",
            "line 3: the key 'output' is there twice, first in line 2",
        ),
        (
            "job.yaml",
            "data: a.json\noutput: o\nstages:\n- plan: {rank: 8}\n  steps: 1\n  steps: 2",
            "line 6: the key 'steps' is there twice, first in line 5",
        ),
        (
            "job.yaml",
            "data: a.json\noutput: o\nplan: {rank: 8}\nschedule: {epochs: 1}\nplan: {alpha: 8}",
            "line 5: the key 'plan' is there twice, first in line 3",
        ),
        (
            "job.json",
            '{"data": "a.json", "output": "o",\n"data": "b.json"}',
            "line 2: the key 'data' is there twice, first in line 1",
        ),
        (
            "job.json",
            '{"data": "a.json", "output": "o", "plan": {\n\t"rank": 8,\n\t"rank": 9}}',
            "line 3: the key 'rank' is there twice, first in line 2",
        ),
        (
            "job.json",
            '{"data": "a.json", "output": "o", "stages": [{"steps": 1, "steps": 2}]}',
            "line 1: the key 'steps' is there twice.",
        ),
        (
            "stages.yaml",
            "- plan: {rank: 8}\n  steps: 1\n- steps: 1\n  plan: {rank: 8}\n  steps: 1",
            "line 5: the key 'steps' is there twice, first in line 3",
        ),
        ("stages.json", '{"stages": [{"plan": {"rank": 8, "rank": 9}}]}', "line 1: the key 'rank' is there twice."),
    ],
)
def test_of_two_equal_keys_none_is_taken(name, text, said, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    argv = (
        [str(tmp_path / name)]
        if name.startswith("job")
        else ["--data", "a.json", "--output", "o", "--stages", str(tmp_path / name)]
    )
    for command in ("train", "doctor"):
        assert main([command, *argv]) == 2
        err = capsys.readouterr().err
        assert said in err and f"{name}, line" in err and err.count("\n") == 1
    if name.startswith("stages"):
        assert main(["plan", "lab", "--stages", str(tmp_path / name)]) == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--rank", "8", "--rank", "16"], ["--data", "a.json", "--data=b.json"], ["--four-bit", "--no-four-bit"]]
)
def test_of_two_equal_flags_none_is_taken(argv, capsys):
    with pytest.raises(SystemExit) as e:
        main(["train", *argv, "--output", "o"])
    assert e.value.code == 2 and re.search("twice|both given", capsys.readouterr().err)
    assert main(["plan", "lab", "--flags", "minicpmv", "use_lora=true", "use_lora=false"]) == 2
    assert "the flag 'use_lora' is there twice" in capsys.readouterr().err


def test_what_may_be_repeated(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "lab", "--metric", "exact", "--metric", "cer", "--help"])
    assert "twice" not in capsys.readouterr().err


def test_the_files_of_a_checkpoint_say_nothing_twice(tmp_path, capsys):
    shutil.copytree(lab_folder(), tmp_path / "model")
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if not (file := tmp_path / "model" / name).is_file():
            file.write_text("{}")
        text = file.read_text()
        file.write_text(
            text.rstrip().rstrip("}").rstrip()
            + (", " if len(text) > 5 else "")
            + '"hidden_size": 1,\n"hidden_size": 2}'
        )
        assert (
            main(
                [
                    "doctor",
                    "--data",
                    str(samples_folder() / "handwriting" / "train.json"),
                    "--model",
                    str(tmp_path / "model"),
                ]
            )
            == 2
        )
        said = " ".join(capsys.readouterr().out.split())
        assert name in said and "the key 'hidden_size' is there twice" in said, said
        file.write_text(text)


def test_laughs_and_loops_are_counted_before_they_are_printed(tmp_path, capsys):
    lines = [
        "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]",
        *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)),
    ]
    for text in ("\n".join(lines), "data: &a [*a]"):
        (tmp_path / "job.yaml").write_text(text)
        assert main(["train", str(tmp_path / "job.yaml")]) == 2
        assert "unfold to more than 100,000 values" in capsys.readouterr().err


@pytest.mark.parametrize(
    "encoding, said",
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-32", "UTF-32"),
        ("gbk", "GBK"),
        ("latin-1", "Latin-1"),
        ("shift_jis", "SHIFT_JIS"),
    ],
)
def test_a_job_in_another_encoding(encoding, said, tmp_path, capsys):
    text = {"gbk": "输出: 第一次", "latin-1": "où: là-bas", "shift_jis": "これ: は猫です"}.get(encoding, "data: d.json")
    (tmp_path / "job.yaml").write_bytes(text.encode(encoding))
    assert main(["train", str(tmp_path / "job.yaml")]) == 2
    err = capsys.readouterr().err
    assert "is not UTF-8 text" in err and said in err and "iconv -f" in err
    (tmp_path / "job.yaml").write_bytes(b"\xef\xbb\xbf" + b"rank: 3")
    assert main(["train", str(tmp_path / "job.yaml")]) == 2 and "'rank' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, said",
    [
        ('data: "data\\train.json"\noutput: o', "with a tab or a line break in it. In double quotes"),
        ('data: d.json\noutput: "runs\\new"', "with a tab or a line break in it"),
        ('{"data": "d\\ud800.json", "output": "o"}', "with half a character in it"),
        ('{"data": "C:\\data\\x.json", "output": "o"}', "neither YAML nor JSON"),
    ],
)
def test_paths_that_quotes_have_changed(text, said, tmp_path, capsys):
    (tmp_path / "job.yaml").write_text(text)
    for command in ("train", "doctor"):
        assert main([command, str(tmp_path / "job.yaml")]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.skipif(os.sep != "/", reason="a backslash is between folders here")
def test_a_backslash_makes_no_folder_with_a_strange_name(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("data: data\\train.json\noutput: runs\\first")
    assert main(["train", "job.yaml"]) == 2
    assert "Write / between folders: runs/first" in capsys.readouterr().err and [
        p.name for p in tmp_path.iterdir()
    ] == ["job.yaml"]
    (tmp_path / "a\\b").mkdir()  # somebody meant it
    assert main(["train", "--data", "data\\train.json", "--output", "a\\b"]) == 2
    assert "A backslash is part of a name here; write / between folders" in capsys.readouterr().err
