"""Running plans of fused calls: the part that the emulator and the device share.

Everything around the call happens here: packing, the mask and bias tensors, the way back to
the request's layout, statistics in attnkit's form. The two backends differ in one function,
the launch itself, so that what the emulator proves holds for the device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from attnkit.backends.arranged import arranged
from attnkit.backends.base import (
    AttentionOutput,
    Backend,
    Kept,
    Operands,
    Partial,
    Stats,
    seeded,
    stats_dtype,
    untransformed,
)
from attnkit.backends.bias_pass import Bits, PassedPlan, with_bias_gradient
from attnkit.backends.biases import call_bias
from attnkit.backends.calling import Caller, Made
from attnkit.backends.channels import Leveled, run_on_route
from attnkit.backends.merged import Answer, Drawn, Launcher
from attnkit.backends.selected import run_selected
from attnkit.backends.shares import against_share, gradients_of_share, partial_of
from attnkit.backends.unseen import cleared
from attnkit.constants import constant
from attnkit.errors import Refusal
from attnkit.kernel import Gradients, KernelCall
from attnkit.masks.given import GivenCells
from attnkit.planner import Composition, Launch, Plan, Request, lower
from attnkit.planner.biases import lacking
from attnkit.planner.calls import Parts, widened
from attnkit.planner.request import state_of
from attnkit.planner.selected import SelectedPlan

__all__ = ["Fused"]


class Fused(Backend):
    """A backend whose plans are calls of the fused kernel."""

    by_calls = True
    block_sparse = False
    """Whether plans may call the block-sparse op."""

    def refusals(self, request: Request) -> list[Refusal]:
        """Return why no call fits, if none does; candidates that fell keep their own reasons."""
        reasons = untransformed(request, self.name) + against_share(request, self.name)
        found = self.lowered(request)
        if isinstance(request.mask, GivenCells) and request.needs_grad:
            reason = (
                "a mask whose cells come with each call is for inference, and a gradient is asked"
            )
            return [*reasons, Refusal("mask-given", reason, self.name)]
        if found.steps:
            return reasons
        return reasons + _each_once(found.refusals, self.name)

    def composition_refusals(self, composition: Composition) -> list[Refusal]:
        """Return what the kernel lacks for the composition, whatever the tensors are."""
        return [replace(reason, subject=self.name) for reason in lacking(composition)]

    def plan(self, request: Request) -> Plan:
        """Return the cheapest proven call, its dearer rivals and what was refused."""
        found = self.lowered(request)
        if found.bias_pass is None:
            return replace(found, backend=self.name)
        return PassedPlan(**{**state_of(found), "backend": self.name})

    def lowered(self, request: Request) -> Plan:
        """Return the plan before a backend takes it."""
        return lower(request, self.block_sparse)

    @abstractmethod
    def forward(self, call: KernelCall, tensors: dict[str, Any]) -> Answer:
        """Make one call."""

    @abstractmethod
    def backward(
        self, call: KernelCall, tensors: dict[str, Any], dy: Tensor, merged: Answer
    ) -> Gradients:
        """Make one grad call, with the statistics and output of the whole softmax."""

    @contextmanager
    def drawing(self, seed: Tensor | None, device: torch.device) -> Iterator[Launcher]:
        """Make forward calls that draw numbers which follow from a seed, if there is one."""
        with seeded(seed, device):
            yield self

    @abstractmethod
    def decisions(self, call: KernelCall, random: Drawn, query: Tensor) -> Bits:
        """Return which cells a forward call with dropout kept, by their number in the call."""

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        """Run the plan's calls and bring their results into the request's form."""
        if isinstance(plan, SelectedPlan):
            return run_selected(self, plan, operands)
        wide = widened(plan.request)
        if wide is not plan.request:
            plan, operands = plan.inner, _widened(plan.request, operands)
        if plan.bias_pass is not None:
            return with_bias_gradient(self, _run, plan, operands)
        return _run(Made(self), plan, operands)

    def partial(self, plan: Plan, operands: Operands, seed: Tensor | None) -> Partial:
        """Run the calls of a share.

        Each rounds its output to the dtype of the query; where several answer one row, their merge
        does not. `Partial.random` is a tuple of tensors, or None where nothing was drawn.
        """
        return partial_of(self, _attend, plan, operands, seed)

    def partial_gradients(
        self,
        plan: Plan,
        operands: Operands,
        kept: Kept,
        wanted: tuple[bool, ...],
        random: Any = None,
    ) -> tuple[Tensor | None, ...]:
        """Make the grad calls of a share, on the log-sum-exp and the output of whole rows.

        Each rounds what it returns to the dtype of the query, and their sum is wide. With
        ``max = lse`` and ``sum = 1`` the op's ``exp(score - max) / sum`` is the weight of a cell.
        """
        return gradients_of_share(self, _attend, plan, operands, kept, wanted, random)


def _widened(request: Request, operands: Operands) -> Operands:
    """Give query and key zeros up to the dimensions of the values; gradients of them are cut."""
    layout, more = request.layout_of, request.value_dim - request.head_dim
    query, key, _ = (layout.restore(pad(view, (0, more))) for view in operands.by_head(request))
    return replace(operands, query=query, key=key)


def _attend(caller: Caller, plan: Plan, operands: Operands) -> AttentionOutput:
    """Run the calls of a share, without the pass for a bias."""
    if widened(plan.request) is not plan.request:
        plan, operands = plan.inner, _widened(plan.request, operands)
    return _run(caller, plan if plan.bias_pass is None else plan.inner, operands)


def _run(caller: Caller, plan: Plan, operands: Operands) -> AttentionOutput:
    """Run calls, on their route and in their order."""
    if plan.route is not None:
        return run_on_route(partial(_run, caller), plan, plan.route, operands)
    if plan.in_order is not None:
        return arranged(partial(_run, caller), plan, plan.in_order, operands)
    request, layout, first = plan.request, plan.request.layout_of, plan.steps[0]
    operands = cleared(request, operands)
    packs = first.partial or first.packs(request)
    if packs:
        query = layout.to_tnd(operands.query, request.num_heads)
        key, value = (
            layout.to_tnd(t, request.num_kv_heads) for t in (operands.key, operands.value)
        )
        operands = replace(operands, query=query, key=key, value=value)
    if first.partial:
        out, lse, peak = _run_parts(caller, plan, operands)
    else:
        out, lse, peak = caller.single(first.call, _call_tensors(request, first, operands))
    if packs:
        out = layout.from_tnd(out, 1 if layout.packed else request.batch)
        if not layout.packed:
            lse, peak = (rearrange(t, "(b s) n -> b n s", b=request.batch) for t in (lse, peak))
    return AttentionOutput(out, Stats(lse, peak))


def _run_parts(caller: Caller, plan: Plan, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Run a plan of several calls on packed tensors, each group of heads by itself."""
    groups = plan.by_heads
    if groups[0].heads is None:
        return _run_heads(caller, plan, groups[0], operands)
    known = {head for some in groups for head in some.heads or ()}
    silent = tuple(head for head in range(plan.request.num_heads) if head not in known)
    if silent:  # heads whose mask allows nothing
        groups += (Parts(silent, (), once=True),)
    parts = [_run_heads(caller, plan, some, operands) for some in groups]
    order = [head for some in groups for head in some.heads or ()]
    back = _indices(tuple(map(order.index, sorted(order))), operands.query.device)
    out, lse, peak = (torch.cat(c, dim=1).index_select(1, back) for c in zip(*parts, strict=True))
    return out, lse, peak


