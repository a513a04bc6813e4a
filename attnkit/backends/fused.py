"""Running plans of fused calls: the part that the emulator and the device share.

Everything around the call happens here: packing, the mask and bias tensors, the way back to
the request's layout, statistics in attnkit's form. The two backends differ in one function,
the launch itself, so that what the emulator proves holds for the device.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from attnkit.backends.base import AttentionOutput, Backend, Operands, Stats, stats_dtype
from attnkit.errors import Refusal
from attnkit.kernel import KernelCall, unpack_stats
from attnkit.kernel.scores import MASKED
from attnkit.planner import Composition, Launch, Plan, Request, lower
from attnkit.planner.lower import lacking
from attnkit.planner.request import bias_terms
from attnkit.pse.sloped import Sloped

__all__ = ["CallTensors", "Fused"]


class CallTensors(NamedTuple):
    """The tensors that one kernel call is given, in its layout and the kernel's polarity."""

    query: Tensor
    key: Tensor
    value: Tensor
    atten_mask: Tensor | None
    pse: Tensor | None
    sink: Tensor | None


class Fused(Backend):
    """A backend whose plans are calls of the fused kernel."""

    def refusals(self, request: Request) -> list[Refusal]:
        """Return why no call fits, if none does; candidates that fell keep their own reasons."""
        lowering = lower(request)
        if lowering.best is not None:
            return []
        return [
            Refusal(r.code, f"{r.subject}: {r.reason}" if r.subject else r.reason, self.name)
            for r in lowering.refusals
        ]

    def composition_refusals(self, composition: Composition) -> list[Refusal]:
        """Return what the kernel lacks for the composition, whatever the tensors are."""
        bias = bias_terms(composition.pse)
        reasons = lacking(composition.softcap, bias)
        return [replace(reason, subject=self.name) for reason in reasons]

    def plan(self, request: Request) -> Plan:
        """Return the cheapest proven call, its dearer rivals and what was refused."""
        lowering = lower(request)
        steps = (lowering.best,) if lowering.best is not None else ()
        return Plan(self.name, request, steps, lowering.alternatives, lowering.refusals)

    @abstractmethod
    def launch(self, call: KernelCall, tensors: CallTensors) -> tuple[Tensor, Tensor, Tensor]:
        """Run one call; returns attention_out, softmax_max, softmax_sum as the op does."""

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        """Run the plan's call and bring its results into the request's form."""
        (step,) = plan.steps
        request = plan.request
        out, peak, total = self.launch(step.call, _call_tensors(request, step, operands))
        rows = (unpack_stats(step.call, stats) for stats in (peak, total))
        peak, total = (_request_rows(request, step, stat) for stat in rows)
        if step.form.packs:
            out = request.layout_of.from_tnd(out, request.batch)
        empty = (peak <= MASKED) | (total == 0)
        return AttentionOutput(
            out, Stats(peak.masked_fill(empty, -torch.inf), total.masked_fill(empty, 0.0))
        )


def _call_tensors(request: Request, step: Launch, operands: Operands) -> CallTensors:
    tensors = (operands.query, operands.key, operands.value)
    if step.form.packs:
        counts = (request.num_heads, request.num_kv_heads, request.num_kv_heads)
        layout = request.layout_of
        tensors = tuple(layout.to_tnd(t, n) for t, n in zip(tensors, counts, strict=True))  # type: ignore[assignment]
    return CallTensors(
        *tensors,
        _mask_tensor(request, step.call, operands.query.device),
        _pse_tensor(request, step.call, operands),
        None if operands.sink is None else operands.sink.to(stats_dtype(request.dtype)),
    )


def _mask_tensor(request: Request, call: KernelCall, device: torch.device) -> Tensor | None:
    mask = call.atten_mask
    if mask is None:
        return None
    if not mask.is_opaque:
        return mask.build(device)
    batch, heads = request.mask.batches or 1, request.mask.heads or 1
    lengths = request.sequences[0]
    return request.mask.materialize(*lengths, batch, heads, device).logical_not().view(mask.shape)


def _pse_tensor(request: Request, call: KernelCall, operands: Operands) -> Tensor | None:
    pse, spec = operands.pse, call.pse
    if pse is None or spec is None:
        return None
    device = operands.query.device
    if call.pse_type in (2, 3):
        (sloped,) = pse.parts
        slopes = sloped.slopes if isinstance(sloped, Sloped) else ()
        return torch.tensor(slopes, dtype=spec.dtype, device=device)
    sizes = request.sequences[0]
    if call.pse_type == 1:
        bias = pse.materialize(*sizes, dtype=spec.dtype, device=device)
    else:
        bias = pse.term(*sizes, scale=request.scale, dtype=spec.dtype, device=device)
    return bias.expand(spec.shape).contiguous()


def _request_rows(request: Request, step: Launch, stat: Tensor) -> Tensor:
    """Return statistics as [B, N, Sq], or [T, N] for a packed request."""
    if step.form.packs:
        return rearrange(stat, "(b s) n -> b n s", b=request.batch)
    return stat
