"""What `masks.recover` takes, brought to one form: a reader of rows for each score matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from attnkit.arguments import check_int, check_readable, describe, holds_integers
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region
from attnkit.masks.base import Mask
from attnkit.masks.dense import Dense, _boolean
from attnkit.masks.predicate import MaskFunction, Predicate, evaluate, function_name
from attnkit.masks.slices import Slices
from attnkit.masks.trace import RowReader, function_rows, mask_rows, region_rows

__all__ = ["Source", "source_of"]


class Source(NamedTuple):
    """A source of cells: its lengths, what it tells apart, and how to read it."""

    q_len: int
    kv_len: int
    batches: int | None
    heads: int | None
    rows: Callable[[int, int], RowReader]
    region: Callable[[int, int], Region | None]
    fallback: Callable[[], Mask]
    said: str
    mask: Mask | None = None


def source_of(
    source: object,
    q_len: int | None,
    kv_len: int | None,
    keep: bool,
    batch: int | None,
    heads: int | None,
    q_offset: int,
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
    if not isinstance(source, Mask) and callable(source) and not isinstance(source, torch.Tensor):
        lengths = _needed("a function", q_len, kv_len)
        return _from_function(source, *lengths, keep, batch, heads, q_offset, device)
    if batch is not None or heads is not None or q_offset:
        raise CompositionError(
            f"recover got {describe(source)} with batch, heads or q_offset; these belong to a "
            "function fn(b, h, i, j), everything else has batches, heads and rows of its own"
        )
    if isinstance(source, Mask):
        return _from_mask(source, q_len, kv_len, keep)
    if isinstance(source, np.ndarray):
        source = _tensor(source)
    if isinstance(source, torch.Tensor):
        check_readable("recover", source)
    if isinstance(source, torch.Tensor) and not (source.dim() in (2, 3) and _whole(source)):
        return _from_tensor(source, q_len, kv_len, keep)
    return _from_bounds(source, q_len, kv_len, keep)


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise CompositionTypeError(
            f"recover got {describe(array)}, which torch cannot hold ({error}); give booleans, or "
            "row bounds as int64"
        ) from None


def _whole(tensor: torch.Tensor) -> bool:
    return holds_integers(tensor) and tensor.shape[-1] == 2


def _needed(what: str, q_len: int | None, kv_len: int | None) -> tuple[int, int]:
    if q_len is None or kv_len is None:
        raise CompositionError(
            f"recover got {what}, which knows no lengths of its own, with q_len={q_len} and "
            f"kv_len={kv_len}; say both"
        )
    return q_len, kv_len


def _fits(what: str, said: Sequence[int | None], own: Sequence[int]) -> None:
    for name, want, has in zip(("q_len", "kv_len"), said, own, strict=True):
        if want is not None and want != has:
            raise CompositionError(
                f"recover got {what} with {name}={has}, but was told {name}={want}; leave it out"
            )


def _read(q_len: int, kv_len: int, keep: bool) -> str:
    return f"all {q_len * kv_len} cells read (True = {'allowed' if keep else 'masked out'})"


def _negated(reader: RowReader) -> RowReader:
    return lambda i0, i1: ~reader(i0, i1)


# -- masks and tensors ---------------------------------------------------------------------


def _from_mask(mask: Mask, q_len: int | None, kv_len: int | None, keep: bool) -> Source:
    if not keep:
        raise CompositionError(
            f"recover got keep=False with {mask!r}; a mask says what it allows, so invert it: ~mask"
        )
    own = [
        said if has is None else has for said, has in zip((q_len, kv_len), mask.extent, strict=True)
    ]
    rows, keys = _needed(repr(mask), *own)
    mask.check(rows if q_len is None else q_len, keys if kv_len is None else kv_len)

    def region(b: int, h: int) -> Region | None:
        known = mask.enclosure(rows, keys, b, h)
        return known.inner if known.exact else None

    return Source(
        rows, keys, mask.batches, mask.heads,
        rows=lambda b, h: mask_rows(mask, rows, keys, b, h),
        region=region,
        fallback=lambda: mask,
        said="compared as regions" if mask.is_region(rows, keys) else _read(rows, keys, True),
        mask=mask,
    )  # fmt: skip


def _from_tensor(tensor: torch.Tensor, q_len: int | None, kv_len: int | None, keep: bool) -> Source:
    cells = _boolean(tensor, "keep" if keep else "drop")
    planes = cells.detach().reshape((1,) * (4 - cells.dim()) + tuple(cells.shape))
    b_count, h_count, rows, keys = planes.shape
    _fits(f"a tensor of shape {tuple(tensor.shape)}", (q_len, kv_len), (rows, keys))
    # An expanded axis holds one score matrix, however long it is.
    batches = b_count if b_count > 1 and planes.stride(0) else None
    heads = h_count if h_count > 1 and planes.stride(1) else None

    def reader(b: int, h: int) -> RowReader:
        plane = planes[b, h]
        return _negated(lambda i0, i1: plane[i0:i1]) if not keep else lambda i0, i1: plane[i0:i1]

    return Source(
        rows, keys, batches, heads,
        rows=reader,
        region=lambda b, h: None,
        fallback=lambda: Dense.keep(cells) if keep else Dense.drop(cells),
        said=_read(rows, keys, keep),
    )  # fmt: skip


# -- functions -----------------------------------------------------------------------------


class _Uses(TorchFunctionMode):
    """Notes which of two tensors any torch operation is given."""

    def __init__(self, b: torch.Tensor, h: torch.Tensor) -> None:
        super().__init__()
        self.watched = {"batch": b, "heads": h}
        self.used: set[str] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for value in _flat((*args, *(kwargs or {}).values())):
            self.used |= {name for name, one in self.watched.items() if value is one}
        return func(*args, **(kwargs or {}))


def _flat(values: Sequence[Any]) -> list[Any]:
    out = []
    for value in values:
        out += _flat(value) if isinstance(value, tuple | list) else [value]
    return out


def _from_function(
    fn: Callable[..., Any],
    q_len: int,
    kv_len: int,
    keep: bool,
    batch: int | None,
    heads: int | None,
    q_offset: int,
    device: torch.device | str | None,
) -> Source:
    function = cast(MaskFunction, fn)
    if q_len and kv_len:
        _check_uses(function, batch, heads, device)

    def reader(b: int, h: int) -> RowReader:
        read = function_rows(function, kv_len, b, h, q_offset, device)
        return read if keep else _negated(read)

    def fallback() -> Mask:
        mask: Mask = Predicate(function, batch, heads)
        if q_offset:
            mask = mask[q_offset:, :]
        return mask if keep else ~mask

    return Source(
        q_len, kv_len, batch, heads,
        rows=reader,
        region=lambda b, h: None,
        fallback=fallback,
        said=_read(q_len, kv_len, keep),
    )  # fmt: skip


def _check_uses(
    fn: MaskFunction, batch: int | None, heads: int | None, device: torch.device | str | None
) -> None:
    """Refuse a function that reads b or h without being told how many there are."""
    b, h = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(2))
    first = torch.zeros(1, dtype=torch.int64, device=device)
    with _Uses(b, h) as uses:
        evaluate(fn, b, h, first, first)
    for name, count in (("batch", batch), ("heads", heads)):
        if count is None and name in uses.used:
            index = "b" if name == "batch" else "h"
            raise CompositionError(
                f"the mask function {function_name(fn)} reads {index}, and {name}= was not said, "
                f"so one answer cannot stand for all; say {name}=1 or how many there are"
            )


# -- row bounds ----------------------------------------------------------------------------


def _from_bounds(source: object, q_len: int | None, kv_len: int | None, keep: bool) -> Source:
    if isinstance(source, torch.Tensor):
        source = source.tolist()
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
    rows = len(source)
    region = Region.from_rows(_row(i, row, kv_len) for i, row in enumerate(source))
    return Source(
        rows, kv_len, None, None,
        rows=lambda b, h: region_rows(region, kv_len),
        region=lambda b, h: region,
        fallback=lambda: Slices.of(region, rows, kv_len),
        said=f"all {rows} rows of bounds read",
    )  # fmt: skip


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
