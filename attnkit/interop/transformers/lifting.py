"""The mask function that transformers calls: closures in, a set in a tensor's clothes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import CompositionError
from attnkit.interop.transformers.mask_tensor import MaskTensor
from attnkit.masks import Lifted, recover

__all__ = ["lift", "make_mask"]

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
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **hints: Any,
) -> Tensor:
    """Return the mask of a model's call: the interface of transformers' mask registry.

    It never returns None, which means something else to each attention function.
    """
    unknown = hints.keys() - _HINTS
    if unknown:
        raise CompositionError(
            f"transformers asks for a mask with {', '.join(sorted(unknown))}, which this version "
            "of attnkit.interop.transformers does not know; nothing is ignored that may be part "
            "of a mask"
        )
    lifted = lift(
        mask_function,
        q_length,
        kv_length,
        batch=batch_size,
        q_offset=int(q_offset),
        kv_offset=int(kv_offset),
        attention_mask=attention_mask,
    )
    return MaskTensor(lifted, (batch_size, 1, q_length, kv_length), dtype, device)


def lift(
    mask_function: Callable[..., Any] | None,
    q_len: int,
    kv_len: int,
    *,
    batch: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
) -> Lifted:
    """Return the mask that a mask function of transformers is."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    cells = sdpa_mask(
        batch,
        q_len,
        kv_len,
        q_offset,
        kv_offset,
        mask_function or causal_mask_function,
        attention_mask,
        allow_is_causal_skip=False,
        device="cpu" if attention_mask is None else attention_mask.device,
    )
    found = recover(cells)
    return Lifted(found.mask, "a mask function", ("its cells",), batch * q_len * kv_len)
