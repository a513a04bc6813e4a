"""Score functions on tiles: their values forward, and their slopes backward."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.backends.base import recorded
from attnkit.backends.tiled.schedule import KeyChunk
from attnkit.backends.tiled.tiles import Step
from attnkit.planner.scoring import ScoreFunction, modified

__all__ = ["Modify"]


class Modify:
    """Calls a score function on tiles; with `records`, the slope of the last one can be asked for.

    What it records is one tile's, so that memory stays that of a few tiles.
    """

    def __init__(self, fn: ScoreFunction) -> None:
        self.fn = fn
        self.records = False
        self._last: tuple[Tensor, Tensor] | None = None

    def put(self, scores: Tensor, step: Step, chunk: KeyChunk) -> None:
        """Overwrite the scores ``[b h i j]`` of a tile by what the function makes of them."""
        index = _numbers(step, chunk, scores.device)
        if not self.records:
            with torch.no_grad():
                scores.copy_(modified(self.fn, scores, *index))
            return
        with recorded():
            given = scores.detach().clone().requires_grad_()
            made = modified(self.fn, given, *index)
        self._last = given, made
        scores.copy_(made.detach())

    def pull(self, slopes: Tensor) -> None:
        """Overwrite gradients of what the last `put` wrote by those of what it was given."""
        if self._last is None:
            return
        (given, made), self._last = self._last, None
        if not made.requires_grad:  # a function that does not look at its score
            slopes.zero_()
            return
        with recorded():
            (found,) = torch.autograd.grad(made, given, slopes, allow_unused=True)
        slopes.zero_() if found is None else slopes.copy_(found)


def _numbers(step: Step, chunk: KeyChunk, device: torch.device) -> tuple[Tensor, ...]:
    """Return the batch elements, heads, rows and keys of a tile, one number for each entry."""
    first = step.lane.matrix + step.batch - step.lane.batches[0]
    spans = ((first, step.batches), (step.head, step.heads), (step.row, step.block.rows))
    keys = [torch.arange(at, at + count, device=device) for _, at, count in step.runs(chunk)]
    return (
        *(torch.arange(start, start + count, device=device) for start, count in spans),
        keys[0] if len(keys) == 1 else torch.cat(keys),
    )
