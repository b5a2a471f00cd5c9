"""Read the checkpoints of other scripts: whose they are, what is in them, what is lost; and write what is there."""

from ... import names_in

# Where a name of this package is looked for; what is known of scripts has always been found here, too.
_ROOMS = ("write", "account", "plan", "read", "signs", "..scripts.known", "..scripts.script")

__getattr__ = names_in(__name__, _ROOMS)
