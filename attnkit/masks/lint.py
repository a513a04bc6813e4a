"""`Mask.lint`: what looks like a mistake in a mask, as data.

A finding is not an error: every mask that it speaks of is computed as written. Cells are
judged by regions, exactly, for each batch element and head. A mask that is not a union of slices is
read row by row, which is enough for its empty rows and unseen keys; the rest is then not
checked, and a finding says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple, cast

import torch

from attnkit.geometry import Region, Slice
from attnkit.masks.algebra import And, Not, Path, needless_parts, without_part
from attnkit.masks.base import Full, Mask
from attnkit.masks.block_table import Blocks
from attnkit.masks.blocks import BlockCausal, Chunked
from attnkit.masks.causal import Band, Causal, SlidingWindow
from attnkit.masks.composite import Composite, leaves
from attnkit.masks.dense import Dense
from attnkit.masks.documents import Documents
from attnkit.masks.finding import Finding, counted, ranges
from attnkit.masks.grid import GridMask
from attnkit.masks.order import Order
from attnkit.masks.per_head import PerHead
from attnkit.masks.predicate import Predicate
from attnkit.masks.recover import Recovered, recover
from attnkit.masks.slices import Slices
from attnkit.masks.trace import mask_rows, row_blocks
from attnkit.masks.tree import Tree
from attnkit.strips import gaps

__all__ = ["lint", "positive_leaves"]


_MOST_READ = 1 << 24
"""Cells up to which a mask is read where it is no region, though it is one in another order."""


class _View(NamedTuple):
    """A mask at given lengths, and its cells in each score matrix; None where no region.

    `found`: what recovery said, where the cells had to be read. `orders`: the orders of positions
    in which the mask is a region, where it knows of some and is none as they stand.
    """

    mask: Mask
    q_len: int
    kv_len: int
    regions: dict[tuple[int, int], Region] | None
    found: Recovered | None
    orders: dict[tuple[int, int], Order] | None = None

    def where(self, planes: list[tuple[int, int]]) -> str:
        """Say which score matrices are meant, when not all are."""
        b, h = planes[0]
        words = [f"batch element {b}"] * (self.mask.batches is not None)
        words += [f"head {h}"] * (self.mask.heads is not None)
        more = f" (and {len(planes) - 1} more)" if len(planes) > 1 else ""
        return f" in {', '.join(words)}{more}" if words and planes != self.mask._places else ""


def lint(
    mask: Mask, q_len: int, kv_len: int, batch: int | None, heads: int | None
) -> tuple[Finding, ...]:
    """Return what `Mask.lint` documents."""
    mask.check(q_len, kv_len, batch, heads)
    view = _view(mask, q_len, kv_len)
    found = [*_rows_and_keys(view), *_equal_to_named(view)]
    wide = list(_too_wide(view))
    found += [finding for _, finding in wide]
    if view.regions is None:
        opaque = Finding(
            "not-a-region",
            f"{mask!r} is not a small union of slices at {q_len} x {kv_len}: leaks, redundant "
            "parts and cells ahead were not looked for",
            "write its opaque parts as named masks where they have a name",
        )
        return (*found, opaque)
    found += _leaks(view)
    found += _shared_positions(view)
    found += _future(view)
    found += _redundant(view, {part for part, _ in wide})
    return tuple(found)


def _view(mask: Mask, q_len: int, kv_len: int) -> _View:
    view = _View(mask, q_len, kv_len, None, None)
    if min(q_len, kv_len) == 0:
        return view._replace(regions=dict.fromkeys(mask._places, Region.empty()))
    known = {plane: mask.enclosure(q_len, kv_len, *plane) for plane in mask._places}
    if all(one.exact for one in known.values()):
        return view._replace(regions={plane: one.inner for plane, one in known.items()})
    if q_len * kv_len > _MOST_READ:
        found_orders = {plane: mask.in_order(q_len, kv_len, *plane) for plane in mask._places}
        orders = {plane: order for plane, order in found_orders.items() if order is not None}
        if len(orders) == len(found_orders):
            return view._replace(orders=orders)
    found = recover(mask, q_len, kv_len)
    if not found.exact:
        return view._replace(found=found)
    # Equal planes are held once.
    regions = {
        (b, h): per_head[min(h, len(per_head) - 1)]
        for b, h in known
        for per_head in [found.regions[min(b, len(found.regions) - 1)]]
    }
    return view._replace(regions=regions, found=found)


# -- rows and keys -------------------------------------------------------------------------


def _rows_and_keys(view: _View) -> Iterator[Finding]:
    empty: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = {}
    unseen: dict[tuple[tuple[int, int], ...], list[tuple[int, int]]] = {}
    for plane in view.mask._places:
        rows, keys = _unmatched(view, plane)
        empty.setdefault(rows, []).append(plane)
        unseen.setdefault(_not_ruled_out(view, plane, keys), []).append(plane)
    for spans, planes in empty.items():
        if spans:
            yield _empty_rows(view, spans, planes)
    for spans, planes in unseen.items():
        if spans and view.q_len:
            count = sum(b - a for a, b in spans)
            yield Finding(
                "unseen-keys",
                f"{view.mask!r} lets no query see {count} of {view.kv_len} keys: "
                f"{ranges(spans)}{view.where(planes)}",
                "leave these keys out of the call (they cost memory and time), or widen the mask",
            )


def _empty_rows(
    view: _View, spans: tuple[tuple[int, int], ...], planes: list[tuple[int, int]]
) -> Finding:
    count = sum(b - a for a, b in spans)
    remedy = "leave these rows out, or allow each of them a key (its own: mask | Band(0, 0))"
    bottom = [
        part
        for part in positive_leaves(view.mask)
        if getattr(part, "align", None) == "bottom_right" and view.q_len > view.kv_len
    ]
    if bottom:
        remedy = (
            f"there are more queries than keys, and {bottom[0]!r} puts the last query at the "
            "last key: align='top_left' puts query 0 at key 0"
        )
    return Finding(
        "empty-rows",
        f"{view.mask!r} leaves {count} of {view.q_len} queries without a key: rows "
        f"{ranges(spans)}{view.where(planes)}; their output and gradients are 0 and their lse "
        "is -inf",
        remedy,
    )


Spans = tuple[tuple[int, int], ...]


def _unmatched(view: _View, plane: tuple[int, int]) -> tuple[Spans, Spans]:
    """Return the rows without keys and the keys without rows, as ranges."""
    if view.regions is not None:
        region = view.regions[plane]
        seen = ((s.j0, s.j1) for s in region.slices)
        return region.empty_rows(view.q_len), tuple(gaps(seen, 0, view.kv_len))
    if view.orders is not None:
        return view.orders[plane].unmatched()
    read = mask_rows(view.mask, view.q_len, view.kv_len, *plane)
    rows = torch.zeros(view.q_len, dtype=torch.bool)
    keys = torch.zeros(view.kv_len, dtype=torch.bool)
    for i0, i1 in row_blocks(0, view.q_len, view.kv_len):
        cells = read(i0, i1)
        rows[i0:i1] = cells.any(dim=1)
        keys |= cells.any(dim=0)
    each = (((k, k + 1) for k in seen.nonzero().flatten().tolist()) for seen in (rows, keys))
    return tuple(gaps(next(each), 0, view.q_len)), tuple(gaps(next(each), 0, view.kv_len))


def _not_ruled_out(view: _View, plane: tuple[int, int], keys: Spans) -> Spans:
    """Drop the keys outside of a part that is one range of keys: that is what the part is for."""
    parts = view.mask.parts if isinstance(view.mask, And) else ()
    free = Region.of(*(Slice(0, 1, a, b) for a, b in keys))
    rows = max(view.q_len, 2)  # a single row of a window is a range of keys too
    for part in (view.mask, *parts):
        inner, outer = part.enclosure(rows, view.kv_len, *plane)
        here = inner.row(0)
        if len(here) <= 1 and inner == outer == Region.of(*(Slice(0, rows, *run) for run in here)):
            free &= inner
    return free.row(0)


# -- parts ---------------------------------------------------------------------------------


def positive_leaves(mask: Mask, positive: bool = True, head: int | None = None) -> Iterator[Mask]:
    """Iterate over the masks that a composition adds cells from; not those it takes away.

    `head`: of one head only.
    """
    if isinstance(mask, Not):
        yield from positive_leaves(mask.part, not positive, head)
    elif isinstance(mask, PerHead) and head is not None:
        yield from positive_leaves(mask.masks[head], positive)
    elif isinstance(mask, Composite):
        for member in mask.members:
            yield from positive_leaves(member, positive, head)
    elif positive:
        yield mask


def _too_wide(view: _View) -> Iterator[tuple[Mask, Finding]]:
    if min(view.q_len, view.kv_len) == 0:
        return
    for part in dict.fromkeys(leaves(view.mask)):
        widest, wider = part, _without_limit(part)
        cells = part.enclosure(view.q_len, view.kv_len).inner
        while wider is not None and wider.enclosure(view.q_len, view.kv_len).inner == cells:
            widest, wider = wider, _without_limit(wider)
        if widest is not part:
            yield (
                part,
                Finding(
                    "window-exceeds-sequence",
                    f"{part!r} cuts nothing off at {view.q_len} x {view.kv_len}: it is {widest!r}",
                    f"write {widest!r}, or a smaller size if a limit was meant",
                ),
            )


def _without_limit(part: Mask) -> Mask | None:
    """Return the mask that a window, band, chunk, table, tree or grid is without its limit."""
    if isinstance(part, SlidingWindow):
        return Causal(part.align)
    if isinstance(part, Band) and part.left is not None and part.left > 0:
        return Full() if part.right is None else Band(None, part.right, part.align)
    if isinstance(part, Band) and part.right is not None and part.right > 0:
        return Full()
    if isinstance(part, Tree):
        return Causal()
    if isinstance(part, Blocks) and part.causal:
        return Causal(part.align)
    if isinstance(part, Chunked | BlockCausal | Blocks | GridMask):
        return Full()
    return None


def _equal_to_named(view: _View) -> Iterator[Finding]:
    for part in dict.fromkeys(leaves(view.mask)):
        if not isinstance(part, Dense | Slices | Predicate | Blocks):
            continue
        found = view.found if part is view.mask else None
        found = recover(part, view.q_len, view.kv_len) if found is None else found
        if found.named and found.mask != part:
            yield Finding(
                "equals-a-named-mask",
                f"{part!r} equals {found.mask!r} at {view.q_len} x {view.kv_len}",
                f"write {found.mask}" if len(str(found.mask)) < 200 else "call simplify()",
            )


def _exceeding(
    view: _View, kinds: tuple[type[Mask], ...]
) -> Iterator[tuple[Mask, tuple[int, int], Region]]:
    """Yield each part of these kinds, and the cells of a score matrix that it does not have.

    For a causal part, that it and all cells before it do not have.
    """
    told: set[Mask] = set()
    for plane, region in cast(dict[tuple[int, int], Region], view.regions).items():
        for part in positive_leaves(view.mask, head=plane[1]):
            if part in told or not isinstance(part, kinds):
                continue
            whole = Causal(part.align) if isinstance(part, SlidingWindow) else part
            if isinstance(part, Documents):
                whole = part.apart
            beyond = region - whole.enclosure(view.q_len, view.kv_len, plane[0]).inner
            if beyond:
                told.add(part)
                yield part, plane, beyond


def _leaks(view: _View) -> Iterator[Finding]:
    for part, (b, h), beyond in _exceeding(view, (Documents,)):
        i = beyond.slices[0].i0
        j = beyond.row(i)[0][0]
        ends = [
            _document(cast(Documents, part), b, index, axis) for axis, index in ((0, i), (1, j))
        ]
        yield Finding(
            "documents-leak",
            f"{view.mask!r} connects documents of {part!r}: {counted(beyond.area, 'cell')} "
            f"between two of them{view.where([(b, h)])}, the first at query {i} ({ends[0]}) and "
            f"key {j} ({ends[1]})",
            "put the documents around everything, documents & (a | b); keep it if those keys are "
            "meant to be shared",
        )


def _shared_positions(view: _View) -> Iterator[Finding]:
    """Find ``Documents(q, kv) & Causal()``: causal through the whole matrix, in no document."""
    for joined in _intersections(view.mask):
        for documents in joined.parts:
            if not isinstance(documents, Documents) or documents.kv_lengths is None:
                continue
            for part in joined.parts:
                if getattr(part, "align", None) is None:
                    continue
                differs = _first_difference(view, documents, part)
                if differs is not None:
                    each = replace(
                        documents,
                        inside=part if documents.inside is None else documents.inside & part,
                    )
                    yield Finding(
                        "documents-share-positions",
                        f"{part!r} beside {documents!r} counts positions through the whole "
                        f"{view.q_len} x {view.kv_len} score matrix, not in each document: "
                        f"{differs}",
                        f"write {each!r} where each document has its own; keep it if positions "
                        "are meant to run through",
                    )


def _intersections(mask: Mask) -> Iterator[And]:
    if isinstance(mask, And):
        yield mask
    if isinstance(mask, Composite):
        for member in mask.members:
            yield from _intersections(member)


def _first_difference(view: _View, documents: Documents, part: Mask) -> str | None:
    """Say for which document a part beside is not the part inside; None where they agree."""
    for b in range(documents.batches or 1):
        beside = part.enclosure(view.q_len, view.kv_len, b)
        places = documents.places(b)
        for number, (rows, keys) in enumerate(documents.sizes(b)):
            inside = part.enclosure(rows, keys, b)
            cut = beside.outer.cut(*places[number])
            if beside.exact and cut != inside.outer:
                return (
                    f"document {number} of {rows} x {keys} has {counted(cut.area, 'cell')} of it "
                    f"and not {inside.outer.area}"
                )
    return None


def _document(documents: Documents, batch: int, index: int, axis: int) -> str:
    for number, block in enumerate(documents.blocks(batch)):
        start, stop = ((block.i0, block.i1), (block.j0, block.j1))[axis]
        if start <= index < stop:
            return f"document {number}"
    return "no document"


def _future(view: _View) -> Iterator[Finding]:
    for part, plane, ahead in _exceeding(view, (Causal, SlidingWindow)):
        i = ahead.slices[0].i0
        j = ahead.row(i)[-1][1] - 1
        yield Finding(
            "sees-the-future",
            f"{view.mask!r} has the causal part {part!r} and still allows "
            f"{counted(ahead.area, 'cell')} ahead of the query{view.where([plane])}: query {i} "
            f"sees key {j}",
            f"{part!r} & (...) keeps all of it causal; with a prefix that is meant to be seen "
            "whole, compute no next-token loss on its positions",
        )


# Looking at what a mask is without each of its parts costs their number times their slices.
_MANY_PARTS = 1000


def _redundant(view: _View, known: set[Mask]) -> Iterator[Finding]:
    if view.mask._nesting[1] > _MANY_PARTS:
        return
    regions = cast(dict[tuple[int, int], Region], view.regions)
    needless: dict[Path, None] | None = None
    for plane, region in regions.items():
        found = dict.fromkeys(needless_parts(view.mask, (view.q_len, view.kv_len, *plane), region))
        needless = found if needless is None else {p: None for p in needless if p in found}
    told: set[Mask] = set()
    for path in needless or ():
        part, shorter = without_part(view.mask, path)
        if part in known or part in told:
            continue
        told.add(part)
        yield Finding(
            "part-changes-nothing",
            f"{part!r} changes nothing in {view.mask!r} at {view.q_len} x {view.kv_len}",
            f"{shorter!r} has the same cells; look for a bracket or a sign if it should differ",
        )
