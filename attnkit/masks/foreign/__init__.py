"""Masks as other libraries write them, read as sets; nothing foreign is imported.

One file per library. Each reads objects by their structure and returns a `Lifted`.
"""

from attnkit.masks.foreign.flashmask import from_flashmask
from attnkit.masks.foreign.flex import from_flex
from attnkit.masks.foreign.lifted import Lifted
from attnkit.masks.foreign.magi import from_magi
from attnkit.masks.foreign.seqlens import from_cu_seqlens
from attnkit.masks.foreign.torch import from_torch
from attnkit.masks.foreign.transformers import from_transformers
from attnkit.masks.foreign.xformers import from_xformers

__all__ = [
    "Lifted",
    "from_cu_seqlens",
    "from_flashmask",
    "from_flex",
    "from_magi",
    "from_torch",
    "from_transformers",
    "from_xformers",
]
