"""The differentiable call: one `torch.autograd.Function` around forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.backends.base import Operands, recorded
from attnkit.backends.rows import derivatives
from attnkit.backends.tiled.backward import (
    Saved,
    Slopes,
    backward,
    backward_at_once,
    sink_gradient,
)
from attnkit.backends.tiled.bias import bind, with_tensors
from attnkit.backends.tiled.build import schedule
from attnkit.backends.tiled.forward import forward
from attnkit.backends.tiled.scores import Job
from attnkit.backends.tiled.terms import Carried
from attnkit.backends.tiled.whole import in_a_row, run_whole
from attnkit.errors import BackendRefused, Refusal
from attnkit.pse import Pse
from attnkit.pse.base import rebound

__all__ = ["Kept", "attend", "bound", "first_derivatives", "new_seed", "run"]


def attend(
    job: Job, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, pse: Pse | None
) -> tuple[Tensor, Tensor]:
    """Return the output in the request's layout, and the log denominators ``[b n s]``.

    Tensors come in the request's layout. Random numbers are drawn here, from torch's generator.
    """
    seed = new_seed(query.device) if job.request.dropout else None
    if torch.is_grad_enabled():
        inputs = (query, key, value, sink, *(pse.tensors if pse is not None else ()))
        if any(t is not None and t.requires_grad for t in inputs):
            output, lse = _Tiled.apply(job, pse, seed, *inputs)  # type: ignore[no-untyped-call]
            return output, lse
    return run(bound(job, pse, query.device), seed, query, key, value, sink)


def bound(job: Job, pse: Pse | None, device: torch.device) -> Job:
    """Return a job with the terms of a bias."""
    return job if pse is None else replace(job, terms=bind(job.request, pse, device))


def new_seed(device: torch.device) -> Tensor:
    """Draw the seed of one call's dropout from torch's generator."""
    return torch.randint(2**63 - 1, (1,), device=device)


def run(
    job: Job,
    seed: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the forward pass; no graph is recorded."""
    if job.raised is not None:
        made, lse = run(job.raised, seed, query.float(), key.float(), value.float(), sink)
        return made.to(query.dtype), lse
    request = job.request
    shape = job.form
    heads, key_heads = request.num_heads, request.num_kv_heads
    q, k, v = shape.view(query, heads), shape.view(key, key_heads), shape.view(value, key_heads)
    part = job.sole if sink is None else None
    if part is not None:
        made, lse = run_whole(part, q, k, v, request.scale)
        if part.times > 1:
            made, lse = in_a_row(made), in_a_row(lse)
        return shape.restore(made), lse
    if request.head_dim == request.value_dim:
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
    else:
        sizes = list(query.shape)
        sizes[-1] = sizes[-1] // request.head_dim * request.value_dim
        output = query.new_empty(sizes)
    lse = forward(job, q, k, v, sink, seed, shape.view(output, heads))
    return output, lse


def _with_heads(
    job: Job, query: Tensor, key: Tensor, value: Tensor
) -> tuple[tuple[Tensor, int], ...]:
    heads, key_heads = job.request.num_heads, job.request.num_kv_heads
    return (query, heads), (key, key_heads), (value, key_heads)


class _Tiled(torch.autograd.Function):
    """Saves the operands, the output and the statistics; the backward makes the rest again."""

    @staticmethod
    def forward(
        ctx: Any,
        job: Job,
        pse: Pse | None,
        seed: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        *carried: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.job, ctx.pse = job, pse
        ctx.terms = _Terms.of(job, pse, carried, ctx.needs_input_grad[7:], query.device)
        output, lse = run(ctx.terms.job, seed, query, key, value, sink)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed, query, key, value, sink, output, lse, *carried)
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        seed, query, key, value, sink, output, lse, *carried = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        kept = Kept(seed, output, lse, grad, grad_lse, query, key, value, sink)
        if torch.is_grad_enabled():  # somebody will ask for the gradients of these gradients
            grads = _Gradients.apply(ctx.job, ctx.pse, ctx.terms, *kept, *carried)  # type: ignore[no-untyped-call]
        else:
            grads = ctx.terms.first_derivatives(kept)
        return (None, None, None, *grads)


class Kept(NamedTuple):
    """What the forward pass keeps beside the tensors of the bias, and the gradients that arrive."""

    seed: Tensor | None
    output: Tensor
    lse: Tensor
    grad: Tensor | None
    grad_lse: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor
    sink: Tensor | None


