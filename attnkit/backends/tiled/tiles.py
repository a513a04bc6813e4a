"""Tiles of operands: strided views where one matrix product can read them, copies elsewhere.

Every product of a step works on 3-D tensors ``[g r d]``: `g` runs over batch elements,
repetitions of a block and key heads; `r` over the query heads of one key head and their rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.backends.tiled.schedule import KeyChunk, Lane, RowBlock

__all__ = [
    "Step",
    "Strided",
    "Workspace",
    "head_tiles",
    "key_gradient",
    "key_tile",
    "query_gradient",
    "query_tile",
    "steps",
]

Sizes = tuple[int, ...]


class Step(NamedTuple):
    """One tile of a block: what shares its matrix products.

    Batch elements ``[batch, batch + batches)``, repetitions ``[repeat, repeat + repeats)``, key
    heads ``[key_head, key_head + key_heads)`` and, of each, the query heads
    ``[member, member + members)`` among the `group` that it serves.
    """

    lane: Lane
    block: RowBlock
    batch: int
    batches: int
    repeat: int
    repeats: int
    key_head: int
    key_heads: int
    member: int
    members: int
    group: int

    @property
    def head(self) -> int:
        """The first query head."""
        return self.key_head * self.group + self.member

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.key_heads * self.members

    @property
    def row(self) -> int:
        """The first row, counted from the lane's origin."""
        return self.block.row + self.repeat * self.block.step

    @property
    def products(self) -> int:
        """How many matrices one product multiplies: `g`."""
        return self.batches * self.repeats * self.key_heads

    def runs(self, chunk: KeyChunk) -> Iterator[tuple[int, int, int]]:
        """Yield (column, first key, keys) of each run, counted from the lane's origin."""
        column = 0
        for start, stop, step in chunk.runs:
            yield column, start + self.repeat * step, stop - start
            column += stop - start


def steps(lane: Lane, block: RowBlock, group: int) -> Iterator[Step]:
    """Walk a block: batch elements, repetitions and heads in tiles."""
    tile = block.tile
    heads = list(head_tiles(*lane.heads, group, tile.heads))
    for batch in range(*lane.batches, tile.batch):
        batches = min(tile.batch, lane.batches[1] - batch)
        for repeat in range(0, block.times, tile.repeats):
            repeats = min(tile.repeats, block.times - repeat)
            for part in heads:
                yield Step(lane, block, batch, batches, repeat, repeats, *part, group)


def head_tiles(first: int, last: int, group: int, most: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (key head, key heads, member, members): whole groups, or a part of one group."""
    head = first
    while head < last:
        key_head, member = divmod(head, group)
        whole = min(most, last - head) // group
        if member == 0 and whole:
            yield key_head, whole, 0, group
            head += whole * group
        else:
            members = min(group - member, last - head, most)
            yield key_head, 1, member, members
            head += members


class Workspace:
    """Buffers that the steps of one call share; each name is one buffer, as large as needed.

    On the CPU the next call gets the same ones: the first touch of fresh memory is a page fault
    for every 4 kB, which costs short calls as much as their attention.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype, Sizes], Tensor] = {}

    @staticmethod
    def lent(like: Tensor) -> Workspace:
        """Return a workspace on a tensor's device, for one call."""
        if like.device.type == "cpu" and not torch._C._len_torch_dispatch_stack():
            try:
                return _IDLE.pop()
            except IndexError:
                pass
        return Workspace(like.device)

    def give_back(self) -> None:
        """End the call: keep the buffers for another, unless they are large, or those of a mode."""
        self._views.clear()
        size = sum(flat.nbytes for flat in self._flat.values())
        real = self.device.type == "cpu" and not torch._C._len_torch_dispatch_stack()
        if real and size <= KEPT:
            _IDLE.append(self)

    def take(self, name: str, dtype: torch.dtype, *sizes: int) -> Tensor:
        """Return a buffer of that shape, holding anything."""
        key = (name, dtype, sizes)
        found = self._views.get(key)
        if found is None:
            count = 1
            for size in sizes:
                count *= size
            flat = self._flat.get((name, dtype))
            if flat is None or flat.numel() < count:
                # Not as an inference tensor, which a later call could not write to.
                with torch.inference_mode(False):
                    flat = torch.empty(count, dtype=dtype, device=self.device)
                self._flat[name, dtype] = flat
                self._views = {k: v for k, v in self._views.items() if k[:2] != (name, dtype)}
            found = flat[:count].view(sizes)
            self._views[key] = found
        return found


# Workspaces that no call uses now: one for each of a few threads, and this many bytes at most.
_IDLE: deque[Workspace] = deque(maxlen=4)
KEPT = 64 * 1024 * 1024


