"""The cuda backend: torch's fused attention where its flags say the mask, FlexAttention elsewhere.

It was written and tested without a CUDA device: what it decides is checked for requests that
say "cuda", what it computes is checked by the same calls on the CPU. It has not been run on
CUDA hardware, and nothing about its speed was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnkit.backends.base import AttentionOutput, Backend, Operands, Stats, register
from attnkit.backends.flex import Flex, FlexPlan
from attnkit.backends.numbers import masks_before_scale
from attnkit.backends.rows import maxima
from attnkit.errors import BackendRefused, Refusal
from attnkit.geometry import Region, Slice
from attnkit.planner import Plan, Request

__all__ = ["Cuda", "CudaPlan"]

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class CudaPlan(Plan):
    """One call: of torch's fused attention (`causal` or not), or of FlexAttention.

    `refusals` say why fused attention was not taken.
    """

    causal: bool = False
    flex: FlexPlan | None = None

    def __hash__(self) -> int:
        return super().__hash__()

    @cached_property
    def of_lse(self) -> FlexPlan:
        """The plan of the pass that computes the log-sum-exp, which has no dropout."""
        return FlexPlan(Flex.name, replace(self.request, dropout=0.0))


class Cuda(Backend):
    """``scaled_dot_product_attention`` for what it has a flag for, FlexAttention for the rest.

    The fused call is taken where the mask's cells are all cells, or those of ``is_causal``, and
    nothing else joins the scores; dropout exists only there. It keeps no statistics: who looks
    at the log-sum-exp pays for another pass, of FlexAttention. Runs on CUDA devices.
    """

    name = "cuda"
    auto = 20
    plan_type = CudaPlan

    def __init__(self, flex: Flex | None = None) -> None:
        self._flex = flex or Flex()

    def refusals(self, request: Request) -> list[Refusal]:
        """Return why the request is not for this backend."""
        found = []
        if request.device != "cuda":
            reason = f"the tensors are on device {request.device!r}, not on a CUDA device"
            found.append(Refusal("cuda-device", reason, self.name))
        unfused = _unfused(request)
        if not unfused:
            return found
        rest = [replace(reason, subject=self.name) for reason in self._flex.refusals(request)]
        # Where there are some, it matters why the other way is closed too.
        return [*found, *rest, *(unfused if rest else ())]

    def plan(self, request: Request) -> CudaPlan:
        """Return the plan: fused where that is the whole composition, else FlexAttention's."""
        unfused = _unfused(request)
        if unfused:
            return CudaPlan(self.name, request, refusals=unfused, flex=self._flex.plan(request))
        return CudaPlan(self.name, request, causal=_flag(request) == "causal")

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        """Make the one call."""
        if not isinstance(plan, CudaPlan):
            raise TypeError(f"the cuda backend runs its own plans, not a {type(plan).__name__}")
        if plan.flex is not None:
            return self._flex.run(plan.flex, operands)
        stats = Stats(partial(self._lse, plan, operands), partial(maxima, plan.request, operands))
        return AttentionOutput(_fused(plan, operands), stats)

    def _lse(self, plan: CudaPlan, operands: Operands) -> Tensor:
        """Compute the log-sum-exp after all."""
        reasons = self._flex.refusals(plan.of_lse.request)
        if reasons:
            told = "; ".join(reason.reason for reason in reasons)
            raise BackendRefused(
                f"torch's fused attention keeps no log-sum-exp, and FlexAttention, which has one, "
                f"cannot run this: {told}; backend='reference' has one",
                reasons,
            )
        return self._flex.run(plan.of_lse, operands).stats.lse


def _unfused(request: Request) -> tuple[Refusal, ...]:
    """Return why torch's fused attention is not the whole of the composition."""
    return tuple(Refusal("cuda-unfused", why, Cuda.name) for why in _lacks(request))


def _lacks(request: Request) -> Iterator[str]:
    if request.bias:
        yield "fused attention takes a bias only as a matrix of all scores"
    if request.softcap is not None:
        yield "fused attention has no soft-cap"
    if request.score_fn is not None:
        yield "fused attention calls no score function"
    if request.sink:
        yield "fused attention has no sink"
    if not masks_before_scale(request.scale, torch.float32):
        yield f"fused kernels take the largest score before they scale it, by {request.scale:g}"
    if request.num_heads != request.num_kv_heads and request.dtype not in _HALVES:
        yield "fused kernels share key heads among query heads in half precision only"
    if len(set(request.sequences)) != 1 or 0 in request.sequences[0]:
        yield "fused attention takes score matrices of one size, none of them empty"
    elif _flag(request) is None:
        yield f"the cells of {request.mask!r} are neither all cells nor those of is_causal"


def _flag(request: Request) -> str | None:
    """Return which of its two masks fused attention is to take, recognised by its cells."""
    known = request.matrices
    if not known.exact:
        return None
    q_len, kv_len = request.sequences[0]
    regions = {region for head in range(len(known.planes)) for region in known.regions(head)}
    # is_causal counts from the upper left corner, whatever the lengths.
    corner = Region.of(Slice(0, q_len, 0, kv_len, hi=0))
    for name, region in (("full", Region.full(q_len, kv_len)), ("causal", corner)):
        if regions == {region}:
            return name
    return None


def _fused(plan: CudaPlan, operands: Operands) -> Tensor:
    request, layout = plan.request, plan.request.layout_of
    query, key, value = operands.by_head(request)
    if layout.packed:  # sequences of one length: the token axis is batch and length
        pattern = "1 n (b s) d -> b n s d"
        query, key, value = (rearrange(t, pattern, b=request.batch) for t in (query, key, value))
    if plan.causal:  # what lies behind the square nobody sees: it must not even be multiplied
        key, value = (t[..., : query.shape[-2], :] for t in (key, value))
    output = scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=request.dropout,
        is_causal=plan.causal,
        scale=request.scale,
        enable_gqa=request.num_heads != request.num_kv_heads,
    )
    if layout.packed:
        output = rearrange(output, "b n s d -> 1 n (b s) d")
    return layout.restore(output)


register(Cuda())
