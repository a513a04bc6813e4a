"""One call of the tiled backend, and its gradients.

Eager calls are one `torch.autograd.Function`; graphs call `compute` and `differentiate` themselves.
Both run a plan's `Job` here, and keep nothing but the operands, the output and the statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnkit.backends.base import Kept, Operands
from attnkit.backends.dropout import chances_of
from attnkit.backends.rows import derivatives
from attnkit.backends.tiled.bias import Bound
from attnkit.backends.tiled.job import Job
from attnkit.backends.tiled.passes import (
    Backward,
    Forward,
    backward_at_once,
    forward_at_once,
    sink_gradient,
)
from attnkit.backends.tiled.terms import Term
from attnkit.backends.tiled.whole import fits_torch
from attnkit.pse import Pse

__all__ = ["Attend", "Grads", "compute", "differentiate"]

Grads = tuple[Tensor | None, ...]


def compute(
    job: Job,
    terms: tuple[Term, ...],
    seed: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output in the request's layout, and the log denominators ``[b n s]``."""
    if job.raised is not None:
        wide = (query.float(), key.float(), value.float())
        made, lse = compute(job.raised, terms, seed, *wide, sink)
        return made.to(query.dtype), lse
    request, shape = job.request, job.layout
    views = _views(job, query, key, value)
    at_once = forward_at_once(job, terms, views)
    if at_once is not None:
        made, lse, sound = at_once
        if not sound:
            return compute(job.by_blocks, terms, seed, query, key, value, sink)
        return shape.restore(made), lse
    if request.head_dim == request.value_dim:
        output = query.new_empty(query.shape)
    else:
        sizes = list(query.shape)
        sizes[-1] = sizes[-1] // request.head_dim * request.value_dim
        output = query.new_empty(sizes)
    forward = Forward(job, terms, views, sink, seed, shape.view(output, request.num_heads))
    forward.go()
    if not forward.sound:
        return compute(job.by_blocks, terms, seed, query, key, value, sink)
    return output, forward.lse


def _gradients(
    job: Job,
    terms: tuple[Term, ...],
    operands: Sequence[Any],
    kept: Kept,
    made: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, sink and of bias tensors that ask for some."""
    query, key, value, sink = operands
    if job.schedule.fused and not fits_torch(kept, made, bool(terms)):
        job = job.by_blocks
    if job.raised is not None:
        wide = kept._replace(output=kept.output.float(), grad=kept.arrived.float())
        raised = (query.float(), key.float(), value.float(), sink)
        found = _gradients(job.raised, terms, raised, wide, made)
        return (*(g.to(query.dtype) for g in found[:3] if g is not None), *found[3:])
    shape, heads, views = job.layout, job.request.num_heads, _views(job, query, key, value)
    seen = kept._replace(
        output=shape.view(kept.output, heads), grad=shape.view(kept.arrived, heads)
    )
    at_once = backward_at_once(job, terms, views, seen)
    if at_once is not None:
        return (*(shape.restore(grad) for grad in at_once), None)
    to_sink = None if sink is None else sink_gradient(seen, sink)
    to_query = query.new_empty(query.shape)
    fresh = torch.Tensor.new_empty if job.reads_keys_once else torch.Tensor.new_zeros
    to_key, to_value = (fresh(t, t.shape, dtype=job.wide) for t in (key, value))
    to_bias = [None if t is None else torch.zeros_like(t, dtype=job.wide) for t in made]
    slopes = _views(job, to_query, to_key, to_value)
    Backward(job, terms, views, seen, slopes, to_bias).go()
    return (to_query, to_key.to(key.dtype), to_value.to(value.dtype), to_sink, *to_bias)


def _views(job: Job, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See query, key and value (or their gradients) as ``[b n s d]``."""
    view, heads, key_heads = job.layout.view, job.request.num_heads, job.request.num_kv_heads
    return view(query, heads), view(key, key_heads), view(value, key_heads)


def differentiate(job: Job, bias: Bound, operands: Sequence[Any], kept: Kept) -> Grads:
    """Return the gradients of query, key, value, sink and of the tensors of the bias."""
    found = _gradients(job, bias.terms, operands, kept, bias.made)
    return (*found[:4], *bias.handed_on(found[4:]))


class Attend(torch.autograd.Function):
    """Saves the operands, the output and the statistics; the backward makes the rest again."""

    @staticmethod
    def forward(
        ctx: Any, job: Job, pse: Pse | None, seed: Tensor | None, *leaves: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the output and the log-sum-exp."""
        ctx.job, ctx.pse = job, pse
        wanted = ctx.needs_input_grad[7:]
        ctx.bias = Bound(job.request, pse, leaves[4:], wanted, leaves[0].device)
        output, lse = compute(job, ctx.bias.terms, seed, *leaves[:4])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed, output, lse, *leaves)
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of the leaves, which have derivatives where somebody asks."""
        seed, output, lse, *leaves = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        kept = Kept(seed, output, lse, grad, grad_lse)
        if torch.is_grad_enabled():  # somebody will ask for the gradients of these gradients
            given = (ctx.job, ctx.pse, ctx.bias)
            grads = _Derivatives.apply(*given, *kept, *leaves)  # type: ignore[no-untyped-call]
        else:
            grads = differentiate(ctx.job, ctx.bias, leaves[:4], kept)
        return (None, None, None, *grads)


class _Derivatives(torch.autograd.Function):
    """The backward as a function; its derivatives follow from the definition."""

    @staticmethod
    def forward(ctx: Any, job: Job, pse: Pse | None, bias: Bound, *inputs: Any) -> Grads:
        ctx.request, ctx.pse = job.request, pse
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], *inputs[3:])
        return differentiate(job, bias, inputs[5:9], Kept(*inputs[:5]))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Any, ...]:
        request, further = ctx.request, torch.is_grad_enabled()
        with torch.enable_grad():  # one tensor may be in several places, and each is one by itself
            seed, *saved = ctx.saved_tensors
            grad, grad_lse, *leaves = (None if t is None else t.view_as(t) for t in saved)
        operands = Operands.of(ctx.pse, leaves)
        inputs = [t for t in leaves if t is not None]
        kept = [slope for t, slope in zip(leaves, slopes, strict=True) if t is not None]
        chances = chances_of(request, seed, inputs[0].device)
        arrived = (grad, grad_lse)
        found = iter(derivatives(request, operands, inputs, arrived, kept, further, chances))
        to_leaves = [None if t is None else next(found) for t in leaves]
        return (*(None,) * 6, next(found), next(found), *to_leaves)
