"""The tiled backend as one operator that `torch.compile` takes into its graph whole.

A graph holds tensors and numbers, so a plan goes in as a number: its handle. A handle lives as
long as its plan does.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from attnkit.backends.tiled.bias import with_tensors
from attnkit.backends.tiled.function import gradients, run
from attnkit.backends.tiled.scores import Job
from attnkit.errors import CompositionError

__all__ = ["HANDLES", "Handles", "tiled"]


class Handles:
    """Numbers for jobs; forgets a job that nobody else holds."""

    def __init__(self) -> None:
        self._jobs: WeakValueDictionary[int, Job] = WeakValueDictionary()
        self._next = count()

    def add(self, job: Job) -> int:
        """Return a new number for a job."""
        handle = next(self._next)
        self._jobs[handle] = job
        return handle

    def job(self, handle: int, given: list[Tensor]) -> Job:
        """Return the job, on the tensors that its bias has now."""
        job = self._jobs.get(handle)
        if job is None:
            raise CompositionError(
                f"the plan {handle} of a compiled attention is gone: its module was dropped or has "
                "planned for many other shapes since; call torch.compile again"
            )
        return replace(job, terms=with_tensors(job.terms, given)) if given else job


HANDLES = Handles()


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    given: list[Tensor],
    seed: Tensor | None,
    handle: int,
) -> tuple[Tensor, Tensor]:
    job = HANDLES.job(handle, given)
    output, lse = run(job, seed, query, key, value, sink)
    return output.contiguous(), lse.contiguous()


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    given: list[Tensor],
    seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    handle: int,
) -> list[Tensor]:
    job = HANDLES.job(handle, given)
    grads = gradients(
        job, (query, key, value, sink), (output, lse), (grad, None), seed, list(given)
    )
    return [grad.contiguous() for grad in grads if grad is not None]


tiled = torch.library.custom_op(
    "attnkit::tiled",
    _forward,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? sink, Tensor[] given, Tensor? seed, "
    "int handle) -> (Tensor, Tensor)",
)
tiled_backward = torch.library.custom_op(
    "attnkit::tiled_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? sink, Tensor[] given, "
    "Tensor? seed, Tensor output, Tensor lse, int handle) -> Tensor[]",
)


@tiled.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    given: list[Tensor],
    seed: Tensor | None,
    handle: int,
) -> tuple[Tensor, Tensor]:
    job = HANDLES.job(handle, given)
    sizes = list(query.shape)
    sizes[-1] = sizes[-1] // job.request.head_dim * job.request.value_dim
    return query.new_empty(sizes), query.new_empty(job.sizes[:3], dtype=job.wide)


@tiled_backward.register_fake
def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    given: list[Tensor],
    seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    handle: int,
) -> list[Tensor]:
    leaves = [query, key, value, *([] if sink is None else [sink]), *given]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in leaves]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, sink, given, seed, handle = inputs
    ctx.handle = handle
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, sink, seed, *output, *given)


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, sink, seed, output, lse, *given = ctx.saved_tensors
    grads = list(
        tiled_backward(grad, query, key, value, sink, given, seed, output, lse, ctx.handle)
    )
    to_sink = None if sink is None else grads[3]
    return (*grads[:3], to_sink, grads[len(grads) - len(given) :], None, None)


tiled.register_autograd(_differentiate, setup_context=_setup_context)
