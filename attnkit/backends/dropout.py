"""Dropout without an S x S tensor: a counter hash of (batch, head, row, key).

Every cell has a 16-bit number, made from one 64-bit key per row and one per four columns. It is
compared with a level of its row: one of the two 65,536ths on either side of the probability,
drawn such that a cell's chance is the probability itself. Two cells of a row thereby have a
correlation below ``2**-34 / (p * (1 - p))``: 2e-10 at p = 0.5, 1e-5 at p = 5e-6. The backward
makes the same numbers again; nothing is kept but the seed.

What is counted are positions of the whole attention: a share of it drops what the whole would.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnkit.constants import constant
from attnkit.planner import Request
from attnkit.ranges import Ranges

__all__ = ["Chances", "chances_of", "drawn_seed", "numbers"]

# Odd constants with about half of their bits set (from splitmix64 and L'Ecuyer's tables).
_ROW, _COLUMN, _MIX = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x5851F42D4C957F2D
_LEVELS = 1 << 16


def drawn_seed(request: Request, device: torch.device) -> Tensor | None:
    """Draw the one number that a call takes from torch's generator, if it drops anything."""
    return torch.randint(2**63 - 1, (1,), device=device) if request.dropout else None


def chances_of(request: Request, seed: Tensor | None, device: torch.device) -> Chances | None:
    """Return which weights of a call survive; None where none is dropped."""
    if seed is None or not request.dropout:
        return None
    return Chances(request, seed, device)


class Chances:
    """Which weights of one call survive; a share counts its rows, heads and keys as the whole does.

    `rows` and `levels` are ``[b n s]``, keys of rows and what a cell must be above to survive;
    `quads` are the numbers of four columns each. Of a packed batch s counts tokens, and b is 1.
    """

    def __init__(self, request: Request, seed: Tensor, device: torch.device) -> None:
        self.kept = 1.0 - request.dropout
        level, part = divmod(request.dropout * _LEVELS, 1.0)
        # Levels go from 0 to 65,536 and 16 bits do not: "more than one less" saves the last one.
        self.survives, first = (torch.ge, 0) if level == 0 else (torch.gt, -1)
        seed = seed.to(device, non_blocking=True)  # a graph draws it on the host
        self.rows = _mixed(_numbers_of_rows(request, device) * _ROW + seed)
        above = _mixed(self.rows ^ _MIX) < round((part - 0.5) * 2.0**64)
        self.levels = (above + (int(level) + first - _LEVELS // 2)).to(torch.int16)
        self._keys = None if request.share is None else _columns(request.share.keys, device)
        if self._keys is None:
            quads = torch.arange(-(-request.kv_len // 4) + 1, device=device)
        else:
            quads = self._keys.quads
        self.quads = _mixed((quads + 1) * _COLUMN)

    def columns(self, first: int, count: int) -> tuple[slice, slice | Tensor]:
        """Return where some keys are: the quads that have them, and their places among these."""
        if self._keys is not None:
            return self._keys.columns(first, count)
        quad, skip = divmod(first, 4)
        return slice(quad, quad - (-(skip + count) // 4)), slice(skip, skip + count)

    def survivors(self, rows: slice, first: int, count: int) -> Tensor:
        """Return True where a weight survives, ``[b n i j]``, of some rows and `count` keys."""
        quads, places = self.columns(first, count)
        bits = self.rows[:, :, rows, None] + self.quads[quads]
        bits = (bits ^ (bits >> 29)) * _MIX
        bits = bits + (bits >> 32)
        # The same as `numbers`, by operators that transforms of torch.func follow.
        lanes = torch.stack([(bits << (48 - 16 * lane)) >> 48 for lane in range(4)], -1)
        found: Tensor = self.survives(lanes.flatten(-2)[..., places], self.levels[:, :, rows, None])
        return found


def _numbers_of_rows(request: Request, device: torch.device) -> Tensor:
    """Return which row of the whole attention each row is, over all batch elements and heads."""
    batch = 1 if request.seqlens is not None else request.batch
    sizes, share = (batch, request.num_heads, request.q_len), request.share
    if share is None:
        return torch.arange(batch * request.num_heads * request.q_len, device=device).view(sizes)
    heads = torch.arange(request.num_heads, device=device) + share.first_head
    matrices = torch.arange(batch, device=device)[:, None] * share.num_heads + heads
    return matrices[..., None] * share.q_len + _positions(share.rows, device)


@constant
def _positions(ranges: Ranges, device: torch.device) -> Tensor:
    return torch.from_numpy(_counted(ranges)).to(device)


def _counted(ranges: Ranges) -> NDArray[np.int64]:
    parts = [np.arange(one.start, one.stop, one.step, dtype=np.int64) for one in ranges]
    return np.concatenate([np.empty(0, np.int64), *parts])


@constant
def _columns(keys: Ranges, device: torch.device) -> _KeyPlaces:
    return _KeyPlaces(keys, device)


class _KeyPlaces:
    """The keys of a share among the `quads` of columns that have some of them, in their order."""

    def __init__(self, keys: Ranges, device: torch.device) -> None:
        quads, lanes = np.divmod(_counted(keys), 4)
        new = np.diff(quads, prepend=-1) != 0
        self.quads = torch.from_numpy(quads[new]).to(device)
        self._places = 4 * (np.cumsum(new) - 1) + lanes
        self._on_device = torch.from_numpy(self._places).to(device)
        # How many keys up to each one do not follow the key before them.
        self._breaks = np.cumsum(np.diff(self._places, prepend=-1) != 1)

    def columns(self, first: int, count: int) -> tuple[slice, slice | Tensor]:
        """Return the quads of some keys, and the places of the keys among these."""
        if not count:
            return slice(0, 0), slice(0, 0)
        last = first + count - 1
        quad, skip = divmod(int(self._places[first]), 4)
        quads = slice(quad, int(self._places[last]) // 4 + 1)
        if self._breaks[first] == self._breaks[last]:
            return quads, slice(skip, skip + count)
        return quads, self._on_device[first : last + 1] - 4 * quad


def numbers(rows: Tensor, quads: Tensor, bits: Tensor, spare: Tensor) -> Tensor:
    """Return the numbers of cells, ``[... 4 q]`` of keys of rows ``[... 1]`` and q quads.

    They are written to `bits`, int64; `spare` is as large.
    """
    torch.add(rows, quads, out=bits)
    torch.bitwise_right_shift(bits, 29, out=spare)
    bits.bitwise_xor_(spare).mul_(_MIX)
    torch.bitwise_right_shift(bits, 32, out=spare)
    # torch shifts in copies of the sign: adding spreads them, a second xor would not.
    return bits.add_(spare).view(torch.int16)


def _mixed(x: Tensor) -> Tensor:
    """Return 64-bit numbers whose every bit depends on every bit of `x`."""
    for shift in (31, 29, 32):
        x = (x ^ (x >> shift)) * _MIX
    return x + (x >> 32)
