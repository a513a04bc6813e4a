"""The addends of a bias, in the forms that the cells of a tile can be read from.

A term is a formula (`Distances`), or it carries a tensor that its cells follow from: the cells
themselves (`Stored`), a table that an index leads into (`LookedUp`), or one number per distance
(`Diagonals`). A carried tensor is
what the operator takes, and what gets a gradient, which is added up tile by tile.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from attnkit.arguments import Anchor, anchor
from attnkit.backends.tiled.schedule import Lane
from attnkit.backends.tiled.tiles import Step, Workspace
from attnkit.ranges import Excerpt, met

__all__ = [
    "Carried",
    "Diagonals",
    "Distances",
    "Ends",
    "Excerpted",
    "Lengths",
    "LookedUp",
    "Stored",
    "Term",
]

Lengths = tuple[int, int]

# A number per diagonal is spread over so many rows at a time: their copies stay in a near cache.
SKEW = 32


class Ends(NamedTuple):
    """What cells are multiplied by, and where they are cut off then, above and below."""

    factor: float
    most: float


@dataclass(frozen=True, eq=False)
class Distances:
    """A bias ``-slope[h] * abs(i' - j)`` or of its root, by formula: no tensor is carried."""

    slopes: tuple[float, ...]
    align: Anchor
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
    def put(
        self, target: Tensor, step: Step, first: int, work: Workspace, ends: Ends, *, more: bool
    ) -> None:
        """Overwrite ``[b h i j]`` scores with a tile's cells, the keys from `first` on.

        Or add them, if there is `more` in the target already. What is there then is cut off.
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

    def put(
        self, target: Tensor, step: Step, first: int, work: Workspace, ends: Ends, *, more: bool
    ) -> None:
        """Put the tile's window of the tensor."""
        factor, most = ends
        cells = self.window(self.tensor, step, first, target.shape[3])
        if more:
            target.add_(cells, alpha=factor)
        elif cells.dtype == target.dtype:
            torch.mul(cells.expand(target.shape), factor, out=target)
        else:  # a product of 16-bit cells would be rounded to 16 bits
            target.copy_(cells).mul_(factor)
        target.clamp_(-most, most)

    def add(self, grad: Tensor, part: Tensor, step: Step, first: int, work: Workspace) -> None:
        """Add to the tile's window, summed over the axes that the tensor shares."""
        target = self.window(grad, step, first, part.shape[3])
        shared = [axis for axis in (0, 1, 2) if target.shape[axis] == 1 < part.shape[axis]]
        part = part.sum(shared, keepdim=True) if shared else part
        target.add_(part, alpha=self.factor)

    def window(self, tensor: Tensor, step: Step, first: int, count: int) -> Tensor:
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
class LookedUp(Carried):
    """A bias whose cells are entries ``[1 | n, entries]`` of a table, by ``[1 | b, i, j]``."""

    index: Tensor

    def put(
        self, target: Tensor, step: Step, first: int, work: Workspace, ends: Ends, *, more: bool
    ) -> None:
        """Put the entries of the tile's cells."""
        factor, most = ends
        index = self._tile(step, first, target.shape[3])
        entries = (self._heads_of(self.tensor, step) * factor).clamp_(-most, most)
        found = entries.index_select(1, index.flatten())
        cells = rearrange(found.view(-1, *index.shape), "h b i j -> b h i j")
        if more:
            target.add_(cells).clamp_(-most, most)
        else:
            target.copy_(cells)

    def add(self, grad: Tensor, part: Tensor, step: Step, first: int, work: Workspace) -> None:
        """Add every cell to its entry, heads and batch elements that share one together."""
        index, target = self._tile(step, first, part.shape[3]), self._heads_of(grad, step)
        if len(index) == 1 < len(part):
            part = part.sum(0, keepdim=True)
        if len(target) == 1 < part.shape[1]:
            part = part.sum(1, keepdim=True)
        cells = rearrange(part, "b h i j -> h (b i j)")
        target.index_add_(1, index.flatten(), cells.to(grad.dtype), alpha=self.factor)

    def _tile(self, step: Step, first: int, count: int) -> Tensor:
        """Return the index of the tile's cells, ``[1 | b, i, j]``."""
        number = step.lane.matrix + step.batch - step.lane.batches[0]
        batches = slice(number, number + step.batches) if len(self.index) > 1 else slice(None)
        return self.index[batches, step.row : step.row + step.block.rows, first : first + count]

    @staticmethod
    def _heads_of(tensor: Tensor, step: Step) -> Tensor:
        return tensor if len(tensor) == 1 else tensor.narrow(0, step.head, step.heads)


@dataclass(frozen=True, eq=False)
class Diagonals(Carried):
    """A bias with one number per diagonal of a score matrix: ``[1 | n, diagonals]``.

    Matrices of the same lengths have the same numbers. Those of the lengths ``(q_len, kv_len)``
    begin at ``starts[q_len, kv_len]``, in the order of ``j - i``: from ``1 - q_len`` on.
    """

    starts: Mapping[Lengths, int]

    def put(
        self, target: Tensor, step: Step, first: int, work: Workspace, ends: Ends, *, more: bool
    ) -> None:
        """Put the tile's diagonals, spread over its cells."""
        factor, most = ends
        rows, count = target.shape[2:]
        values = (self._stretch(self.tensor, step, first, count) * factor).clamp_(-most, most)
        skew = work.take("diagonals", values.dtype, len(values), min(SKEW, rows), values.shape[1])
        skew.copy_(values[:, None])
        for row, cells in _rows_of(skew, rows, count):
            part = target[:, :, row : row + cells.shape[1]]
            part.add_(cells) if more else part.copy_(cells)
        if more:
            target.clamp_(-most, most)

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


@dataclass(frozen=True, eq=False)
class Excerpted(Diagonals):
    """The numbers per diagonal of whole score matrices, of which a share has some rows and keys.

    Of a tile, each run of rows over each run of keys is a piece of whole diagonals.
    """

    excerpts: tuple[Excerpt, ...]

    def put(
        self, target: Tensor, step: Step, first: int, work: Workspace, ends: Ends, *, more: bool
    ) -> None:
        """Put the tile's cells piece by piece."""
        for piece, there, key in self._pieces(target, step, first):
            super().put(piece, there, key, work, ends, more=more)

    def add(self, grad: Tensor, part: Tensor, step: Step, first: int, work: Workspace) -> None:
        """Add the sums of the diagonals of each piece."""
        for piece, there, key in self._pieces(part, step, first):
            super().add(grad, piece, there, key, work)

    def _pieces(self, cells: Tensor, step: Step, first: int) -> Iterator[tuple[Tensor, Step, int]]:
        """Yield parts of ``[b h i j]`` cells, with the step and first key that the whole has."""
        one = self.excerpts[0]
        if one.batch is not None:
            one = self.excerpts[step.lane.matrix + step.batch - step.lane.batches[0]]
        lane = step.lane._replace(lengths=(one.q_len, one.kv_len))
        row, (rows, count) = step.row, cells.shape[2:]
        keys = [*met(one.keys, first, first + count)]
        for u, own in met(one.rows, row, row + rows):
            block = step.block._replace(row=own.start, rows=len(own))
            there = step._replace(lane=lane, block=block, repeat=0)
            for v, some in keys:
                yield cells[:, :, u : u + len(own), v : v + len(some)], there, some.start


Term = Distances | Carried


def _sums_of_diagonals(part: Tensor, work: Workspace) -> Tensor:
    """Return the sums of ``[b h i j]`` over b and over each diagonal, the lowest left one first."""
    _, heads, rows, count = part.shape
    skew = work.take("diagonals", part.dtype, heads, min(SKEW, rows), rows + count - 1).zero_()
    for row, sums in _rows_of(skew, rows, count):
        for one in part[:, :, row : row + sums.shape[1]]:
            sums.add_(one)
    return skew.sum(1)


def _rows_of(skew: Tensor, rows: int, count: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (row, ``[h r j]``) for a tile's rows: what a number per diagonal is to its cells.

    `skew` are a few copies ``[h r diagonals]`` of the numbers, the lowest left diagonal first.
    Torch has no negative strides, which rows that move left would take. So each row has a copy,
    and strides that are one short of a row move over the copies; the rows below see the same
    ones further left.
    """
    heads, height, width = skew.shape
    for row in range(0, rows, height):
        sizes = (heads, min(height, rows - row), count)
        yield row, skew.as_strided(sizes, (height * width, width - 1, 1), rows - 1 - row)
