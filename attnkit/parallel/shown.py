"""What a notebook shows of shardings and of plans over ranks: a colour for each rank."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from attnkit.display import Drawing, Layer, colour, html
from attnkit.parallel.choose import label
from attnkit.parallel.picture import drawing
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.sharding import Sharding, between
from attnkit.planner.explain import bytes_told, request_lines
from attnkit.planner.shown import refused

__all__ = ["page", "sharding_page"]

_MOST_RANKS = 16
_MOST_DRAWN = 64  # ranks of a plan whose shares are looked at for a display
_MOST_ROWS = 24
_COLUMNS = 96


def page(plan: ParallelPlan) -> str:
    """Return what `ParallelPlan._repr_html_` does.

    >>> import torch
    >>> from attnkit import masks, parallel
    >>> x = torch.empty(1, 64, 4, 16, device="meta")
    >>> "rank 1" in page(parallel.plan(x, x, x, ranks=2, mask=masks.Causal()))
    True
    """
    return html.safely(lambda: html.block(*_page(plan)), lambda: f"plan over {plan.size} ranks")


def _page(plan: ParallelPlan) -> Iterator[str]:
    yield html.heading(f"Plan over {plan.size:,} ranks", label(plan))
    if plan.size <= _MOST_DRAWN:
        yield html.picture(drawing(plan))
    else:
        yield html.note(f"no picture of {plan.size:,} ranks: plan.plot() draws one")
    yield html.table((escape(name), escape(text)) for name, text in _lines(plan))
    ranks = range(min(plan.size, _MOST_RANKS))
    yield html.table(
        (_rank(plan, rank) for rank in ranks),
        ("rank", "tokens", "heads", "cells", "keys received", "forward", "backward"),
    )
    if plan.size > _MOST_RANKS:
        yield html.note(f"and {plan.size - _MOST_RANKS:,} more ranks")
    best = plan.price.total if plan.price is not None else 0.0
    others = (
        (html.code(one.label), f"{100 * (one.price.total / best - 1):+.3g} %" if best else "")
        for one in plan.alternatives
    )
    dearer = html.table(others, ("way", "price"), _MOST_ROWS)
    yield html.folded(f"also right, but dearer ({len(plan.alternatives):,})", dearer)
    yield refused("not taken", plan.refusals)
    yield html.note("print(plan.explain()) says all of it")


def _lines(plan: ParallelPlan) -> Iterator[tuple[str, str]]:
    yield from request_lines(plan.request)
    yield "method", f"{plan.method}, balance {plan.balance}"
    if plan.price is not None:
        time = plan.price.total / 1e3
        yield "price", f"about {time:,.0f} us for rank {plan.price.rank}, the slowest looked at"


def _rank(plan: ParallelPlan, rank: int) -> tuple[str, ...]:
    received, own = plan.received(rank), plan.queries.ranks[rank]
    return (
        f"{html.swatch(colour(rank))}{rank}",
        f"{plan.queries.sizes[rank]:,} in {len(own):,} range{'s' * (len(own) != 1)}",
        f"{len(plan.heads(rank))}",
        f"{plan.cells[rank]:,}" if plan.size <= _MOST_DRAWN else "",
        f"{received.keys:,}",
        bytes_told(received.forward),
        bytes_told(received.backward),
    )


def sharding_page(sharding: Sharding) -> str:
    """Return what `Sharding._repr_html_` does: a row for each of the first ranks.

    >>> "2 ranks" in sharding_page(Sharding.zigzag(32, 2))
    True
    """
    return html.safely(lambda: html.block(*_sharding(sharding)), lambda: repr(sharding))


def _sharding(sharding: Sharding) -> Iterator[str]:
    tokens = f"{sharding.length:,} tokens on {sharding.size:,} ranks"
    yield html.heading("Sharding", f"of {tokens}")
    some, columns = min(sharding.size, _MOST_RANKS), min(sharding.length, _COLUMNS)
    blank = [0.0] * columns
    layers = []
    for rank in range(some if columns else 0):
        rows = [blank] * rank + [sharding.held(rank, columns)] + [blank] * (some - rank - 1)
        layers.append(Layer(rows, colour(rank)))
    wide = max(1, round(columns / 4))
    note = f"tokens from left to right, ranks 0 to {some - 1} from the top"
    note += f" ({sharding.size - some:,} more are not drawn)" * (sharding.size > some)
    yield html.picture(Drawing(wide, columns, tuple(layers), tokens, note))
    counts = [len(own) for own in sharding.ranks]
    told = f"{between(sharding.sizes)} tokens each, in {between(counts)} range"
    told += "s" * (max(counts) != 1)
    yield html.table([("ranks", escape(told)), ("as text", html.code(_text(sharding)))])


def _text(sharding: Sharding) -> str:
    whole = sum(map(len, sharding.ranks)) + sharding.size <= 64
    return str(sharding) if whole else repr(sharding)
