"""The compiled backend: plans, refusals and autograd around the kernel's two passes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnkit.backends.base import (
    BACKENDS,
    AttentionOutput,
    Kept,
    Operands,
    Stats,
    register,
    untransformed,
)
from attnkit.backends.compiled.library import KINDS, Library
from attnkit.backends.compiled.table import TileTable, table_of
from attnkit.backends.graph import run_held
from attnkit.backends.partials import OnStatistics
from attnkit.backends.rows import maxima
from attnkit.backends.tiled.passes import sink_gradient
from attnkit.errors import BackendRefused, Refusal
from attnkit.planner import Plan, Request

__all__ = ["Compiled", "CompiledPlan", "prefer"]

# From this scale on, products with it may leave float32 where the scores do not.
HUGE_SCALE = 1024.0

# Fewer rows than this are faster in products that need no tiles: measured on one AVX-512 core.
FEW_ROWS = 16

LIBRARY = Library()


class CompiledPlan(Plan):
    """A plan with its table of keys; a copy in another process makes it again."""

    @cached_property
    def table(self) -> TileTable:
        """Which keys each row reads."""
        return table_of(self.request, LIBRARY.height)


class Compiled(OnStatistics):
    """A kernel in C++ for the CPU: masks that are regions, at the cost of their cells.

    Tiles are as high as two vectors, so that narrow windows and short documents cost little more
    than their cells; 16 bits are computed in float32. By name only, unless `prefer` was called:
    the first plan builds the kernel, which takes some seconds once per machine, and needs a C++
    compiler and ninja. The largest score of each row is computed from the definition where
    somebody looks.
    """

    name = "compiled"
    plan_type = CompiledPlan
    saves_lse = True

    def refusals(self, request: Request) -> list[Refusal]:
        """Return why the request is not for this backend."""
        return [*untransformed(request, self.name), *_refusals(request)]

    def plan(self, request: Request) -> CompiledPlan:
        """Return the plan; the kernel is built here, if it was not before."""
        plan = CompiledPlan(self.name, request)
        _ = plan.table
        return plan

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        """Run the kernel; autograd records it as one function."""
        if isinstance(operands.query, FakeTensor):
            return run_held(plan, operands)
        leaves = operands.leaves
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in leaves):
            output, lse = _OneCall.apply(plan, *leaves)  # type: ignore[no-untyped-call]
        else:
            output, lse = _forward(plan, operands)
        return _answer(plan, operands, output, lse)

    def compute(self, plan: Plan, operands: Operands, seed: Tensor | None) -> AttentionOutput:
        """Run the kernel without recording a graph."""
        return _answer(plan, operands, *_forward(plan, operands))

    def gradients(
        self, plan: Plan, operands: Operands, kept: Kept, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Run the backward pass on the statistics of the forward pass."""
        if kept.grad is None and kept.grad_lse is None:
            return (None,) * len(wanted)
        if plan.request.seqlens is not None:
            grad_lse = None if kept.grad_lse is None else kept.grad_lse.transpose(0, 1)[None]
            kept = kept._replace(lse=kept.lse.transpose(0, 1)[None], grad_lse=grad_lse)
        return _backward(plan, operands, kept)


class Preferred(Compiled):
    """The same, and "auto" asks it before `tiled`, which runs what this one refuses."""

    auto = 25

    def refusals(self, request: Request) -> list[Refusal]:
        """Return why the request is not for this backend; that it cannot be built is a reason."""
        found = super().refusals(request)
        if not found:
            try:
                _ = LIBRARY.height
            except BackendRefused as error:
                return list(error.refusals)
        return found

    def yields(self, plan: Plan) -> Refusal | None:
        """Return why "auto" should go on: tiles are high, and a few rows do not fill one."""
        rows = max((rows for rows, _ in plan.request.sequences), default=0)
        if rows >= FEW_ROWS:
            return None
        reason = f"{rows} rows do not fill a tile of the kernel; from {FEW_ROWS} on they do"
        return Refusal("compiled-rows", reason, self.name)


def prefer() -> None:
    """Let "auto" ask the compiled backend before `tiled`, in this process from now on.

    The kernel is built when a plan first needs it. What it refuses goes to `tiled`, and the
    reasons stay on the plan.
    """
    BACKENDS.remove(Compiled.name)
    register(Preferred())


_TERM_CODES = {
    "bias": "compiled-bias",
    "dropout": "compiled-dropout",
    "softcap": "compiled-softcap",
    "score_fn": "compiled-score_fn",
}
"""What joins the scores and the kernel has not got, each with its code."""


