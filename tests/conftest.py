import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a network
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # these tests compare bits on a CPU
# and not in the user's cache
os.environ.setdefault("VLM_LORA_LAB_HASHES", f"{tempfile.gettempdir()}/vlm_lora_lab_hashes")


@pytest.fixture(scope="session")
def golden_root():
    "Reference tensors of the original code: the copy in this repository, or the folder named by VLM_LORA_LAB_GOLDEN."
    return Path(os.environ.get("VLM_LORA_LAB_GOLDEN", Path(__file__).parent / "golden"))
