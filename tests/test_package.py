"""What is shipped: the wheel and the sdist, their metadata, their types.

`VLM_LORA_LAB_DIST` names a folder with a built wheel and sdist; without it they are built here, if `build` is at hand.
"""

import ast
import email
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vlm_lora_lab

ROOT = Path(__file__).parent.parent
FACTS = ConfigParser(delimiters=["="])
FACTS.read(ROOT / "settings.ini", encoding="utf-8")
FACTS = FACTS["DEFAULT"]
SOURCES = sorted(p for folder in ("vlm_lora_lab", "tests", "benchmarks", "docs") for p in (ROOT / folder).rglob("*.py"))
CI = "CI" in os.environ


def tool_needed(name):
    return pytest.mark.skipif(
        not find_spec(name) and not CI,
        reason=f"no {name}: pip install -c constraints.txt -e '.[dev]'; CI does not skip this",
    )


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    "(wheel, sdist)."
    if not (folder := os.environ.get("VLM_LORA_LAB_DIST")):
        if not find_spec("build") and not CI:
            pytest.skip("no build: pip install -c constraints.txt -e '.[dev]'")
        folder = tmp_path_factory.mktemp("dist")
        # a copy of what git knows and of new files: nothing is left in the checkout, and nothing ignored gets in
        source = folder / "source"
        for name in filter(
            None,
            subprocess.run(
                ["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.split("\0"),
        ):
            if (ROOT / name).is_file() and not name.startswith("nbs/"):
                (source / name).parent.mkdir(parents=True, exist_ok=True)
                (source / name).write_bytes((ROOT / name).read_bytes())
        built = subprocess.run(
            [sys.executable, "-m", "build", "--outdir", str(folder), str(source)], capture_output=True, text=True
        )
        assert built.returncode == 0, (built.stdout + built.stderr)[-3000:]
    [wheel], [sdist] = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def metadata(dist):
    with zipfile.ZipFile(dist[0]) as z:
        [name] = [n for n in z.namelist() if n.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(z.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(dist):
    with zipfile.ZipFile(dist[0]) as z:
        names = set(z.namelist())
    shipped = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "vlm_lora_lab").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    shipped |= {
        f"vlm_lora_lab/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "data_samples").rglob("*") if p.is_file()
    }
    assert {n for n in names if ".dist-info/" not in n} == shipped
    for needed in (
        "py.typed",
        "lab/model.safetensors",
        "lab/tokenizer.json",
        "models/published.json",
        "train/configs/zero3.yaml",
        "study/results/claims.json",
        "data_samples/handwriting/test.json",
        "data_samples/mixed.json",
    ):
        assert f"vlm_lora_lab/{needed}" in names
    assert dist[0].stat().st_size < 7_000_000


def test_the_sdist_holds_what_the_wheel_is_built_from(dist):
    with tarfile.open(dist[1]) as t:
        names = {m.name.partition("/")[2] for m in t.getmembers() if m.isfile()}
    tracked = subprocess.run(
        [
            "git",
            "ls-files",
            "vlm_lora_lab",
            "data_samples",
            "settings.ini",
            "setup.py",
            "pyproject.toml",
            "constraints.txt",
            "LICENSE",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert len(tracked) > 100 and not set(tracked) - names
    assert not [n for n in names if n.endswith(".ipynb") or "/golden/" in n]
    assert dist[1].stat().st_size < 7_000_000


def test_metadata_is_what_settings_ini_says(metadata):
    assert (metadata["Name"].replace("-", "_"), metadata["Version"], metadata["Requires-Python"]) == (
        FACTS["lib_name"],
        FACTS["version"],
        f">={FACTS['min_python']}",
    )
    groups = {k.removesuffix("_requirements"): v.split() for k, v in FACTS.items() if k.endswith("_requirements")}
    assert {"dev", "docs", "gpu"} <= set(groups) == set(metadata.get_all("Provides-Extra"))

    wanted = [*FACTS["requirements"].split(), *(f"{r}; extra == '{extra}'" for extra, rs in groups.items() for r in rs)]

    def plain(requirements):
        return sorted(str(Requirement(r)) for r in requirements)

    assert plain(metadata.get_all("Requires-Dist")) == plain(wanted)
    classifiers = metadata.get_all("Classifier")
    pythons = FACTS["pythons"].split()
    assert (
        pythons[0] == FACTS["min_python"]
        and [c.rpartition(" ")[2] for c in classifiers if re.search(r"Python :: \d\.\d", c)] == pythons
    )
    assert (
        any(c.startswith(f"Development Status :: {FACTS['status']} - ") for c in classifiers)
        and "Typing :: Typed" in classifiers
    )
    assert metadata["License-Expression"] == "Apache-2.0" and not [c for c in classifiers if c.startswith("License")]
    workflow = (ROOT / ".github" / "workflows" / "matrix.yml").read_text(encoding="utf-8")
    assert re.findall(r'"(3\.\d+)"', workflow) == pythons
    links = dict(u.split(", ") for u in metadata.get_all("Project-URL"))
    assert set(links) == {"Documentation", "Source", "Issues", "Changelog"} and links["Documentation"].startswith(
        FACTS["doc_host"]
    )
    assert all(link.startswith((FACTS["git_url"], FACTS["doc_host"])) for link in links.values())


def test_a_gpu_user_is_pointed_to_every_optional_package_that_is_named():
    "A message that says `pip install X` is kept by an extra."
    advised = {
        m
        for p in SOURCES
        if p.is_relative_to(ROOT / "vlm_lora_lab")
        for m in re.findall(r"pip install ([a-z][\w-]+)", p.read_text(encoding="utf-8"))
    }
    offered = {re.split(r"[<>=]", r)[0] for r in FACTS["gpu_requirements"].split()}
    assert "tensorboard" in advised and advised <= offered


def test_what_we_reach_into_is_bounded_above_and_the_tested_versions_lie_within():
    from vlm_lora_lab.compat import SEEN

    bounds = {r.name: r.specifier for r in map(Requirement, FACTS["requirements"].split())}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if "==" in line)
    assert {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors"} <= set(bounds)
    for name, specifier in bounds.items():
        pinned = tested.get(name) or tested.get(name.replace("_", "-"))
        assert pinned is None or pinned.partition("+")[0] in specifier, name
        for version in SEEN.get(name, ()):
            assert version in specifier, name
    for name, major in dict(torch="3.0", transformers="6.0", peft="1.0", accelerate="2.0", bitsandbytes="1.0").items():
        assert major not in bounds[name], name


def test_the_newest_libraries_are_tried_each_night_and_by_hand():
    nightly = (ROOT / ".github" / "workflows" / "nightly.yml").read_text(encoding="utf-8")
    assert re.search(r"schedule:\n +- cron:", nightly) and "workflow_dispatch:" in nightly
    order = ["-c constraints.txt", "--upgrade transformers peft", "pytest -q $(python tests/matrix.py --tests)"]
    assert sorted(order, key=nightly.index) == order
    listed = subprocess.run([sys.executable, ROOT / "tests" / "matrix.py", "--tests"], capture_output=True, text=True)
    files = listed.stdout.split()
    assert "tests/test_compat.py" in files and all((ROOT / f).is_file() for f in files)


@tool_needed("twine")
def test_an_index_would_take_it(dist):
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist)], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


@tool_needed("mypy")
def test_types_agree():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "def f(a: int, b):\n    return a",
        "def f(a: int) -> str:\n    return a",
        "def f() -> int:\n    from vlm_lora_lab.errors import nearest\n    return nearest('a', ['b'])",
    ],
)
@tool_needed("mypy")
def test_mypy_is_set_up_to_find_something(code, tmp_path):
    (tmp_path / "wrong.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", str(tmp_path / "wrong.py"), "--config-file", "pyproject.toml"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "wrong.py" in done.stdout, done.stdout + done.stderr


def signatures():
    "(name, signature) of all that the package offers: functions, and methods that do not replace one of a library's."
    for info in pkgutil.walk_packages(vlm_lora_lab.__path__, "vlm_lora_lab."):
        if info.name.endswith("__main__") or "data_samples" in info.name:
            continue
        module = importlib.import_module(info.name)
        for name, thing in vars(module).items():
            if name.startswith("_") or getattr(thing, "__module__", "") != module.__name__:
                continue
            if inspect.isfunction(thing):
                yield f"{info.name}.{name}", inspect.signature(thing)
            elif inspect.isclass(thing):
                for key, method in vars(thing).items():
                    method = (
                        getattr(method, "__func__", None)
                        or getattr(method, "fget", None)
                        or getattr(method, "func", None)
                        or method
                    )
                    if (
                        inspect.isfunction(method)
                        and not {key[0], method.__name__[0]} & {"_", "<"}
                        and not any(key in vars(base) for base in thing.__mro__[1:])
                    ):
                        yield f"{info.name}.{name}.{key}", inspect.signature(method)


def test_every_function_says_what_it_takes_and_what_it_gives():
    found = dict(signatures())

    def bare(s):
        return [p.name for p in s.parameters.values() if p.annotation is p.empty and p.name not in ("self", "cls")]

    silent = {name: bare(s) or "returns" for name, s in found.items() if bare(s) or s.return_annotation is s.empty}
    assert len(found) > 400 and not silent, silent


def test_the_oldest_python_can_read_it():
    assert len(SOURCES) > 100
    for path in SOURCES:
        ast.parse(
            path.read_text(encoding="utf-8"),
            str(path.relative_to(ROOT)),
            feature_version=tuple(map(int, FACTS["min_python"].split("."))),
        )
