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
