"""The command `vlm-lora-lab`: one file per command, and `line`, which finds them."""

from .about import versions
from .line import main

__all__ = ["main", "versions"]
