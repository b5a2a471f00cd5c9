"""Training. Its room can be called: `vlm_lora_lab.train(job)` is `job.train`, and there is one name for both."""

import sys
from importlib import import_module
from types import ModuleType


class _Room(ModuleType):
    def __call__(self, *args, **kwargs):
        "Run a job from data to a saved adapter, as `vlm_lora_lab.job.train` says."
        return import_module("vlm_lora_lab.job").train(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
