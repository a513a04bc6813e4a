"""Every legal cover of a small score matrix, priced: the yardstick of the planner.

Sets of cells are the bits of an int. What a call computes, whether it is legal and what it
costs is asked of `KernelCall` and the price, one sequence at a time; of how the planner cuts,
groups and orders the search knows nothing.

- A *spot* is one sequence of a call: a rectangle of the matrix, and a prefix in mode 6.
- A *family* are the spots that one call may hold together: those of one layout, mode and
  window. A dense call's have one size; modes 7 and 8 treat one spot apart.
- A *walk* is how a call finds its tokens. It may gather queries, keys, both or neither; where
  it does not gather, its spots follow each other through the tokens in place.

A call's price is a constant of its walk and a sum over its spots, so the cheapest call for
every set of cells is found by dynamic programming over sets, exactly; and so is the cheapest
set of disjoint calls. Nothing is pruned. Left out are masks of one entry per cell, and, unless
`blank_parts` asks for them, merged calls with rows without a key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate, product
from math import inf, prod

import numpy as np
import numpy.typing as npt
import torch

from attnkit import masks
from attnkit.geometry import Region
from attnkit.kernel import AttenMask, KernelCall, TensorSpec, expressing_versions
from attnkit.planner import Composition, Request, read_request
from attnkit.planner.calls import Launch, Solution
from attnkit.planner.price import Chip, price_call
from attnkit.planner.sequences import Block

DIM = 8
DTYPE = torch.float32
# What `planner.calls` says surrounds a call of several; `built` checks that it still does.
MERGE_LAUNCHES = 6
MERGE_BYTES = DTYPE.itemsize + 2 * 4

Sizes = tuple[int, int]
Ends = tuple[int, int, int, int]
Costs = npt.NDArray[np.float64]


def request_of(cells: int, sizes: Sizes) -> Request:
    """Return the request for a set of cells."""
    mask = masks.Slices.of(region_of(cells, sizes), *sizes)
    query, key = (torch.empty(1, n, 1, DIM, dtype=DTYPE, device="meta") for n in sizes)
    return read_request(Composition(mask=mask), query, key, key)


def bits(region: Region, kv_len: int, at: Sizes = (0, 0)) -> int:
    """Return the cells of a region, moved to `at`, as bits of an int."""
    i0, j0 = at
    return sum(
        1 << ((i0 + i) * kv_len + j0 + j)
        for i0_, i1, _ in region.rows()
        for i in range(i0_, i1)
        for a, b in region.row(i)
        for j in range(a, b)
    )


def region_of(cells: int, sizes: Sizes) -> Region:
    """Return the region that an int stands for."""
    q_len, kv_len = sizes
    rows = []
    for i in range(q_len):
        keys = [j for j in range(kv_len) if cells >> (i * kv_len + j) & 1]
        starts = [j for j in keys if j - 1 not in keys]
        rows.append([(a, next(j for j in range(a, kv_len + 1) if j not in keys)) for a in starts])
    return Region.from_rows(rows)


# -- calls ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """A call's layout, mode and window; `apart` is that of modes 7 and 8's own sequence."""

    layout: str
    mode: int
    masked: bool = True
    pre: int | None = None
    next: int | None = None

    def call(self, sequences: list[Sizes], prefixes: list[int], zero: bool) -> KernelCall:
        """Return the call on sequences of these sizes; `zero` asks for rows of 0."""
        rows, keys = zip(*sequences, strict=True)
        arguments: dict[str, object] = {}
        shapes: list[tuple[int, ...]] = [(len(rows), rows[0]), (len(keys), keys[0])]
        if self.layout == "TND":
            shapes = [(sum(rows),), (sum(keys),)]
            arguments["actual_seq_qlen"] = tuple(accumulate(rows))
            arguments["actual_seq_kvlen"] = tuple(accumulate(keys))
        if self.masked:
            arguments["atten_mask"] = AttenMask.prefix() if self.mode == 6 else AttenMask.causal()
            arguments["sparse_mode"] = self.mode
        if self.mode == 6:
            arguments["prefix"] = tuple(prefixes)
        if self.pre is not None:
            arguments["pre_tokens"] = self.pre
        if self.next is not None:
            arguments["next_tokens"] = self.next
        if zero:
            arguments["inner_precise"] = 2
        query, key = (TensorSpec((*shape, 1, DIM), DTYPE) for shape in shapes)
        return KernelCall(
            query,
            key,
            key,
            head_num=1,
            input_layout=self.layout,
            scale=DIM**-0.5,
            **arguments,  # type: ignore[arg-type]
        )


@dataclass(frozen=True)
class Spot:
    """One sequence of a call: where it is, its prefix, its cells, and what they cost."""

    ends: Ends
    prefix: int
    cells: int
    cost: float
    blank: bool
    """Whether some row has no key."""
    apart: bool = False

    @property
    def block(self) -> Block:
        """Its rows and keys."""
        return Block.at(0, *self.ends)


@dataclass(frozen=True)
class Shape:
    """What a window computes in a rectangle of some size, if it may, and what the cells cost."""

    region: Region
    cost: float
    blank: bool


def sizes_of(ends: Ends) -> Sizes:
    """Return the sizes of a rectangle."""
    i0, i1, j0, j1 = ends
    return i1 - i0, j1 - j0


@cache
def shape_of(window: Window, sizes: Sizes, prefix: int, weights: Chip) -> Shape | None:
    """Ask the kernel's own contract; None where the call would not be legal."""
    blank = False
    call = window.call([sizes], [prefix], zero=False)
    if any(call.averaged_rows()):
        blank = True
        call = window.call([sizes], [prefix], zero=True)
    version = (expressing_versions(call) or ("v2",))[0]
    if call.violations(version=version) or any(call.averaged_rows()):
        return None
    (region,) = call.regions()
    blank = blank or bool(region.empty_rows(sizes[0]))
    cost = price_call(call, weights=weights).nanoseconds - weights.launch_ns
    return Shape(region, cost, blank)


