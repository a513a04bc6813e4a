"""transformers on attnkit: `enable(model)`, or ``attn_implementation="attnkit"``."""

from attnkit.interop.transformers.names import NAME
from attnkit.interop.transformers.reports import masks_of
from attnkit.interop.transformers.switching import TESTED, Switched, enable, register
from attnkit.reports import LayerReport, ModelReport, expect, report

__all__ = [
    "NAME",
    "TESTED",
    "LayerReport",
    "ModelReport",
    "Switched",
    "enable",
    "expect",
    "masks_of",
    "register",
    "report",
]

register()
