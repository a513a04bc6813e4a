"""Masks of edge tiles, as numbers: added to the scores, or the most that they may be."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from attnkit.backends.tiled.schedule import Chunk, Pattern
from attnkit.backends.tiled.tiles import Step

__all__ = ["patch", "put_cells", "put_patches"]


@lru_cache(maxsize=128)
def patch(
    pattern: Pattern, dtype: torch.dtype, device: torch.device, allowed: float = 0.0
) -> Tensor:
    """Return a pattern as ``[rows, width]``: `allowed`, or -inf; kept for the next tile and call.

    Where a cell is allowed it holds 0, for a sum, or inf, for a minimum.
    """
    # Made outside of inference mode, so that it serves training later on.
    with torch.inference_mode(False), torch.no_grad():
        out = torch.full((pattern.rows, pattern.width), -torch.inf, dtype=dtype, device=device)
        column = torch.arange(pattern.width, device=device)
        for row, rows, runs in pattern.pieces:
            below = torch.arange(rows, device=device)[:, None]
            for a, da, b, db in runs:
                inside = (column >= a + da * below) & (column < b + db * below)
                out[row : row + rows].masked_fill_(inside, allowed)
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
        # A minimum, where a sum would leave the NaN of inf - inf. It is as fast, and several times
        # faster than filling by a boolean mask.
        edge.clamp_(max=patch(pattern, scores.dtype, scores.device, torch.inf))


def put_cells(scores: Tensor, planes: Tensor, step: Step, chunk: Chunk) -> None:
    """Mask ``[1, h, i, j]`` scores by the cells ``[1 | n, i, j]`` of an opaque mask."""
    rows = slice(step.row, step.row + step.block.rows)
    heads = slice(None) if planes.shape[0] == 1 else slice(step.head, step.head + step.heads)
    for column, first, count in step.runs(chunk):
        allowed = planes[heads, rows, first : first + count]
        scores[..., column : column + count].masked_fill_(~allowed, -torch.inf)
