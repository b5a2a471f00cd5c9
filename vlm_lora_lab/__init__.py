__version__ = "0.1.0"

import logging

# On a CPU, bitsandbytes 0.50 warns on import that optional `kernels` are missing. Its own code serves; nothing is wrong.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels" not in record.getMessage())
