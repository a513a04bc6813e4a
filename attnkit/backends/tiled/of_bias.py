"""The gradients of a bias and nothing else, beside a kernel that computes all others.

The kernel gives the output and the statistics; its scores, and so its weights, are made again tile
by tile. What it dropped, it has to tell.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.backends.base import Kept
from attnkit.backends.tiled.bias import Bound
from attnkit.backends.tiled.dropout import Decisions
from attnkit.backends.tiled.job import Job
from attnkit.backends.tiled.retraced import Retraced
from attnkit.backends.tiled.schedule import RowBlock
from attnkit.backends.tiled.tiles import Step, key_tile
from attnkit.backends.tiled.whole import WholeCall

__all__ = ["bias_gradients"]


class OfBias(Retraced):
    """Adds up the gradients of bias tensors, and makes no others; torch's kernel knows none."""

    def step(self, step: Step, block: RowBlock) -> None:
        """Add what one tile of rows gives to the tensors of the bias."""
        rows = self.rows(step, block)
        for chunk in block.chunks:
            key = key_tile(self.work, "key", self.key, step, chunk, self.wide)
            self.weights(step, chunk, rows, key)

    def whole(self, call: WholeCall) -> None:
        """There is none: the schedule of such a walk is made of blocks."""
        raise ArithmeticError(f"{call} has no gradient of a bias")

    def blank(self, rows: tuple[slice, slice, slice]) -> None:
        """Queries that see nothing add nothing."""


def bias_gradients(
    job: Job,
    bias: Bound,
    tensors: tuple[Tensor, Tensor, Tensor],
    kept: Kept,
    decisions: Decisions | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the tensors of a bias; `tensors` and `kept` are ``[b n s d]``.

    `job` is one without torch's fused kernel.
    """
    if job.raised is not None:
        query, key, value = (tensor.float() for tensor in tensors)
        kept = kept._replace(output=kept.output.float(), grad=kept.arrived.float())
        return bias_gradients(job.raised, bias, (query, key, value), kept, decisions)
    found = [None if t is None else torch.zeros_like(t, dtype=job.wide) for t in bias.made]
    walk = OfBias(job, bias.terms, tensors, kept, found)
    walk.dropout = decisions
    walk.go()
    return bias.handed_on(found)
