"""`Dilated`: every step-th key, counted from the query."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from attnkit.arguments import check_align, check_int
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Align, Enclosure, Mask, Rectangle, anchor
from attnkit.masks.order import Order

__all__ = ["Dilated"]


@MASKS.register("dilated")
@dataclass(frozen=True, repr=False, eq=False)
class Dilated(Mask):
    """Keys a whole number of steps away: ``(p - j) % step == 0``, p the query's position.

    Not a small union of slices (it has one per residue and key), so it keeps its exact cells
    and the bounds that are known: ``Dilated(2) & SlidingWindow(256)`` lives inside a band.

    >>> from attnkit import masks
    >>> print((masks.Dilated(2) & masks.Causal()).show(4, 4))
    #...
    .#..
    #.#.
    .#.#
    """

    step: int
    align: Align = "bottom_right"

    def __post_init__(self) -> None:
        check_int("Dilated step", self.step, 1)
        check_align("Dilated", self.align)

    _alike_on_squares = True

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Everything bounds it from outside; step 1 is everything."""
        full = Region.full(q_len, kv_len)
        return Enclosure(full if self.step == 1 else Region.empty(), full)

    def in_order(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Order | None:
        """Sort positions by their residue: the cells of one residue are a block of the diagonal.

        There are no more residues than positions, however large the step is.
        """
        if self.step == 1:
            return None
        at, step = anchor(self.align, q_len, kv_len), self.step
        of_rows = {(i + at) % step for i in range(min(q_len, step))}
        residues = sorted(of_rows.union(range(min(kv_len, step))))
        rows = tuple(range((residue - at) % step, q_len, step) for residue in residues)
        keys = tuple(range(residue, kv_len, step) for residue in residues)
        ends = zip(*(accumulate(map(len, side), initial=0) for side in (rows, keys)), strict=True)
        blocks = (Slice(i0, i1, j0, j1) for (i0, j0), (i1, j1) in pairwise(ends))
        return Order(rows, keys, Region.of(*blocks))

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        i = torch.arange(*at.rows, device=device)[:, None] + anchor(self.align, at.q_len, at.kv_len)
        j = torch.arange(*at.keys, device=device)
        # Beyond all distances of the matrix, a step of any size leaves distance 0 alone.
        return (i - j) % min(self.step, at.q_len + at.kv_len + 1) == 0
