"""The two passes: what forward and backward do with the tiles of their walk.

Forward, each block's softmax over its chunks of keys, one after the other:

    p = exp(score - max);  output = p @ v / sum(p);  lse = max + log(sum(p))

Backward, probabilities are made again, tile by tile, from the statistics:

    p = exp(score - lse);  dp = do @ v^T;  ds = p * (dp - delta)
    dq = scale * ds @ k;  dk = scale * ds^T @ q;  dv = p^T @ do
    with a score function, ds times its slope; with a soft-cap, ds * (1 - tanh**2) in dq and dk

where ``delta = sum(do * o) - dlse`` per row. With dropout, `keep` scales both p in dv and dp.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnkit.backends.base import Kept
from attnkit.backends.tiled.job import Job
from attnkit.backends.tiled.retraced import Retraced
from attnkit.backends.tiled.schedule import RowBlock
from attnkit.backends.tiled.terms import Term
from attnkit.backends.tiled.tiles import (
    Step,
    Strided,
    Workspace,
    key_gradient,
    key_tile,
    query_gradient,
    query_tile,
)
from attnkit.backends.tiled.walk import LN2, LOG2E, Walk, bias_of
from attnkit.backends.tiled.whole import (
    WholeCall,
    in_a_row,
    is_sound,
    run_whole,
    run_whole_backward,
)

__all__ = ["Backward", "Forward", "backward_at_once", "forward_at_once", "sink_gradient"]

# A row without a key has no maximum. This part of the lowest number is taken for one: finite, and
# below every score, those of biases that are cut off included. Statistics below the other part
# are such a row's.
FLOOR, EMPTY = 0.25, 0.15
# A sum of exponentials is at least 1, except in such a row, whose output must be 0.
LEAST = 1e-30


class Softmax:
    """The state of a tile's rows between chunks: maximum, sum and weighted values."""

    def __init__(self, walk: Walk, query: Tensor) -> None:
        (group, rows, _), wide, take = query.shape, walk.wide, walk.work.take
        self.peak = take("peak", wide, group, rows, 1)
        self.total = take("total", wide, group, rows, 1)
        self.spare = take("spare peak", wide, group, rows, 1)
        self.output = take("output", wide, group, rows, walk.value.width)

    def soften(self, tile: Tensor, first: bool, bare: bool) -> None:
        """Turn scores into ``2 ** (score - peak)``, and bring the state to the new peak."""
        peak = self.peak if first else self.spare
        torch.amax(tile, -1, keepdim=True, out=peak)
        if bare:
            peak.clamp_(min=FLOOR * torch.finfo(peak.dtype).min)
        if not first:
            torch.maximum(self.peak, self.spare, out=self.spare)
            self._rise()
        tile.sub_(self.peak).exp2_()
        torch.sum(tile, -1, keepdim=True, out=self.total if first else self.spare)
        if not first:
            self.total.add_(self.spare)

    def add_sink(self, sink: Tensor, shape: torch.Size) -> None:
        """Let a logit per head join the denominator, as one more column without a value."""
        _, _, key_heads, members, _, _ = shape
        logit = (sink * LOG2E).view(key_heads, members, 1, 1).expand(shape)
        torch.maximum(self.peak.view(shape), logit, out=self.spare.view(shape))
        self._rise()
        self.total.view(shape).add_(torch.exp2(logit - self.peak.view(shape)))

    def _rise(self) -> None:
        """Take the maximum that is in `spare`."""
        self.peak.sub_(self.spare).exp2_()
        self.total.mul_(self.peak)
        self.output.mul_(self.peak)
        self.peak.copy_(self.spare)


