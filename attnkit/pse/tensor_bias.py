"""`TensorBias`: what biases share that are a tensor, with or without axes of heads and batch."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from attnkit.arguments import check_floats
from attnkit.errors import CompositionError
from attnkit.pse.base import Pse, Rectangle

__all__ = ["TensorBias"]


class TensorBias(Pse):
    """A tensor of some last `axes`, alone, after ``n``, or after ``[1 | b, 1 | n]``."""

    tensor: Tensor
    axes: ClassVar[tuple[str, ...]]

    def _hold(self, tensor: Tensor, remedy: str = "") -> None:
        """Keep a tensor, if it has the axes of a bias."""
        name, last = f"pse.{type(self).__name__}", ", ".join(self.axes)
        check_floats(name, tensor)
        object.__setattr__(self, "tensor", tensor)
        if tensor.ndim - len(self.axes) not in (0, 1, 2):
            raise CompositionError(
                f"pse.{self}: give [{last}], [n, {last}] or [1 or b, 1 or n, {last}]{remedy}"
            )

    def _check_values(self, told: str, infinite: bool = False) -> None:
        """Raise `CompositionError` for NaN, and for infinite values unless told otherwise."""
        values = self.tensor.detach()
        traced = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
        if traced or values.is_meta or not values.numel():
            return  # there is nothing to read yet
        # One pass without a temporary; NaN propagates into both ends.
        low, high = torch.stack(torch.aminmax(values)).tolist()
        finite = math.isfinite(low) and math.isfinite(high)
        if math.isnan(low) or not (infinite or finite):
            raise CompositionError(f"pse.{self} holds {told}")

    @property
    def _leading(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape[: -len(self.axes)])

    @property
    def heads(self) -> int | None:
        """Its number of heads; None when it has no heads axis, or one of extent 1."""
        lead = self._leading
        return None if not lead or lead == (lead[0], 1) else lead[-1]

    @property
    def batch(self) -> int | None:
        """Its number of batch elements; None when all of them share the bias."""
        lead = self._leading
        return lead[0] if len(lead) == 2 and lead[0] != 1 else None

    @property
    def anchored(self) -> bool:
        """False: an entry is where it is, whatever the lengths."""
        return False

    def _values(self, at: Rectangle, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        """Return a view: of the rows too, where they have an axis."""
        keys = slice(*at.keys)
        if len(self.axes) == 1:
            return self.tensor[..., None, keys]
        return self.tensor[..., slice(*at.rows), keys]

    def __repr__(self) -> str:
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        side = ", before_scale=True" if self.before_scale else ""
        grad = ", requires_grad" if self.tensor.requires_grad else ""
        return f"{type(self).__name__}({dtype}{list(self.tensor.shape)}{side}{grad})"
