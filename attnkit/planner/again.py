"""A request like one that was planned before: the same form of call, proven for what is new.

A training step has new lengths of texts, a decoding step one key more. What changes then is which
cells are asked for, and seldom which kind of call is the cheapest. So the kind that a search found
is filled in anew, alone, and proven like any other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from attnkit.errors import Refusal
from attnkit.planner.calls import Launch
from attnkit.planner.candidates import candidates, whole_calls
from attnkit.planner.request import Request

if TYPE_CHECKING:
    from attnkit.planner.plan import Plan

__all__ = ["has_form", "in_same_form"]

# Beyond, another form may be the cheapest: then it is searched for again.
_MOST_GROWTH = 2


def has_form(plan: Plan) -> bool:
    """Whether a plan is one call on whole matrices that are regions, and nothing around it."""
    around = (plan.route, plan.in_order, plan.bias_pass)
    if len(plan.steps) != 1 or any(one is not None for one in around):
        return False
    return plan.request.matrices.exact and not plan.steps[0].partial


def in_same_form(plan: Plan, request: Request) -> Plan | None:
    """Return the plan of another request by the kind of call that a plan has, or None.

    None where such a call would compute something else, where the op rejects it, and where the
    number of keys has doubled, or halved.
    """
    before, kv_len = plan.request.kv_len, request.kv_len
    if max(before, kv_len) > _MOST_GROWTH * min(before, kv_len):
        return None
    if not request.matrices.exact or not request.matrices.allow_any:
        return None
    reason = (
        f"another kind of call was not looked for: {plan.request.mask!r} of {before} keys, planned "
        "before, took this one"
    )
    told = Refusal("as-before", reason, "every other")
    for one in _like(plan.steps[0], request):
        found = replace(plan, request=request, steps=(one,), alternatives=(), refusals=(told,))
        if found.disprove() is None:
            return found
    return None


def _like(step: Launch, request: Request) -> Iterator[Launch]:
    """Yield the calls for a request that have the layout, the mode and the masks of another one."""
    full = step.call.atten_mask is not None and step.call.atten_mask.kind == "full"
    for bare in whole_calls(request):
        if bare.call.input_layout == step.call.input_layout:
            for one in candidates(request, bare, full_masks=full):
                if isinstance(one, Launch) and one.label == step.label:
                    yield one
