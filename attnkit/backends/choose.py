"""Which backend runs a request: the rule, the same for "auto" and for an explicit name."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.autograd.profiler import record_function

from attnkit.backends.base import (
    BACKENDS,
    AttentionOutput,
    Backend,
    Operands,
    without_shares,
)
from attnkit.errors import BackendRefused, Refusal, clipped, reasons_told
from attnkit.planner import Plan, Request

__all__ = ["auto_order", "make_plan", "run_plan"]


def auto_order() -> tuple[str, ...]:
    """Return the backends that "auto" asks, by their places; the first without a refusal runs.

    >>> auto_order()
    ('ascend', 'cuda', 'tiled', 'reference')
    """
    places = [(one.auto, name) for name, one in BACKENDS.items() if one.auto is not None]
    return tuple(name for _, name in sorted(places, key=lambda place: place[0]))


@lru_cache(maxsize=64)  # a packed batch is large, and in training each one is new
def make_plan(request: Request, backend: str = "auto") -> Plan:
    """Return the verified plan of the backend that runs `request`.

    An explicit name never falls back: it raises `BackendRefused` with every reason, and
    `KernelContractError` for a plan whose proof fails. "auto" keeps the reasons of the backends
    that it passed over on the plan, a failed proof among them.
    """
    passed: list[Refusal] = []
    for name in auto_order() if backend == "auto" else (backend,):
        reasons = _refusals(BACKENDS[name], request)
        if not reasons:
            plan = BACKENDS[name].plan(request)
            if backend != "auto":
                plan.verify()
                return plan
            against = plan.disprove() or BACKENDS[name].yields(plan)
            if against is None:
                return plan.after(passed)
            reasons = [replace(against, subject=name)]
        passed += reasons
    what = f"{request.mask!r} in layout {request.layout}"
    told = reasons_told(passed)
    if backend == "auto":
        raise BackendRefused(f"no backend runs {what}:\n{told}", passed)
    raise BackendRefused(
        f"backend {backend!r} was asked for by name and cannot run {what}:\n{told}\n"
        "backend='auto' would take the next one that can and keep these reasons",
        passed,
    )


def _refusals(backend: Backend, request: Request) -> list[Refusal]:
    """Return why a backend cannot run a request; one without `partial` runs no share."""
    own = backend.refusals(request)
    lacks = type(backend).partial is Backend.partial
    return [*own, *(without_shares(request, backend.name) if lacks else ())]


BACKENDS.on_change(make_plan.cache_clear)


def run_plan(plan: Plan, operands: Operands) -> AttentionOutput:
    """Run a plan on its backend, in the dtype of its tensors: autocast does not reach inside.

    A profiler of torch sees it as one region, by the name of its backend and its mask.
    """
    if _profiler_enabled():  # a name costs ten microseconds, also when nobody looks
        with record_function(_region_of(plan)):
            return _run(plan, operands)
    return _run(plan, operands)


def _region_of(plan: Plan) -> str:
    of = plan.request
    return f"attnkit {plan.backend} {of.q_len}x{of.kv_len} {clipped(repr(of.mask), 120)}"


def _run(plan: Plan, operands: Operands) -> AttentionOutput:
    backend, kind = BACKENDS[plan.backend], operands.query.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return backend.run(plan, operands)
    return backend.run(plan, operands)
