"""`python -m vlm_lora_lab` is the command `vlm-lora-lab`."""

import sys

from .cli import main

sys.exit(main())
