"""What a notebook shows of a plan: its calls as coloured cells and in a table, the rest folded.

Nobody waits for a display: what `explain` would have to search for, or prove over thousands of
sequences, is left to `explain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from attnkit.display import colour, html
from attnkit.errors import Refusal
from attnkit.planner.calls import Launch
from attnkit.planner.explain import bytes_told, proven, request_lines, said
from attnkit.planner.lower import lower
from attnkit.planner.picture import drawing, sequences_take_turns
from attnkit.planner.plan import Plan

__all__ = ["page", "refused"]

_MOST_ROWS = 24
_MOST_BLOCKS = 256  # of a plan that is proven again for a display
_MOST_TOKENS, _MOST_SEQUENCES = 1 << 17, 512  # of a plan whose fused calls are looked for


def page(plan: Plan) -> str:
    """Return what `Plan._repr_html_` does.

    >>> import torch
    >>> import attnkit as ak
    >>> x = torch.empty(1, 64, 2, 16, device="meta")
    >>> shown = page(ak.plan(x, x, x, mask=ak.masks.Causal(), backend="emulated"))
    >>> "1 fused call" in shown, "<summary>not taken" in shown
    (True, True)
    """
    return html.safely(lambda: _page(plan), lambda: f"plan on backend {plan.backend!r}")


def _page(plan: Plan) -> str:
    count = len(plan.steps)
    calls = _calls(plan)
    runs = f"{count} fused call{'s' * (count > 1)}" if count else "the composition itself"
    parts = [html.heading(f"Plan on backend '{plan.backend}'", runs)]
    parts.append(_picture(plan, calls))
    parts.append(html.table(_lines(plan, calls)))
    if calls.steps:
        parts += [*_tables(calls)] if count else [html.folded("on Ascend", "".join(_tables(calls)))]
    refusals = calls.refusals if calls.steps else plan.refusals
    parts.append(refused("not taken", refusals))
    parts.append(refused("backends passed over", plan.passed_over))
    parts.append(html.note("print(plan.explain()) says all of it"))
    return html.block(*parts)


def _calls(plan: Plan) -> Plan:
    """Return the plan whose calls are shown: itself, or that of Ascend where it is soon found."""
    request = plan.request
    few = request.q_len <= _MOST_TOKENS and len(request.sequences) <= _MOST_SEQUENCES
    return plan if plan.steps or not few else lower(request)


def _picture(plan: Plan, calls: Plan) -> str:
    """Return the picture of the first score matrix, and which that is."""
    count = len(plan.request.sequences)
    if not count:
        return html.note("no picture: there is no score matrix")
    told = []
    if count > 1:
        what = "packed sequence" if plan.request.seqlens is not None else "batch element"
        told.append(f"{what} 0 of {count:,}")
    if calls.request.matrices.per_head:
        told.append("head 0")
    if not plan.steps:
        would = "colours are the calls that Ascend would get"
        told.append(
            would if calls.steps else "plan.explain() finds the calls that Ascend would get"
        )
    drawn = html.picture(drawing(plan, search=calls is not plan))
    return drawn + (html.note("; ".join(told)) if told else "")


def _lines(plan: Plan, calls: Plan) -> Iterator[tuple[str, str]]:
    for label, text in request_lines(plan.request, calls.in_order):
        yield escape(label), escape(text)
    price = plan.price
    if price is not None:
        yield (
            "price",
            f"about {price.nanoseconds / 1e3:,.0f} us, {price.flops:,} FLOP, "
            f"masks {bytes_told(price.mask_bytes)}, memory {bytes_told(price.peak_bytes)}",
        )
    if plan.steps:
        blocks = sum(len(launch.blocks) for launch in plan.steps)
        yield "proof", escape(proven(plan) if blocks <= _MOST_BLOCKS else "plan.verify() checks it")


def _tables(plan: Plan) -> Iterator[str]:
    """Yield the table of calls, and what else would do."""
    rows = [_row(k, launch, plan.steps) for k, launch in enumerate(plan.steps)]
    yield html.table(rows, ("", "call", "sequences", "arguments", "about"), _MOST_ROWS)
    best = plan.solution.price.nanoseconds
    others = [
        (html.code(other.label), f"{100 * (other.price.nanoseconds / best - 1):+.3g} %")
        for other in plan.alternatives
    ]
    dearer = html.table(others, ("calls", "price"), _MOST_ROWS)
    yield html.folded(f"also right, but dearer ({len(others):,})", dearer)


def _row(k: int, launch: Launch, every: Sequence[Launch]) -> tuple[str, ...]:
    given = launch.call.non_default_arguments()
    told = ", ".join(f"{name}={said(value)}" for name, value in given.items())
    turns = sequences_take_turns(every)
    mark = "" if turns else html.swatch(colour(k))
    heads = "" if launch.heads is None else f", {len(launch.heads)} heads"
    return (
        mark + (f"{k + 1}" if len(every) > 1 else ""),
        html.code(f"{launch.call.op}, {launch.label}{heads}"),
        f"{len(launch.blocks):,}",
        html.code(told),
        f"{launch.price.nanoseconds / 1e3:,.0f} us",
    )


def refused(what: str, refusals: Sequence[Refusal]) -> str:
    """Return refusals folded away, those for one reason together; nothing where there are none.

    >>> refused("not taken", [Refusal("mine", "not today", "tiled")])[:46]
    '<details><summary>not taken (1)</summary><tabl'
    """
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for one in refusals:
        reasons.setdefault((one.code, one.reason), {})[one.subject] = None
    rows = [
        (html.code("; ".join(subjects)), escape(reason), html.code(code))
        for (code, reason), subjects in reasons.items()
    ]
    body = html.table(rows, ("what", "why", "code"), _MOST_ROWS)
    return html.folded(f"{what} ({len(rows):,})", body)