def windows(layout: str, most: int) -> Iterator[Window]:
    """Yield every mode and window of a layout that differ in rectangles of up to most x most."""
    yield Window(layout, 0, masked=False)
    for mode in (2, 3, 6):
        yield Window(layout, mode)
    ends = range(-most, most + 1)
    for pre, next_ in product(ends, ends):
        yield Window(layout, 4, pre=pre, next=next_)
    if layout == "TND":
        for mode, next_ in product((7, 8), ends):
            yield Window(layout, mode, next=next_)


@dataclass(frozen=True)
class Family:
    """The spots that one call may hold together."""

    window: Window
    spots: tuple[Spot, ...]
    apart: tuple[Spot, ...] = ()
    """Those that modes 7 and 8 treat apart: the last, and the first, that has queries."""


@dataclass(frozen=True)
class Walk:
    """Whether a call gathers its queries, and its keys and values; and whether it is merged."""

    queries: bool
    keys: bool
    merged: bool = True


ALONE = Walk(False, False, merged=False)
WALKS = (ALONE, *(Walk(*pair) for pair in product((False, True), repeat=2)))

Trail = tuple[Spot, ...]
Made = tuple[Window, Walk, Trail]
"""A call of a cover: its window, how it finds its tokens, and its spots in order."""


class Search:
    """The cheapest cover of every set of cells of one small score matrix."""

    def __init__(self, sizes: Sizes, weights: Chip, blank_parts: bool = False) -> None:
        self.sizes = sizes
        self.weights = weights
        self.blank_parts = blank_parts
        self.count = 1 << prod(sizes)

    # -- spots ---------------------------------------------------------------------------

    def blocks(self) -> Iterator[Ends]:
        """Yield every rectangle, those without queries or without keys too."""
        q_len, kv_len = self.sizes
        rows = [(a, b) for a in range(q_len + 1) for b in range(a, q_len + 1)]
        keys = [(a, b) for a in range(kv_len + 1) for b in range(a, kv_len + 1)]
        for (i0, i1), (j0, j1) in product(rows, keys):
            if i1 > i0 or j1 > j0:
                yield i0, i1, j0, j1

    def spots(self, window: Window, blocks: Iterable[Ends], apart: bool = False) -> Trail:
        """Return what a window computes in rectangles, where it is legal."""
        found: dict[tuple[Ends, int], Spot] = {}
        for ends in blocks:
            sizes = sizes_of(ends)
            for prefix in range(sizes[1] + 1) if window.mode == 6 else (0,):
                shape = shape_of(window, sizes, prefix, self.weights)
                if shape is not None:
                    cells = bits(shape.region, self.sizes[1], ends[::2])
                    spot = Spot(ends, prefix, cells, shape.cost, shape.blank, apart)
                    found.setdefault((ends, cells), spot)
        return tuple(found.values())

    @cached_property
    def families(self) -> tuple[Family, ...]:
        """Every family, but those whose spots another one has, too."""
        blocks, most = list(self.blocks()), max(self.sizes)
        found: dict[object, Family] = {}

        def add(family: Family) -> None:
            if family.spots or family.apart:
                found.setdefault((family.spots, family.apart), family)

        for window in windows("TND", most):
            if window.mode in (7, 8):
                rest = Window("TND", 3 if window.mode == 7 else 2)
                full = [ends for ends in blocks if all(sizes_of(ends))]
                apart = self.spots(window, full, apart=True)
                add(Family(window, self.spots(rest, blocks), apart))
            else:
                add(Family(window, self.spots(window, blocks)))
        packed = [set(family.spots) for family in found.values() if not family.apart]
        by_size = defaultdict(list)
        for ends in blocks:
            if all(sizes_of(ends)):
                by_size[sizes_of(ends)].append(ends)
        for window, same in product(windows("BSND", most), by_size.values()):
            spots = self.spots(window, same)
            if not any(known.issuperset(spots) for known in packed):
                add(Family(window, spots))
        return tuple(found.values())

    # -- one call ------------------------------------------------------------------------

    def price(self, spot: Spot, walk: Walk) -> float:
        """Return what a spot adds to the price of its call."""
        rows, keys = spot.block.sizes
        moved = MERGE_BYTES * rows * walk.merged
        moved += 2 * DTYPE.itemsize * (rows * walk.queries + 2 * keys * walk.keys)
        return spot.cost + moved * DIM / self.weights.bytes_per_ns

    def fixed(self, walk: Walk) -> float:
        """Return the launches of a call."""
        small = walk.merged * (MERGE_LAUNCHES + walk.queries + 2 * walk.keys)
        return self.weights.launch_ns + small * self.weights.small_launch_ns

    def usable(self, spots: Trail, walk: Walk) -> Trail:
        """Return the spots that a call may have that is merged, or not."""
        if self.blank_parts or not walk.merged:
            return spots
        return tuple(spot for spot in spots if not spot.blank)

    def scattered(self, family: Family, walk: Walk) -> Costs:
        """Return the least price of disjoint spots in any order, for every set of cells."""
        costs = np.full(self.count, inf)
        costs[0] = 0.0
        least = self._least(family.spots, walk)
        for bit in reversed(range(prod(self.sizes))):
            sets = np.arange(1 << bit, self.count, 2 << bit)  # those whose lowest bit it is
            best = costs[sets]
            for cells, (cost, _) in least.items():
                if cells & -cells == 1 << bit:
                    holds = (sets & cells) == cells
                    best[holds] = np.minimum(best[holds], cost + costs[sets[holds] ^ cells])
            costs[sets] = best
        if not family.apart:
            return costs
        sets, best = np.arange(self.count), np.full(self.count, inf)
        for cells, (cost, _) in self._least(family.apart, walk).items():
            holds = (sets & cells) == cells
            best[holds] = np.minimum(best[holds], cost + costs[sets[holds] ^ cells])
        return best

    def _least(self, spots: Trail, walk: Walk) -> dict[int, tuple[float, Spot]]:
        least: dict[int, tuple[float, Spot]] = {}
        for spot in self.usable(spots, walk):
            price = self.price(spot, walk)
            if spot.cells and (spot.cells not in least or price < least[spot.cells][0]):
                least[spot.cells] = (price, spot)
        return least

    def chained(self, family: Family, walk: Walk) -> dict[int, tuple[float, Trail]]:
        """Return the cheapest spots that follow each other through all tokens in place."""
        q_len, kv_len = self.sizes
        steps = defaultdict(list)
        for spot in self.usable((*family.spots, *family.apart), walk):
            i0, i1, j0, j1 = spot.ends
            start = (0 if walk.queries else i0, 0 if walk.keys else j0)
            stop = (0 if walk.queries else i1, 0 if walk.keys else j1)
            if start != stop:
                steps[start].append((stop, self.price(spot, walk), spot))
        goal = (0 if walk.queries else q_len, 0 if walk.keys else kv_len)
        known: dict[tuple[Sizes, bool], dict[int, tuple[float, Trail]]] = defaultdict(dict)
        known[(0, 0), False][0] = (0.0, ())
        for at in steps if walk.merged else ():  # a part may start and stop anywhere
            known[at, False][0] = (0.0, ())
        for at in product(range(goal[0] + 1), range(goal[1] + 1)):
            for done in (False, True):
                for stop, price, spot in steps[at]:
                    if family.apart and not _in_turn(family.window.mode, spot, done):
                        continue
                    there = known[stop, done or spot.apart]
                    for cells, (cost, trail) in known[at, done].items():
                        if cells & spot.cells:
                            continue
                        old = there.get(cells | spot.cells)
                        if old is None or cost + price < old[0]:
                            there[cells | spot.cells] = (cost + price, (*trail, spot))
        if not walk.merged:
            return known[goal, bool(family.apart)]
        best: dict[int, tuple[float, Trail]] = {}
        for (_, done), found in known.items():
            for cells, (cost, trail) in found.items():
                if done == bool(family.apart) and cost < best.get(cells, (inf,))[0]:
                    best[cells] = (cost, trail)
        return best

    def calls_of(self, family: Family, walk: Walk) -> Costs:
        """Return the price of the cheapest call on each set of cells."""
        if walk.queries and walk.keys:
            return self.scattered(family, walk) + self.fixed(walk)
        costs = np.full(self.count, inf)
        if walk.merged or family.window.layout == "TND":
            for cells, (cost, _) in self.chained(family, walk).items():
                costs[cells] = cost + self.fixed(walk)
            return costs
        for spot in family.spots:  # a dense call that needs no merge is one score matrix
            if spot.block.sizes == self.sizes:
                costs[spot.cells] = self.price(spot, walk) + self.fixed(walk)
        return costs

    @cached_property
    def _calls(self) -> dict[bool, tuple[Costs, npt.NDArray[np.int64]]]:
        """The cheapest call on each set, and which family and walk it has: merged, or alone."""
        found = {}
        for merged in (False, True):
            best, which = np.full(self.count, inf), np.full(self.count, -1)
            for n, (family, walk) in enumerate(product(self.families, WALKS)):
                if walk.merged is merged:
                    costs = self.calls_of(family, walk)
                    better = costs < best
                    best[better], which[better] = costs[better], n
            found[merged] = (best, which)
        return found

    # -- covers --------------------------------------------------------------------------

    @cached_property
    def _covers(self) -> Costs:
        """The price of the cheapest disjoint calls that are merged, for every set of cells."""
        calls, _ = self._calls[True]
        best: Costs = calls.copy()
        best[0] = 0.0
        for cells in range(1, self.count):
            rest = _subsets(cells & (cells - 1))  # the lowest cell is in the first call
            best[cells] = (calls[cells ^ rest] + best[rest]).min()
        return best

    def least(self, cells: int) -> float:
        """Return the price of the cheapest legal cover of a set of cells."""
        return float(min(self._calls[False][0][cells], self._covers[cells]))

    def cover(self, cells: int) -> list[Made]:
        """Return the calls of the cheapest cover."""
        alone, _ = self._calls[False]
        if alone[cells] <= self._covers[cells]:
            return [self._made(cells, merged=False)]
        calls, best, made = self._calls[True][0], self._covers, []
        while cells:
            rest = _subsets(cells & (cells - 1))
            left = int(rest[np.argmin(calls[cells ^ rest] + best[rest])])
            made.append(self._made(cells ^ left, merged=True))
            cells = left
        return made

    def _made(self, cells: int, merged: bool) -> Made:
        which = int(self._calls[merged][1][cells])
        family, walk = self.families[which // len(WALKS)], WALKS[which % len(WALKS)]
        if walk.queries and walk.keys:
            return family.window, walk, self._scatter(family, walk, cells)
        if walk.merged or family.window.layout == "TND":
            return family.window, walk, self.chained(family, walk)[cells][1]
        whole = (s for s in family.spots if s.cells == cells and s.block.sizes == self.sizes)
        return family.window, walk, (next(whole),)

    def _scatter(self, family: Family, walk: Walk, cells: int) -> Trail:
        plain = Family(family.window, family.spots)
        costs, trail = self.scattered(plain, walk), []
        known = [spot for _, spot in self._least(family.spots, walk).values()]

        def cheapest(spots: Iterable[Spot], left: int) -> Spot:
            inside = [spot for spot in spots if spot.cells & ~left == 0]
            return min(inside, key=lambda s: self.price(s, walk) + costs[left ^ s.cells])

        apart = [spot for _, spot in self._least(family.apart, walk).values()]
        first = [cheapest(apart, cells)] if apart else []
        left = cells ^ (first[0].cells if first else 0)
        while left:
            trail.append(cheapest((s for s in known if s.cells & left & -left), left))
            left ^= trail[-1].cells
        return (*trail, *first) if family.window.mode == 7 else (*first, *trail)

    def built(self, cells: int) -> Solution:
        """Return the cheapest cover as the planner's own records, every call in full."""
        request = request_of(cells, self.sizes)
        launches = []
        for window, walk, trail in self.cover(cells):
            sizes = [spot.block.sizes for spot in trail]
            call = window.call(sizes, [s.prefix for s in trail], any(s.blank for s in trail))
            blocks = tuple(spot.block for spot in trail)
            targets = tuple(
                region_of(s.cells, self.sizes).cut(s.ends[:2], s.ends[2:]) for s in trail
            )
            launch = Launch(f"mode {window.mode}", call, blocks, targets, request.token_starts)
            launches.append(replace(launch, kv_heads=(0,)).as_part() if walk.merged else launch)
        return Solution(tuple(launches))


def _in_turn(mode: int, spot: Spot, done: bool) -> bool:
    """Whether a spot may stand here: mode 7's own is the last with queries, mode 8's the first."""
    if spot.apart:
        return not done
    return not spot.block.sizes[0] or done == (mode == 8)


@cache
def _subsets(cells: int) -> npt.NDArray[np.int32]:
    """Return every subset of a set, itself and the empty one included."""
    found = np.zeros(1, dtype=np.int32)
    while cells:
        found = np.concatenate((found, found | (cells & -cells)))
        cells &= cells - 1
    return found
