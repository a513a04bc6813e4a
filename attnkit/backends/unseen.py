"""Keys that no query may see, and what they hold: NaN and infinities there must reach nothing.

Masked weights are 0, and 0 times NaN is NaN. Where a kernel multiplies with what it masks, keys
and values that no query of their sequence may see are put to 0 before the call. Masks whose
keys are all seen by someone pay nothing for it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnkit.backends.base import Operands
from attnkit.constants import constant
from attnkit.masks import Rectangle
from attnkit.masks.trace import blocks_around
from attnkit.planner import Request
from attnkit.strips import seen_spans

__all__ = ["cleared", "unseen_keys", "without_unseen"]


def unseen_keys(request: Request, device: torch.device) -> Tensor | None:
    """Return True where no query may see a key, ``[1 | b, 1 | n, kv_len, 1]`` (packed: b is 1).

    `n` counts key heads: one is unseen where none of the query heads that share it sees it.
    None where every key is seen, or where only the call says which are.
    """
    if request.mask.comes_with_call or request.sees_all_keys:
        return None
    return _unseen_keys(request, device)


@constant
def _unseen_keys(request: Request, device: torch.device) -> Tensor | None:
    group, heads = request.num_heads // request.num_kv_heads, [range(1)]
    if (request.mask.heads or 1) > 1:  # the query heads that share each key head
        heads = [range(head, head + group) for head in range(0, request.num_heads, group)]
    alike = request.seqlens is None and request.mask.batches is None
    places = [[(b, own) for own in heads] for b in range(1 if alike else request.batch)]
    if request.matrices.exact:  # then it is known without a tensor, which may be a fake one
        known = [[_seen(request, *place) for place in row] for row in places]
        if all(seen.all() for row in known for seen in row):
            return None
        rows = [torch.tensor(np.stack(row), device=device) for row in known]
    else:
        rows = [torch.stack([_seen_cells(request, *p, device) for p in row]) for row in places]
    found = torch.stack(rows) if request.seqlens is None else torch.cat(rows, -1)[None]
    if _is_at_hand(found) and bool(found.all()):
        return None
    return found.logical_not()[..., None]


def without_unseen(request: Request, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``[b n s d]`` key and value with 0 where no query may see them."""
    unseen = unseen_keys(request, key.device)
    if unseen is None:
        return key, value
    # A clone keeps the strides, so that compiled kernels need no second version.
    return key.clone().masked_fill_(unseen, 0.0), value.clone().masked_fill_(unseen, 0.0)


def cleared(request: Request, operands: Operands) -> Operands:
    """Return operands in the request's layout with 0 at the keys that no query may see.

    For kernels that replace masked scores, but multiply all values of a tile that they visit.
    """
    layout, count = request.layout_of, request.num_kv_heads
    unseen = unseen_keys(request, operands.key.device)
    if unseen is None:
        return operands
    views = (layout.view(tensor, count) for tensor in (operands.key, operands.value))
    key, value = (layout.restore(view.masked_fill(unseen, 0.0)) for view in views)
    return replace(operands, key=key, value=value)


def _seen(request: Request, batch: int, heads: range) -> NDArray[np.bool_]:
    """Return which keys of a score matrix some of the heads see, ``[kv_len]``: by its regions."""
    planes, (_, kv_len) = request.matrices.planes, request.sequences[batch]
    found = np.zeros(kv_len, np.bool_)
    for head in heads:
        region = planes[head if len(planes) > 1 else 0][batch].outer
        for a, b in seen_spans(region.strips):
            found[a:b] = True
    return found


def _seen_cells(request: Request, batch: int, heads: range, device: torch.device) -> Tensor:
    """Return the same by the mask's cells, a block of rows and the keys around them at a time."""
    q_len, kv_len = request.sequences[batch]
    number = batch if request.mask.batches is not None else 0
    found = torch.zeros(kv_len, dtype=torch.bool, device=device)
    planes = request.matrices.planes
    for head in heads:
        outer = planes[head if len(planes) > 1 else 0][batch].outer
        # From below, where most masks see most of the keys.
        for rows, _ in reversed(list(blocks_around([outer], q_len, kv_len))):
            for keys in seen_spans(outer.cut(rows, (0, kv_len)).strips):
                at = Rectangle(rows, keys, q_len, kv_len, number, head)
                found[slice(*keys)] |= request.mask._read(at, device).any(0)
            if _is_at_hand(found) and bool(found.all()):
                return found
    return found


def _is_at_hand(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at without waiting for a device."""
    return tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)
