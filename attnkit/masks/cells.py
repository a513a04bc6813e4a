"""Cells of one score matrix: a rectangle of them, what is known of a set, a region as a tensor."""

from __future__ import annotations

from typing import NamedTuple

import torch

from attnkit.geometry import Region

__all__ = ["Enclosure", "Rectangle", "paint"]


class Rectangle(NamedTuple):
    """Rows ``[start, stop)`` and keys ``[start, stop)`` of one score matrix.

    >>> Rectangle((2, 4), (0, 3), 8, 8).shape
    (2, 3)
    """

    rows: tuple[int, int]
    keys: tuple[int, int]
    q_len: int
    kv_len: int
    batch: int = 0
    head: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """How many rows and keys it has."""
        return self.rows[1] - self.rows[0], self.keys[1] - self.keys[0]


class Enclosure(NamedTuple):
    """What is known of a mask as a region: ``inner <= mask <= outer``.

    For a mask that is a region the two are equal, and are the mask.

    >>> from attnkit import masks
    >>> known = (masks.Dilated(2) & masks.SlidingWindow(3)).enclosure(6, 6)
    >>> known.inner.area, known.outer.area, known.exact
    (0, 15, False)
    """

    inner: Region
    outer: Region

    @property
    def exact(self) -> bool:
        """Whether the two bounds meet, so that the mask is a region."""
        return self.inner == self.outer


def paint(
    region: Region, q_len: int, kv_len: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """Return a region as a bool tensor [Sq, Skv], True inside."""
    cells = torch.zeros(q_len, kv_len, dtype=torch.bool, device=device)
    for s in region.slices:
        block = cells[s.i0 : s.i1, s.j0 : s.j1]
        if s.is_rectangle:
            block.fill_(True)
        else:
            shift = s.i0 - s.j0
            block |= torch.ones_like(block).tril(s.hi + shift).triu(s.lo + shift)
    return cells
