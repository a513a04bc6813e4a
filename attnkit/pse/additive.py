"""`split_additive`: a float mask as what it is, a set of cells and a bias on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.arguments import check_floats, check_readable
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError
from attnkit.masks.base import Full, Mask
from attnkit.masks.foreign.torch import collapsed, from_torch
from attnkit.pse.base import Pse
from attnkit.pse.tensors import Dense, KeyBias

__all__ = ["Additive", "split_additive"]


class Additive(NamedTuple):
    """The cells that a float mask leaves, and what it adds to their scores (None: nothing)."""

    mask: Mask
    bias: Pse | None


@untraced(MASK_IN_GRAPH)
def split_additive(
    tensor: Tensor, *, q_len: int | None = None, kv_len: int | None = None
) -> Additive:
    """Split what is added to scores into a set of allowed cells and a finite bias.

    A cell is masked where the value is -inf, or at most half of its dtype's least number: so
    ``finfo.min``, which stands for -inf in transformers, is masked, also with something added. A
    row without an allowed cell has the output 0 (-inf gives NaN elsewhere, ``finfo.min`` a mean).
    The rest is the bias: `KeyBias` where it is the same for every query, else `Dense`, or None
    where it is 0 everywhere. Gradients flow to `tensor`: where it requires them there is a bias.

    Shapes: any that broadcasts against the scores ``[b, n, q_len, kv_len]``, as in
    `masks.from_torch`. `kv_len` is needed where there is one number for all keys of a query.

    Reads the tensor, which waits for a device. Raises `CompositionError` for NaN or +inf, and for
    a shape that does not broadcast.

    >>> import torch
    >>> scores = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
    >>> split_additive(scores)
    Additive(mask=Causal(), bias=None)
    >>> split_additive(scores + 0.5)
    Additive(mask=Causal(), bias=Dense(float32[4, 4]))
    """
    check_floats("pse.split_additive", tensor)
    check_readable("pse.split_additive", tensor)
    if not 1 <= tensor.dim() <= 4 or 0 in tensor.shape:
        raise CompositionError(
            f"pse.split_additive got shape {tuple(tensor.shape)}; what is added broadcasts against "
            "the scores [b, n, q_len, kv_len] and holds at least one cell"
        )
    cells = collapsed(tensor)
    values = cells.detach()
    allowed = values > torch.finfo(tensor.dtype).min / 2
    # One pass: NaN propagates into the maximum.
    if not bool(values.amax() < torch.inf):
        raise CompositionError(
            f"pse.split_additive got {tuple(tensor.shape)} with NaN or +inf in it; what is added "
            "to a score is a number, or -inf where the cell is masked"
        )
    everything = bool(allowed.all())
    mask = Full() if everything else from_torch(allowed, keep=True, q_len=q_len, kv_len=kv_len).mask
    rest = cells if everything else cells.masked_fill(~allowed, 0.0)
    if not tensor.requires_grad and not bool(rest.any()):
        return Additive(mask, None)
    return Additive(mask, _bias(rest, tensor, kv_len))


def _bias(rest: Tensor, tensor: Tensor, kv_len: int | None) -> Pse:
    """Return the bias that a tensor of four axes is."""
    if rest.shape[-1] == 1:
        keys = tensor.shape[-1] if kv_len is None else kv_len
        if keys == 1 and kv_len is None:
            raise CompositionError(
                f"pse.split_additive got shape {tuple(tensor.shape)}, one number for all keys of a "
                "query, and no kv_len; say how many keys there are"
            )
        rest = rest.expand(*rest.shape[:3], keys)
    plain = rest if max(rest.shape[:2]) > 1 else rest[0, 0]
    if rest.shape[2] == 1:
        return KeyBias(plain[..., 0, :], validate=False)
    return Dense(plain, validate=False)
