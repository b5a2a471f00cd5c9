"""`python -m vlm_lora_lab.study NAME` computes the results of an experiment again, `--claims all` those of the ledger."""

import sys

from . import claims, experiments

sys.exit((claims if any(a.startswith("--claims") for a in sys.argv[1:]) else experiments).main())
