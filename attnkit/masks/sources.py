"""What `masks.recover` takes, brought to one form: a mask at some lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, cast

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from attnkit.arguments import check_int, check_readable, describe, holds_integers
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region
from attnkit.masks.base import Mask
from attnkit.masks.dense import Dense, boolean_cells
from attnkit.masks.predicate import MaskFunction, Predicate, evaluate, function_name
from attnkit.masks.slices import Slices
from attnkit.masks.symbolic import symbolic
from attnkit.masks.symbols import Extent
from attnkit.masks.trace import Progress, RowReader, cells_of, count_slices, trace

__all__ = ["Source", "indices_used", "source_of"]


@dataclass(frozen=True, eq=False)
class Source:
    """A source of cells at some lengths: a mask, or a tensor [B, N, q_len, kv_len] of bools.

    `written`: its author wrote it as a mask; `keep`: what True means in the tensor; `regions`:
    what is known of a function by batch element and head, without its cells.
    """

    given: Mask | None
    q_len: int
    kv_len: int
    said: str
    written: bool = False
    device: torch.device | str | None = None
    tensor: torch.Tensor | None = None
    keep: bool = True
    regions: Mapping[tuple[int, int], Region] | None = None

    @cached_property
    def mask(self) -> Mask:
        """The source as a mask, as it was given."""
        if self.given is not None:
            return self.given
        if self.tensor is None:  # a fault of the caller
            raise CompositionError("a source is a mask or a tensor")
        return Dense.keep(self.tensor) if self.keep else Dense.drop(self.tensor)

    @property
    def counts(self) -> tuple[int | None, int | None]:
        """How many batch elements and heads it tells apart."""
        if self.tensor is None:
            return self.mask.batches, self.mask.heads
        return tuple(size if size > 1 else None for size in self.tensor.shape[:2])  # type: ignore[return-value]

    def region(self, batch: int, head: int, max_slices: int, progress: Progress) -> Region | str:
        """Return the region of a score matrix, or in words why it has none."""
        lengths = self.q_len, self.kv_len
        if self.tensor is not None:
            plane = self.tensor[batch, head].detach()
            if self.keep:
                return trace(lambda a, b: plane[a:b], *lengths, max_slices, progress)
            return trace(lambda a, b: ~plane[a:b], *lengths, max_slices, progress)
        cells: Region | RowReader
        if self.regions is not None:
            cells = self.regions[batch, head]
        else:
            cells = cells_of(self.mask, *lengths, batch, head, self.device)
        if not isinstance(cells, Region):
            return trace(cells, *lengths, max_slices, progress)
        size = count_slices(cells)
        if size <= max_slices or self.written:
            return cells
        return f"the rows need {size} slices, and max_slices={max_slices}"


def source_of(
    source: object,
    q_len: int | None,
    kv_len: int | None,
    keep: bool,
    batch: int | None,
    heads: int | None,
    q_offset: int,
    kv_offset: int,
    device: torch.device | str | None,
) -> Source:
    """Bring any source that `masks.recover` documents to one form."""
    if type(keep) is not bool:
        raise CompositionTypeError(
            f"recover got keep={shown(keep)}; True says that True marks allowed cells, False that "
            "it marks masked ones"
        )
    for name, value, least in (
        ("q_len", q_len, 0),
        ("kv_len", kv_len, 0),
        ("batch", batch, 1),
        ("heads", heads, 1),
    ):
        if value is not None:
            check_int(f"recover {name}", value, least)
    check_int("recover q_offset", q_offset, 0)
    check_int("recover kv_offset", kv_offset, 0)
    if not isinstance(source, Mask) and callable(source) and not isinstance(source, torch.Tensor):
        lengths = _needed("a function", q_len, kv_len)
        return _of_function(
            cast(MaskFunction, source), Extent(*lengths, q_offset, kv_offset), keep,
            batch, heads, device,
        )  # fmt: skip
    if batch is not None or heads is not None or q_offset or kv_offset:
        raise CompositionError(
            f"recover got {describe(source)} with batch, heads, q_offset or kv_offset; these "
            "belong to a function fn(b, h, i, j), everything else has its batches, heads, rows "
            "and keys"
        )
    if isinstance(source, Mask):
        return _written(source, q_len, kv_len, keep)
    if isinstance(source, np.ndarray):
        source = _tensor(source)
    if isinstance(source, torch.Tensor):
        check_readable("recover", source)
        if not (source.dim() in (2, 3) and holds_integers(source) and source.shape[-1] == 2):
            return _from_tensor(source, q_len, kv_len, keep)
        source = source.tolist()
    bounds = _bounds(source, q_len, kv_len, keep)
    said = f"all {bounds.q_len} rows of bounds read"
    return Source(bounds, bounds.q_len, bounds.kv_len, said)


def _needed(what: str, q_len: int | None, kv_len: int | None) -> tuple[int, int]:
    if q_len is None or kv_len is None:
        raise CompositionError(
            f"recover got {what}, which does not know its lengths, with q_len={q_len} and "
            f"kv_len={kv_len}; say both"
        )
    return q_len, kv_len


def _fits(what: str, said: Sequence[int | None], own: Sequence[int]) -> None:
    for name, want, has in zip(("q_len", "kv_len"), said, own, strict=True):
        if want is not None and want != has:
            raise CompositionError(
                f"recover got {what} with {name}={has}, but was told {name}={want}; leave it out"
            )


def _cells_read(q_len: int, kv_len: int, keep: bool) -> str:
    return f"all {q_len * kv_len} cells read (True = {'allowed' if keep else 'masked out'})"


# -- masks and tensors ---------------------------------------------------------------------


def _written(mask: Mask, q_len: int | None, kv_len: int | None, keep: bool) -> Source:
    if not keep:
        raise CompositionError(
            f"recover got keep=False with {mask!r}; a mask says what it allows, so invert it: ~mask"
        )
    own = [
        said if has is None else has for said, has in zip((q_len, kv_len), mask.extent, strict=True)
    ]
    rows, keys = _needed(repr(mask), *own)
    mask.check(rows if q_len is None else q_len, keys if kv_len is None else kv_len)
    known = mask.is_region(rows, keys)
    said = "compared as regions" if known else _cells_read(rows, keys, True)
    return Source(mask, rows, keys, said, written=True)


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise CompositionTypeError(
            f"recover got {describe(array)}, which torch cannot hold ({error}); give booleans, or "
            "row bounds as int64"
        ) from None


def _from_tensor(tensor: torch.Tensor, q_len: int | None, kv_len: int | None, keep: bool) -> Source:
    cells = boolean_cells(tensor, "keep" if keep else "drop")
    planes = cells.reshape((1,) * (4 - cells.dim()) + tuple(cells.shape))
    # An expanded axis holds one score matrix, however long it is.
    planes = planes[slice(None if planes.stride(0) else 1), slice(None if planes.stride(1) else 1)]
    own = planes.shape[2], planes.shape[3]
    _fits(f"a tensor of shape {tuple(tensor.shape)}", (q_len, kv_len), own)
    return Source(None, *own, _cells_read(*own, keep), tensor=planes, keep=keep)


# -- functions -----------------------------------------------------------------------------


def _of_function(
    function: MaskFunction,
    at: Extent,
    keep: bool,
    batch: int | None,
    heads: int | None,
    device: torch.device | str | None,
) -> Source:
    lengths = at.q_len, at.kv_len
    if all(lengths):
        _check_uses(function, batch, heads, device)
    mask: Mask = Predicate(function, batch, heads)
    mask = mask[at.q_offset :, at.kv_offset :] if at.q_offset or at.kv_offset else mask
    mask = mask if keep else ~mask
    regions = {}
    for place in product(range(batch or 1), range(heads or 1)):
        region = symbolic(function, at, *place, device)
        if region is None:
            return Source(mask, *lengths, _cells_read(*lengths, keep), device=device)
        regions[place] = region if keep else region.complement(*lengths)
    meant = "allowed" if keep else "masked out"
    said = f"comparisons of rows with keys, read from the function (True = {meant})"
    return Source(mask, *lengths, said, regions=regions)


class _Uses(TorchFunctionMode):
    """Notes which of two tensors any torch operation is given."""

    def __init__(self, b: torch.Tensor, h: torch.Tensor) -> None:
        super().__init__()
        self.watched = {"batch": b, "heads": h}
        self.used: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        looks = getattr(func, "__name__", "")
        if looks == "__get__":  # of an attribute
            looks = getattr(getattr(func, "__self__", None), "__name__", "")
        values = [] if looks in _BLIND else tree_flatten((args, kwargs))[0]
        for value in values:
            self.used |= {name for name, one in self.watched.items() if value is one}
        return func(*args, **(kwargs or {}))


# What is asked of an index without looking at its number: where it is, and a True beside it.
_BLIND = {
    "device", "dtype", "shape", "ndim", "dim", "size", "new_ones", "new_zeros", "new_full",
    "new_tensor", "ones_like", "zeros_like", "full_like",
}  # fmt: skip


def indices_used(fn: MaskFunction, device: torch.device | str | None = None) -> set[str]:
    """Return which of "batch" and "heads" a function looks at.

    >>> indices_used(lambda b, h, i, j: i >= j + h)
    {'heads'}
    """
    b, h = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    first = torch.zeros(1, dtype=torch.int64, device=device)
    with _Uses(b, h) as noted:
        evaluate(fn, b, h, first, first)
    used: set[str] = noted.used
    return used


def _check_uses(
    fn: MaskFunction, batch: int | None, heads: int | None, device: torch.device | str | None
) -> None:
    """Refuse a function that reads b or h without being told how many there are."""
    used = indices_used(fn, device)
    for name, count in (("batch", batch), ("heads", heads)):
        if count is None and name in used:
            index = "b" if name == "batch" else "h"
            raise CompositionError(
                f"the mask function {function_name(fn)} reads {index}, and {name}= was not said, "
                f"so one answer cannot stand for all; say {name}=1 or how many there are"
            )


# -- row bounds ----------------------------------------------------------------------------


def _bounds(source: object, q_len: int | None, kv_len: int | None, keep: bool) -> Slices:
    if not isinstance(source, tuple | list):
        raise CompositionTypeError(
            f"recover got {describe(source)}; it takes a bool tensor, a function fn(b, h, i, j), "
            "a mask, or for each row (start, stop) or a list of such pairs"
        )
    if not keep:
        raise CompositionError(
            "recover got keep=False with row bounds; these say which keys are allowed, so invert "
            "the mask that comes back: ~mask"
        )
    if kv_len is None:
        raise CompositionError(
            "recover got row bounds and no kv_len; bounds do not tell how many keys there are"
        )
    _fits("row bounds", (q_len, None), (len(source), 0))
    region = Region.from_rows(_row(i, row, kv_len) for i, row in enumerate(source))
    return Slices.of(region, len(source), kv_len)


def _row(i: int, row: object, kv_len: int) -> list[tuple[int, int]]:
    """Return the runs of one row, in order and apart."""
    pairs: Any = [row] if _is_pair(row) else row
    if not isinstance(pairs, tuple | list) or not all(_is_pair(pair) for pair in pairs):
        raise CompositionTypeError(
            f"recover got {describe(row)} for row {i}; a row is (start, stop), or a list of such "
            "pairs of ints"
        )
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(pair for pair in pairs if pair[0] < pair[1]):
        if start < 0 or stop > kv_len:
            raise CompositionError(
                f"recover got the keys {shown(start)} <= j < {shown(stop)} for row {i}, but there "
                f"are kv_len={kv_len}; bounds lie within the score matrix"
            )
        if runs and start <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(runs[-1][1], stop))
        else:
            runs.append((start, stop))
    return runs


def _is_pair(value: object) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(type(end) is int for end in value)
    )
