"""The addends of a bias, in the forms that the cells of a tile can be read from.

A term is a formula (`Distances`), or it carries a tensor that its cells follow from: the cells
themselves (`Stored`), or one number per distance (`Diagonals`). A carried tensor is
what the operator takes, and what gets a gradient, which is added up tile by tile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor

from attnkit.backends.tiled.schedule import Lane
from attnkit.backends.tiled.tiles import Step, Workspace
from attnkit.masks.base import Align, anchor

__all__ = ["Carried", "Diagonals", "Distances", "Lengths", "Stored", "Term"]

Lengths = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Distances:
    """A bias ``-slope[h] * abs(i' - j)`` or of its root, by formula: no tensor is carried."""

    slopes: tuple[float, ...]
    align: Align
    root: bool

    def anchor(self, lane: Lane) -> int:
        """Return ``i' - i`` in a lane's score matrices."""
        return anchor(self.align, *lane.lengths)


@dataclass(frozen=True, eq=False)
class Carried(ABC):
    """A bias whose cells follow from a tensor, times `factor`."""

    tensor: Tensor
    factor: float

    @abstractmethod
    def cells(self, step: Step, first: int, count: int, work: Workspace) -> Tensor:
        """Return the cells of a tile's rows and of `count` keys from `first` on.

        They are ``[1 | b, 1 | h, 1 | i, j]``, and hold until a buffer of `work` is next taken.
        """

    @abstractmethod
    def add(self, grad: Tensor, part: Tensor, step: Step, first: int, work: Workspace) -> None:
        """Add ``[b h i j]`` gradients of such scores to the gradient of the tensor."""


@dataclass(frozen=True, eq=False)
class Stored(Carried):
    """A bias whose cells are a tensor ``[1 | b, 1 | n, 1 | i, j]``.

    With `starts` they are the matrices of packed sequences, end to end: ``[1 | n, cells]``, where
    the matrix number m begins at ``starts[m]``.
    """

    starts: tuple[int, ...] = ()

    def cells(self, step: Step, first: int, count: int, work: Workspace) -> Tensor:
        """Return the tile's window of the tensor."""
        return self._window(self.tensor, step, first, count)

    def add(self, grad: Tensor, part: Tensor, step: Step, first: int, work: Workspace) -> None:
        """Add to the tile's window, summed over the axes that the tensor shares."""
        target = self._window(grad, step, first, part.shape[3])
        shared = [axis for axis in (0, 1, 2) if target.shape[axis] == 1 < part.shape[axis]]
        part = part.sum(shared, keepdim=True) if shared else part
        target.add_(part, alpha=self.factor)

    def _window(self, tensor: Tensor, step: Step, first: int, count: int) -> Tensor:
        """Return the part of such a tensor that a tile reads, as a view."""
        number = step.lane.matrix + step.batch - step.lane.batches[0]
        if self.starts:
            q_len, kv_len = step.lane.lengths
            own = tensor.narrow(1, self.starts[number], q_len * kv_len)
            tensor = rearrange(own, "n (i j) -> 1 n i j", i=q_len, j=kv_len)
        starts = (number, step.head, step.row, first)
        sizes = (step.batches, step.heads, step.block.rows, count)
        index = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        for axis in (0, 1, 2):
            if tensor.shape[axis] == 1:
                index[axis] = slice(None)
        return tensor[tuple(index)]


@dataclass(frozen=True, eq=False)
class Diagonals(Carried):
    """A bias with one number per diagonal of a score matrix: ``[1 | n, diagonals]``.

    Matrices of the same lengths have the same numbers. Those of the lengths ``(q_len, kv_len)``
    begin at ``starts[q_len, kv_len]``, in the order of ``j - i``: from ``1 - q_len`` on.
    """

    starts: Mapping[Lengths, int]

    def cells(self, step: Step, first: int, count: int, work: Workspace) -> Tensor:
        """Return the tile's diagonals, spread over its cells."""
        values = self._stretch(self.tensor, step, first, count)
        (heads, width), rows = values.shape, step.block.rows
        # Torch has no negative strides, which rows that move left would take. So each row gets
        # a copy of all numbers, and strides that are one short of a row move over the copies.
        skew = work.take("diagonals", values.dtype, heads, rows, width)
        skew.copy_(values[:, None])
        strides = (0, rows * width, width - 1, 1)
        return skew.as_strided((1, heads, rows, count), strides, rows - 1)

    def add(self, grad: Tensor, part: Tensor, step: Step, first: int, work: Workspace) -> None:
        """Add the sums of the tile's diagonals."""
        target = self._stretch(grad, step, first, part.shape[3])
        sums = _sums_of_diagonals(part, work)
        if target.shape[0] == 1 < sums.shape[0]:
            sums = sums.sum(0, keepdim=True)
        target.add_(sums, alpha=self.factor)

    def _stretch(self, tensor: Tensor, step: Step, first: int, count: int) -> Tensor:
        """Return the numbers of the tile's diagonals, from its lowest left cell on."""
        rows, (q_len, _) = step.block.rows, step.lane.lengths
        lowest = first - (step.row + rows - 1)
        start = self.starts[step.lane.lengths] + q_len - 1 + lowest
        if tensor.shape[0] > 1:
            tensor = tensor.narrow(0, step.head, step.heads)
        return tensor.narrow(1, start, rows + count - 1)


Term = Distances | Carried


def _sums_of_diagonals(part: Tensor, work: Workspace) -> Tensor:
    """Return the sums of ``[b h i j]`` over b and over each diagonal, the lowest left one first."""
    _, heads, rows, count = part.shape
    width = rows + count - 1
    # Zeros before every row, and strides one longer than a row: cells of one diagonal come to
    # lie in one column, and what a row's last columns meet are the zeros of the next row.
    flat = work.take("diagonals", part.dtype, heads * rows * width + rows - 1)
    skew = flat[: heads * rows * width].view(heads, rows, width)
    skew[:, :, : rows - 1] = 0.0
    flat[heads * rows * width :] = 0.0
    target = skew[:, :, rows - 1 :]
    target.copy_(part[0])
    for more in part[1:]:  # several times faster than sum(0) into rows that are not dense
        target.add_(more)
    return flat.as_strided((heads, rows, width), (rows * width, width + 1, 1), 0).sum(1)
