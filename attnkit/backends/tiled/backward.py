"""The backward pass: probabilities are made again, tile by tile, from the statistics.

    p = exp(score - lse);  dp = do @ v^T;  ds = p * (dp - delta)
    dq = scale * ds @ k;  dk = scale * ds^T @ q;  dv = p^T @ do
    with a soft-cap, ds * (1 - tanh**2) in dq and dk

where ``delta = sum(do * o) - dlse`` per row. With dropout, `keep` scales both p in dv and dp.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnkit.backends.tiled.guard import guarded
from attnkit.backends.tiled.schedule import Block, Chunk, Whole
from attnkit.backends.tiled.scores import LOG2E, Job, Scores
from attnkit.backends.tiled.tiles import (
    Source,
    Step,
    add_to_keys,
    key_tile,
    query_tile,
    steps,
)
from attnkit.backends.tiled.whole import Part, in_a_row, parts, run_whole_backward

__all__ = ["Saved", "Slopes", "backward"]


class Saved:
    """What the forward pass keeps, and the gradients that arrive; all ``[b n s d]``."""

    def __init__(
        self,
        operands: tuple[Tensor, Tensor, Tensor],
        output: Tensor,
        lse: Tensor,
        grad: Tensor,
        grad_lse: Tensor | None,
        seed: Tensor | None,
    ) -> None:
        self.operands = operands
        self.output = output
        self.lse = lse
        self.grad = grad
        self.grad_lse = grad_lse
        self.seed = seed


class Slopes:
    """Where the gradients go: of query, key and value, ``[b n s d]``, and of bias tensors.

    Those of key and value are added to, in the dtype of the scores.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Sequence[Tensor | None]
    ) -> None:
        self.query, self.key, self.value, self.bias = query, key, value, bias


def backward(job: Job, saved: Saved, slopes: Slopes) -> None:
    """Write the gradients of everything but the sink."""
    query, *keys = saved.operands
    job, key, value = guarded(job, *keys)
    saved.operands = (query, key, value)
    run = _Run(job, saved, slopes)
    for lane in job.schedule.lanes:
        for item in lane.items:
            if isinstance(item, Whole):
                for part in parts(lane, item, job.group):
                    run.whole(part)
                continue
            for step in steps(lane, item, job.group):
                run.step(step, item)
        for start, stop in lane.blank:
            rows = slice(lane.origin[0] + start, lane.origin[0] + stop)
            slopes.query[slice(*lane.batches), slice(*lane.heads), rows] = 0.0
    run.scores.work.give_back()


def backward_at_once(job: Job, saved: Saved) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the gradients as torch's kernel made them, where it makes all of them in one call."""
    part = job.sole
    if part is None or part.before or not part.all_keys or saved.grad_lse is not None:
        return None
    dq, dk, dv = run_whole_backward(
        part, saved.grad, saved.operands, saved.output, saved.lse, job.request.scale
    )
    return (dq, dk, dv) if part.times == 1 else (in_a_row(dq), in_a_row(dk), in_a_row(dv))


def sink_gradient(saved: Saved, sink: Tensor) -> Tensor:
    """Return ``-sum(p_sink * delta)`` per head, with ``p_sink = exp(sink - lse)``."""
    grads = []
    for head in range(saved.lse.shape[1]):
        lse = saved.lse[:, head]
        delta = (saved.grad[:, head].to(lse.dtype) * saved.output[:, head]).sum(-1)
        if saved.grad_lse is not None:
            delta -= saved.grad_lse[:, head]
        grads.append(-(torch.exp(sink[head].to(lse.dtype) - lse) * delta).sum())
    return torch.stack(grads).to(sink.dtype)


# Rows of so few keys are cheap to put right, and may be many for each of their keys.
FEW = 64
# Beside a maximum of this size the log of a sum loses digits that weights need.
LARGE = 512.0


def _swallows(lse: Tensor) -> bool:
    """Whether some row's statistics are so large that they swallow the log of its sum."""
    return not bool(torch.linalg.vector_norm(lse, torch.inf) < LARGE)


