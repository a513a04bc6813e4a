"""Any backend's plan as one operator that `torch.compile` takes into its graph whole.

What the operator does is not traced, so it may be a launch of a kernel or a hundred small ops.
A graph holds tensors and numbers: a plan goes in as a number, which is good as long as somebody
holds the plan. Whoever the graph is guarded on does so (`attnkit.attend`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from attnkit.backends.base import BACKENDS, AttentionOutput, Operands, Stats, reached, stats_dtype
from attnkit.errors import BackendRefused, CompositionError, Refusal
from attnkit.planner import Plan
from attnkit.pse import Pse
from attnkit.pse.base import rebound

__all__ = ["Held", "hold", "run_in_graph", "run_number", "stand_in"]


@dataclass(frozen=True, eq=False)
class Held:
    """A plan with its bias, whose tensors are put in at run time, and its number."""

    plan: Plan
    pse: Pse | None
    number: int


# Weak: a number dies with its plan. No number leaves the process (`Plan.__getstate__`).
_HELD: WeakValueDictionary[int, Held] = WeakValueDictionary()
_NUMBERS = count()


def hold(plan: Plan, pse: Pse | None) -> Held:
    """Give a plan its number for a kind of bias; the plan keeps it."""
    kinds: dict[object, Held] = plan.__dict__.setdefault("_held", {})
    kind = None if pse is None else pse.key()
    if kind not in kinds:
        if pse is not None:  # not the tensors of the first who asked
            facts = ((t.shape, t.dtype, t.device, t.requires_grad) for t in pse.tensors)
            pse = rebound(pse, [stand_in(*known) for known in facts])
        kinds[kind] = Held(plan, pse, next(_NUMBERS))
        _HELD[kinds[kind].number] = kinds[kind]
    return kinds[kind]


def _held(number: int) -> Held:
    held = _HELD.get(number)
    if held is None:
        raise CompositionError(
            f"plan {number} of a compiled attention is gone: its module or mask was dropped, or "
            "the graph comes from another process; call torch.compile again"
        )
    return held


def stand_in(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, requires_grad: bool
) -> Tensor:
    """Return a tensor with such properties, and one number of memory."""
    cell = torch.empty(1, dtype=dtype, device=device, requires_grad=requires_grad)
    return cell.expand(tuple(shape))


def run_in_graph(held: Held, operands: Operands, return_stats: bool) -> AttentionOutput:
    """Run a plan as one operator of the graph that is being recorded.

    Without `return_stats` there are none, since some backends compute them only where they are
    looked at.
    """
    leaves, drops = list(operands.leaves), held.plan.request.dropout > 0
    return run_number(held.number, leaves, drops, return_stats)


def run_number(number: int, leaves: list[Any], drops: bool, return_stats: bool) -> AttentionOutput:
    """Run the plan of a number on `Operands.leaves`, with dropout if it `drops`."""
    # Drawn in the graph and on the host, which no device has to wait for.
    seed = torch.randint(2**63 - 1, (1,)) if drops else None
    output, lse, peak = _attend(*leaves[:4], leaves[4:], seed, number, return_stats)
    return AttentionOutput(output, Stats(lse, peak))


_TRANSFORMS = (
    "FuncTorchBatched",
    "FuncTorchBatchedDecomposition",
    "FuncTorchDynamicLayerBackMode",
    "FuncTorchDynamicLayerFrontMode",
    "FuncTorchVmapMode",
)


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """Compute in the dtype of the tensors, as autocast does not reach inside.

    `torch.vmap` does: it asks the functions of masks for their cells.
    """
    with torch.autocast(device.type, enabled=False), reached(*_TRANSFORMS):
        yield


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
    held = _held(number)
    backend = BACKENDS[held.plan.backend]
    operands = Operands.of(held.pse, (query, key, value, sink, *carried))
    with _alone(query.device):
        output, stats = backend.compute(held.plan, operands, seed)
        output, nothing = output.contiguous(), output.new_empty(0)
        lse = stats.lse.contiguous() if return_stats or backend.saves_lse else nothing
        # Without keys both statistics may be one tensor, which an operator must not return twice.
        peak = stats.max.contiguous().clone() if return_stats else output.new_empty(0)
    return output, lse, peak


def _backward(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    carried: list[Tensor],
    seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    wanted: list[bool],
    number: int,
) -> list[Tensor]:
    held = _held(number)
    backend = BACKENDS[held.plan.backend]
    operands = Operands.of(held.pse, (query, key, value, sink, *carried))
    with _alone(query.device):
        found = backend.gradients(
            held.plan, operands, seed, (output, lse), (grad, grad_lse), tuple(wanted)
        )
    leaves = _leaves(query, key, value, sink, carried)
    return [
        leaf.new_empty(0) if not want else torch.zeros_like(leaf) if g is None else g.contiguous()
        for leaf, g, want in zip(leaves, found, wanted, strict=True)
    ]


def _leaves(
    query: Tensor, key: Tensor, value: Tensor, sink: Tensor | None, carried: list[Tensor]
) -> list[Tensor]:
    """Return the tensors that may want a gradient, in order; the sink's place is always taken."""
    return [query, key, value, query.new_empty(0) if sink is None else sink, *carried]


