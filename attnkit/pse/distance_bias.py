"""`DistanceBias`: a bias given as a number for each distance between query and key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.arguments import check_align, check_floats, check_int
from attnkit.errors import CompositionError
from attnkit.pse.base import Align, Rectangle
from attnkit.pse.by_distance import ByDistance

__all__ = ["DistanceBias"]


@dataclass(frozen=True, init=False, eq=False, repr=False)
class DistanceBias(ByDistance):
    """A number per distance: ``bias[h, i, j] = tensor[h, j - i' - first]``, added after the scale.

    Shapes: ``[d]`` or ``[n, d]``, the distances from `first` on, each that is asked for among them.
    ``i' = i + (kv_len - q_len)`` for ``align="bottom_right"``, ``i' = i`` for ``"top_left"``.
    Floating dtypes. The tensor itself is kept: gradients flow to it. No matrix is made.

    Equality compares content, as for `Dense`. Raises `CompositionTypeError` for anything but a
    floating tensor, `CompositionError` for another rank, or at use for distances it does not hold.

    >>> import torch
    >>> bias = DistanceBias(torch.tensor([3.0, 2.0, 1.0]), first=-2)
    >>> bias
    DistanceBias(float32[3], first=-2)
    >>> bias.materialize(1, 3)
    tensor([[[[3., 2., 1.]]]])
    """

    tensor: Tensor
    first: int
    align: Align

    def __init__(self, tensor: Tensor, first: int, align: Align = "bottom_right") -> None:
        check_floats("pse.DistanceBias", tensor)
        check_int("pse.DistanceBias first", first, None)
        check_align("pse.DistanceBias", align)
        vars(self).update(tensor=tensor, first=first, align=align)
        if tensor.ndim not in (1, 2):
            raise CompositionError(f"pse.{self}: give a number per distance, [d] or [n, d]")

    @property
    def heads(self) -> int | None:
        """Its number of heads; None where all share the numbers."""
        return self.tensor.shape[0] if self.tensor.ndim == 2 else None

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """Look the distances up, ``[n | 1, *distance.shape]``; each is one that it holds."""
        table = self.tensor if self.tensor.ndim == 2 else self.tensor[None]
        return table.to(dtype)[:, (distance - self.first).to(table.device)]

    def diagonals(
        self, q_len: int, kv_len: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """Return the number of each distance of a score matrix."""
        first = 1 - q_len - self.offset(q_len, kv_len)
        self._check(first, first + q_len + kv_len - 2)
        return super().diagonals(q_len, kv_len, dtype=dtype, device=device)

    def _values(self, at: Rectangle, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        offset = self.offset(at.q_len, at.kv_len)
        self._check(at.keys[0] - at.rows[1] + 1 - offset, at.keys[1] - 1 - at.rows[0] - offset)
        return super()._values(at, dtype, device)

    def _check(self, least: int, most: int) -> None:
        """Raise `CompositionError` for distances that it does not hold; no number is read."""
        low, high = self.first, self.first + self.tensor.shape[-1] - 1
        if least <= most and (least < low or most > high):
            raise CompositionError(
                f"pse.{self} holds the distances {low} to {high}, and was asked for {least} to "
                f"{most}"
            )

    def __repr__(self) -> str:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        align = "" if self.align == "bottom_right" else f", align={self.align!r}"
        return f"DistanceBias({dtype}{list(self.tensor.shape)}, first={self.first}{align})"
