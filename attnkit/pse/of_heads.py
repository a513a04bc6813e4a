"""`OfHeads`: some of the heads of a bias that tells heads apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnkit.errors import CompositionError
from attnkit.masks.of_heads import check_heads
from attnkit.pse.base import Pse, Rectangle
from attnkit.pse.part_of import PartOf
from attnkit.pse.structure import Linear, Root, Structure

__all__ = ["OfHeads"]


@dataclass(frozen=True, repr=False, eq=False)
class OfHeads(PartOf):
    """Query heads ``start <= h < stop`` of another bias, counted from 0.

    Its tensors are those of the other bias, whole, which the gradients of these heads reach. Made
    by `Pse.for_heads` where a bias has no closer form.

    Raises `CompositionError` for heads that the bias was not made for.

    >>> from attnkit import pse
    >>> bias = pse.T5Relative(4).for_heads(1, 3)
    >>> bias.heads, bias.tensors[0].shape, bias.materialize(2, 2).shape
    (2, torch.Size([32, 4]), torch.Size([1, 2, 2, 2]))
    """

    start: int
    stop: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.part, self.part.heads, self.start, self.stop)
        if self.part.heads is None:
            raise CompositionError(f"pse.{self.part} is the same for all heads; it is that of any")

    @property
    def heads(self) -> int:
        """How many heads are left."""
        return self.stop - self.start

    @property
    def structure(self) -> Structure | None:
        """As that of the bias, with the slopes of these heads."""
        known = self.part.structure
        if isinstance(known, Linear | Root) and known.slopes is not None:
            return replace(known, slopes=known.slopes[self.start : self.stop])
        return known

    @property
    def structure_tensors(self) -> tuple[Tensor, ...]:
        """Views of that bias's, of these heads."""
        known, numbers = self.part.structure, self.part.structure_tensors
        axis = None if known is None else known.heads_axis
        if axis is None or not numbers:
            return numbers
        if numbers[0].ndim < -axis or numbers[0].shape[axis] == 1:  # the same for all heads
            return numbers
        return (numbers[0].narrow(axis, self.start, self.heads), *numbers[1:])

    def diagonals(
        self, q_len: int, kv_len: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """Return those of these heads."""
        found = self.part.diagonals(q_len, kv_len, dtype=dtype, device=device)
        return found[self.start : self.stop] if len(found) > 1 else found

    def _values(self, at: Rectangle, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        cells = self.part._cells(at, dtype, device)
        return cells[:, self.start : self.stop] if cells.shape[1] > 1 else cells

    def _bias_of(self, at: Rectangle) -> Pse:
        return self.part._bias_of(at).for_heads(self.start, self.stop)

    def _of_heads(self, start: int, stop: int) -> Pse:
        return self.part.for_heads(self.start + start, self.start + stop)

    def __repr__(self) -> str:
        return f"{self.part!r}.for_heads({self.start}, {self.stop})"
