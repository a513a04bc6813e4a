"""What a planner that gathers keys makes of sparse masks, beside one that cuts them into pieces."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from statistics import geometric_mean, median

import torch
from _sparse_masks import LONG, SHORT, SPARSE, Sparse

from attnkit import masks
from attnkit.planner import Composition, Plan, Request, read_request
from attnkit.planner.calls import Launch, Solution, by_heads
from attnkit.planner.lower import search_for
from attnkit.planner.search import Search

__all__ = ["ABOUT", "row", "tables"]

ABOUT = (
    "8 heads of 64, bfloat16, training, one batch element; times of the process. Each mask is",
    "planned twice, with and without gathering. *Pieces* and *gathered* are the cheapest plans of",
    "each that read no mask of one entry per cell, as for a longer text; where one of them has",
    "none, what is chosen. *Chosen* is what is chosen, such a mask allowed. `K/V x` counts a copy",
    "beside keys and values themselves. Prices are the planner's own, which nobody has calibrated.",
)

HEADS, DIM = 8, 64
TOKENS = {SHORT: "2,048", LONG: "16,384"}

# Where the planner before all this cannot be had by a switch: price, megabytes and seconds of its
# plan, which reads a mask of one entry per cell. Two masks are given as cells: as regions it had
# not cut them after five minutes, or into splinters. Two are sorted first, now, and for the last it
# had found no pieces; those that are found are dearer.
RECORDED = {
    ("sliding tile attention (3-D), window (1, 3, 3)", SHORT): (66.52, 4.2, 5.567),
    ("sliding tile attention (3-D), window (3, 3, 3)", LONG): (6101.0, 293.6, 300.0),
    ("NATTEN 3-D (5, 7, 7)", SHORT): (100.1, 7.3, 16.8),
    ("NATTEN 3-D (5, 7, 7)", LONG): (6101.0, 293.6, 300.0),
    ("Sparse Transformer, strided 64", SHORT): (72.4, 7.3, 0.002),
    ("Sparse Transformer, strided 128", LONG): (3217.4, 293.6, 0.002),
    ("Swin, windows of 8, shifted", LONG): (373.0, 26.2, 3.173),
    ("Sparse Transformer, fixed 128/16", LONG): (3217.4, 293.6, 2.969),
}
# Merged then, although every row was answered once: price and megabytes.
MERGED = {("causal + 4 image spans", SHORT): (168.2, 62.9)}


@dataclass(frozen=True)
class Told:
    """One solution in the numbers of the table; of a run that was long ago, its price alone."""

    us: float
    peak: float
    calls: int = 0
    sequences: int = 0
    copied: float = 0.0
    """How many times keys and values are written to another place."""
    how: str = ""
    full: bool = False
    """Whether a mask of one entry per cell is read."""

    @classmethod
    def of(cls, found: Solution, kv_len: int) -> Told:
        launches, price = found.launches, found.price
        gathered = [one.keys for one in launches if one.partial and one.keys.span is None]
        full = any(map(_reads_all, launches))
        return cls(
            price.nanoseconds / 1e3,
            price.peak_bytes / 1e6,
            len(launches),
            sum(len(one.blocks) for one in launches),
            sum(len(ranges) for keys in gathered for ranges in keys.ranges) / kv_len,
            found.label + (" + a mask per cell" if full else _merged(launches)),
            full,
        )

    def __str__(self) -> str:
        if not self.calls:
            return "1 (1): a mask per cell"
        copied = f", K/V x {self.copied:.1f}" if self.copied else ""
        return f"{self.calls} ({self.sequences:,}): {self.how}{copied}"


@dataclass(frozen=True)
class Row:
    """One mask at one length. What there is not is None."""

    name: str
    density: float
    pieces: Told | None
    gathered: Told | None
    before: Told
    now: Told
    in_one: bool
    """Whether one call computes it without a mask of one entry per cell, chosen or not."""
    old_ms: float
    plan_ms: float
    proof_ms: float

    @property
    def ratios(self) -> tuple[float, float]:
        """How many times dearer it is to cut than to gather, and what was chosen than what is."""
        first, last = self.ways
        return first.us / last.us, self.before.us / self.now.us

    @property
    def ways(self) -> tuple[Told, Told]:
        """The best of either planner without a mask of one entry per cell; with one, if needed."""
        if self.pieces is None or self.gathered is None:
            return self.before, self.now
        return self.pieces, self.gathered

    def __str__(self) -> str:
        first, last = self.ways
        cells = [
            self.name,
            f"{100 * self.density:.1f} %",
            f"{first}",
            f"{first.us:,.0f}",
            f"{first.peak:,.0f}",
            f"{last}",
            f"{last.us:,.0f}",
            f"{last.peak:,.0f}",
            f"{self.ratios[0]:.2f}",
            f"{self.before.us:,.0f}{_marked(self.before)} -> {self.now.us:,.0f}{_marked(self.now)}",
            f"{self.ratios[1]:.2f}",
            f"{self.old_ms:,.0f}",
            f"{self.plan_ms:,.0f} + {self.proof_ms:,.0f}",
        ]
        return f"| {' | '.join(cells)} |"


HEAD = """\
| mask | density | pieces: calls (sequences) | us | MB | gathered: calls (sequences) | us | MB \
| ratio | chosen: before -> now, us | ratio | planned before, ms | now: planned + proven, ms |
|---|---:|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|"""


def _marked(told: Told) -> str:
    return " (mask)" if told.full else ""


def _merged(launches: Sequence[Launch]) -> str:
    if not launches[0].partial or all(parts.once for parts in by_heads(launches)):
        return ""
    return ", merged"


def _reads_all(launch: Launch) -> bool:
    """Whether a call reads a mask with an entry for each cell of the score matrices."""
    mask = launch.call.atten_mask
    return mask is not None and mask.kind == "full" and not launch.partial


def _without_mask(plan: Plan) -> Told | None:
    """Return the cheapest way of a plan that reads no mask of one entry per cell."""
    every = [plan.solution, *plan.alternatives]
    spared = [one for one in every if not any(map(_reads_all, one.launches))]
    best = min(spared, key=lambda one: one.price.nanoseconds, default=None)
    return None if best is None else Told.of(best, plan.request.kv_len)


def _planned(request: Request, gathers: bool) -> tuple[Plan, float]:
    start = time.process_time()
    plan = search_for(request, Search(gathers=gathers))
    return replace(plan, backend="emulated"), 1e3 * (time.process_time() - start)


def row(one: Sparse, size: int) -> Row:
    """Plan one mask both ways."""
    mask, (q_len, kv_len) = one.at(size)
    query, key = (
        torch.empty(1, n, HEADS, DIM, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for n in (q_len, kv_len)
    )
    request = read_request(Composition(mask=mask), query, key, key)
    # To know the mask's region is no part of planning; each plan has a request of its own.
    cells = (
        request.matrices.regions()[0].area
        if request.matrices.exact
        else int(mask.materialize(q_len, kv_len).sum())
    )
    now, plan_ms = _planned(request, True)
    start = time.process_time()
    now.verify()
    proof_ms = 1e3 * (time.process_time() - start)
    chosen = Told.of(now.solution, kv_len)
    gathered = _without_mask(now)
    known = RECORDED.get((one.label(size), size))
    if known is None:
        old, old_ms = _planned(request, False)
        pieces, before = _without_mask(old), Told.of(old.solution, kv_len)
        if pieces is not None and (one.label(size), size) in MERGED:
            us, peak = MERGED[one.label(size), size]
            pieces = replace(pieces, us=us, peak=peak, how=f"{pieces.how}, merged")
    else:
        pieces, before, old_ms = None, Told(*known[:2], full=True), 1e3 * known[2]
    density = cells / (q_len * kv_len)
    times = (old_ms, plan_ms, proof_ms)
    ways = [now.solution, *now.alternatives]
    in_one = any(len(way.launches) == 1 and not _reads_all(way.launches[0]) for way in ways)
    return Row(one.label(size), density, pieces, gathered, before, chosen, in_one, *times)


def table(size: int) -> Iterator[str]:
    """Yield the lines of one length."""
    yield f"## {TOKENS[size]} tokens"
    yield ""
    yield HEAD
    rows = []
    for one in SPARSE:
        if one.arguments[size] is not None:
            rows.append(row(one, size))
            print(rows[-1], file=sys.stderr, flush=True)
    yield from map(str, rows)
    cut, chosen = (geometric_mean(some) for some in zip(*(r.ratios for r in rows), strict=True))
    single = sum(r.now.calls == 1 for r in rows)
    in_one = sum(r.in_one for r in rows)
    worse = sum(r.ratios[1] < 0.999 for r in rows)
    yield ""
    yield (
        f"Geometric mean of the ratios: {cut:.2f} where no mask of one entry per cell is read "
        f"(median {median(r.ratios[0] for r in rows):.2f}), {chosen:.2f} of what is chosen. "
        f"One call is chosen for {single} of {len(rows)}; one without such a mask computes "
        f"{in_one}. Dearer than before: {worse or 'none'}."
    )
    yield ""


def video() -> Iterator[str]:
    """Yield a line on sliding tile attention over a video."""
    shape, tile = (30, 48, 80), (6, 8, 8)
    length = prod(shape)
    x = torch.empty(1, length, 24, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    request = read_request(Composition(mask=masks.SlidingTiles(shape, tile, 3)), x, x, x)
    plan, plan_ms = _planned(request, True)
    told = Told.of(plan.solution, length)
    whole = " with a mask per cell" if told.full else ", no mask of one entry per cell"
    yield f"## Sliding tile attention over a video of {length:,} tokens"
    yield ""
    yield (
        f"Grid {shape}, tiles {tile}, window 3, 24 heads of 128: {told}{whole}; planned in "
        f"{plan_ms:,.0f} ms, {told.us / 1e3:,.0f} ms by the price, {told.peak / 1e3:,.1f} GB."
    )
    yield ""


def tables(sizes: Sequence[int] = (SHORT, LONG)) -> list[str]:
    """Return both tables as lines, each printed as it comes, and what a video takes."""
    return [*chain.from_iterable(map(table, sizes)), *video()]
