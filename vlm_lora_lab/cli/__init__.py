"""The command `vlm-lora-lab`: one file per command, and `line`, which finds them."""

from .line import main

__all__ = ["main"]
