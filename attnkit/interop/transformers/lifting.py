"""The mask function that transformers calls: closures in, a set in a tensor's clothes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from attnkit.errors import CompositionError
from attnkit.interop.transformers.mask_tensor import MaskTensor
from attnkit.masks import Full
from attnkit.masks.foreign.transformers import from_transformers

__all__ = ["make_mask"]

# What transformers passes beside these: hints for others' masks (whether one may leave a causal
# mask to a flag; how to evaluate closures; the window, which the closure has too), and what makes
# no difference to a set.
_HINTS = frozenset(
    (
        "allow_is_causal_skip",
        "allow_is_bidirectional_skip",
        "allow_torch_fix",
        "use_vmap",
        "local_size",
        "config",
    )
)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **hints: Any,
) -> Tensor | None:
    """Return the mask of a model's call: the interface of transformers' mask registry.

    None, which means something else to each attention function, only where it is for eager
    attention, too: where everything is seen, and the model allows it.
    """
    unknown = hints.keys() - _HINTS
    if unknown:
        raise CompositionError(
            f"transformers asks for a mask with {', '.join(sorted(unknown))}, which this version "
            "of attnkit.interop.transformers does not know; nothing is ignored that may be part "
            "of a mask"
        )
    lifted = from_transformers(
        mask_function,
        q_length,
        kv_length,
        batch=batch_size,
        q_offset=cast("int", q_offset),  # or a tensor of a static cache
        kv_offset=kv_offset,
        attention_mask=attention_mask,
    )
    if hints.get("allow_is_bidirectional_skip") and lifted.mask == Full():
        return None
    return MaskTensor(lifted, (batch_size, 1, q_length, kv_length), dtype, device)
