"""What would make a plan cheaper: requests close by are planned too, and those that win told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from attnkit.errors import CompositionError
from attnkit.masks import Mask
from attnkit.planner.candidates import is_in_order
from attnkit.planner.lower import lower, search_for
from attnkit.planner.price import Price, chip
from attnkit.planner.request import Request
from attnkit.planner.search import Search

__all__ = ["Saving", "savings"]

_WORTH = 0.03
_LAYOUTS = ("BSND", "BSH", "BNSD", "SBH")


@dataclass(frozen=True)
class Saving:
    """A change to the request, and the share of the price per allowed cell that it saves."""

    change: str
    share: float

    def __str__(self) -> str:
        return f"{self.change}: -{100 * self.share:.3g} %"


def savings(request: Request) -> tuple[Saving, ...]:
    """Return the changes near a request that make it cheaper per allowed cell, best first.

    Tried are other layouts, equal lengths, lengths in whole tiles, and the other alignment of
    the masks: what an author can often choose. A change that alters the result says so.
    """
    base = _per_cell(lower(request).price)
    if base is None:
        return ()
    search, found = Search(), []
    for change, near in _nearby(request):
        try:
            near.mask.check(near.q_len, near.kv_len, near.batch, near.num_heads)
            cost = _per_cell(search_for(near, search).price)
        except CompositionError:
            continue
        share = 1 - cost / base if cost is not None and base else 0.0
        if share > _WORTH:
            found.append(Saving(change, share))
    return tuple(sorted(found, key=lambda saving: -saving.share))


def _per_cell(price: Price | None) -> float | None:
    return None if price is None else price.nanoseconds / max(price.cells, 1)


def _nearby(request: Request) -> Iterator[tuple[str, Request]]:
    if request.seqlens is not None:
        return
    # No rule tells dense layouts apart: they differ in what it costs to pack them.
    for name in () if is_in_order(request) else _LAYOUTS:
        if name != request.layout:
            yield f"layout {name}", replace(request, layout=name)
    if request.q_len != request.kv_len and min(request.q_len, request.kv_len) > 1:
        longer = max(request.q_len, request.kv_len)
        yield (
            f"{longer:,} queries and keys (another result)",
            replace(request, q_len=longer, kv_len=longer),
        )
    tile = chip().tile_q
    whole = tuple(-(-n // tile) * tile for n in (request.q_len, request.kv_len))
    if whole != (request.q_len, request.kv_len) and request.q_len > 1:
        yield (
            f"lengths in whole tiles, {whole[0]:,} x {whole[1]:,} (padded)",
            replace(request, q_len=whole[0], kv_len=whole[1]),
        )
    turned = _turned(request.mask) if request.q_len != request.kv_len else request.mask
    if turned != request.mask:
        yield f"mask {turned!r} (another result)", replace(request, mask=turned)


def _turned(mask: Mask) -> Mask:
    """Return a mask with every alignment the other way round, or itself where it has none.

    A cut of a mask that then counts from the end of lengths which nobody said has none.
    """
    try:
        return _turn(mask)
    except CompositionError:
        return mask


def _turn(mask: Mask) -> Mask:
    twin: Any = mask  # every family is a frozen dataclass
    changes: dict[str, Any] = {}
    for item in fields(twin):
        value = getattr(mask, item.name) if item.init else None
        if item.name == "align":
            changes["align"] = "top_left" if value == "bottom_right" else "bottom_right"
        elif isinstance(value, Mask):
            changes[item.name] = _turn(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Mask):
            changes[item.name] = tuple(_turn(part) for part in value)
    turned: Mask = replace(twin, **changes) if changes else mask
    return turned
