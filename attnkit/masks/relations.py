"""Sets of cells that compare a number of the row with a number of the key, without a matrix."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from attnkit.geometry import Region, Slice, Strip
from attnkit.masks.runs import Runs

__all__ = ["TooManyRuns", "compare", "marked"]

Order = Literal["le", "ge", "eq", "lt", "gt", "ne"]
Values = np.ndarray[Any, Any]
Ints = np.ndarray[Any, np.dtype[np.int64]]

_OPPOSITE: dict[Order, Order] = {"lt": "ge", "gt": "le", "ne": "eq"}
_MIRRORED: dict[Order, Order] = {"le": "ge", "ge": "le", "eq": "eq"}
_HOLDS = {"le": np.less_equal, "ge": np.greater_equal, "eq": np.equal}
_MOST_COMPARED = 1 << 22  # cells that are looked at where numbers have no order


class TooManyRuns(Exception):
    """The set is no small union of slices."""


def marked(cells: Values, axis: int, q_len: int, kv_len: int) -> Region:
    """Return the cells whose row (axis 0), or whose key (1), is marked.

    >>> marked(np.array([True, False]), 1, 3, 2)
    Region.of(Slice(i0=0, i1=3, j0=0, j1=1, lo=-2, hi=0))
    """
    runs = Runs.of_cells(cells[None])
    ends = zip(runs.starts.tolist(), runs.stops.tolist(), strict=True)
    if axis == 0:
        return Region.of(*(Slice(a, b, 0, kv_len) for a, b in ends))
    row = tuple((a, 0, b, 0) for a, b in ends)
    return Region((Strip(0, q_len, row),) if row and q_len else ())


def compare(rows: Values, order: Order, keys: Values) -> Region:
    """Return ``{(i, j): rows[i] <= keys[j]}``, or with another order.

    Raises `TooManyRuns` where the cells would need more runs than a few per row and key.

    >>> compare(np.arange(3), "ge", np.arange(3)).area
    6
    """
    if order in _OPPOSITE:
        same = compare(rows, _OPPOSITE[order], keys)
        return same.complement(len(rows), len(keys))
    if not (len(rows) and len(keys)):
        return Region.empty()
    if _rising(keys):
        return _ends(rows, order, keys, len(keys)).region()
    if _rising(keys[::-1]):
        ends = _ends(rows, order, keys[::-1], len(keys))
        return ends._replace(starts=len(keys) - ends.stops, stops=len(keys) - ends.starts).region()
    if order == "eq":
        return _equal(rows, keys).region()
    if _rising(rows) or _rising(rows[::-1]):
        return compare(keys, _MIRRORED[order], rows).transpose()
    return _by_value(rows, order, keys).region()


def _rising(values: Values) -> bool:
    return bool((values[1:] >= values[:-1]).all())


def _ends(rows: Values, order: Order, keys: Values, width: int) -> Runs:
    """Of keys that rise, each row has one run."""
    starts = np.zeros(len(rows), np.int64)
    stops = np.full(len(rows), width)
    if order != "ge":
        starts = np.searchsorted(keys, rows, "left")
    if order != "le":
        stops = np.searchsorted(keys, rows, "right")
    some = starts < stops
    return Runs(len(rows), np.flatnonzero(some), starts[some], stops[some])


def _equal(rows: Values, keys: Values) -> Runs:
    """Of keys in any order: the ranges of one number, as often as it comes."""
    borders = np.flatnonzero(keys[1:] != keys[:-1]) + 1
    starts = np.concatenate(([0], borders))
    stops = np.concatenate((borders, [len(keys)]))
    by_value = np.argsort(keys[starts], kind="stable")
    values = keys[starts][by_value]
    low = np.searchsorted(values, rows, "left")
    return _gathered(low, np.searchsorted(values, rows, "right") - low,
                     starts[by_value], stops[by_value])  # fmt: skip


def _by_value(rows: Values, order: Order, keys: Values) -> Runs:
    """Of no order at all: each number of a row once."""
    values, which = np.unique(rows, return_inverse=True)
    if len(values) * len(keys) > _MOST_COMPARED:
        raise TooManyRuns
    each = Runs.of_cells(_HOLDS[order](values[:, None], keys))
    counts = np.bincount(each.rows, minlength=len(values))
    first = np.cumsum(counts) - counts
    return _gathered(first[which], counts[which], each.starts, each.stops)


def _gathered(first: Ints, counts: Ints, starts: Ints, stops: Ints) -> Runs:
    """Return runs of which row i has those from ``first[i]`` on, ``counts[i]`` of them."""
    total = int(counts.sum())
    if total > 8 * (len(first) + len(starts)) + 64:
        raise TooManyRuns
    rows = np.repeat(np.arange(len(first)), counts)
    within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    which = first[rows] + within
    return Runs(len(first), rows, starts[which], stops[which])
