"""From a request to fused kernel calls: enumerate, prove, price, choose; keep every refusal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch

from attnkit.errors import Refusal
from attnkit.kernel import KernelCall
from attnkit.kernel.versions import expressing_versions
from attnkit.planner.candidates import Candidate, candidates
from attnkit.planner.matrices import matrices
from attnkit.planner.plan import Launch
from attnkit.planner.price import price_call
from attnkit.planner.proof import disprove
from attnkit.planner.request import BiasTerm, Request

__all__ = ["Lowering", "lower"]


@dataclass(frozen=True)
class Lowering:
    """The cheapest proven call, the dearer ones, and why the others were dropped."""

    best: Launch | None
    alternatives: tuple[Launch, ...]
    refusals: tuple[Refusal, ...]


@lru_cache(maxsize=512)
def lower(request: Request) -> Lowering:
    """Return how the fused kernel computes a request; a pure function, cached on the record."""
    lacks = lacking(request.softcap, request.bias)
    if lacks:
        return Lowering(None, (), tuple(lacks))
    proven: list[Launch] = []
    refusals: list[Refusal] = []
    for candidate in candidates(request):
        if isinstance(candidate, Refusal):
            refusals.append(candidate)
            continue
        reasons = _reasons_against(request, candidate)
        refusals += [replace(reason, subject=candidate.label) for reason in reasons]
        if not reasons:
            price = price_call(candidate.call, _copied_bytes(request, candidate))
            proven.append(Launch(candidate.label, candidate.call, candidate.form, price))
    proven.sort(key=lambda launch: launch.price.nanoseconds)
    return Lowering(proven[0] if proven else None, tuple(proven[1:]), tuple(refusals))


def lacking(softcap: float | None, bias: tuple[BiasTerm, ...]) -> list[Refusal]:
    """Return the terms of a composition that no call of the fused kernel computes."""
    reasons = []
    if softcap is not None:
        reason = f"softcap={softcap} is a term the fused kernel does not have"
        reasons.append(Refusal("softcap", reason))
    learnable = [term.text for term in bias if term.requires_grad]
    if learnable:
        reason = (
            f"{' and '.join(learnable)} asks for a gradient, which the kernel never writes "
            "(it would be uninitialised memory)"
        )
        reasons.append(Refusal("pse-gradient", reason))
    return reasons


def _reasons_against(request: Request, candidate: Candidate) -> list[Refusal]:
    """Return why a candidate falls: what it would compute first, then what the op rejects."""
    call = candidate.call
    if call.atten_mask is None or not call.atten_mask.is_opaque:
        per_head = matrices(request).per_head
        for head in range(call.num_heads) if per_head else (None,):
            targets = matrices(request).regions(head or 0) if per_head else candidate.form.targets
            wrong = disprove(call, targets, head)
            if wrong is not None:
                return [wrong]
    return _broken_rules(request, call)


def _broken_rules(request: Request, call: KernelCall) -> list[Refusal]:
    """Return the contract's rules that a call breaks, on the op version that can express it.

    float64 exists on the emulator alone; everything else is judged as for hardware.
    """
    versions = expressing_versions(call)
    broken = call.violations(
        version=versions[0] if versions else "v2",
        product="emulator" if request.dtype == torch.float64 else "A2",
        training=request.needs_grad,
    )
    return [Refusal(violation.code, violation.found) for violation in broken]


def _copied_bytes(request: Request, candidate: Candidate) -> int:
    """Return the bytes moved to bring a dense layout into packed order and back."""
    if not candidate.form.packs or request.layout in ("BSH", "BSND") or request.batch == 1:
        return 0
    size = torch.empty((), dtype=request.dtype).element_size()
    cells = sum(prod(shape) for shape in request.shapes())
    return 2 * size * (cells + prod(candidate.call.output.shape))
