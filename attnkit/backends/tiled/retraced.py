"""A walk on the statistics of a forward pass: its weights again, and the slopes of its scores.

p = exp(score - lse);  dp = do @ v^T;  ds = p * (dp - delta),  delta = sum(do * o) - dlse
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.backends.base import Kept
from attnkit.backends.tiled.job import Job
from attnkit.backends.tiled.schedule import KeyChunk, RowBlock
from attnkit.backends.tiled.terms import Term
from attnkit.backends.tiled.tiles import Step, Strided, key_tile, query_tile
from attnkit.backends.tiled.walk import LOG2E, Walk
from attnkit.backends.tiled.whole import LARGE

__all__ = ["Retraced"]

# StepRows of so few keys are cheap to put right, and may be many for each of their keys.
FEW = 64


class StepRows(NamedTuple):
    """The rows of a step, ``[g r d]``, and what the forward pass left of each, ``[g r 1]``.

    Where there is a `total`, the sums of weights were made again, of which `lse` is the maximum.
    """

    query: Tensor
    grad: Tensor
    delta: Tensor
    lse: Tensor
    total: Tensor | None


class Retraced(Walk):
    """A walk on the statistics of a forward pass: its weights again, and the slopes of its scores.

    What is `kept` is ``[b n s d]``. Gradients of bias tensors are added up in `to_bias`.
    """

    def __init__(
        self,
        job: Job,
        terms: tuple[Term, ...],
        tensors: tuple[Tensor, Tensor, Tensor],
        kept: Kept,
        to_bias: Sequence[Tensor | None],
    ) -> None:
        super().__init__(job, terms, tensors, kept.seed)
        if self.modify is not None:
            self.modify.records = True
        self.kept, self.to_bias = kept, to_bias
        self.output, self.grad = Strided(kept.output), Strided(kept.arrived)
        self.lse = Strided(kept.lse[..., None])
        self.grad_lse = None if kept.grad_lse is None else Strided(kept.grad_lse[..., None])
        # Whether the weights of a row are all there is: nothing else takes a share of its slope.
        self.sums_known = not job.request.sink and job.request.share is None
        self.whole_rows = self.sums_known and kept.grad_lse is None

    def last(self) -> None:
        """Hand on what the tiles gave to the bias."""
        if self.bias is not None:
            self.bias.hand_on(self.to_bias)

    def rows(self, step: Step, block: RowBlock) -> StepRows:
        """Return what the tiles of a step's rows are made of, beside their keys and values."""
        query = query_tile(self.work, "query", self.query, step, self.wide)
        grad = query_tile(self.work, "grad", self.grad, step, self.wide)
        delta, lse = self._delta(step, grad), self._lse(step, grad, block)
        total = self._total(step, block, query, lse) if _swallows(lse) else None
        return StepRows(query, grad, delta, lse, total)

    def weights(
        self, step: Step, chunk: KeyChunk, rows: StepRows, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the weights that the values had, and the gradient of the scores `ds`."""
        work, wide = self.work, self.wide
        query, grad, delta, lse, total = rows
        p, bend = self._probabilities(step, chunk, query, key, lse)
        if total is not None:
            p.div_(total)
        value = key_tile(work, "value", self.value, step, chunk, wide)
        ds = work.take("slopes", wide, *p.shape)
        torch.bmm(grad, value.transpose(1, 2), out=ds)
        weights = p
        if self.dropout is not None:
            keep = self.dropout.tile(work, step, chunk, wide).div_(self.dropout.kept)
            ds.mul_(keep)
            weights = keep.mul_(p)
        ds.sub_(delta).mul_(p)
        matters = chunk.width <= FEW or total is not None
        if self.whole_rows and matters and len(step.block.chunks) == 1:
            # The slopes of a softmax add up to 0. What rounding leaves instead would add up
            # over all rows that see one key and nothing else, and a huge scale magnifies it.
            left = torch.sum(ds, -1, keepdim=True, out=work.take("left", wide, *p.shape[:2], 1))
            ds.addcmul_(p, left, value=-1.0)
        if self.modify is not None:
            self.modify.pull(self.by_head(ds, step, chunk))
            ds.masked_fill_(p == 0.0, 0.0)  # whatever the slope of the function is there
        if self.bias is not None and any(slope is not None for slope in self.to_bias):
            self.bias.add_gradient(self.to_bias, self.by_head(ds, step, chunk), step, chunk)
        if bend is not None:
            ds.mul_(bend)
        return weights, ds

    def _probabilities(
        self, step: Step, chunk: KeyChunk, query: Tensor, key: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the softmax weights of a tile, and the slope of a soft-cap."""
        p, bend = self.bent(step, chunk, query, key), None
        if self.cap is not None:
            bend = self.work.take("bend", self.wide, *p.shape)
            torch.mul(p, p, out=bend).neg_().add_(1.0)
        self.finish(p, step, chunk)
        return p.sub_(lse).exp2_(), bend

    def _total(self, step: Step, block: RowBlock, query: Tensor, lse: Tensor) -> Tensor | None:
        """Put the rows' maxima in place of their statistics, and return the sums beside them."""
        peak, total = torch.full_like(lse, -torch.inf), torch.zeros_like(lse)
        for chunk in block.chunks:
            key = key_tile(self.work, "key", self.key, step, chunk, self.wide)
            tile = self.scores(step, chunk, query, key)
            torch.maximum(peak, tile.amax(-1, keepdim=True), out=peak)
        peak.masked_fill_(peak == -torch.inf, 0.0)
        if not self.sums_known:
            # The sink, or other keys, have their share; where rounding puts the statistics below a
            # score, they have none.
            torch.maximum(lse, peak, out=lse)
            return None
        lse.copy_(peak)
        for chunk in block.chunks:
            key = key_tile(self.work, "key", self.key, step, chunk, self.wide)
            total += self._probabilities(step, chunk, query, key, lse)[0].sum(-1, keepdim=True)
        return total.masked_fill_(total == 0.0, 1.0)

    def _delta(self, step: Step, grad: Tensor) -> Tensor:
        """Return ``sum(do * o) - dlse`` per row, ``[g r 1]``."""
        work, wide = self.work, self.wide
        output = query_tile(work, "row values", self.output, step, wide)
        product = torch.mul(grad, output, out=work.take("row products", wide, *grad.shape))
        delta = work.take("delta", wide, *grad.shape[:2], 1)
        torch.sum(product, -1, keepdim=True, out=delta)
        if self.grad_lse is not None:
            delta.sub_(query_tile(work, "grad lse", self.grad_lse, step, wide))
        return delta

    def _lse(self, step: Step, grad: Tensor, block: RowBlock) -> Tensor:
        """Return the rows' statistics times log2(e); 0 for rows that see nothing."""
        lse = self.work.take("lse", self.wide, *grad.shape[:2], 1)
        view = self.lse.rows(step)
        torch.mul(view, LOG2E, out=lse.view(view.shape))
        return lse.masked_fill_(lse == -torch.inf, 0.0) if block.bare else lse


def _swallows(lse: Tensor) -> bool:
    """Whether some row's statistics are so large that they swallow the log of its sum.

    A device is not asked, which would wait for it: there the sums are always made again.
    """
    if lse.device.type != "cpu":
        return True
    low, high = torch.aminmax(lse)  # several times faster than a norm
    return not bool((low > -LARGE) & (high < LARGE))
