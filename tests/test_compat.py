"""Private parts of other libraries: they are there in the installed versions, and nothing but compat touches any."""

import ast
import importlib
import re
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import vlm_lora_lab
from vlm_lora_lab import compat
from vlm_lora_lab.compat import (
    DECLARED,
    PRIVATE,
    SEEN,
    STEPS,
    attention_of,
    backward_node,
    checkpointing_arguments,
    computes_again,
    is_stored,
    no_false_warning,
    on_one_gpu,
    open_trainer,
    opened,
    operation,
    other_loss,
    plain_kernel,
    sequence_number,
    set_attention,
    set_rates,
    switch_checkpointing,
    tensors_in,
    without_adapters,
    without_cache_note,
    writes,
)
from vlm_lora_lab.errors import InputError
from vlm_lora_lab.models.load import load_vlm
from vlm_lora_lab.models.minicpmv import MiniCPMV
from vlm_lora_lab.models.qwenvl import QwenVL

PACKAGE = Path(vlm_lora_lab.__file__).parent
TESTS = Path(__file__).parent
# Text and no attribute: operators of ATen; a key of config.json, a word of names in files, endings of our own keys.
TEXT = {"_cdist_forward", "_euclidean_dist", "_to_copy", "_unsafe_view"}
TEXT |= {"_name_or_path", "_orig_mod", "_low", "_high"}
# Python's own argparse shows its options in private only.
ARGPARSE = {"_actions", "_SubParsersAction", "_AppendAction", "_ArgumentGroup", "_option_string_actions"}


def is_private(name):
    return re.fullmatch(r"_[A-Za-z]\w*", name) is not None and not name.endswith("_")


def foreign_names():
    "Private names of the classes that this package derives from or is handed objects of."
    objects = (
        *(transformers.Trainer, transformers.TrainingArguments, transformers.PreTrainedModel),
        *(transformers.PreTrainedConfig, transformers.PreTrainedTokenizerBase, PeftModel, BaseTunerLayer),
        *(
            nn.Module(),
            torch.Tensor,
            torch.autograd.Function,
            torch.optim.Optimizer,
            torch.optim.lr_scheduler.LRScheduler,
        ),
    )
    parts = {p.rpartition(".")[2] for t in PRIVATE.values() for p in t.parts}
    return {n for o in objects for n in dir(o) if is_private(n)} | parts


def own_names(trees):
    "Private names that the package itself defines: in modules, in classes, and on `self`."
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return found


def named_in(node):
    "Names by which a piece of code reaches into something else."
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Import):
        return [part for a in node.names for part in a.name.split(".")]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [*node.module.split("."), *(a.name for a in node.names)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value] if node.value[1:2].islower() else []
    return []


def defined_in(node):
    "Private names that a class with a base defines: each may replace one of the base."
    if not isinstance(node, ast.ClassDef) or not node.bases:
        return []
    names = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
    return names + [t.id for n in node.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]


def touched(tree, own, foreign):
    "(line, name) of every private name of somebody else."
    for node in ast.walk(tree):
        reached = [n for n in named_in(node) if is_private(n) and (n not in own or n in foreign)]
        replaced = [n for n in defined_in(node) if n in foreign]
        yield from ((node.lineno, n) for n in reached + replaced if n not in TEXT)


def modules():
    paths = [p for p in PACKAGE.rglob("*.py") if p.name not in ("_modidx.py", "compat.py")]
    return {p.relative_to(PACKAGE).as_posix(): ast.parse(p.read_text(encoding="utf-8")) for p in sorted(paths)}


def test_nothing_but_compat_touches_a_private_name_of_another_library():
    trees = modules()
    own, foreign = own_names(trees.values()), foreign_names() - set(DECLARED)
    found = [(path, *t) for path, tree in trees.items() for t in touched(tree, own | set(DECLARED), foreign)]
    assert len(trees) > 60 and [f for f in found if not (f[0].startswith("cli") and f[2] in ARGPARSE)] == []


@pytest.mark.parametrize(
    "code",
    [
        "def f(t): return t._version",
        "def f(m): return m._buffers",
        "def f(m): return getattr(m, '_forward_hooks', None)",
        "def f(m): return hasattr(m, '_hf_hook')",
        "import torch._dynamo",
        "from torch.utils._pytree import tree_leaves",
        "from transformers.trainer import _is_peft_model",
        "class Mine(Trainer):\n    def _save_checkpoint(self): pass",
        "class Mine(Trainer):\n    def go(self): return self._save_checkpoint()",
        "class Mine(nn.Module):\n    _version = 2",
        "x._anything_at_all = 1",
    ],
)
def test_a_planted_touch_is_found(code):
    trees = modules()
    planted = ast.parse(code)
    own, foreign = own_names([*trees.values(), planted]) | set(DECLARED), foreign_names() - set(DECLARED)
    assert list(touched(planted, own, foreign))


