"""Which backend runs a request: the rule, the same for "auto" and for an explicit name."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from attnkit.backends.base import BACKENDS
from attnkit.errors import BackendRefused, Refusal
from attnkit.planner import Plan, Request

__all__ = ["AUTO_ORDER", "make_plan"]

AUTO_ORDER = ("ascend", "reference")
"""The order in which "auto" asks; the first without a refusal runs."""


@lru_cache(maxsize=1024)
def make_plan(request: Request, backend: str = "auto") -> Plan:
    """Return the verified plan of the backend that runs `request`.

    An explicit name never falls back: it raises `BackendRefused` with every reason. "auto"
    keeps the reasons of the backends that it passed over on the plan.
    """
    if backend != "auto":
        return _plan(request, backend, ())
    passed: list[Refusal] = []
    for name in AUTO_ORDER:
        reasons = BACKENDS[name].refusals(request)
        if not reasons:
            return _plan(request, name, tuple(passed))
        passed += reasons
    raise BackendRefused(
        "no backend runs this composition:\n" + "\n".join(f"  {r}" for r in passed), passed
    )


def _plan(request: Request, name: str, passed: tuple[Refusal, ...]) -> Plan:
    reasons = BACKENDS[name].refusals(request)
    if reasons:
        raise BackendRefused(
            f"backend {name!r} was asked for by name and cannot run {request.mask!r} "
            f"in layout {request.layout}:\n"
            + "\n".join(f"  {r}" for r in reasons)
            + "\nbackend='auto' would take the next one that can and keep these reasons",
            reasons,
        )
    plan = BACKENDS[name].plan(request)
    plan.verify()
    return replace(plan, passed_over=passed)
