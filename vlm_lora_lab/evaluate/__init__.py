"""Answers, scores, and two models side by side."""

from importlib import import_module

_ROOMS = ("ask", "boxes", "metrics", "scores", "gallery")  # where a name of this package is looked for


def __getattr__(name):
    "A public name of one of the modules, imported when it is first asked for."
    if not name.startswith("_"):
        for room in _ROOMS:
            module = import_module(f".{room}", __name__)
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
