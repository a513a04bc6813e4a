"""`DistanceBias`: a bias given as a number for each distance between query and key."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.arguments import check_align, check_floats, check_int
from attnkit.errors import CompositionError
from attnkit.pse.base import Align
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
        """Look the distances up, ``[n | 1, *distance.shape]``."""
        held = self.tensor.shape[-1]
        low, high = self.first, self.first + held - 1
        if distance.numel() and not distance.is_meta:
            ends = torch.stack(torch.aminmax(distance)).tolist()
            if ends[0] < low or ends[1] > high:
                raise CompositionError(
                    f"pse.{self} holds the distances {low} to {high}, and was asked for "
                    f"{ends[0]} to {ends[1]}"
                )
        table = self.tensor if self.tensor.ndim == 2 else self.tensor[None]
        return table.to(dtype)[:, (distance - low).to(table.device)]

    def __repr__(self) -> str:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        align = "" if self.align == "bottom_right" else f", align={self.align!r}"
        return f"DistanceBias({dtype}{list(self.tensor.shape)}, first={self.first}{align})"
