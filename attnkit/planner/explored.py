"""A plan as the data of its page: what `attnkit.explorer` shows in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnkit.errors import clipped
from attnkit.kernel import KernelCall
from attnkit.planner.calls import Launch
from attnkit.planner.explain import bytes_told, request_lines
from attnkit.planner.lower import lower
from attnkit.planner.placed import Places
from attnkit.planner.plan import Plan
from attnkit.planner.price import Price, dearer
from attnkit.planner.sheet import Sheet, command_of, refusals, time_told, unsaid

__all__ = ["as_page"]

_LONGEST_VALUE = 400


def as_page(plan: Plan, command: Sequence[str] | None = None) -> dict[str, Any]:
    """Return what the page of a plan shows; `command` makes such a page, but for the mask."""
    request = plan.request
    calls = plan if plan.steps else lower(request)
    if request.mask.comes_with_call:  # where its cells lie is data
        calls = Plan(plan.backend, request)
    sheet = Sheet(request, Places(request, calls.in_order))
    views = [_view("plan", _headline(plan), calls.steps, calls.price, None)]
    if calls.back:
        views.append(_view("gradients", "where the gradients come from", calls.back, None, None))
    for other in calls.alternatives:
        views.append(_view(other.label, other.label, other.launches, other.price, calls.price))
    patches = [[list(sheet.places.call(k)) for k in steps] for _, steps in views]
    data = sheet.data([view for view, _ in views], patches)
    return data | {
        "kind": "calls",
        "note": "" if calls.steps and plan.steps else _without_calls(plan, calls),
        "facts": list(request_lines(request, calls.in_order)),
        "refusals": refusals((*plan.passed_over, *calls.refusals)),
        "report": str(plan.explain()),
        "command": list(command_of(request, plan.backend) if command is None else command),
        "unsaid": unsaid(request) if command is None else [],
    }


def _headline(plan: Plan) -> str:
    count = len(plan.steps)
    if not count:
        return f"backend {plan.backend!r} makes no fused call"
    return f"backend {plan.backend!r}: {count} fused call" + "s" * (count > 1)


def _without_calls(plan: Plan, calls: Plan) -> str:
    """Say what is drawn of a plan that makes no fused calls."""
    if plan.request.mask.comes_with_call:
        return "Which cells are allowed comes with each call. Drawn are those that may be."
    told = f"Backend {plan.backend!r} computes this by itself, without a fused call."
    if calls.steps:
        return f"{told} Drawn are the calls that compute the same on Ascend."
    return f"{told} No fused call computes it; the refusals say why."


def _view(
    label: str,
    title: str,
    launches: Sequence[Launch],
    price: Price | None,
    rival: Price | None,
) -> tuple[dict[str, Any], Sequence[Launch]]:
    """Return a tab, whose calls have no cells yet, and its calls."""
    told = "" if price is None else time_told(price.nanoseconds)
    if price is not None and rival is not None:
        told += f" ({dearer(price.nanoseconds, rival.nanoseconds)})"
    view = {
        "label": label,
        "title": title,
        "price": told,
        "items": [] if price is None else _items(price),
        "calls": list(map(_call, launches)),
    }
    return view, launches


def _items(price: Price) -> list[list[str]]:
    """Return the items of a price as labels and texts."""
    return [
        ["estimated time", time_told(price.nanoseconds)],
        ["allowed cells", f"{price.cells:,}"],
        ["in whole tiles", f"{price.flops / 1e9:,.3g} GFLOP"],
        ["mask bytes", bytes_told(price.mask_bytes)],
        ["copied", bytes_told(price.copy_bytes)],
        ["peak memory", bytes_told(price.peak_bytes)],
    ]


def _call(launch: Launch) -> dict[str, Any]:
    given = launch.call.non_default_arguments()
    return {
        "label": launch.label,
        "op": launch.call.op,
        "arguments": [[name, clipped(_value(v), _LONGEST_VALUE)] for name, v in given.items()],
        "reads": _reads(launch.call),
        "counts_from": _counts_from(launch.call),
        "sequences": len(launch.blocks),
        "opaque": launch.is_opaque,
    }


def _value(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 8:
        return f"({', '.join(map(str, value[:6]))}, ... {len(value)} in all)"
    return str(value)


def _reads(call: KernelCall) -> str:
    """Say which arguments of a call allow a cell (u, v) of one of its sequences."""
    mode = call.sparse_mode
    named = f"sparse_mode={mode}"
    if call.atten_mask is None:
        return "no mask: every cell of the sequence is computed"
    if call.op != "npu_fusion_attention":
        return "the blocks that the call lists"
    if mode in (0, 1, 5):
        return f"{named}: the mask has an entry for the cell"
    if mode == 4:
        return (
            f"{named}: -pre_tokens <= (v - keys) - (u - rows) <= next_tokens, that is "
            f"{-call.pre_tokens:,} to {call.next_tokens:,}"
        )
    if mode == 6:
        return f"{named}: v < prefix, or (v - keys) - (u - rows) <= 0"
    first = {7: "; the last sequence ends at next_tokens", 8: "; the first one at next_tokens"}
    causal = "v - u <= 0" if mode in (2, 8) else "(v - keys) - (u - rows) <= 0"
    return f"{named}: {causal}{first.get(mode, '')}"


def _counts_from(call: KernelCall) -> str:
    """Return from where a call counts distances of a cell: "start", "end", or "" if it does not."""
    if (
        call.atten_mask is None
        or call.op != "npu_fusion_attention"
        or call.sparse_mode in (0, 1, 5)
    ):
        return ""
    return "start" if call.sparse_mode in (2, 8) else "end"
