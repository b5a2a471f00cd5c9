"""`python -m vlm_lora_lab.study NAME` computes the results of an experiment again."""

import sys

from .experiments import main

sys.exit(main())
