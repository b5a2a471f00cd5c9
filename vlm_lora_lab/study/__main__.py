"""`python -m vlm_lora_lab.study NAME` computes the results of an experiment again, `--claims all` those of the ledger."""

import sys

from ..show import outliving
from . import claims, experiments

with outliving() as out:
    status = (claims if any(a.startswith("--claims") for a in sys.argv[1:]) else experiments).main()
sys.exit(max(status, 2 if out.full else 0))