class Strided:
    """A ``[b n s d]`` tensor (any strides) that hands out its tiles."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.batch, self.head, self.row, self.dim = tensor.stride()
        self.offset = tensor.storage_offset()
        self.width = tensor.shape[3]

    def rows(self, step: Step) -> Tensor:
        """Return the query rows of a step, ``[b m n g r d]``, as a view."""
        block, lane = step.block, step.lane
        start = (
            self.offset
            + step.batch * self.batch
            + step.head * self.head
            + (lane.origin[0] + step.row) * self.row
        )
        sizes = (step.batches, step.repeats, step.key_heads, step.members, block.rows, self.width)
        strides = (
            self.batch,
            block.step * self.row,
            step.group * self.head,
            self.head,
            self.row,
            self.dim,
        )
        return self.tensor.as_strided(sizes, strides, start)

    def keys(self, step: Step, start: int, stop: int, stride: int) -> Tensor:
        """Return the keys ``[start, stop)`` of a run, ``[b m n j d]``, as a view.

        Positions are those of the block's first repetition; each next one is `stride` further.
        """
        first = (
            self.offset
            + step.batch * self.batch
            + step.key_head * self.head
            + (step.lane.origin[1] + start + step.repeat * stride) * self.row
        )
        sizes = (step.batches, step.repeats, step.key_heads, stop - start, self.width)
        strides = (self.batch, stride * self.row, self.head, self.row, self.dim)
        return self.tensor.as_strided(sizes, strides, first)


def query_tile(
    work: Workspace, name: str, source: Strided, step: Step, dtype: torch.dtype
) -> Tensor:
    """Return the rows of a step as ``[(b m n) (g r) d]`` in `dtype`."""
    view = source.rows(step)
    rows = step.members * step.block.rows
    if view.dtype == dtype and step.members == 1:
        folded = _folded(view[:, :, :, 0])
        if folded is not None:
            return folded
    copy = work.take(name, dtype, *view.shape)
    copy.copy_(view)
    return work.take(name, dtype, step.products, rows, source.width)


def key_tile(
    work: Workspace, name: str, source: Strided, step: Step, chunk: KeyChunk, dtype: torch.dtype
) -> Tensor:
    """Return the keys of a chunk as ``[(b m n) w d]`` in `dtype`, its runs side by side."""
    if len(chunk.runs) == 1:
        view = source.keys(step, *chunk.runs[0])
        folded = _folded(view) if view.dtype == dtype else None
        if folded is not None:
            return folded
    sizes = (step.batches, step.repeats, step.key_heads, chunk.width, source.width)
    copy = work.take(name, dtype, *sizes)
    widths = [stop - start for start, stop, _ in chunk.runs]
    for run, part in zip(chunk.runs, copy.split_with_sizes(widths, 3), strict=True):
        part.copy_(source.keys(step, *run))
    return work.take(name, dtype, step.products, chunk.width, source.width)


@contextmanager
def query_gradient(
    work: Workspace, target: Strided, step: Step, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Lend ``[(b m n) (g r) d]``, to be overwritten with what belongs to the rows of a step."""
    view = target.rows(step)
    if view.dtype == dtype and step.members == 1:
        folded = _folded(view[:, :, :, 0])
        if folded is not None and folded.is_contiguous():
            yield folded
            return
    rows = step.members * step.block.rows
    part = work.take("to query", dtype, step.products, rows, target.width)
    yield part
    view.copy_(part.view(view.shape))


@contextmanager
def key_gradient(
    work: Workspace, target: Strided, step: Step, chunk: KeyChunk, dtype: torch.dtype, once: bool
) -> Iterator[Tensor]:
    """Lend ``[(b m n) w d]``, to be overwritten with what is added to the keys of a chunk.

    Where each key is met `once`, that is all there is: the keys' place holds nothing yet.
    """
    if once and target.tensor.dtype == dtype:
        folded = _folded(target.keys(step, *chunk.runs[0]))
        if folded is not None and folded.is_contiguous():
            yield folded
            return
    part = work.take("to key", dtype, step.products, chunk.width, target.width)
    yield part
    wide = part.view(step.batches, step.repeats, step.key_heads, chunk.width, target.width)
    if once:
        target.keys(step, *chunk.runs[0]).copy_(wide)
        return
    widths = [stop - start for start, stop, _ in chunk.runs]
    for run, piece in zip(chunk.runs, wide.split_with_sizes(widths, 3), strict=True):
        view, (start, stop, stride) = target.keys(step, *run), run
        if step.repeats == 1 or stride >= stop - start:
            view.add_(piece)
        else:  # repetitions share keys, and one add_ must not write a cell twice
            for repeat in range(step.repeats):
                view[:, repeat].add_(piece[:, repeat])


def _folded(view: Tensor) -> Tensor | None:
    """Return ``[b m n r d]`` as ``[(b m n) r d]`` without a copy; None where strides forbid it."""
    sizes, strides = view.shape, view.stride()
    count, stride = 1, 0
    for size, step in zip(sizes[2::-1], strides[2::-1], strict=True):
        if size == 1:
            continue
        if count > 1 and step != stride * count:
            return None
        if count == 1:
            stride = step
        count *= size
    if strides[4] != 1 and strides[3] != 1:
        return None
    if count > 1 and stride == 0:
        return None
    return view.as_strided(
        (count, sizes[3], sizes[4]), (stride or 1, strides[3], strides[4]), view.storage_offset()
    )