class _Run:
    """One backward call."""

    def __init__(self, job: Job, saved: Saved, slopes: Slopes) -> None:
        self.job, self.saved, self.slopes = job, saved, slopes
        self.scores = Scores(job, saved.seed, saved.grad)
        self.query, self.key, self.value = (Source(t) for t in saved.operands)
        self.output, self.grad = Source(saved.output), Source(saved.grad)
        self.lse = Source(saved.lse[..., None])
        grad_lse = saved.grad_lse
        self.grad_lse = None if grad_lse is None else Source(grad_lse[..., None])
        # Whether the weights of a row are all there is: nothing else takes a share of its slope.
        self.whole_rows = not job.request.sink and grad_lse is None
        self.to_query, self.to_key, self.to_value = (
            Source(t) for t in (slopes.query, slopes.key, slopes.value)
        )

    def step(self, step: Step, block: Block) -> None:
        """Add what one tile of rows gives to every gradient."""
        work, wide = self.scores.work, self.scores.wide
        query = query_tile(work, "query", self.query, step, wide)
        grad = query_tile(work, "grad", self.grad, step, wide)
        delta = self._delta(step, grad)
        lse = self._lse(step, grad, block)
        total = self._total(step, block, query, lse) if _swallows(lse) else None
        to_query = work.take("to query", wide, *query.shape)
        scale = self.job.request.scale
        for k, chunk in enumerate(block.chunks):
            key = key_tile(work, "key", self.key, step, chunk, wide)
            weights, ds = self._weights(step, chunk, (query, key, grad), (lse, total), delta)
            to_value = work.take("to value", wide, *key.shape[:2], self.value.width)
            torch.bmm(weights.transpose(1, 2), grad, out=to_value)
            add_to_keys(self.to_value, step, chunk, to_value)
            to_query.baddbmm_(ds, key, beta=0.0 if k == 0 else 1.0, alpha=scale)
            to_key = work.take("to key", wide, *key.shape)
            to_key.baddbmm_(ds.transpose(1, 2), query, beta=0.0, alpha=scale)
            add_to_keys(self.to_key, step, chunk, to_key)
        target = self.to_query.rows(step)
        target.copy_(to_query.view(target.shape))

    def _weights(
        self,
        step: Step,
        chunk: Chunk,
        operands: tuple[Tensor, Tensor, Tensor],
        rows: tuple[Tensor, Tensor | None],
        delta: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the weights that the values had, and the gradient of the scores `ds`."""
        scores, work, wide = self.scores, self.scores.work, self.scores.wide
        query, key, grad = operands
        lse, total = rows
        p, bend = self._probabilities(step, chunk, query, key, lse)
        if total is not None:
            p.div_(total)
        value = key_tile(work, "value", self.value, step, chunk, wide)
        ds = work.take("slopes", wide, *p.shape)
        torch.bmm(grad, value.transpose(1, 2), out=ds)
        weights = p
        if scores.dropout is not None:
            keep = scores.dropout.tile(work, step, chunk, wide).div_(scores.dropout.kept)
            ds.mul_(keep)
            weights = keep.mul_(p)
        ds.sub_(delta).mul_(p)
        matters = chunk.width <= FEW or total is not None
        if self.whole_rows and matters and len(step.block.chunks) == 1:
            # The slopes of a softmax add up to 0. What rounding leaves instead would add up
            # over all rows that see one key and nothing else, and a huge scale magnifies it.
            left = torch.sum(ds, -1, keepdim=True, out=work.take("left", wide, *p.shape[:2], 1))
            ds.addcmul_(p, left, value=-1.0)
        if scores.bias is not None and any(grad is not None for grad in self.slopes.bias):
            scores.bias.add_gradient(self.slopes.bias, scores.by_head(ds, step, chunk), step, chunk)
        if bend is not None:
            ds.mul_(bend)
        return weights, ds

    def _probabilities(
        self, step: Step, chunk: Chunk, query: Tensor, key: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the softmax weights of a tile, and the slope of a soft-cap."""
        scores = self.scores
        p = scores.bent(step, chunk, query, key)
        bend = None
        if scores.cap is not None:
            bend = scores.work.take("bend", scores.wide, *p.shape)
            torch.mul(p, p, out=bend).neg_().add_(1.0)
        scores.finish(p, step, chunk)
        return p.sub_(lse).exp2_(), bend

    def _total(self, step: Step, block: Block, query: Tensor, lse: Tensor) -> Tensor | None:
        """Put the rows' maxima in place of their statistics, and return the sums beside them."""
        scores, wide = self.scores, self.scores.wide
        peak, total = torch.full_like(lse, -torch.inf), torch.zeros_like(lse)
        for chunk in block.chunks:
            key = key_tile(scores.work, "key", self.key, step, chunk, wide)
            tile = scores.tile(step, chunk, query, key)
            torch.maximum(peak, tile.amax(-1, keepdim=True), out=peak)
        peak.masked_fill_(peak == -torch.inf, 0.0)
        if self.job.request.sink:
            # The sink has its share; where rounding puts the statistics below a score, it has none.
            torch.maximum(lse, peak, out=lse)
            return None
        lse.copy_(peak)
        for chunk in block.chunks:
            key = key_tile(scores.work, "key", self.key, step, chunk, wide)
            total += self._probabilities(step, chunk, query, key, lse)[0].sum(-1, keepdim=True)
        return total.masked_fill_(total == 0.0, 1.0)

    def _delta(self, step: Step, grad: Tensor) -> Tensor:
        """Return ``sum(do * o) - dlse`` per row, ``[g r 1]``."""
        work, wide = self.scores.work, self.scores.wide
        output = query_tile(work, "row values", self.output, step, wide)
        product = torch.mul(grad, output, out=work.take("row products", wide, *grad.shape))
        delta = work.take("delta", wide, *grad.shape[:2], 1)
        torch.sum(product, -1, keepdim=True, out=delta)
        if self.grad_lse is not None:
            delta.sub_(query_tile(work, "grad lse", self.grad_lse, step, wide))
        return delta

    def _lse(self, step: Step, grad: Tensor, block: Block) -> Tensor:
        """Return the rows' statistics times log2(e); 0 for rows that see nothing."""
        work, wide = self.scores.work, self.scores.wide
        lse = work.take("lse", wide, *grad.shape[:2], 1)
        view = self.lse.rows(step)
        torch.mul(view, LOG2E, out=lse.view(view.shape))
        if any(chunk.bare for chunk in block.chunks):
            lse.masked_fill_(lse == -torch.inf, 0.0)
        return lse

    def whole(self, part: Part) -> None:
        """Let torch's kernel make a part's gradients, and put them in place."""
        saved, slopes = self.saved, self.slopes
        for k, call in enumerate(part.calls):
            dq, dk, dv = run_whole_backward(
                call, saved.grad, saved.operands, saved.output, saved.lse, self.job.request.scale
            )
            to_query = call.rows(slopes.query)
            to_query.add_(dq) if k else to_query.copy_(dq)
            call.keys(slopes.key).add_(dk)
            call.keys(slopes.value).add_(dv)
