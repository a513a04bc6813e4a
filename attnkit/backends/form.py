"""Layouts as strides: a request's tensors seen as ``[b n s d]``, without copies."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from attnkit import layouts

__all__ = ["Form", "form"]


class Form(NamedTuple):
    """How to see a tensor of a layout as ``[b n s d]``: split the merged axis, then permute.

    A packed layout gets a batch axis of 1 in front.
    """

    merged: int | None
    order: tuple[int, ...]
    inverse: tuple[int, ...]
    packed: bool
    turned: bool

    def view(self, tensor: Tensor, heads: int) -> Tensor:
        """Return the ``[b n s d]`` view."""
        if self.turned:  # the axes are there; tiny calls feel every further question
            return tensor.permute(self.order)
        if self.merged is not None:
            shape = tensor.shape
            width = shape[self.merged] // heads
            split = (*shape[: self.merged], heads, width, *shape[self.merged + 1 :])
            tensor = tensor.view(split)
        if self.packed:
            tensor = tensor[None]
        return tensor if self.order == (0, 1, 2, 3) else tensor.permute(self.order)

    def restore(self, tensor: Tensor) -> Tensor:
        """Return a ``[b n s d]`` tensor in the layout: a view where strides allow one."""
        tensor = tensor.permute(self.inverse)
        if self.turned:
            return tensor
        if self.packed:
            tensor = tensor[0]
        return tensor if self.merged is None else tensor.flatten(self.merged, self.merged + 1)


@lru_cache(maxsize=64)
def form(name: str) -> Form:
    """Return the form of a layout by its name."""
    pattern = layouts.get(name).pattern
    merged = None
    axes = pattern.replace("(", " ").replace(")", " ").split()
    if "(" in pattern:
        merged = len(pattern.split("(")[0].split())
    packed = "t" in axes
    if packed:
        axes = ["b", *("s" if axis == "t" else axis for axis in axes)]
    order = tuple(axes.index(axis) for axis in "bnsd")
    inverse = tuple(order.index(axis) for axis in range(4))
    turned = merged is None and not packed and order != (0, 1, 2, 3)
    return Form(merged, order, inverse, packed, turned)
