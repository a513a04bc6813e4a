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

from attnkit.backends.base import (
    BACKENDS,
    AttentionOutput,
    Kept,
    Operands,
    Stats,
    reached,
    stats_dtype,
)
from attnkit.errors import BackendRefused, CompositionError, Refusal
from attnkit.planner import Plan
from attnkit.pse import Pse
from attnkit.pse.base import rebound

__all__ = ["Held", "hold", "run_number", "stand_in"]


@dataclass(frozen=True, eq=False)
class Held:
    """A plan with its bias, whose tensors are put in at run time, and its number."""

    plan: Plan
    pse: Pse | None
    number: int

    def operands(self, tensors: list[Tensor]) -> Operands:
        """Return operands from the tensors among their leaves: there may be no sink."""
        sink = () if self.plan.request.sink else (None,)
        return Operands.of(self.pse, [*tensors[:3], *sink, *tensors[3:]])


class _ByNumber:
    """Plans by number. Weak: a number dies with its plan, and is never given again.

    No number leaves the process (`Plan.__getstate__`).
    """

    def __init__(self) -> None:
        self._next = count()
        self.held: WeakValueDictionary[int, Held] = WeakValueDictionary()

    def add(self, plan: Plan, pse: Pse | None) -> Held:
        held = Held(plan, pse, next(self._next))
        self.held[held.number] = held
        return held

    def get(self, number: int) -> Held:
        held = self.held.get(number)
        if held is None:
            raise CompositionError(
                f"plan {number} of a compiled attention is gone: its module or mask was dropped, "
                "or the graph comes from another process; call torch.compile again"
            )
        return held


_PLANS = _ByNumber()


def hold(plan: Plan, pse: Pse | None) -> Held:
    """Give a plan its number for a kind of bias; the plan keeps it."""
    kinds: dict[object, Held] = plan.__dict__.setdefault("_held", {})
    kind = None if pse is None else pse.key()
    if kind not in kinds:
        if pse is not None:  # not the tensors of the first who asked
            facts = ((t.shape, t.dtype, t.device, t.requires_grad) for t in pse.tensors)
            pse = rebound(pse, [stand_in(*known) for known in facts])
        kinds[kind] = _PLANS.add(plan, pse)
    return kinds[kind]


def stand_in(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, requires_grad: bool
) -> Tensor:
    """Return a tensor with such properties, and one number of memory."""
    cell = torch.empty(1, dtype=dtype, device=device, requires_grad=requires_grad)
    return cell.expand(tuple(shape))


def run_number(number: int, leaves: list[Any], drops: bool, return_stats: bool) -> AttentionOutput:
    """Run the plan of a number on `Operands.leaves`, as one operator of the graph being recorded.

    It `drops` where it has dropout. Without `return_stats` there are none, since some backends
    compute them only where they are looked at.
    """
    # Drawn in the graph and on the host, which no device has to wait for.
    seed = torch.randint(2**63 - 1, (1,)) if drops else None
    tensors = [leaf for leaf in leaves if leaf is not None]
    output, lse, peak = _attend(tensors, seed, number, return_stats)
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


# -- the operators, what they make of shapes alone, and their derivatives ----------------------


def _forward(
    tensors: list[Tensor], seed: Tensor | None, number: int, return_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    held = _PLANS.get(number)
    backend, operands = BACKENDS[held.plan.backend], held.operands(tensors)
    with _alone(operands.query.device):
        output, stats = backend.compute(held.plan, operands, seed)
        output, nothing = output.contiguous(), output.new_empty(0)
        lse = stats.lse.contiguous() if return_stats or backend.saves_lse else nothing
        # Without keys both statistics may be one tensor, which an operator must not return twice.
        peak = stats.max.contiguous().clone() if return_stats else output.new_empty(0)
    return output, lse, peak


def _forward_shapes(
    tensors: list[Tensor], seed: Tensor | None, number: int, return_stats: bool
) -> tuple[Tensor, Tensor, Tensor]:
    held = _PLANS.get(number)
    request, query = held.plan.request, tensors[0]
    sizes = list(query.shape)
    sizes[-1] = sizes[-1] // request.head_dim * request.value_dim
    packed = (request.q_len, request.num_heads)
    rows = packed if request.seqlens else (request.batch, request.num_heads, request.q_len)
    kept = return_stats or BACKENDS[held.plan.backend].saves_lse
    lse, peak = (
        query.new_empty(rows, dtype=stats_dtype(query.dtype)) if asked else query.new_empty(0)
        for asked in (kept, return_stats)
    )
    return query.new_empty(sizes), lse, peak


def _backward(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    tensors: list[Tensor],
    seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    wanted: list[bool],
    number: int,
) -> list[Tensor]:
    """Return the gradients of the tensors that are wanted, and empty tensors for the others."""
    held = _PLANS.get(number)
    backend, operands = BACKENDS[held.plan.backend], held.operands(tensors)
    kept = Kept(seed, output, lse, grad, grad_lse)
    asked = iter(wanted)
    every = tuple(leaf is not None and next(asked) for leaf in operands.leaves)
    with _alone(output.device):
        found = backend.gradients(held.plan, operands, kept, every)
    slopes = (g for g, leaf in zip(found, operands.leaves, strict=True) if leaf is not None)
    return [
        (torch.zeros_like(t) if g is None else g.contiguous()) if want else t.new_empty(0)
        for t, g, want in zip(tensors, slopes, wanted, strict=True)
    ]


def _backward_shapes(
    grad: Tensor | None, grad_lse: Tensor | None, tensors: list[Tensor], *rest: Any
) -> list[Tensor]:
    *_, wanted, _ = rest
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if want else t.new_empty(0)
        for t, want in zip(tensors, wanted, strict=True)
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, seed, ctx.number, _ = inputs
    ctx.wanted = [tensor.requires_grad for tensor in tensors]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(seed, *output[:2], *tensors)


def _differentiate(
    ctx: Any, grad: Tensor | None, grad_lse: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    seed, output, lse, *tensors = ctx.saved_tensors
    made = _attend_backward(grad, grad_lse, tensors, seed, output, lse, ctx.wanted, ctx.number)
    return [g if want else None for g, want in zip(made, ctx.wanted, strict=True)], None, None, None


def _refuse(ctx: Any, *unused: Any) -> None:
    reason = (
        "a compiled attention has no second derivatives; without torch.compile, backend='tiled' "
        "and backend='reference' compute them"
    )
    raise BackendRefused(reason, [Refusal("second-derivative", reason)])


_attend = torch.library.custom_op(
    "attnkit::attend",
    _forward,
    mutates_args=(),
    schema="(Tensor[] tensors, Tensor? seed, int number, bool return_stats) "
    "-> (Tensor, Tensor, Tensor)",
)
_attend_backward = torch.library.custom_op(
    "attnkit::attend_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor? grad, Tensor? grad_lse, Tensor[] tensors, Tensor? seed, Tensor output, "
    "Tensor lse, bool[] wanted, int number) -> Tensor[]",
)
_attend.register_fake(_forward_shapes)
_attend_backward.register_fake(_backward_shapes)
_attend.register_autograd(_differentiate, setup_context=_setup_context)
_attend_backward.register_autograd(_refuse)
