"""`Dilated`: every step-th key, counted from the query."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnkit.arguments import check_align, check_int
from attnkit.geometry import Region
from attnkit.masks.base import MASKS, Align, Enclosure, Mask, Rectangle, anchor

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

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        i = torch.arange(*at.rows, device=device)[:, None] + anchor(self.align, at.q_len, at.kv_len)
        j = torch.arange(*at.keys, device=device)
        # Beyond all distances of the matrix, a step of any size leaves distance 0 alone.
        return (i - j) % min(self.step, at.q_len + at.kv_len + 1) == 0