@pytest.mark.parametrize(
    "code",
    [
        "class Mine:\n    def _go(self): return self._far\n    def far(self): self._far = 1",
        "def _helper(): pass\n_helper()",
        "from .errors import _helper",
        "x.__dict__; x._repr_html_(); _ = 1",
    ],
)
def test_our_own_private_names_are_ours(code):
    tree = ast.parse(code)
    assert list(touched(tree, own_names([tree]), foreign_names())) == []


@pytest.mark.parametrize("name", PRIVATE)
def test_a_docstring_says_library_versions_reason_and_what_then(name):
    said, told = getattr(compat, name).__doc__, PRIVATE[name]
    for part in (told.library, *told.parts, *SEEN[told.library], told.why, told.gone):
        assert part in said


def test_the_versions_are_those_of_the_matrix():
    rows = [
        r.strip("| \n").split(" | ")
        for r in (TESTS / "MATRIX.md").read_text(encoding="utf-8").splitlines()
        if r[:1] == "|"
    ]

    def ordered(v):
        return [int(n) for n in v.split("+")[0].split(".")]

    for library, ends in SEEN.items():
        column = [r[rows[0].index(library)].split("+")[0] for r in rows[2:]]
        assert ends == (min(column, key=ordered), max(column, key=ordered)), library


def test_importing_it_imports_no_library():
    said = subprocess.run(
        [sys.executable, "-c", "import vlm_lora_lab.compat, sys; print(*sys.modules)"], capture_output=True, text=True
    ).stdout.split()
    assert "vlm_lora_lab.compat" in said and not {"torch", "transformers", "peft", "bitsandbytes"} & set(said)


def test_what_is_gone_is_an_error_that_names_library_version_and_remedy(monkeypatch):
    wanted = rf"transformers {re.escape(version('transformers'))} has no .*pip install 'transformers>=5"
    monkeypatch.delattr(transformers.Trainer, "_run_epoch")
    with pytest.raises(InputError, match=wanted):
        open_trainer()
    with pytest.raises(InputError, match=wanted):
        set_attention({}, "sdpa")
    with pytest.raises(InputError, match=r"torch .* has no OpOverload._schema"):
        operation(type("OpOverload", (), {})())
    with (
        pytest.raises(InputError, match=r"peft .* has no Layer._disable_adapters"),
        without_adapters([type("Layer", (), {})()]),
    ):
        pass


def test_the_trainer_has_all_steps_and_none_of_our_names():
    for private, ours in STEPS.items():
        assert callable(getattr(transformers.Trainer, private)) and not hasattr(transformers.Trainer, ours), private


def test_a_step_is_replaced_and_the_replaced_one_can_be_called():
    class Theirs:
        def work(self, n, *, twice=False):
            return self._step(n, twice=twice)

        def _step(self, n, twice):
            return n + 1 + twice

    class Ours(opened(Theirs, {"_step": "step"}, "transformers")):
        def step(self, n, **kwargs):
            return 10 * super().step(n, **kwargs)

    assert (Ours().work(1), Ours().work(1, twice=True), Theirs().work(1)) == (20, 30, 2)


def test_transformers_still_knows_what_our_classes_declare():
    lacking = [n for n in DECLARED if not hasattr(transformers.PreTrainedModel, n)]
    assert lacking == []
    declared = {n for c in (*MiniCPMV.__mro__, *QwenVL.__mro__) if c.__module__.startswith("vlm_") for n in vars(c)}
    assert set(DECLARED) <= declared


def test_torch_below_autograd():
    seen = []

    class Listening(compat.dispatch_mode()):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            node = backward_node()
            seen.append((operation(op), node is not None, sequence_number(node)))
            return op(*args, **(kwargs or {}))

    x = torch.ones(2, requires_grad=True)
    with Listening(), torch.enable_grad():
        y = x * 3
        torch.ones(2).add_(1)
        y.sum().backward()
    forward = {name: n for (name, _), back, n in seen if not back}
    assert dict(s[0] for s in seen)["add_"] and not dict(s[0] for s in seen)["mul"]
    assert [n for (name, _), back, n in seen if back and name == "mul"] == [forward["mul"]]