class _Gradients(torch.autograd.Function):
    """The backward as a function of its own: its derivatives follow from the definition."""

    @staticmethod
    def forward(
        ctx: Any, job: Job, pse: Pse | None, terms: _Terms, *inputs: Any
    ) -> tuple[Tensor | None, ...]:
        ctx.job, ctx.pse = job, pse
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[3:])
        return terms.first_derivatives(Kept(*inputs[:9]))

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Any, ...]:
        request, further = ctx.job.request, torch.is_grad_enabled()
        if request.dropout:
            reason = (
                "second derivatives with dropout need the same cells to be dropped once more, "
                "which the tiled backend does not do; backend='reference' computes them"
            )
            raise BackendRefused(reason, [Refusal("second-derivative", reason, "tiled")])
        with torch.enable_grad():  # one tensor may stand in several places, and each has its own
            grad, grad_lse, *every = (
                None if t is None else t.view_as(t) for t in ctx.saved_tensors
            )
        operands = Operands.of(ctx.pse, every)
        inputs = [t for t in every if t is not None]
        kept = [slope for t, slope in zip(every, slopes, strict=True) if t is not None]
        made = derivatives(request, operands, inputs, (grad, grad_lse), kept, further)
        found = iter(made)
        to_inputs = [None if t is None else next(found) for t in every]
        return (None, None, None, None, None, None, next(found), next(found), *to_inputs)


class _Terms:
    """What tiles read of a bias, and how its gradient goes on to the tensors of the bias.

    The tiles' own tensors follow from those by operators that torch knows and records here.
    """

    def __init__(self, job: Job, leaves: list[Tensor], made: list[Tensor]) -> None:
        self.job, self.leaves, self.made = job, leaves, made

    @classmethod
    def of(
        cls,
        job: Job,
        pse: Pse | None,
        carried: Sequence[Tensor],
        wanted: Sequence[bool],
        device: torch.device,
    ) -> _Terms:
        leaves = [t.detach().requires_grad_(w) for t, w in zip(carried, wanted, strict=True)]
        if pse is None or not any(wanted):
            return cls(bound(job, pse, device), leaves, [])
        with recorded():
            now = bound(job, rebound(pse, leaves), device)
        made = [term.tensor for term in now.terms if isinstance(term, Carried)]
        terms = with_tensors(now.terms, [tensor.detach() for tensor in made])
        return cls(replace(now, terms=terms), leaves, made)

    def first_derivatives(self, kept: Kept) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key, value, sink and of the tensors of the bias."""
        grad = torch.zeros_like(kept.output) if kept.grad is None else kept.grad
        asked = [tensor if tensor.requires_grad else None for tensor in self.made]
        first = gradients(
            self.job,
            (kept.query, kept.key, kept.value, kept.sink),
            (kept.output, kept.lse),
            (grad, kept.grad_lse),
            kept.seed,
            asked,
        )
        pairs = [(t, g) for t, g in zip(asked, first[4:], strict=True) if t is not None]
        if not pairs:
            return (*first[:4], *(None for _ in self.leaves))
        back = torch.autograd.grad(
            [t for t, _ in pairs],
            [leaf for leaf in self.leaves if leaf.requires_grad],
            [g for _, g in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        found = iter(back)
        return (*first[:4], *(next(found) if leaf.requires_grad else None for leaf in self.leaves))


def first_derivatives(
    job: Job, pse: Pse | None, wanted: tuple[bool, ...], kept: Kept, carried: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value, sink and of the tensors of the bias."""
    terms = _Terms.of(job, pse, carried, wanted[4:], kept.query.device)
    return terms.first_derivatives(kept)


def gradients(
    job: Job,
    operands: tuple[Tensor, Tensor, Tensor, Tensor | None],
    results: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None],
    seed: Tensor | None,
    given: list[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value and sink, and of the given bias tensors."""
    query, key, value, sink = operands
    if job.raised is not None:
        found = gradients(
            job.raised,
            (query.float(), key.float(), value.float(), sink),
            (results[0].float(), results[1]),
            (grads[0].float(), grads[1]),
            seed,
            given,
        )
        first = (g if g is None else g.to(query.dtype) for g in found[:3])
        return (*first, *found[3:])
    request, wide = job.request, job.wide
    shape, heads = job.form, request.num_heads
    views = tuple(shape.view(t, n) for t, n in _with_heads(job, query, key, value))
    saved = Saved(
        (views[0], views[1], views[2]),
        shape.view(results[0], heads),
        results[1],
        shape.view(grads[0], heads),
        grads[1],
        seed,
    )
    to_sink = None if sink is None else sink_gradient(saved, sink)
    at_once = backward_at_once(job, saved) if not given else None
    if at_once is not None:
        return (*(shape.restore(grad) for grad in at_once), to_sink)
    if saved.grad_lse is not None and job.schedule.wholes:
        # torch's kernel knows no gradient through the statistics; blocks do.
        job = replace(job, schedule=schedule(request, False))
    to_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    to_key, to_value = (
        torch.zeros_like(t, dtype=wide, memory_format=torch.contiguous_format) for t in (key, value)
    )
    to_given = [None if t is None else torch.zeros_like(t, dtype=wide) for t in given]
    to_q, to_k, to_v = (shape.view(t, n) for t, n in _with_heads(job, to_query, to_key, to_value))
    backward(job, saved, Slopes(to_q, to_k, to_v, to_given))
    typed = (
        None if g is None or t is None else g.to(t.dtype)
        for g, t in zip(to_given, given, strict=True)
    )
    return (to_query, to_key.to(key.dtype), to_value.to(value.dtype), to_sink, *typed)