class Forward(Walk):
    """Writes `output` ``[b n s d]`` and `lse` ``[b n s]``, the log of the softmax denominator."""

    def __init__(
        self,
        job: Job,
        terms: tuple[Term, ...],
        tensors: tuple[Tensor, Tensor, Tensor],
        sink: Tensor | None,
        seed: Tensor | None,
        output: Tensor,
    ) -> None:
        super().__init__(job, terms, tensors, seed)
        self.sink = None if sink is None else sink.to(job.wide)
        self.output = output
        self.lse = torch.empty(job.sizes[:3], dtype=job.wide, device=output.device)
        self.to_output, self.to_lse = Strided(output), Strided(self.lse[..., None])

    def step(self, step: Step, block: RowBlock) -> None:
        """Compute one tile of rows against all of their keys."""
        work, wide, bare = self.work, self.wide, block.bare
        query = query_tile(work, "query", self.query, step, wide)
        rows = Softmax(self, query)
        for k, chunk in enumerate(block.chunks):
            key = key_tile(work, "key", self.key, step, chunk, wide)
            tile = self.scores(step, chunk, query, key)
            rows.soften(tile, k == 0, bare)
            if self.dropout is not None:
                tile.mul_(self.dropout.tile(work, step, chunk, wide))
            value = key_tile(work, "value", self.value, step, chunk, wide)
            rows.output.baddbmm_(tile, value, beta=0.0 if k == 0 else 1.0)
        self._finish(step, rows, bare)
        target = self.to_output.rows(step)
        sums = rows.total.view(*target.shape[:-1], 1)
        torch.div(rows.output.view(target.shape), sums, out=target)

    def _finish(self, step: Step, rows: Softmax, bare: bool) -> None:
        """Write the statistics where they belong, and leave the divisors of the output."""
        lse = self.to_lse.rows(step)
        if self.sink is not None:
            rows.add_sink(self.sink[step.head : step.head + step.heads], lse.shape)
        elif bare:
            rows.total.clamp_(min=LEAST)
        torch.log2(rows.total, out=rows.spare)
        torch.mul(rows.spare.add_(rows.peak).view(lse.shape), LN2, out=lse)
        if bare and self.sink is None:
            lse.masked_fill_(lse < EMPTY * torch.finfo(lse.dtype).min, -torch.inf)
        if self.dropout is not None:
            rows.total.mul_(self.dropout.kept)

    def whole(self, call: WholeCall) -> None:
        """Run a piece on torch's kernel and put its results in place."""
        out, stats = run_whole(call, *self.tensors, self.scale, self.bias)
        if self.sink is not None:
            if self.bias is not None:  # what tells that they are not sound must not be lost
                stats.masked_fill_(stats == 0.0, torch.nan)
            total = torch.logaddexp(stats, self.sink[call.heads, None])
            out, stats = out.mul_(torch.exp(stats - total)[..., None]), total
        call.rows(self.output).copy_(out)
        call.rows(self.lse[..., None]).copy_(stats[..., None])

    @property
    def sound(self) -> bool:
        """Whether torch's kernel made what it should of a bias, if it was given one."""
        if self.bias is None or not self.job.schedule.fused:
            return True
        return is_sound(self.lse.masked_fill(self.lse == -torch.inf, 1.0))

    def blank(self, rows: tuple[slice, slice, slice]) -> None:
        """Answer rows that see nothing, or the sink alone."""
        self.output[rows] = 0.0
        self.lse[rows] = -torch.inf if self.sink is None else self.sink[rows[1], None]


