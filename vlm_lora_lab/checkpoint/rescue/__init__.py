"""Read the checkpoints of other scripts: whose they are, what is in them, what is lost; and write what is there."""

from importlib import import_module

# Where a name of this package is looked for; what is known of scripts has always been found here, too.
_ROOMS = ("write", "account", "plan", "read", "signs", "..scripts.known", "..scripts.script")


def __getattr__(name):
    "A public name of one of the modules, imported when it is first asked for."
    if not name.startswith("_"):
        for room in _ROOMS:
            module = import_module(f".{room}", __name__)
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
