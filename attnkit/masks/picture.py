"""Pictures of score matrices: what they hold, field by field, as text or as a drawing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from attnkit import fields
from attnkit.display import Drawing, Text
from attnkit.errors import CompositionError
from attnkit.fields import Picture, layer
from attnkit.geometry import Region

if TYPE_CHECKING:
    from attnkit.display.figure import Figure

__all__ = ["Picture", "figure", "layer", "shares", "text"]


def shares(
    cells: Region | Callable[[int, int], torch.Tensor],
    q_len: int,
    kv_len: int,
    rows: int,
    columns: int,
) -> Picture:
    """Return the share of allowed cells in each field of a grid of `rows` x `columns` at most.

    `cells` is the region, or what reads the rows ``i0 <= i < i1`` of a mask that is none.

    >>> from attnkit.geometry import Slice
    >>> shares(Region.of(Slice(0, 4, 0, 4, hi=0)), 4, 4, 2, 2).tolist()
    [[0.75, 0.0], [1.0, 0.75]]
    """
    if isinstance(cells, Region):
        return fields.shares(cells.strips, q_len, kv_len, rows, columns)
    downs, rights = fields.borders(q_len, rows), fields.borders(kv_len, columns)
    grid = np.zeros((len(downs) - 1, len(rights) - 1))
    for n, (i0, i1) in enumerate(pairwise(downs) if kv_len else ()):
        grid[n] = np.add.reduceat(cells(i0, i1).sum(0).cpu().numpy(), rights[:-1])
    return grid / np.outer(np.diff(downs), np.diff(rights))


def text(picture: Picture) -> Text:
    """Return the shares as signs: ``#`` all allowed, ``+`` some allowed, ``.`` none."""
    rows = ("".join("#" if s == 1 else "+" if s else "." for s in row) for row in picture)
    return Text("\n".join(rows))


def figure(drawing: Drawing, columns: int = 2) -> Figure:
    """Return a figure of a drawing; `columns` are those of its legend."""
    try:
        from attnkit.display.figure import figure as drawn
    except ImportError:
        raise CompositionError("plot() draws with matplotlib: pip install attnkit[plot]") from None
    return drawn(drawing, columns)