def _run_heads(
    caller: Caller, plan: Plan, parts: Parts, operands: Operands
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the calls of one group of heads that share their regions."""
    launches, heads = parts.launches, parts.heads
    query, key, value, sink = operands.query, operands.key, operands.value, operands.sink
    logits = operands.logits if isinstance(operands, Leveled) else None
    biases = [call_bias(plan.request, one, operands.pse, query.device) for one in launches]
    if heads is not None:
        group = plan.request.num_heads // plan.request.num_kv_heads
        reads = launches[0].kv_heads if launches else None
        reads = reads or tuple(head // group for head in heads)
        own, kv_own = (_indices(some, query.device) for some in (heads, reads))
        query = query.index_select(1, own)
        key, value = key.index_select(1, kv_own), value.index_select(1, kv_own)
        sink = None if sink is None else sink.index_select(0, own)
        logits = None if logits is None else logits.index_select(1, own)
    leaves = (query, key, value, sink, logits)
    return caller.merged(parts, biases, leaves, plan.request.share is not None)


@constant
def _indices(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(heads, device=device)


def _call_tensors(request: Request, step: Launch, operands: Operands) -> tuple[Tensor | None, ...]:
    """Return mask, bias, query, key, value and sink of a call on all rows, as it takes them."""
    device, sink = operands.query.device, operands.sink
    return (
        _mask_tensor(request, step.call, operands),
        call_bias(request, step, operands.pse, device),
        operands.query,
        operands.key,
        operands.value,
        None if sink is None else sink.to(stats_dtype(request.dtype)),
    )


def _mask_tensor(request: Request, call: KernelCall, operands: Operands) -> Tensor | None:
    mask, device = call.atten_mask, operands.query.device
    if mask is None:
        return None
    if operands.given:
        (cells,) = operands.given
        return cells.logical_not().view(mask.shape)
    if not mask.is_opaque:
        return mask.build(device)
    batch, heads = request.mask.batches or 1, request.mask.heads or 1
    lengths = request.sequences[0]
    return request.mask.materialize(*lengths, batch, heads, device).logical_not().view(mask.shape)


def _each_once(refusals: Sequence[Refusal], name: str) -> list[Refusal]:
    """Return why candidates fell, each reason once: first what most of them fell for."""
    fell: dict[Refusal, dict[str, None]] = {}
    for refusal in refusals:
        fell.setdefault(replace(refusal, subject=""), {})[refusal.subject] = None
    found = []
    for refusal, subjects in sorted(fell.items(), key=lambda one: -len(one[1])):
        some = [subject for subject in subjects if subject]
        more = f" and {len(some) - 3} more" if len(some) > 3 else ""
        told = f"{', '.join(some[:3])}{more}: " if some else ""
        found.append(replace(refusal, reason=told + refusal.reason, subject=name))
    return found
