"""Plans that do not compute what they say: changed, or a defect."""

from __future__ import annotations

__all__ = ["TOLD"]

_AGAIN = "Plan again. If nobody changed the plan, report it with its `explain()`: it is a defect."

_MEANINGS = {
    "cover": "The calls leave out cells of the mask, or compute some twice.",
    "misplaced": "A call is not about the rows, keys or heads where its tokens lie.",
    "no-calls": "The plan has no calls.",
    "unread": "A call has a window or prefix that its mode does not read.",
    "unreadable": "It is not a plan: a field is missing or of another kind.",
    "levels-per-head": "A head is in calls of several groups of heads, which merge by themselves.",
    "other-backend": "The backend of the plan does not exist, or runs plans of another kind.",
    "other-backward": "The calls of the backward pass are not those of the request.",
    "other-bias": "A call does not add the bias that was asked for.",
    "other-dims": "A call has not the channels of its bias.",
    "other-level": "A call adds a level of the bias to distances of another.",
    "other-numbers": "A call has another scale or share of dropout than was asked for.",
    "other-pass": "The pass for the bias's gradient is another request's.",
    "other-request": "The plan is for another request, or for tensors that cannot exist.",
    "other-route": "What goes around the calls is not a way that the planner knows.",
    "other-sequences": "The blocks of a call are not its sequences.",
    "other-sign": "A call has cells on the side for which its channels have the wrong sign.",
    "other-zone": "The zones of the calls are not those of the route.",
}

TOLD = {code: (meaning, _AGAIN) for code, meaning in _MEANINGS.items()}
"""Codes to what they mean and what to do."""
