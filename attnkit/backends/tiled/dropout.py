"""Dropout on tiles: the numbers of their cells against the levels of their rows."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from attnkit.backends.dropout import Chances, numbers
from attnkit.backends.tiled.schedule import KeyChunk
from attnkit.backends.tiled.tiles import Step, Strided, Workspace

__all__ = ["Decisions", "Dropout"]


class Decisions(Protocol):
    """Which weights survived the dropout of a call, tile by tile."""

    kept: float

    def tile(self, work: Workspace, step: Step, chunk: KeyChunk, dtype: torch.dtype) -> Tensor:
        """Return ``[g r w]`` in `dtype`: 1 where a weight survives, else 0."""


class Dropout:
    """Which weights of one call survive, as tiles of 0 and 1."""

    def __init__(self, chances: Chances) -> None:
        self.kept, self.chances = chances.kept, chances
        self.rows, self.levels = (Strided(t[..., None]) for t in (chances.rows, chances.levels))

    def tile(self, work: Workspace, step: Step, chunk: KeyChunk, dtype: torch.dtype) -> Tensor:
        """Return ``[g r w]`` in `dtype`: 1 where a weight survives, else 0."""
        group, rows = step.products, step.members * step.block.rows
        keep = work.take("keep", dtype, group, rows, chunk.width)
        row_keys, levels = (
            source.rows(step).reshape(group, rows, 1) for source in (self.rows, self.levels)
        )
        for column, first, count in step.runs(chunk):
            quads, places = self.chances.columns(step.lane.origin[1] + first, count)
            sizes = (group, rows, quads.stop - quads.start)
            bits, spare = (work.take(name, torch.int64, *sizes) for name in ("bits", "spare bits"))
            found = numbers(row_keys, self.chances.quads[quads], bits, spare)
            target = keep[..., column : column + count]
            self.chances.survives(found[..., places], levels, out=target)
        return keep
