"""torchtune's models on attnkit (read with 0.6.1).

Its `MultiHeadAttention` computes by an attribute, `_attention_call`. A packed batch has its mask
as FlexAttention's `BlockMask`, which is made for CUDA alone; here a set says the same anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.functional import attention
from attnkit.interop.host import IntsOnHost, ints_on_host
from attnkit.interop.torch.sdpa import scaled_dot_product_attention
from attnkit.masks import Causal, Documents, Mask
from attnkit.masks.foreign.flex import is_block_mask

__all__ = ["attend", "enable", "packed_block_causal_mask"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | Mask | object | None,
    dropout_p: float,
    is_causal: bool,
) -> Tensor:
    """Attend as torchtune's modules ask for it: heads ``[b n s d]``.

    `mask` is a bool tensor ``[b s s]``, True = allowed, or a mask of attnkit, such as that of
    `packed_block_causal_mask`; `is_causal` goes without one. A `BlockMask` is read as a set, once.

    >>> import torch
    >>> x = torch.randn(1, 2, 6, 8)
    >>> attend(x, x, x, packed_block_causal_mask([[4, 2]]), 0.0, False).shape
    torch.Size([1, 2, 6, 8])
    """
    if isinstance(mask, Mask):
        if is_causal:
            raise CompositionError(f"is_causal=True and {mask!r}; intersect them: Causal() & mask")
        return attention(q, k, v, mask=mask, dropout=dropout_p, layout="BNSD")
    if is_block_mask(mask):
        return _of_blocks(q, k, v, mask, dropout_p)
    if not isinstance(mask, Tensor | None):
        raise CompositionTypeError(
            f"mask={shown(mask)}; give a bool tensor [b, s, s], a BlockMask or a mask of attnkit"
        )
    cells = mask[:, None] if mask is not None else None
    return scaled_dot_product_attention(q, k, v, cells, dropout_p, is_causal)


def _of_blocks(q: Tensor, k: Tensor, v: Tensor, mask: object, dropout_p: float) -> Tensor:
    # Not before: torch's module of that name loads its compiler, for seconds.
    from attnkit.interop.flex import flex_attention

    if dropout_p:
        raise CompositionError(
            f"a BlockMask and dropout_p={dropout_p}: FlexAttention has no dropout; make the mask "
            "with attnkit.interop.torchtune.packed_block_causal_mask"
        )
    return cast(Tensor, flex_attention(q, k, v, block_mask=mask))


def packed_block_causal_mask(seq_lens: Sequence[IntsOnHost]) -> Mask:
    """Return torchtune's mask of a packed batch, of the lengths in each row, as a set.

    Read on the host, so make it where the batch is made, and hand it to the model as `mask`
    after the batch was moved: torchtune moves tensors only.

    >>> print(packed_block_causal_mask([[3, 1], [2, 2]]).show(4, 4, batch=1))
    #...
    ##..
    ..#.
    ..##
    """
    rows = [ints_on_host(f"seq_lens[{k}]", row) for k, row in enumerate(seq_lens)]
    if not rows:
        raise CompositionError("packed_block_causal_mask got no rows; give the lengths of each")
    return Causal() & Documents(rows[0] if len(rows) == 1 else rows)


def enable(model: nn.Module) -> tuple[str, ...]:
    """Have every attention module of a torchtune model compute by attnkit; return their names.

    Raises `CompositionError` where there is none.
    """
    if not isinstance(model, nn.Module):
        raise CompositionTypeError(f"enable got {shown(model)}; give a model of torchtune")
    found = {
        name: one
        for name, one in model.named_modules()
        if callable(vars(one).get("_attention_call"))
    }
    if not found:
        raise CompositionError(
            f"{type(model).__name__} has no attention module of torchtune: none has an "
            "_attention_call"
        )
    for one in found.values():
        one._attention_call = attend
    return tuple(found)