def _refusals(request: Request) -> Iterator[Refusal]:
    """Yield every reason why the kernel cannot run a request."""
    instead, name = "backend='tiled' computes it", Compiled.name
    if request.device not in ("cpu", "meta"):
        reason = f"the tensors are on {request.device!r}, the kernel on the CPU"
        yield Refusal("compiled-device", reason, name)
    if request.dtype not in KINDS:
        reason = f"the kernel computes in float32, not {request.dtype}; {instead}"
        yield Refusal("compiled-dtype", reason, name)
    if not request.matrices.exact:
        reason = f"the mask is no union of slices, and the kernel reads runs of keys; {instead}"
        yield Refusal("compiled-mask", reason, name)
    for term, code in _TERM_CODES.items():
        if getattr(request, term):
            yield Refusal(code, f"the kernel has no {term}; {instead}", name)
    if abs(request.scale) > HUGE_SCALE:
        reason = f"scale={request.scale:.3g} is beyond {HUGE_SCALE:.0f}, where products with it "
        yield Refusal("compiled-scale", f"{reason}overflow; {instead}", name)
    missing = LIBRARY.missing()
    if missing is not None:
        reason = f"the kernel cannot be built: {missing}; {instead}"
        yield Refusal("compiled-toolchain", reason, name)


def _table(plan: Plan) -> TileTable:
    return plan.table if isinstance(plan, CompiledPlan) else table_of(plan.request, LIBRARY.height)


def _answer(plan: Plan, operands: Operands, output: Tensor, lse: Tensor) -> AttentionOutput:
    """Return results whose largest scores are computed when somebody looks."""
    if plan.request.seqlens is not None:
        lse = lse[0].transpose(0, 1)
    return AttentionOutput(output, Stats(lse, partial(maxima, plan.request, operands)))


def _dense(tensor: Tensor) -> Tensor:
    """Return ``[b n s d]`` with dense rows, as the kernel reads them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _given(request: Request, operands: Operands) -> dict[str, Tensor | None]:
    names = ("query", "key", "value")
    return dict(zip(names, map(_dense, operands.by_head(request)), strict=True))


def _forward(plan: Plan, operands: Operands) -> tuple[Tensor, Tensor]:
    """Return the output in the request's layout, and the log denominators ``[b n s]``."""
    request, query, sink = plan.request, operands.query, operands.sink
    heads = query.shape[-1] // request.head_dim
    output = query.new_empty(*query.shape[:-1], heads * request.value_dim)
    seen = request.layout_of.view(output, request.num_heads)
    lse = torch.empty(seen.shape[:3], dtype=torch.float32)
    given = _given(request, operands)
    given |= {"output": seen, "lse": lse}
    given |= {} if sink is None else {"sink": sink.detach().float().contiguous()}
    LIBRARY.run(_table(plan), request.scale, given)
    return output, lse


def _backward(plan: Plan, operands: Operands, kept: Kept) -> tuple[Tensor | None, ...]:
    """Return the gradients of query, key, value and sink."""
    request, view = plan.request, plan.request.layout_of.view
    given = _given(request, operands)
    output, grad = (_dense(view(t, request.num_heads)) for t in (kept.output, kept.arrived))
    kept = kept._replace(output=output, grad=grad)
    to_query = torch.empty_like(operands.query, memory_format=torch.contiguous_format)
    batch, key_heads, keys = request.layout_of.view(operands.key, request.num_kv_heads).shape[:3]
    # Threads that share a key head add up apart.
    parts = max(1, -(-torch.get_num_threads() // max(1, batch * key_heads)))
    sums = [
        torch.zeros(parts, batch, key_heads, keys, LIBRARY.padded(width))
        for width in (request.head_dim, request.value_dim)
    ]
    grad_lse = None if kept.grad_lse is None else kept.grad_lse.float().contiguous()
    given |= {"output": output, "grad": grad, "lse": kept.lse.contiguous(), "grad_lse": grad_lse}
    given |= {"to_query": view(to_query, request.num_heads), "to_key": sums[0], "to_value": sums[1]}
    LIBRARY.run(_table(plan), request.scale, given, parts)
    to_keys = []
    for total, like, width in zip(
        sums,
        (operands.key, operands.value),
        (request.head_dim, request.value_dim),
        strict=True,
    ):
        slope = torch.empty_like(like, memory_format=torch.contiguous_format)
        whole = total[0] if parts == 1 else total.sum(0)
        view(slope, request.num_kv_heads).copy_(whole[..., :width])
        to_keys.append(slope)
    to_sink = None if operands.sink is None else sink_gradient(kept, operands.sink)
    return (to_query, *to_keys, to_sink)


class _OneCall(torch.autograd.Function):
    """Saves the operands, the output and the statistics; the backward makes the rest again."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *leaves: Any) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        output, lse = _forward(plan, Operands.of(None, leaves))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, lse, *leaves)
        return output, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        output, lse, *leaves = ctx.saved_tensors
        if grad is None and grad_lse is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            reason = (
                "the compiled kernel has no second derivatives; backend='tiled' and "
                "backend='reference' compute them"
            )
            raise BackendRefused(reason, [Refusal("second-derivative", reason, "compiled")])
        kept = Kept(None, output, lse, grad, grad_lse)
        return (None, *_backward(ctx.plan, Operands.of(None, leaves), kept))


register(Compiled())
