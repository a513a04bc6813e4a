"""The differentiable call: one `torch.autograd.Function` around forward and backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnkit.backends.tiled.backward import (
    Saved,
    Slopes,
    backward,
    backward_at_once,
    sink_gradient,
)
from attnkit.backends.tiled.build import schedule
from attnkit.backends.tiled.forward import forward
from attnkit.backends.tiled.scores import Job
from attnkit.backends.tiled.terms import Carried
from attnkit.backends.tiled.whole import in_a_row, run_whole

__all__ = ["attend", "gradients", "new_seed", "run"]


def attend(
    job: Job, query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the output in the request's layout, and the log denominators ``[b n s]``.

    Tensors come in the request's layout. Random numbers are drawn here, from torch's generator.
    """
    seed = new_seed(query.device) if job.request.dropout else None
    given = [term.tensor for term in job.terms if isinstance(term, Carried)]
    if torch.is_grad_enabled():
        inputs = (query, key, value, sink, *given)
        if any(t is not None and t.requires_grad for t in inputs):
            output, lse = _Tiled.apply(job, seed, *inputs)  # type: ignore[no-untyped-call]
            return output, lse
    return run(job, seed, query, key, value, sink)


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
        seed: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        *given: Tensor,
    ) -> tuple[Tensor, Tensor]:
        output, lse = run(job, seed, query, key, value, sink)
        ctx.job = job
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(seed, query, key, value, sink, output, lse, *given)
        return output, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        seed, query, key, value, sink, output, lse, *given = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * (6 + len(given))
        wanted = ctx.needs_input_grad[6:]
        if grad is None:
            grad = torch.zeros_like(output)
        grads = gradients(
            ctx.job,
            (query, key, value, sink),
            (output, lse),
            (grad, grad_lse),
            seed,
            [tensor if want else None for tensor, want in zip(given, wanted, strict=True)],
        )
        return (None, None, *grads)


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
