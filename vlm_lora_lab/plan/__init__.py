"""Freeze, LoRA or full: a plan, what it does to a model, and how it looks."""

from .. import names_in

_ROOMS = ("tuning",)  # where a name of this package is looked for

__getattr__ = names_in(__name__, _ROOMS)
