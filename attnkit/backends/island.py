"""Any backend's plan as one operator that `torch.compile` takes into its graph whole.

What the operator does is not traced, so it may be a launch of a kernel or a hundred small ops.
A graph holds tensors and numbers: a plan goes in as a number. The backward computes the
forward again, as activation checkpointing does, on the random numbers of the first time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit.backends.base import AttentionOutput, Operands, Stats, stats_dtype
from attnkit.backends.choose import run_plan
from attnkit.backends.rebind import rebound
from attnkit.planner import Plan
from attnkit.pse import Pse

__all__ = ["Island", "islands", "run_island"]


@dataclass(frozen=True)
class Island:
    """A plan with its bias, whose tensors are put in at run time, and its number."""

    plan: Plan
    pse: Pse | None
    number: int


class Islands:
    """The islands of all graphs. A graph lives as long as the process, and so do they."""

    def __init__(self) -> None:
        self._all: list[Island] = []

    def add(self, plan: Plan, pse: Pse | None) -> Island:
        """Give a plan a number."""
        self._all.append(Island(plan, pse, len(self._all)))
        return self._all[-1]

    def __getitem__(self, number: int) -> Island:
        return self._all[number]


islands = Islands()


class _Inputs(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    sink: Tensor | None
    carried: list[Tensor]

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (*self[:3], self.sink, *self.carried) if t is not None]


def run_island(
    island: Island, operands: Operands, carried: list[Tensor], return_stats: bool
) -> AttentionOutput:
    """Run a plan as one operator of the graph that is being traced.

    `carried` are the tensors of the bias. Without `return_stats` there are none, since some
    backends compute them only where they are looked at.
    """
    # Drawn in the graph and on the host, which no device has to wait for.
    seed = torch.randint(2**63 - 1, (1,)) if island.plan.request.dropout else None
    q, k, v, sink = operands.query, operands.key, operands.value, operands.sink
    output, peak, total = _island(q, k, v, sink, carried, seed, island.number, return_stats)
    return AttentionOutput(output, Stats(peak.detach(), total.detach()))


def _run(inputs: _Inputs, seed: Tensor | None, number: int) -> AttentionOutput:
    island = islands[number]
    pse = rebound(island.pse, inputs.carried) if island.pse is not None else None
    with _seeded(seed, inputs.query.device):
        return run_plan(island.plan, Operands(*inputs[:3], pse, inputs.sink))


@contextmanager
def _seeded(seed: Tensor | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(int(seed))
        yield


@contextmanager
def _recorded() -> Iterator[None]:
    """Record gradients inside an operator, where torch leaves its recorder out of the way."""
    key = torch._C.DispatchKey.AutogradFunctionality
    was = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, was)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    carried: list[Tensor],
    seed: Tensor | None,
    number: int,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    found = _run(_Inputs(query, key, value, sink, carried), seed, number)
    output = found.output.contiguous()
    if not return_stats:
        return output, output.new_empty(0), output.new_empty(0)
    return output, found.stats.max.contiguous().clone(), found.stats.sum.contiguous().clone()


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    carried: list[Tensor],
    seed: Tensor | None,
    number: int,
) -> list[Tensor]:
    again = _Inputs(
        _leaf(query),
        _leaf(key),
        _leaf(value),
        None if sink is None else _leaf(sink),
        [_leaf(t) for t in carried],
    )
    with _recorded():
        output = _run(again, seed, number).output
    wanted = [t for t in again.leaves if t.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad, allow_unused=True))
    each = ((t, next(found) if t.requires_grad else None) for t in again.leaves)
    return [torch.zeros_like(t) if g is None else g.contiguous() for t, g in each]


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


_island = torch.library.custom_op(
    "attnkit::island",
    _forward,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? sink, Tensor[] carried, "
    "Tensor? seed, int number, bool return_stats) -> (Tensor, Tensor, Tensor)",
)
_island_backward = torch.library.custom_op(
    "attnkit::island_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? sink, "
    "Tensor[] carried, Tensor? seed, int number) -> Tensor[]",
)


@_island.register_fake
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    carried: list[Tensor],
    seed: Tensor | None,
    number: int,
    return_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    request = islands[number].plan.request
    sizes = list(query.shape)
    sizes[-1] = sizes[-1] // request.head_dim * request.value_dim
    output = query.new_empty(sizes)
    if not return_stats:
        return output, output.new_empty(0), output.new_empty(0)
    packed = (request.q_len, request.num_heads)
    rows = packed if request.seqlens else (request.batch, request.num_heads, request.q_len)
    peak, total = (query.new_empty(rows, dtype=stats_dtype(query.dtype)) for _ in range(2))
    return output, peak, total


@_island_backward.register_fake
def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    carried: list[Tensor],
    seed: Tensor | None,
    number: int,
) -> list[Tensor]:
    leaves = _Inputs(query, key, value, sink, carried).leaves
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in leaves]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, sink, carried, seed, number, _ = inputs
    ctx.number = number
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(query, key, value, sink, seed, *carried)


def _differentiate(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    query, key, value, sink, seed, *carried = ctx.saved_tensors
    grads = list(_island_backward(grad, query, key, value, sink, carried, seed, ctx.number))
    to_sink = None if sink is None else grads[3]
    return (*grads[:3], to_sink, grads[len(grads) - len(carried) :], None, None, None)


_island.register_autograd(_differentiate, setup_context=_setup_context)
