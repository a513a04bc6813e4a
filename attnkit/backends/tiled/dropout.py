"""Dropout without an S x S tensor: a counter hash of (batch, head, row, key).

Every cell has a 16-bit number, made from one 64-bit key per row and one per four columns. It is
compared with a level of its row: one of the two 65,536ths on either side of the probability,
drawn such that a cell's chance is the probability itself. Two cells of a row thereby have a
correlation below ``2**-34 / (p * (1 - p))``: 2e-10 at p = 0.5, 1e-5 at p = 5e-6. The backward
makes the same numbers again; nothing is kept but the seed.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from attnkit.backends.tiled.schedule import KeyChunk
from attnkit.backends.tiled.tiles import Step, Strided, Workspace

__all__ = ["Decisions", "Dropout"]

# Odd constants with about half of their bits set (from splitmix64 and L'Ecuyer's tables).
_ROW, _COLUMN, _MIX = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x5851F42D4C957F2D
_LEVELS = 1 << 16


class Decisions(Protocol):
    """Which weights survived the dropout of a call, tile by tile."""

    kept: float

    def tile(self, work: Workspace, step: Step, chunk: KeyChunk, dtype: torch.dtype) -> Tensor:
        """Return ``[g r w]`` in `dtype`: 1 where a weight survives, else 0."""


class Dropout:
    """Which weights of one call survive, as tiles of 0 and 1."""

    def __init__(
        self,
        probability: float,
        seed: Tensor,
        sizes: tuple[int, int, int, int],
        device: torch.device,
    ) -> None:
        batch, heads, rows, keys = sizes
        self.kept = 1.0 - probability
        level, part = divmod(probability * _LEVELS, 1.0)
        # Levels go from 0 to 65,536 and 16 bits do not: "more than one less" saves the last one.
        self.survives, first = (torch.ge, 0) if level == 0 else (torch.gt, -1)
        seed = seed.to(device, non_blocking=True)  # a graph draws it on the host
        count = torch.arange(batch * heads * rows, device=device)
        keys_of_rows = _mixed(count * _ROW + seed)
        above = _mixed(keys_of_rows ^ _MIX) < round((part - 0.5) * 2.0**64)
        levels = (above + (int(level) + first - _LEVELS // 2)).to(torch.int16)
        self.rows = Strided(keys_of_rows.view(batch, heads, rows, 1))
        self.levels = Strided(levels.view(batch, heads, rows, 1))
        quads = torch.arange(-(-keys // 4) + 1, device=device)
        self.columns = _mixed((quads + 1) * _COLUMN)

    def tile(self, work: Workspace, step: Step, chunk: KeyChunk, dtype: torch.dtype) -> Tensor:
        """Return ``[g r w]`` in `dtype`: 1 where a weight survives, else 0."""
        group, rows = step.products, step.members * step.block.rows
        keep = work.take("keep", dtype, group, rows, chunk.width)
        row_keys, levels = (
            source.rows(step).reshape(group, rows, 1) for source in (self.rows, self.levels)
        )
        for column, first, count in step.runs(chunk):
            first += step.lane.origin[1]
            quad, skip = divmod(first, 4)
            quads = -(-(skip + count) // 4)
            bits = work.take("bits", torch.int64, group, rows, quads)
            spare = work.take("spare bits", torch.int64, group, rows, quads)
            torch.add(row_keys, self.columns[quad : quad + quads], out=bits)
            torch.bitwise_right_shift(bits, 29, out=spare)
            bits.bitwise_xor_(spare).mul_(_MIX)
            torch.bitwise_right_shift(bits, 32, out=spare)
            # torch shifts in copies of the sign: adding spreads them, a second xor would not.
            lanes = bits.add_(spare).view(torch.int16)[..., skip : skip + count]
            self.survives(lanes, levels, out=keep[..., column : column + count])
        return keep


def _mixed(x: Tensor) -> Tensor:
    """Return 64-bit numbers whose every bit depends on every bit of `x`."""
    for shift in (31, 29, 32):
        x = (x ^ (x >> shift)) * _MIX
    return x + (x >> 32)
