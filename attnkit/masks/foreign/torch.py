"""Masks as torch writes them: bool tensors of any shape that broadcasts against the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from attnkit.arguments import check_int, check_readable, describe
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.masks.algebra import Or
from attnkit.masks.base import Full, Mask
from attnkit.masks.foreign.lifted import Lifted
from attnkit.masks.padding import Padding
from attnkit.masks.per_head import PerBatch, PerHead
from attnkit.masks.recover import recover
from attnkit.masks.rectangles import Columns, Prefix, Rows
from attnkit.strips import gaps

__all__ = ["collapsed", "from_torch"]

_Cells = np.ndarray[Any, np.dtype[np.bool_]]


@untraced(MASK_IN_GRAPH)
def from_torch(
    attn_mask: torch.Tensor, *, keep: bool, q_len: int | None = None, kv_len: int | None = None
) -> Lifted:
    """Return the mask that a bool tensor is, read as a set.

    Shapes: any that broadcasts against the scores ``[b, n, q_len, kv_len]``, from the right as
    torch does: ``[kv_len]``, ``[q_len, kv_len]``, ``[n, q_len, kv_len]``, ``[b, 1, 1, kv_len]``.
    An axis of 1, and one that was expanded, is read once and serves any number: padding
    ``[b, 1, 1, kv_len]`` never becomes a matrix. `keep` says what True means: allowed (torch's
    SDPA, FlexAttention, transformers: True) or dropped (`nn.MultiheadAttention`, the fused
    kernel: False). `q_len` and `kv_len`, where given, must be those of the tensor. A float mask
    is a set and a bias: `pse.split_additive`.

    Reads the tensor, which waits for a device. Raises `CompositionTypeError` for anything but a
    bool tensor, `CompositionError` for a shape that does not broadcast.

    >>> import torch
    >>> exists = torch.tensor([[True, True, False], [True, True, True]])
    >>> print(from_torch(exists[:, None, None], keep=True))
    Padding((2, 3)), of a bool tensor [2, 1, 1, 3] (True = allowed): keys alone, the same for \
every query (6 cells read)
    >>> from_torch(torch.ones(4, 4).triu(1).bool(), keep=False).mask
    Causal()
    """
    cells, source = _checked(attn_mask, keep, q_len, kv_len)
    planes = collapsed(cells)
    read = planes.numel()
    rows, keys = planes.shape[-2:]
    if rows > 1 and keys > 1:
        found = recover(planes, keep=keep)
        how = "named" if found.named else "a union of slices" if found.exact else found.reason
        return Lifted(found.mask, source, (f"a matrix of cells, {how}",), read)
    kept = planes.cpu().numpy() == keep
    if rows > 1:
        mask = _each(kept[..., 0], lambda each: _alone(each, _rows))
        return Lifted(mask, source, ("queries alone, the same for every key",), read)
    if keys > 1:
        mask = _each(kept[:, :, 0], _keys)
        return Lifted(mask, source, ("keys alone, the same for every query",), read)
    mask = _each(kept[:, :, 0], lambda each: _alone(each, _all_or_nothing))
    return Lifted(mask, source, ("all cells or none",), read)


def collapsed(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with four axes, those that hold one entry many times with extent 1.

    >>> collapsed(torch.ones(3, 1, 1, 5).expand(3, 2, 4, 5)).shape
    torch.Size([3, 1, 1, 5])
    """
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor[(None,) * (4 - tensor.dim())]


def _checked(
    attn_mask: object, keep: object, q_len: int | None, kv_len: int | None
) -> tuple[torch.Tensor, str]:
    if type(keep) is not bool:
        raise CompositionTypeError(
            f"from_torch got keep={shown(keep)}; True says that True marks allowed cells (SDPA), "
            "False that it marks dropped ones (nn.MultiheadAttention)"
        )
    if isinstance(attn_mask, torch.Tensor):
        check_readable("from_torch", attn_mask)
    if not isinstance(attn_mask, torch.Tensor) or attn_mask.dtype != torch.bool:
        raise CompositionTypeError(
            f"from_torch takes a bool tensor, got {describe(attn_mask)}; what is added to scores "
            "is split into a set and a bias by pse.split_additive"
        )
    shape = tuple(attn_mask.shape)
    if not 1 <= len(shape) <= 4 or 0 in shape:
        raise CompositionError(
            f"from_torch got shape {shape}; a mask broadcasts against the scores [b, n, q_len, "
            "kv_len] and holds at least one cell"
        )
    own = ((1, *shape)[-2], shape[-1])
    for name, said, has in zip(("q_len", "kv_len"), (q_len, kv_len), own, strict=True):
        if said is not None and has not in (1, check_int(f"from_torch {name}", said, 0)):
            raise CompositionError(
                f"from_torch got shape {shape} and {name}={said}; the axis is {name}, or 1"
            )
    meant = "allowed" if keep else "dropped"
    return attn_mask.detach(), f"a bool tensor {list(shape)} (True = {meant})"


def _each(cells: _Cells, make: Callable[[_Cells], Mask]) -> Mask:
    """Return the mask of cells [b, n, length]: `make` has those of all batch elements, [b, length].

    Heads and batch elements that are alike are not told apart.
    """
    if (cells == cells[:, :1]).all():
        return make(cells[:, 0])
    return PerHead([make(cells[:, h]) for h in range(cells.shape[1])])


def _keys(cells: _Cells) -> Mask:
    if (cells == cells[:1]).all():
        return _runs_of_keys(cells[0])
    return Padding.of(torch.from_numpy(np.ascontiguousarray(cells)))


def _alone(cells: _Cells, make: Callable[[_Cells], Mask]) -> Mask:
    if (cells == cells[:1]).all():
        return make(cells[0])
    return PerBatch([make(row) for row in cells])


def _runs_of_keys(row: _Cells) -> Mask:
    if row.all():
        return Full()
    runs = _runs(row)
    parts = [
        Prefix(stop) if start == 0 else Columns(start, None if stop == len(row) else stop)
        for start, stop in runs
    ]
    return Or.of(*parts) if parts else ~Full()


def _rows(row: _Cells) -> Mask:
    if row.all():
        return Full()
    parts = [Rows(start, None if stop == len(row) else stop) for start, stop in _runs(row)]
    return Or.of(*parts) if parts else ~Full()


def _all_or_nothing(row: _Cells) -> Mask:
    return Full() if row.all() else ~Full()


def _runs(row: _Cells) -> Sequence[tuple[int, int]]:
    return gaps(((k, k + 1) for k in np.flatnonzero(~row).tolist()), 0, len(row))
