"""transformers on attnkit: `enable(model)`, or ``attn_implementation="attnkit"``."""

from attnkit.interop.transformers.switching import NAME, TESTED, Switched, enable, register

__all__ = ["NAME", "TESTED", "Switched", "enable", "register"]

register()