_attend = torch.library.custom_op(
    "attnkit::attend",
    _forward,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? sink, Tensor[] carried, "
    "Tensor? seed, int number, bool return_stats) -> (Tensor, Tensor, Tensor)",
)
_attend_backward = torch.library.custom_op(
    "attnkit::attend_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor? grad, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor? sink, Tensor[] carried, Tensor? seed, Tensor output, Tensor lse, bool[] wanted, "
    "int number) -> Tensor[]",
)


@_attend.register_fake
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
    plan = _held(number).plan
    request = plan.request
    sizes = list(query.shape)
    sizes[-1] = sizes[-1] // request.head_dim * request.value_dim
    packed = (request.q_len, request.num_heads)
    rows = packed if request.seqlens else (request.batch, request.num_heads, request.q_len)
    wide = stats_dtype(query.dtype)
    nothing = query.new_empty(0)
    kept = return_stats or BACKENDS[plan.backend].saves_lse
    lse = query.new_empty(rows, dtype=wide) if kept else nothing
    peak = query.new_empty(rows, dtype=wide) if return_stats else query.new_empty(0)
    return query.new_empty(sizes), lse, peak


@_attend_backward.register_fake
def _fake_backward(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    carried: list[Tensor],
    seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    wanted: list[bool],
    number: int,
) -> list[Tensor]:
    leaves = _leaves(query, key, value, sink, carried)
    return [
        torch.empty_like(leaf, memory_format=torch.contiguous_format) if want else leaf.new_empty(0)
        for leaf, want in zip(leaves, wanted, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, sink, carried, seed, number, _ = inputs
    ctx.number = number
    ctx.wanted = [t.requires_grad for t in _leaves(query, key, value, sink, carried)]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, sink, seed, *output[:2], *carried)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    query, key, value, sink, seed, output, lse, *carried = ctx.saved_tensors
    made = _attend_backward(
        grad, grad_lse, query, key, value, sink, carried, seed, output, lse, ctx.wanted, ctx.number
    )
    grads = [g if want else None for g, want in zip(made, ctx.wanted, strict=True)]
    return (*grads[:4], grads[4:], None, None, None)


def _refuse(ctx: Any, *unused: Any) -> None:
    reason = (
        "a compiled attention has no second derivatives; without torch.compile, backend='tiled' "
        "and backend='reference' compute them"
    )
    raise BackendRefused(reason, [Refusal("second-derivative", reason)])


_attend.register_autograd(_differentiate, setup_context=_setup_context)
_attend_backward.register_autograd(_refuse)
