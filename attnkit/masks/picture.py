"""Pictures of score matrices: what they hold, field by field, in text or as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from attnkit.errors import CompositionError
from attnkit.geometry import Region, Slice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Picture", "figure", "shares", "text"]

Picture = np.ndarray[Any, np.dtype[np.float64]]


def shares(
    cells: Region | Callable[[int, int], torch.Tensor],
    q_len: int,
    kv_len: int,
    rows: int,
    columns: int,
) -> Picture:
    """Return the share of allowed cells in each field of a grid of `rows` x `columns` at most.

    `cells` is the region, or what reads the rows ``i0 <= i < i1`` of a mask that is none.

    >>> shares(Region.of(Slice(0, 4, 0, 4, hi=0)), 4, 4, 2, 2).tolist()
    [[0.75, 0.0], [1.0, 0.75]]
    """
    downs, rights = _cuts(q_len, rows), _cuts(kv_len, columns)
    grid = np.zeros((len(downs) - 1, len(rights) - 1))
    for n, (i0, i1) in enumerate(pairwise(downs)):
        if isinstance(cells, Region):
            band = cells & Region.of(Slice(i0, i1, 0, kv_len))
            parts = (band & Region.of(Slice(i0, i1, *ends)) for ends in pairwise(rights))
            grid[n] = [part.area for part in parts] if band else 0
        elif kv_len:
            counts = cells(i0, i1).sum(0).cpu().numpy()
            grid[n] = np.add.reduceat(counts, rights[:-1])
    return grid / np.outer(np.diff(downs), np.diff(rights))


def _cuts(length: int, most: int) -> list[int]:
    """Return the borders of fields that are as even as they can be."""
    count = min(length, most)
    return [length * k // count for k in range(count + 1)] if count else [0]


def text(picture: Picture) -> str:
    """Return the shares as signs: ``#`` all allowed, ``+`` some allowed, ``.`` none."""
    return "\n".join("".join("#" if s == 1 else "+" if s else "." for s in row) for row in picture)


def figure(picture: Picture, q_len: int, kv_len: int, title: str) -> Figure:
    """Return a figure of shares [rows, columns], or of colours [rows, columns, 3].

    A score matrix without cells is a blank field.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CompositionError("plot() draws with matplotlib: pip install attnkit[plot]") from None
    drawn = Figure(figsize=(5, 5.4), layout="constrained")
    axes = drawn.add_subplot()
    if picture.size:
        place = (0, kv_len, q_len, 0)
        axes.imshow(
            picture, "Blues", vmin=0, vmax=1, extent=place, aspect="auto", interpolation="nearest"
        )
    axes.set_title(title, fontsize=9)
    axes.set(xlabel="key j", ylabel="query i")
    return drawn