class Backward(Retraced):
    """Writes the gradients of queries, and adds to those of keys, values and bias tensors.

    The gradients of query, key and value, `slopes`, are ``[b n s d]``; keys and values get theirs
    in the dtype of the scores.
    """

    def __init__(
        self,
        job: Job,
        terms: tuple[Term, ...],
        tensors: tuple[Tensor, Tensor, Tensor],
        kept: Kept,
        slopes: tuple[Tensor, Tensor, Tensor],
        to_bias: Sequence[Tensor | None],
    ) -> None:
        super().__init__(job, terms, tensors, kept, to_bias)
        self.slopes, self.once = slopes, job.reads_keys_once
        self.to_query, self.to_key, self.to_value = (Strided(slope) for slope in slopes)

    def step(self, step: Step, block: RowBlock) -> None:
        """Add what one tile of rows gives to every gradient."""
        work, wide, scale = self.work, self.wide, self.scale
        rows = self.rows(step, block)
        with query_gradient(work, self.to_query, step, wide) as to_query:
            for k, chunk in enumerate(block.chunks):
                key = key_tile(work, "key", self.key, step, chunk, wide)
                weights, ds = self.weights(step, chunk, rows, key)
                with key_gradient(work, self.to_value, step, chunk, wide, self.once) as to_value:
                    torch.bmm(weights.transpose(1, 2), rows.grad, out=to_value)
                to_query.baddbmm_(ds, key, beta=0.0 if k == 0 else 1.0, alpha=scale)
                with key_gradient(work, self.to_key, step, chunk, wide, self.once) as to_key:
                    to_key.baddbmm_(ds.transpose(1, 2), rows.query, beta=0.0, alpha=scale)

    def whole(self, call: WholeCall) -> None:
        """Let torch's kernel make the gradients of a piece, and put them in place."""
        to_query, to_key, to_value = self.slopes
        for k, one in enumerate(call.calls):
            dq, dk, dv = run_whole_backward(one, self.tensors, self.kept, self.scale, self.bias)
            rows = one.rows(to_query)
            rows.add_(dq) if k else rows.copy_(dq)
            one.keys(to_key).add_(dk)
            one.keys(to_value).add_(dv)

    def blank(self, rows: tuple[slice, slice, slice]) -> None:
        """Queries that see nothing have no gradient."""
        self.slopes[0][rows] = 0.0


def forward_at_once(
    job: Job, terms: tuple[Term, ...], tensors: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, bool] | None:
    """Return output and statistics as torch's kernel makes them in one call, if there is one.

    And whether they are sound.
    """
    call = job.sole
    if call is None:
        return None
    if not terms:
        out, lse = _in_order(call, *run_whole(call, *tensors, job.request.scale, None))
        return out, lse, True
    work = Workspace.lent(tensors[0])
    out, lse = run_whole(call, *tensors, job.request.scale, bias_of(job, terms, work))
    work.give_back()
    return out, lse, is_sound(lse)


def backward_at_once(
    job: Job, terms: tuple[Term, ...], tensors: tuple[Tensor, Tensor, Tensor], kept: Kept
) -> tuple[Tensor, ...] | None:
    """Return the gradients as torch's kernel made them, where it makes all of them in one call."""
    call = job.sole
    if call is None or call.piece.before or not call.all_keys or kept.grad_lse is not None:
        return None
    if not terms:
        return _in_order(call, *run_whole_backward(call, tensors, kept, job.request.scale, None))
    work = Workspace.lent(tensors[0])
    bias = bias_of(job, terms, work)
    grads = run_whole_backward(call, tensors, kept, job.request.scale, bias)
    work.give_back()
    return grads


def _in_order(call: WholeCall, *made: Tensor) -> tuple[Tensor, ...]:
    """Put repetitions, which were a batch, in a row."""
    return made if call.times == 1 else tuple(map(in_a_row, made))


def sink_gradient(kept: Kept, sink: Tensor) -> Tensor:
    """Return ``-sum(p_sink * delta)`` per head, with ``p_sink = exp(sink - lse)``."""
    grads = []
    for head in range(kept.lse.shape[1]):
        lse = kept.lse[:, head]
        delta = (kept.arrived[:, head].to(lse.dtype) * kept.output[:, head]).sum(-1)
        if kept.grad_lse is not None:
            delta -= kept.grad_lse[:, head]
        grads.append(-(torch.exp(sink[head].to(lse.dtype) - lse) * delta).sum())
    return torch.stack(grads).to(sink.dtype)
