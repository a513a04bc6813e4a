"""Fields of a picture: how much of each is in a set of cells, counted in integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnkit.display import Drawing, Layer, colour, html
from attnkit.strips import Strip, strip_area

if TYPE_CHECKING:
    from attnkit.geometry import Region

__all__ = ["GRID", "Picture", "borders", "layer", "page", "shares"]

Picture = np.ndarray[Any, np.dtype[np.float64]]
"""The share of each field, ``[rows, columns]``."""

_Whole = np.ndarray[Any, np.dtype[np.int64]]

GRID = 128
"""Rows and columns of fields, at most."""

_AT_ONCE = 1 << 12  # runs that are counted together
_VISIBLE = 0.2  # of a field with an allowed cell, that it is seen
_MOST_RUNS = 1 << 17


def shares(strips: Sequence[Strip], q_len: int, kv_len: int, rows: int, columns: int) -> Picture:
    """Return the share of each field, of a grid of `rows` x `columns` at most, that strips hold.

    Costs follow the strips, not the cells.

    >>> from attnkit.geometry import Region, Slice
    >>> shares(Region.of(Slice(0, 4, 0, 4, hi=0)).strips, 4, 4, 2, 2).tolist()
    [[0.75, 0.0], [1.0, 0.75]]
    """
    downs, rights = borders(q_len, rows), borders(kv_len, columns)
    counts = np.diff(_counted(strips, downs, np.array(rights)), axis=1)
    found: Picture = counts / np.outer(np.diff(downs), np.diff(rights))
    return found


def borders(length: int, most: int) -> list[int]:
    """Return the borders of fields that are as even as they can be.

    >>> borders(7, 3), borders(2, 3), borders(0, 3)
    ([0, 2, 4, 7], [0, 1, 2], [0])
    """
    count = min(length, most)
    return [length * k // count for k in range(count + 1)] if count else [0]


def _counted(strips: Sequence[Strip], downs: list[int], rights: _Whole) -> _Whole:
    """Return for each row of fields how many cells are left of each of some keys."""
    found = np.zeros((len(downs) - 1, len(rights)), dtype=np.int64)
    pieces: list[tuple[int, int, int, int, int, int]] = []  # row of fields, rows, run
    field = 0
    for i0, i1, runs in strips:
        while field < len(downs) - 1 and downs[field + 1] <= i0:
            field += 1
        n = field
        while n < len(downs) - 1 and downs[n] < i1:
            start, stop = max(i0, downs[n]), min(i1, downs[n + 1])
            at = start - i0
            pieces += [(n, stop - start, a + da * at, da, b + db * at, db) for a, da, b, db in runs]
            n += 1
    for k in range(0, len(pieces), _AT_ONCE):
        n, rows, a, da, b, db = np.array(pieces[k : k + _AT_ONCE], dtype=np.int64).T[:, :, None]
        np.add.at(found, n[:, 0], _before(rights, rows, a, da) - _before(rights, rows, b, db))
    return found


def _before(keys: _Whole, rows: _Whole, start: _Whole, slope: _Whole) -> _Whole:
    """Return how many cells lie between an end and each of some keys, over all rows of a run.

    The end is at ``start + slope * k`` in row k, for a slope of 0 or 1: the sum over k of
    ``max(0, key - end)`` is a rectangle, or a triangle whose last rows are cut off.
    """
    first = np.maximum(0, keys - start)
    seeing = np.where(slope == 0, rows, np.minimum(rows, first))
    found: _Whole = seeing * first - slope * (seeing * (seeing - 1) // 2)
    return found


def layer(share: Picture, colour: str, label: str = "") -> Layer:
    """Return shares in a colour; a field of which little is allowed stays visible.

    >>> layer(np.array([[0.0, 0.001, 1.0]]), "#000000").shares
    [[0.0, 0.2, 1.0]]
    """
    seen = np.where(share > 0, np.maximum(share, _VISIBLE), 0)
    return Layer(seen.tolist(), colour, label)


def page(region: Region) -> str:
    """Return what `Region._repr_html_` does.

    >>> from attnkit.geometry import Region
    >>> "16 cells in 1 slice" in page(Region.full(4, 4))
    True
    """

    def build() -> str:
        count = sum(len(runs) for _, _, runs in region.strips)
        area = sum(map(strip_area, region.strips))
        told = f"{area:,} cells in {count:,} slice{'s' * (count != 1)}"
        if count > _MOST_RUNS:
            return html.block(html.heading("Region", told), html.note("no picture of so many"))
        hull = region.bounds
        q_len, kv_len = (0, 0) if hull is None else (hull.i1, hull.j1)
        share = shares(region.strips, q_len, kv_len, GRID, GRID)
        note = f"rows 0 to {q_len - 1:,} (down), columns 0 to {kv_len - 1:,}" if area else ""
        drawn = Drawing(q_len, kv_len, (layer(share, colour(0)),), "Region", note)
        return html.block(html.heading("Region", told), html.picture(drawn) if area else "")

    return html.safely(build, lambda: repr(region))