def test_tensors_in_nested_containers():
    a, b, c = map(torch.tensor, (1.0, 2.0, 3.0))
    out = transformers.utils.ModelOutput(x=a, y=(b, [c, None, "text"]))
    assert [t.item() for t in tensors_in(out)] == [1, 2, 3] and list(tensors_in({"a": 1})) == []


def test_writes_buffers_and_rates():
    t = torch.zeros(1)
    before = writes(t)
    t.add_(1)
    m = nn.BatchNorm1d(2)
    m.register_buffer("loose", torch.zeros(1), persistent=False)
    assert writes(t) == before + 1
    assert [n for n, _ in m.named_buffers() if not is_stored(m, n)] == ["loose"]
    optimizer = torch.optim.SGD([nn.Parameter(t)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    set_rates(scheduler, [0.25])
    assert scheduler.get_last_lr() == [0.25]


def test_without_the_private_set_a_module_is_asked():
    m = nn.BatchNorm1d(2)
    m.register_buffer("loose", torch.zeros(1), persistent=False)
    bare = type("Bare", (), {"state_dict": m.state_dict})()
    assert is_stored(bare, "running_mean") and not is_stored(bare, "loose")


def test_attention_of_a_configuration():
    config = transformers.Qwen2Config(attn_implementation="eager")
    set_attention(config, "sdpa")
    assert attention_of(config) == "sdpa" and attention_of(None) is None and attention_of({"a": 1}) is None


def test_one_gpu(tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    on_one_gpu(arguments)
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 8
    on_one_gpu(arguments)
    assert arguments.n_gpu == 1


def test_a_loss_is_given_back_whether_it_was_set_or_not():
    model = load_vlm("lab")
    before, usual = dict(vars(model)), model.loss_function
    with other_loss(model, len):
        assert model.loss_function is len
    assert model.loss_function is usual and vars(model) == before
    model.loss_function = max
    with pytest.raises(KeyError), other_loss(model, len):
        raise KeyError
    assert model.loss_function is max


def test_checkpointing_under_the_name_of_the_installed_version_warns_of_nothing(tmp_path):
    model = load_vlm("lab")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        wrapped = get_peft_model(model, LoraConfig(target_modules=r"llm\..*\.q_proj", r=2))
        for m in (model, wrapped):
            switch_checkpointing(m)
            assert computes_again(m) and model.is_gradient_checkpointing
            switch_checkpointing(m, False)
            assert not computes_again(m) and not model.is_gradient_checkpointing
        arguments = transformers.TrainingArguments(str(tmp_path), report_to="none", **checkpointing_arguments(True))
    assert arguments.gradient_checkpointing


def test_a_model_of_transformers_is_wrapped_without_a_warning():
    config = transformers.Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with no_false_warning():
            get_peft_model(transformers.Qwen2ForCausalLM(config), LoraConfig(target_modules=["q_proj"], r=2))


def test_one_note_is_left_out_and_only_inside(caplog):
    import logging

    logger = logging.getLogger("transformers.utils.generic")
    logger.propagate, was = True, logger.propagate
    try:
        with without_cache_note():
            logger.warning("`use_cache=True` is incompatible")
            logger.warning("another one")
        logger.warning("`use_cache=True` again")
    finally:
        logger.propagate = was
    assert not logger.filters
    assert not [r for r in caplog.messages if "incompatible" in r]


def test_importing_the_package_silences_nothing_of_others():
    code = (
        "import warnings; before = list(warnings.filters); import vlm_lora_lab, logging\n"
        "assert warnings.filters == before and not logging.getLogger('transformers.utils.generic').filters"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_adapters_are_off_only_inside():
    net = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], init_lora_weights=False))
    x, layers = torch.ones(1, 4), [m for m in net.modules() if isinstance(m, BaseTunerLayer)]
    trained, adapted = [p.requires_grad for p in net.parameters()], net(x)
    with pytest.raises(KeyError), without_adapters(layers):
        assert torch.equal(net(x), layers[0].base_layer(x))
        raise KeyError
    assert torch.equal(net(x), adapted) and [p.requires_grad for p in net.parameters()] == trained


def test_bitsandbytes_still_asks_for_its_kernel_under_this_name():
    bnb = importlib.import_module("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 64, bias=False)
    assert hasattr(layer, "support_avx512bf16_for_cpu")
    plain_kernel(layer)
    assert layer.support_avx512bf16_for_cpu is False
