"""How tokens are exchanged, and in how many stages: what costs the slowest rank the least."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

from attnkit.errors import CompositionError, Refusal
from attnkit.parallel.choices import Choices, divisors
from attnkit.parallel.heads import coarse
from attnkit.parallel.plan import Alternative, ParallelPlan
from attnkit.parallel.plane import planes, seen_by
from attnkit.parallel.price import price_of
from attnkit.parallel.stages import EXCHANGED, Exchanged, Stages
from attnkit.progress import progress
from attnkit.ranges import total

__all__ = ["cheapest", "choose", "label"]

_COUNTS = (1, 2, 4)  # remote stages that are tried
_MOST_WAYS = 3  # ways to split heads among neighbours that are tried


def choose(bare: ParallelPlan, wanted: Choices) -> ParallelPlan:
    """Return a plan like another one, with the method, stages and heads that cost the least.

    Where all is said, nothing is priced.
    """
    wanted.check(bare.size)
    refusals: list[Refusal] = []
    found = [_kept(one, wanted.keep) for one in _candidates(bare, wanted, refusals)]
    if not found:
        told = "; ".join(refusal.reason for refusal in refusals)
        raise CompositionError(
            f"method={wanted.method!r}: {told}; method='needed' runs on any number of ranks"
        )
    if len(found) == 1:
        return replace(found[0], refusals=tuple(refusals))
    priced = []
    with progress("pricing plans of ranks", len(found)) as bar:
        for one in found:
            priced.append(replace(one, price=price_of(one)))
            bar.step(label(one))
    best = cheapest(priced, _time, label)
    return replace(best, refusals=tuple(refusals))


def cheapest(
    priced: Sequence[ParallelPlan],
    time: Callable[[ParallelPlan], float],
    told: Callable[[ParallelPlan], str],
) -> ParallelPlan:
    """Return the plan of priced ones that takes the least, the first of equals.

    It has the prices of the others.
    """
    best = min(priced, key=time)
    others = [Alternative(told(one), one.price) for one in priced if one is not best and one.price]
    every = sorted((*others, *best.alternatives), key=lambda other: other.price.total)
    return replace(best, alternatives=tuple(every))


def _time(plan: ParallelPlan) -> float:
    return plan.price.total if plan.price else 0.0


def label(plan: ParallelPlan) -> str:
    """Say in few words how a plan exchanges tokens."""
    count = len(plan.exchange.distances)
    told = plan.method
    if plan.method == "hybrid":
        told += f" {plan.heads_ways} x {plan.size // plan.heads_ways}"
    if plan.exchange.method == "needed" and count:
        told += f", {count} stage{'s' * (count > 1)}"
    return told + ", kept" * (plan.keep and bool(count))


def _candidates(
    bare: ParallelPlan, wanted: Choices, refusals: list[Refusal]
) -> Iterator[ParallelPlan]:
    for ways in _ways(bare, wanted, refusals):
        for method in _exchanged(bare, wanted, ways):
            yield from _staged(bare, wanted, ways, method)


def _ways(bare: ParallelPlan, wanted: Choices, refusals: list[Refusal]) -> list[int]:
    """Return the numbers of neighbours that may split the heads; 1 is none."""
    size, heads = bare.size, bare.request.num_heads
    if wanted.heads_ways != "auto":
        return [wanted.heads_ways]
    if wanted.method == "ulysses":
        return [size]
    if wanted.method in EXCHANGED:
        return [1]
    some = [ways for ways in divisors(size)[1:] if ways <= heads]
    between = [ways for ways in some if ways < size]
    if size == 1:
        return [1]
    if size > heads:
        reason = f"{size} ranks split {heads} heads, so that some of them would have none"
        refusals.append(Refusal("few-heads", reason, "ulysses"))
    if not between:
        reason = f"{size} ranks are not several neighbourhoods that could split {heads} heads"
        refusals.append(Refusal("no-neighbourhoods", reason, "hybrid"))
    # Key heads that several ranks have are sent to all of them, so those that divide come first.
    between.sort(key=lambda ways: (ways > bare.request.num_kv_heads, -ways))
    chosen = sorted(between[:_MOST_WAYS])
    if wanted.method == "hybrid":
        return chosen
    return [1, *chosen, *([size] if size in some else [])]


def _exchanged(bare: ParallelPlan, wanted: Choices, ways: int) -> tuple[Exchanged, ...]:
    if wanted.method in EXCHANGED:
        return (wanted.method,)
    return ("needed", "gather", "ring") if ways == 1 < bare.size else ("needed",)


def _staged(
    bare: ParallelPlan, wanted: Choices, ways: int, method: Exchanged
) -> Iterator[ParallelPlan]:
    """Yield the plans of a method, one for each number of stages that is tried."""
    size = bare.size // ways
    rows, keys = coarse(bare.queries, ways), coarse(bare.keys, ways)
    regions = planes(bare.request)
    exchange = Stages(method, keys, tuple(seen_by(regions, own) for own in rows.ranks))
    counts: tuple[int, ...] = (1,)
    if method == "needed" and size > 1:
        counts = _COUNTS if wanted.stages == "auto" else (wanted.stages,)
    for count in sorted({min(count, max(1, size - 1)) for count in counts}):
        yield replace(bare, exchange=replace(exchange, count=count), heads_ways=ways)


def _kept(plan: ParallelPlan, keep: bool | Literal["auto"]) -> ParallelPlan:
    """Return a plan that keeps received keys as asked, or by the rule.

    The rule is of memory: they are kept where no rank receives more keys than ranks have of their
    own on average, so that at most as much again is held until the backward pass.
    """
    if keep == "auto":
        most = max(map(total, plan.exchange.wanted), default=0)
        keep = (
            plan.request.needs_grad and most <= plan.exchange.keys.length // plan.exchange.keys.size
        )
    return replace(plan, keep=keep)
