"""A mask as the function that FlexAttention calls per cell, reading small tables.

For regions: where the runs of allowed keys of a row start and stop, ``[planes, runs, q_len]``.
The function is the same for all masks with equally many runs, so that they share one compiled
kernel. Anything else (a dense mask, a function, a row of many runs) is read from bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnkit.backends.flex.planes import Planes, bits_of, planes_of_mask
from attnkit.geometry import Region
from attnkit.masks import Mask

__all__ = ["MaskMod", "Tables", "mask_mod", "mask_mod_of", "tables_of"]

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Every number of runs is a kernel of its own, so there are only these; rows of more are bits.
_RUNS = (1, 2, 4, 8)


@dataclass(frozen=True, eq=False)
class Tables:
    """What a mask function reads: runs (`start` and `stop`), or else `bits`.

    `group` ``[1 | b, 1 | h]`` says which plane a batch element and head have.
    """

    group: Tensor
    start: Tensor | None = None
    stop: Tensor | None = None
    bits: Tensor | None = None

    def to(self, device: torch.device | str) -> Tables:
        """Return the tables on a device."""
        rest = (self.start, self.stop, self.bits)
        return Tables(self.group.to(device), *(t if t is None else t.to(device) for t in rest))

    @property
    def shape(self) -> tuple[object, ...]:
        """What decides the code of the function: not the lengths, not the values."""
        runs = None if self.start is None else self.start.shape[1]
        return (runs, self.group.shape[0] > 1, self.group.shape[1] > 1)


def mask_mod(mask: Mask, q_len: int, kv_len: int, device: torch.device | str = "cpu") -> MaskMod:
    """Return a mask as FlexAttention's ``mask_mod(b, h, i, j)``, exact for every cell.

    >>> from attnkit import masks
    >>> fn = mask_mod(masks.SlidingWindow(2), 4, 4)
    >>> i, j = torch.arange(4)[:, None], torch.arange(4)[None, :]
    >>> fn(torch.tensor(0), torch.tensor(0), i, j).int().tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """
    mask.check(q_len, kv_len)
    return mask_mod_of(tables_of(planes_of_mask(mask, q_len, kv_len)).to(device))


def tables_of(planes: Planes) -> Tables:
    """Return the tables of planes, on the host."""
    group = torch.tensor(planes.group, dtype=torch.int32)
    most = planes.most_runs
    if most is None or most > _RUNS[-1]:
        words = [bits_of(plane, planes.q_len, planes.kv_len) for plane in planes.each]
        return Tables(group, bits=torch.from_numpy(np.stack(words)))
    count = next(n for n in _RUNS if n >= most)
    ends = [_ends(plane, planes.q_len, count) for plane in planes.each if isinstance(plane, Region)]
    start, stop = (torch.from_numpy(np.stack(side)) for side in zip(*ends, strict=True))
    return Tables(group, start, stop)


def _ends(region: Region, q_len: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return where runs start and stop ``[count, q_len]``; a run that is not there is empty."""
    start, stop = np.zeros((2, count, q_len), np.int32)
    for i0, i1, runs in region.strips:
        down = np.arange(i1 - i0, dtype=np.int32)
        for k, (a, da, b, db) in enumerate(runs):
            start[k, i0:i1] = a + da * down
            stop[k, i0:i1] = b + db * down
    return start, stop


def mask_mod_of(tables: Tables) -> MaskMod:
    """Return the function that reads the tables."""
    group, start, stop, bits = tables.group, tables.start, tables.stop, tables.bits
    per_batch, per_head = group.shape[0] > 1, group.shape[1] > 1

    def plane(b: Tensor, h: Tensor) -> Tensor | int:
        if per_batch:
            return group[b, h] if per_head else group[b, 0]
        return group[0, h] if per_head else 0

    if bits is not None:

        def in_bits(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return ((bits[plane(b, h), i, j >> 5] >> (j & 31)) & 1) != 0

        return in_bits
    if start is None or stop is None:
        raise TypeError("Tables holds either runs (start and stop) or bits")
    count = start.shape[1]

    def in_runs(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        p = plane(b, h)
        allowed = (start[p, 0, i] <= j) & (j < stop[p, 0, i])
        for k in range(1, count):
            allowed = allowed | ((start[p, k, i] <= j) & (j < stop[p, k, i]))
        return allowed

    return in_runs
