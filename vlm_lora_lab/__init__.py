__version__ = "0.1.0"

import logging
import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

# On a CPU, bitsandbytes 0.50 says on import that optional `kernels` are missing; its own code serves. Nothing else is
# said under this name. What else would be said for no reason is answered where it arises: see `compat`.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in record.getMessage())

# Modules that have moved, and where to: an import under the old name gives the new module.
MOVED = {
    "compare": "evaluate.compare",
    "explorer": "plan.explorer",
    "flags": "scripts.known",
    "preview": "plan.preview",
    "style": "show",
    "unfreeze": "plan.unfreeze",
}


class _Moved(MetaPathFinder, Loader):
    "Finds a module under the name that it had."

    def find_spec(self, name, path=None, target=None):
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == __name__ and old in MOVED else None

    def create_module(self, spec):
        module = import_module(f".{MOVED[spec.name.partition('.')[2]]}", __name__)
        self.spec = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = self.spec  # importlib has put the old name there


sys.meta_path.append(_Moved())


def names_in(package, rooms):
    "A `__getattr__` for a package: a public name of one of its modules, imported when it is first asked for."

    def find(name):
        if not name.startswith("_"):
            for room in rooms:
                module = import_module(f".{room}", package)
                if name in module.__all__:
                    return getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


# The public surface: name -> the module that defines it, which is imported when the name is first asked for. Everything
# else is internal: it may move or change from one version to the next.
PUBLIC = {
    "load_vlm": "models.load",
    "load_processor": "data.native",
    "read_conversations": "data.records",
    "samples_folder": "data.records",
    "ask": "data.records",
    "generate_answers": "evaluate.ask",
    "ExactMatch": "evaluate.scores",
    "TuningPlan": "plan.tuning",
    "apply_plan": "plan.tuning",
    "Job": "job",
    "Schedule": "train.run",
    "train": "job",
    "save_adapter": "checkpoint.save",
    "load_adapter": "checkpoint.save",
    "inspect_adapter": "checkpoint.inspect",
    "merge_adapter": "checkpoint.merge",
    "export_adapter": "checkpoint.serve",
    "rescue": "checkpoint.rescue.write",
    "InputError": "errors",
}
__all__ = [*PUBLIC]


def __getattr__(name):
    "A public name, imported when it is first asked for."
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "train":  # also the name of a room, which is what an import would put here; it can be called
        return import_module(".train", __name__)
    globals()[name] = getattr(import_module(f".{PUBLIC[name]}", __name__), name)
    return globals()[name]


def __dir__():
    return sorted({*globals(), *PUBLIC})
