"""Additive masks of edge tiles: 0 where a cell is allowed, -inf where it is not."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from attnkit.backends.tiled.schedule import Chunk, Pattern
from attnkit.backends.tiled.tiles import Step

__all__ = ["patch", "put_cells", "put_patches"]


@lru_cache(maxsize=128)
def patch(pattern: Pattern, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a pattern as an additive ``[rows, width]`` tensor; kept for the next tile and call."""
    # Made outside of inference mode, so that it serves training later on.
    with torch.inference_mode(False), torch.no_grad():
        out = torch.full((pattern.rows, pattern.width), -torch.inf, dtype=dtype, device=device)
        column = torch.arange(pattern.width, device=device)
        for row, rows, runs in pattern.pieces:
            below = torch.arange(rows, device=device)[:, None]
            for a, da, b, db in runs:
                inside = (column >= a + da * below) & (column < b + db * below)
                out[row : row + rows].masked_fill_(inside, 0.0)
        return out


def put_patches(scores: Tensor, chunk: Chunk, rows: int) -> None:
    """Mask the edges of ``[g (r rows) w]`` scores."""
    cells = scores.view(-1, rows, chunk.width)
    for column, pattern in chunk.patches:
        edge = (
            cells
            if pattern.width == chunk.width
            else (cells[:, :, column : column + pattern.width])
        )
        edge.add_(patch(pattern, scores.dtype, scores.device))


def put_cells(scores: Tensor, planes: Tensor, step: Step, chunk: Chunk) -> None:
    """Mask ``[1, h, i, j]`` scores by the cells ``[1 | n, i, j]`` of an opaque mask."""
    rows = slice(step.row, step.row + step.block.rows)
    heads = slice(None) if planes.shape[0] == 1 else slice(step.head, step.head + step.heads)
    for column, first, count in step.runs(chunk):
        allowed = planes[heads, rows, first : first + count]
        scores[..., column : column + count].masked_fill_(~allowed, -torch.inf)
