"""The axes of scores: how views, permutations and broadcasting move batch, heads, rows and keys.

A score tensor has dimensions, each the product of some factors: ``[b * n, s_q, s_kv]`` has the
factors b, n of its first. Every tensor that enters is labelled with the factors that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

__all__ = ["Axes", "Labelled", "NotAttention", "permutation"]


class NotAttention(Exception):
    """The calls that were recorded are no attention; the text says what they are instead."""


@dataclass
class Labelled:
    """A tensor, and the factor that each of its dimensions is; factors it has not, it serves all.

    A last dimension of channels has the factor -1.
    """

    tensor: Tensor
    axes: list[int]

    def split(self, factor: int, parts: Sequence[tuple[int, int]]) -> None:
        """Write a factor as several, each (factor, size)."""
        if factor in self.axes:
            at = self.axes.index(factor)
            self.tensor = _unflatten(self.tensor, at, [size for _, size in parts])
            self.axes[at : at + 1] = [one for one, _ in parts]

    def ordered(self, order: Sequence[int]) -> Labelled:
        """Return it with its factors in this order."""
        axes = [one for one in order if one in self.axes]
        if axes == self.axes:
            return self
        return Labelled(self.tensor.permute([self.axes.index(one) for one in axes]), axes)

    def over(self, groups: Sequence[Sequence[int]], sizes: dict[int, int]) -> Tensor:
        """Return the tensor with one dimension for each group of factors; 1 where it has none.

        A group of which it has some factors and lacks others is expanded.
        """
        order = [one for group in groups for one in group]
        mine = self.ordered(order)
        tensor = mine.tensor
        for at, one in enumerate(order):
            if one not in mine.axes:
                tensor = tensor.unsqueeze(at)
        whole: list[int] = []
        shape: list[int] = []
        for group in groups:
            has = any(one in mine.axes for one in group)
            own = [tensor.shape[len(whole) + k] for k in range(len(group))]
            full = [n if one == -1 else sizes[one] for one, n in zip(group, own, strict=True)]
            whole += full if has else own
            shape.append(prod(full if has else own))
        tensor = tensor.expand(whole)
        return tensor if list(tensor.shape) == shape else tensor.reshape(shape)


@dataclass
class Axes:
    """The dimensions of scores as groups of factors, and the side that each factor is of.

    Sides are "lead" (batch and heads), "first" and "second": the rows of the product's first
    operand and the columns of its second. Which of them are the keys, the softmax says.
    """

    dims: list[list[int]] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    sides: dict[int, str] = field(default_factory=dict)
    known: list[Labelled] = field(default_factory=list)

    def new(self, size: int, side: str) -> list[int]:
        """Make a factor, and return it as a group; of extent 1 there is none."""
        if size == 1:
            return []
        factor = len(self.sizes)
        self.sizes[factor], self.sides[factor] = size, side
        return [factor]

    def of_side(self, side: str) -> list[int]:
        """Return the factors of a side, in the order in which the dimensions have them."""
        return [one for group in self.dims for one in group if self.sides[one] == side]

    def size(self, group: Sequence[int]) -> int:
        """Return the number of cells along some factors."""
        return prod(self.sizes[one] for one in group)

    def label(self, tensor: Tensor, dims: Sequence[Sequence[int]] | None = None) -> Labelled:
        """Label a tensor that broadcasts against the dimensions."""
        groups = list(self.dims if dims is None else dims)
        while tensor.ndim > len(groups) and tensor.shape[0] == 1:
            tensor = tensor[0]
        if tensor.ndim > len(groups):
            raise NotAttention("a tensor with more axes than the scores meets them")
        groups = groups[len(groups) - tensor.ndim :]
        axes: list[int] = []
        for at in range(tensor.ndim - 1, -1, -1):
            group = groups[at]
            if group == [-1]:
                axes = [-1, *axes]
            elif tensor.shape[at] == 1 or tensor.stride(at) == 0:
                tensor = tensor.select(at, 0)
            elif tensor.shape[at] != self.size(group):
                raise NotAttention("a tensor that makes the scores larger meets them")
            else:
                if len(group) > 1:
                    tensor = _unflatten(tensor, at, [self.sizes[one] for one in group])
                axes = [*group, *axes]
        made = Labelled(tensor, axes)
        self.known.append(made)
        return made

    def permute(self, order: Sequence[int]) -> None:
        """Reorder the dimensions."""
        self.dims = [self.dims[at] for at in order]

    def reshape(self, shape: Sequence[int]) -> None:
        """Write the dimensions as others of the same cells in the same order."""
        left = [one for group in self.dims for one in group]
        made: list[list[int]] = []
        for size in shape:
            group: list[int] = []
            missing = size
            while missing > 1:
                if not left:
                    raise NotAttention("scores are viewed in another shape")
                factor = left.pop(0)
                own = self.sizes[factor]
                if missing % own and own % missing == 0:
                    factor, rest = self._split(factor, missing)
                    left.insert(0, rest)
                elif missing % own:
                    raise NotAttention("a view mixes axes of the scores")
                group.append(factor)
                missing //= self.sizes[factor]
            made.append(group)
        self.dims = made

    def _split(self, factor: int, size: int) -> tuple[int, int]:
        side, other = self.sides[factor], self.sizes[factor] // size
        first, second = self.new(size, side)[0], self.new(other, side)[0]
        for one in self.known:
            one.split(factor, ((first, size), (second, other)))
        return first, second


def _unflatten(tensor: Tensor, at: int, sizes: Sequence[int]) -> Tensor:
    # A dimension of any stride is several, without a copy.
    return tensor.reshape(*tensor.shape[:at], *sizes, *tensor.shape[at + 1 :])


def permutation(
    func: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any], ndim: int
) -> list[int]:
    """Return the order of axes that a call of `permute`, `transpose` and such makes."""
    probe = torch.empty(tuple(range(2, ndim + 2)), device="meta")
    with torch._C.DisableTorchFunction():
        found = func(probe, *args, **kwargs)
    return [size - 2 for size in found.shape]
