"""What ranks say of a plan to each other: `statement_of`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields

from attnkit.masks.predicate import function_name
from attnkit.parallel.guard import Statement
from attnkit.parallel.plan import ParallelPlan
from attnkit.planner import Request

__all__ = ["statement_of"]

Words = tuple[tuple[str, str], ...]

_BY_TEXT = ("mask", "bias", "score_fn", "seqlens")


def statement_of(plan: ParallelPlan, what: str, also: Words = ()) -> Statement:
    """Return what a rank says before it exchanges what a plan says: "forward" or "backward".

    Equal on two ranks where their plans are: of tensors of a bias by shapes, for their numbers
    train, of functions by name. `also` has more words that ranks must agree on. Kept with the
    plan, so that a step finds it.
    """
    known: dict[tuple[str, Words], Statement] = vars(plan).setdefault("_statements", {})
    if (what, also) not in known:
        known[what, also] = _made(plan, what, also)
    return known[what, also]


def _made(plan: ParallelPlan, what: str, also: Words) -> Statement:
    words = (*_words(plan), *also)
    exchange = plan.exchange
    told = (
        *_facts(plan.request),
        plan.queries.ranks,
        plan.keys.ranks,
        (
            plan.method,
            exchange.method,
            exchange.count,
            plan.heads_ways,
            plan.keep,
            plan.backend,
            plan.dropout,
        ),
    )
    return Statement.of(what, told, words)


def _facts(request: Request) -> Iterator[object]:
    """Yield all of a request, as values with the same repr in every process."""
    for item in fields(request):
        if item.name not in _BY_TEXT:
            yield item.name, getattr(request, item.name)
    yield str(request.mask)
    yield [(term.text, term.key, term.requires_grad) for term in request.bias]
    yield None if request.score_fn is None else function_name(request.score_fn)
    yield None if request.seqlens is None else (request.seqlens.q, request.seqlens.kv)


def _words(plan: ParallelPlan) -> Iterator[tuple[str, str]]:
    """Yield the names and the words of what ranks may differ in; the likeliest first."""
    one = plan.request
    yield "mask", str(one.mask)
    yield "bias", " + ".join(term.text for term in one.bias) or "none"
    yield "tokens", _lengths(one)
    yield "batch of", str(one.batch)
    yield "heads", f"{one.num_heads} and {one.num_kv_heads} of keys"
    yield "head sizes", f"{one.head_dim} and {one.value_dim}"
    yield "dtype", str(one.dtype).removeprefix("torch.")
    yield "layout", one.layout
    yield "method", _method(plan)
    yield "ranks with", f"{_few(plan.queries.sizes)} tokens"
    yield "backend", plan.backend
    yield "scale", f"{one.scale:g}"
    yield "dropout", f"{one.dropout:g}{', of each rank its own' * (plan.dropout == 'local')}"
    yield "soft-cap", str(one.softcap)
    yield "sink", "yes" if one.sink else "no"
    yield "gradients", "yes" if one.needs_grad else "no"


def _lengths(request: Request) -> str:
    seqlens = request.seqlens
    if seqlens is None:
        alike = request.q_len == request.kv_len
        return f"{request.q_len}" + ("" if alike else f", keys {request.kv_len}")
    keys = "" if seqlens.q == seqlens.kv else f", keys {_few(seqlens.kv)}"
    return f"{request.q_len} in texts of {_few(seqlens.q)}{keys}"


def _method(plan: ParallelPlan) -> str:
    count = plan.exchange.count
    stages = f" in {count} stage{'s' * (count > 1)}" if plan.exchange.method == "needed" else ""
    ways = f", {plan.heads_ways} ranks to a set of heads" if plan.heads_ways > 1 else ""
    return f"{plan.method}{stages}{ways}{', received keys kept' * plan.keep}"


def _few(numbers: Sequence[int]) -> str:
    told = ", ".join(map(str, numbers[:8]))
    return f"{told}, ... {len(numbers)} in all" if len(numbers) > 8 else told
