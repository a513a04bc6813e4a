"""`GivenCells`: a mask whose cells come with each call, as a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from attnkit.errors import CompositionTypeError
from attnkit.geometry import Region
from attnkit.masks.base import Enclosure, Mask, Rectangle

__all__ = ["GivenCells"]


@dataclass(frozen=True, repr=False, eq=False)
class GivenCells(Mask):
    """Any cells of score matrices ``[1 | b, 1 | n, q_len, kv_len]``: a call says which.

    Such a mask is not more than its shape, so that one plan serves every call, whatever the cells
    are, and a captured graph does. Keys that nobody sees must hold finite numbers: they are not
    looked for.

    >>> GivenCells((1, 1, 1, 8)).is_region(1, 8)
    False
    >>> GivenCells.of(torch.ones(2, 1, 1, 8).bool()).batches
    2
    """

    shape: tuple[int, int, int, int]
    cells: torch.Tensor | None = field(default=None, compare=False)
    comes_with_call = True

    @classmethod
    def of(cls, cells: torch.Tensor) -> GivenCells:
        """Return the mask of such a shape."""
        b, n, q_len, kv_len = cells.shape
        return cls((b, n, q_len, kv_len))

    def bound(self, tensors: Sequence[torch.Tensor]) -> GivenCells:
        """Return the mask with the cells that came, for who reads them."""
        return GivenCells(self.shape, *tensors)

    def _value(self) -> tuple[int, ...]:
        return self.shape

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Nothing is known before the call."""
        return Enclosure(Region.empty(), Region.full(q_len, kv_len))

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        if self.cells is None:
            raise CompositionTypeError(
                f"{self!r}: its cells come with each call, and a plan cannot read them"
            )
        b, n, _, _ = self.shape
        plane = self.cells[at.batch if b > 1 else 0, at.head if n > 1 else 0]
        return plane[slice(*at.rows), slice(*at.keys)].to(device)

    @property
    def batches(self) -> int | None:
        """As the tensor's; 1 serves every batch element."""
        return self.shape[0] if self.shape[0] > 1 else None

    @property
    def heads(self) -> int | None:
        """As the tensor's; 1 serves every head."""
        return self.shape[1] if self.shape[1] > 1 else None

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The tensor's lengths."""
        return self.shape[2:]
