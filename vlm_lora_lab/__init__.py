__version__ = "0.1.0"

import logging
import warnings

# Messages of our dependencies that need no action and would only make a reader wonder.
# On a CPU, bitsandbytes 0.50 says on import that optional `kernels` are missing; its own code serves.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in record.getMessage())
# PEFT 0.21 uses names that transformers 5.23 is about to rename.
warnings.filterwarnings("ignore", message=r".*gradient_checkpointing.* is deprecated", category=FutureWarning)
# With gradient checkpointing, transformers leaves its cache of keys and values out of training by itself, and says so.
logging.getLogger("transformers.utils.generic").addFilter(lambda record: "use_cache=True" not in record.getMessage())
