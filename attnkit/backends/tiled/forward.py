"""The forward pass: each block's softmax over its chunks of keys, one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.backends.tiled.guard import guarded
from attnkit.backends.tiled.schedule import Block, Lane, Whole
from attnkit.backends.tiled.scores import LN2, LOG2E, Job, Scores
from attnkit.backends.tiled.tiles import Source, Step, key_tile, query_tile, steps
from attnkit.backends.tiled.whole import Part, parts, run_whole

__all__ = ["forward"]

# A row without a key has no maximum. This part of the lowest number stands for one: finite, and
# below every score, those of biases that are cut off included. Statistics below the other part
# are such a row's.
FLOOR, EMPTY = 0.25, 0.15
# A sum of exponentials is at least 1, except in such a row, whose output must be 0.
LEAST = 1e-30


class Rows:
    """The state of a block's rows between chunks: maximum, sum and weighted values."""

    def __init__(self, scores: Scores, query: Tensor, width: int) -> None:
        group, rows, _ = query.shape
        work, wide = scores.work, scores.wide
        self.peak = work.take("peak", wide, group, rows, 1)
        self.total = work.take("total", wide, group, rows, 1)
        self.spare = work.take("spare peak", wide, group, rows, 1)
        self.output = work.take("output", wide, group, rows, width)


def forward(
    job: Job,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    seed: Tensor | None,
    output: Tensor,
) -> Tensor:
    """Attend; query ``[b n s d]``, key and value with fewer heads, any strides.

    Writes `output` ``[b n s d]`` and returns the log of the softmax denominator, ``[b n s]``.
    """
    job, key, value = guarded(job, key, value)
    lse = torch.empty(job.sizes[:3], dtype=job.wide, device=query.device)
    run = _Run(job, query, key, value, sink, seed, output, lse)
    for lane in job.schedule.lanes:
        for item in lane.items:
            if isinstance(item, Whole):
                for part in parts(lane, item, job.group):
                    run.whole(part)
                continue
            for step in steps(lane, item, job.group):
                run.step(step, item)
        run.blank(lane)
    run.scores.work.give_back()
    return lse


class _Run:
    """One forward call."""

    def __init__(
        self,
        job: Job,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        seed: Tensor | None,
        output: Tensor,
        lse: Tensor,
    ) -> None:
        self.job = job
        self.scores = Scores(job, seed, query)
        self.sink = None if sink is None else sink.to(job.wide)
        self.plain = (query, key, value, output, lse)
        self.query, self.key, self.value = Source(query), Source(key), Source(value)
        self.output, self.lse = Source(output), Source(lse[..., None])

    def step(self, step: Step, block: Block) -> None:
        """Compute one tile of rows against all of their keys."""
        scores, work, wide = self.scores, self.scores.work, self.scores.wide
        query = query_tile(work, "query", self.query, step, wide)
        rows = Rows(scores, query, self.value.width)
        bare = any(chunk.bare for chunk in block.chunks)
        for k, chunk in enumerate(block.chunks):
            key = key_tile(work, "key", self.key, step, chunk, wide)
            tile = scores.tile(step, chunk, query, key)
            _soften(rows, tile, k == 0, bare)
            if scores.dropout is not None:
                tile.mul_(scores.dropout.tile(work, step, chunk, wide))
            value = key_tile(work, "value", self.value, step, chunk, wide)
            rows.output.baddbmm_(tile, value, beta=0.0 if k == 0 else 1.0)
        self._finish(step, rows, bare)
        target = self.output.rows(step)
        sums = rows.total.view(*target.shape[:-1], 1)
        torch.div(rows.output.view(target.shape), sums, out=target)

    def _finish(self, step: Step, rows: Rows, bare: bool) -> None:
        """Write the statistics where they belong, and leave the divisors of the output."""
        lse = self.lse.rows(step)
        if self.sink is not None:
            _add_sink(rows, self.sink[step.head : step.head + step.heads], lse.shape)
        elif bare:
            rows.total.clamp_(min=LEAST)
        torch.log2(rows.total, out=rows.spare)
        torch.mul(rows.spare.add_(rows.peak).view(lse.shape), LN2, out=lse)
        if bare and self.sink is None:
            lse.masked_fill_(lse < EMPTY * torch.finfo(lse.dtype).min, -torch.inf)
        if self.scores.dropout is not None:
            rows.total.mul_(self.scores.dropout.kept)

    def whole(self, part: Part) -> None:
        """Run a piece on torch's kernel and put its results in place."""
        query, key, value, output, lse = self.plain
        out, stats = run_whole(part, query, key, value, self.job.request.scale)
        if self.sink is not None:
            total = torch.logaddexp(stats, self.sink[part.heads, None])
            out = out.mul_(torch.exp(stats - total)[..., None])
            stats = total
        part.rows(output).copy_(out)
        part.rows(lse[..., None]).copy_(stats[..., None])

    def blank(self, lane: Lane) -> None:
        """Answer rows that see nothing."""
        *_, output, lse = self.plain
        batches, heads = slice(*lane.batches), slice(*lane.heads)
        for start, stop in lane.blank:
            rows = slice(lane.origin[0] + start, lane.origin[0] + stop)
            output[batches, heads, rows] = 0.0
            if self.sink is None:
                lse[batches, heads, rows] = -torch.inf
            else:
                lse[batches, heads, rows] = self.sink[heads, None]


def _add_sink(rows: Rows, sink: Tensor, shape: torch.Size) -> None:
    """Let a logit per head join the denominator, as one more column without a value."""
    _, _, key_heads, members, _, _ = shape
    logit = (sink * LOG2E).view(key_heads, members, 1, 1).expand(shape)
    peak = rows.peak.view(shape)
    torch.maximum(peak, logit, out=rows.spare.view(shape))
    rows.peak.sub_(rows.spare).exp2_()
    rows.output.mul_(rows.peak)
    rows.total.mul_(rows.peak)
    rows.peak.copy_(rows.spare)
    rows.total.view(shape).add_(torch.exp2(logit - peak))


def _soften(rows: Rows, tile: Tensor, first: bool, bare: bool) -> None:
    """Turn scores into ``2 ** (score - peak)``, and bring the rows' state to the new peak."""
    peak = rows.peak if first else rows.spare
    torch.amax(tile, -1, keepdim=True, out=peak)
    if bare:
        peak.clamp_(min=FLOOR * torch.finfo(peak.dtype).min)
    if not first:
        torch.maximum(rows.peak, rows.spare, out=rows.spare)
        rows.peak.sub_(rows.spare).exp2_()
        rows.total.mul_(rows.peak)
        rows.output.mul_(rows.peak)
        rows.peak.copy_(rows.spare)
    tile.sub_(rows.peak).exp2_()
    if first:
        torch.sum(tile, -1, keepdim=True, out=rows.total)
    else:
        torch.sum(tile, -1, keepdim=True, out=rows.spare)
        rows.total.add_(rows.spare)
