"""Answers, scores, and two models side by side."""

from .. import names_in

_ROOMS = ("ask", "boxes", "metrics", "scores", "gallery")  # where a name of this package is looked for

__getattr__ = names_in(__name__, _ROOMS)
