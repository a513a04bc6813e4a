"""The cells of masks that are no region, tile by tile, and what was read of them, as bits.

The first walk over a tile reads its cells. Their bits are kept, equal ones once (the tiles of a
dilated window are all alike), as long as there is room; what finds none is read again by each
walk. So no whole score matrix is ever held, and few cells are read twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from attnkit.backends.tiled.schedule import KeyChunk
from attnkit.backends.tiled.tiles import Step
from attnkit.masks import Mask, Rectangle

__all__ = ["Bits", "TileCells"]

Bits = tuple[bytes, int, int]
"""The cells of a tile as bits, and its rows and keys: a byte holds those of several sizes."""

ROOM = 4 << 20
"""Bytes of bits that a plan keeps: the cells of 2,048 keys for each of 16,384 rows."""

FEW = 4
"""Patches that a walk holds: each is a tile of one score matrix."""


class TileCells:
    """What a mask allows in the tiles of one job."""

    def __init__(self, mask: Mask) -> None:
        self.mask = mask
        self.room = ROOM
        self._kinds: dict[bytes, bytes] = {}
        self._known: dict[tuple[Rectangle, ...], bytes] = {}

    def patch(
        self, step: Step, chunk: KeyChunk, like: Tensor, recent: dict[Bits, Tensor]
    ) -> Tensor:
        """Return inf where a cell is allowed, else -inf: ``[b m h rows width]``, or 1 where alike.

        The axes are the mask's batch elements, repetitions of the block, and the mask's heads. A
        walk's `recent` patches are those that its next tiles may well have, too.
        """
        mask, first = self.mask, step.lane.matrix + step.batch - step.lane.batches[0]
        axes = (
            range(first, first + step.batches) if mask.batches is not None else range(1),
            range(step.repeat, step.repeat + step.repeats),
            range(step.head, step.head + step.heads) if mask.heads is not None else range(1),
        )
        sizes = (step.block.rows, chunk.width)
        places = [_rectangles(step, chunk, *place) for place in product(*axes)]
        if like.device.type != "cpu":  # it would have to be waited for
            read = torch.stack([self._read(place, like.device) for place in places])
            return _bounds(read.view(*map(len, axes), *sizes), like)
        kinds = [self._kind(place) for place in places]
        if any(kind != kinds[0] for kind in kinds):
            return _bounds(_unpacked(kinds, sizes).view(*map(len, axes), *sizes), like)
        kind = (kinds[0], *sizes)
        found = recent.get(kind)
        if found is None:
            if len(recent) == FEW:
                recent.clear()
            found = _bounds(_unpacked(kinds[:1], sizes).view(1, 1, 1, *sizes), like)
            recent[kind] = found
        return found

    def _kind(self, place: tuple[Rectangle, ...]) -> bytes:
        """Return the bits of a place."""
        known = self._known.get(place)
        if known is not None:
            return known
        bits = np.packbits(self._read(place, torch.device("cpu")).numpy()).tobytes()
        kind = self._kinds.get(bits)
        if kind is None:
            if len(bits) > self.room:
                return bits
            self.room -= len(bits)
            kind = self._kinds[bits] = bits
        self._known[place] = kind
        return kind

    def _read(self, place: tuple[Rectangle, ...], device: torch.device) -> Tensor:
        return torch.cat([self.mask._cells(run, device) for run in place], dim=1)


def _rectangles(
    step: Step, chunk: KeyChunk, batch: int, repeat: int, head: int
) -> tuple[Rectangle, ...]:
    """Return where a tile of one score matrix lies: its rows over each run of its keys."""
    row = step.block.row + repeat * step.block.step
    return tuple(
        Rectangle(
            (row, row + step.block.rows),
            (start + repeat * move, stop + repeat * move),
            *step.lane.lengths,
            batch,
            head,
        )
        for start, stop, move in chunk.runs
    )


def _unpacked(kinds: Sequence[bytes], sizes: tuple[int, int]) -> Tensor:
    """Return bits as cells, one after the other."""
    packed = np.frombuffer(b"".join(kinds), np.uint8).reshape(len(kinds), -1)
    cells = np.unpackbits(packed, axis=1, count=sizes[0] * sizes[1])
    return torch.from_numpy(cells.view(np.bool_))


def _bounds(allowed: Tensor, like: Tensor) -> Tensor:
    """Return inf where a cell is allowed, else -inf: scores become the smaller of the two."""
    highest = torch.full((), torch.inf, dtype=like.dtype, device=like.device)
    return torch.where(allowed, highest, -highest)
