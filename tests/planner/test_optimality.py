"""Small sizes, searched in full: no legal cover is cheaper than the plan, or the gap is known.

The brute force (`bruteforce`) prices every legal cover whose keys lie side by side, as `cuts` make
them, by the planner's own price; how few sequences gather their keys is tested apart. Covers that
read a mask of one entry per cell are left out on both sides: at such sizes one of them is
cheaper than any two calls, which the last test weighs. Weights matter: on the shipped ones a
launch outweighs everything at such sizes; on CELLS, whose tiles are 2 x 2, the cells that a
cover computes do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.backends import make_plan
from attnkit.geometry import Region
from attnkit.kernel import AttenMask, KernelCall, TensorSpec
from attnkit.planner import Launch, cuts, lower, price, proof
from attnkit.planner import search as searching
from attnkit.planner.calls import tile_whole
from attnkit.planner.price import Chip, chip
from tests.planner.bruteforce import DIM, Search, Sizes, bits, region_of, request_of

pytestmark = pytest.mark.usefixtures("no_full_masks", "side_by_side", "merged")

SHIPPED = chip()
CELLS = Chip(
    name="cells",
    calibrated=False,
    source="made up: one computed cell is 1 ns, a launch half of one",
    tile_q=2,
    tile_kv=2,
    flops_per_ns=4.0 * DIM,
    bytes_per_ns=1000.0,
    launch_ns=0.5,
    small_launch_ns=0.05,
)

ATOMS = (
    masks.Causal(),
    masks.SlidingWindow(2),
    masks.Band(1, 1),
    masks.Columns(0, 1),
    masks.Rows(2, 3),
    masks.Prefix(2),
    masks.Chunked(2),
    masks.BlockCausal(2),
    masks.Documents([1, 3]),
)
N = 4
TINY = tuple(product(range(1, 4), range(1, 4)))

Sets = dict[Sizes, tuple[int, ...]]


@cache
def every_tiny_set() -> Sets:
    """Every set of cells, but the empty one, of every matrix up to 3 x 3."""
    return {sizes: tuple(range(1, 1 << (sizes[0] * sizes[1]))) for sizes in TINY}


@cache
def compositions() -> Sets:
    """Every set that three atoms make at N x N."""
    known: dict[Region, None] = {}
    atoms = [mask.region(N, N) for mask in ATOMS]
    level = atoms
    for _ in range(2):
        for a, b in product(level, atoms):
            known.update(dict.fromkeys(one for one in (a, a & b, a | b, a - b) if one))
        level = list(known)
    return {(N, N): tuple(bits(region, N) for region in level)}


@dataclass
class Comparison:
    """How many sets were compared, and those whose plan is dearer than a legal cover."""

    sets: int = 0
    gaps: list[tuple[float, Sizes, int]] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest ratio of a plan's price to the least."""
        return max((ratio for ratio, _, _ in self.gaps), default=1.0)

    def __str__(self) -> str:
        if not self.gaps:
            return f"{self.sets} sets, no gap"
        ratio, (q_len, kv_len), cells = max(self.gaps)
        told = masks.Slices.of(region_of(cells, (q_len, kv_len)), q_len, kv_len)
        return (
            f"{self.sets} sets, {len(self.gaps)} with a gap, the largest x {ratio:.7g}:\n"
            f"{told.show(q_len, kv_len)}"
        )


def compare(sets: Sets, weights: Chip, blank_parts: bool = False) -> Comparison:
    """Compare plans with the cheapest covers; a plan below one would be a fault of the search."""
    found = Comparison()
    for sizes, targets in sets.items():
        search = Search(sizes, weights, blank_parts)
        for cells in targets:
            plan = make_plan(request_of(cells, sizes), "emulated")
            assert plan.price is not None
            ratio = plan.price.nanoseconds / search.least(cells)
            assert ratio > 1 - 1e-9, f"the search has missed {plan}"
            found.sets += 1
            if ratio > 1 + 1e-9:
                found.gaps.append((ratio, sizes, cells))
    print(f"{weights.name}: {found}")
    return found


@pytest.fixture
def weigh(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Chip], None]]:
    """weigh(chip) makes the planner use these weights."""

    def use(weights: Chip) -> None:
        monkeypatch.setattr(price, "chip", lambda: weights)
        forget()

    yield use
    monkeypatch.undo()
    forget()


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Price every part as one that is merged, as the brute force does, where none would be."""
    lowering = sys.modules["attnkit.planner.lower"]
    monkeypatch.setattr(lowering, "_without_merge", lambda request, launches: tuple(launches))


def forget() -> None:
    for cached in (make_plan, lower):
        cached.cache_clear()


Weigh = Callable[[Chip], None]


def test_no_legal_cover_is_cheaper_on_the_shipped_weights(weigh: Weigh) -> None:
    """A gap is below a nanosecond: as many calls and sequences, whose keys are fewer bytes."""
    weigh(SHIPPED)
    tiny, larger = compare(every_tiny_set(), SHIPPED), compare(compositions(), SHIPPED)
    assert (tiny.sets, len(tiny.gaps)) == (673, 4)
    assert (larger.sets, len(larger.gaps)) == (309, 6)
    assert max(tiny.worst, larger.worst) < 1.00001


@pytest.mark.sweep
def test_the_gap_where_cells_are_dear(weigh: Weigh) -> None:
    """Plans have the fewest calls for a cut; where a launch is cheap, more would be cheaper."""
    weigh(CELLS)
    tiny, larger = compare(every_tiny_set(), CELLS), compare(compositions(), CELLS)
    assert (tiny.sets, len(tiny.gaps), round(tiny.worst, 3)) == (673, 90, 1.356)
    assert (larger.sets, len(larger.gaps), round(larger.worst, 3)) == (309, 102, 1.615)


@pytest.mark.sweep
def test_the_gap_to_parts_with_rows_of_no_key(weigh: Weigh) -> None:
    """Such rows between a call's others would spare a copy; no part of a plan has any."""
    weigh(SHIPPED)
    found = compare(every_tiny_set(), SHIPPED, blank_parts=True)
    assert (len(found.gaps), round(found.worst, 3)) == (38, 1.088)


@pytest.mark.sweep
def test_the_gap_without_rectangles(weigh: Weigh, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut into rectangles is for a few rows only; this is what larger regions do without."""
    monkeypatch.setattr(cuts, "_FEW_RUNS", 0)
    weigh(SHIPPED)
    found = compare(compositions(), SHIPPED)
    assert (len(found.gaps), round(found.worst, 3)) == (93, 1.807)


@pytest.mark.parametrize("weights", [SHIPPED, CELLS], ids=lambda weights: weights.name)
def test_a_planner_that_tries_one_cut_is_noticed(
    weigh: Weigh, monkeypatch: pytest.MonkeyPatch, weights: Chip
) -> None:
    tiny = {(3, 3): every_tiny_set()[3, 3][::7]}
    weigh(weights)
    before = compare(tiny, weights)
    monkeypatch.setattr(searching, "_MOST_CUTS", 1)
    forget()
    after = compare(tiny, weights)
    assert len(after.gaps) > len(before.gaps)
    assert after.worst > before.worst + 0.1


@pytest.mark.parametrize("weights", [SHIPPED, CELLS], ids=lambda weights: weights.name)
def test_the_covers_are_legal_and_cost_what_the_search_says(weights: Chip, weigh: Weigh) -> None:
    """Every cover of the search, built as real calls: proven, legal, and priced again."""
    weigh(weights)
    search = Search((3, 3), weights)
    for cells in every_tiny_set()[3, 3]:
        solution = search.built(cells)
        request = request_of(cells, search.sizes)
        assert proof.disprove_places(request, solution.launches) is None
        assert proof.disprove_cover(request, solution.launches) is None
        assert not any(
            call.violations(version="v3") for call in (one.call for one in solution.launches)
        )
        assert solution.price.nanoseconds == pytest.approx(search.least(cells), rel=1e-12)


def shown(rows: Iterable[str]) -> int:
    return int("".join(rows)[::-1].replace(".", "0").replace("#", "1"), 2)


def test_the_search_finds_what_is_known() -> None:
    """One call for a triangle; several for what no window is, with no row or key copied."""
    search = Search((3, 3), SHIPPED)
    (window, walk, trail), *rest = search.cover(shown(["#..", "##.", "###"]))
    assert (rest, window.mode in (2, 3, 4, 6), walk.merged, len(trail)) == ([], True, False, 1)
    (window, walk, trail), *rest = search.cover(shown(["#.#", "###", "#.#"]))
    assert (rest, window.masked, walk.merged, walk.keys) == ([], False, True, False)
    assert sorted(spot.block.sizes for spot in trail) == [(1, 1), (3, 1), (3, 1)]


@pytest.mark.parametrize("batch", [1, 3])
def test_plans_of_tiny_sets_compute_them(batch: int) -> None:
    """Outputs and gradients, with pieces of several batch elements in one call."""
    torch.manual_seed(0)
    for cells in every_tiny_set()[3, 3][:: 7 * batch]:
        mask = masks.Slices.of(region_of(cells, (3, 3)), 3, 3)
        given = [torch.randn(batch, 3, 2, 4, dtype=torch.float64) * 30 for _ in range(4)]
        found = []
        for backend in ("reference", "emulated"):
            q, k, v = (tensor.clone().requires_grad_() for tensor in given[:3])
            out = ak.attention(q, k, v, mask=mask, backend=backend)
            assert isinstance(out, torch.Tensor)
            found.append([out, *torch.autograd.grad(out, (q, k, v), given[3])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def full_masks(cells: int, sizes: Sizes, weights: Chip) -> float:
    """The least price of one call that reads a mask of one entry per cell, over all windows."""
    (q_len, kv_len), target = sizes, region_of(cells, sizes)
    mask = AttenMask.full(sizes, [target])
    zero = {"inner_precise": 2} if target.empty_rows(q_len) else {}
    plain = request_of(cells, sizes)
    query, key, value = (TensorSpec(s, plain.dtype) for s in plain.shapes())
    ways: list[dict[str, Any]] = [{"sparse_mode": 1}]
    ways += [{"pre_tokens": pre, "next_tokens": n} for pre in range(q_len) for n in range(kv_len)]
    ways += [{"sparse_mode": 5, "prefix": (n,)} for n in range(kv_len + 1)]
    prices = []
    for way in ways:
        call = KernelCall(
            query, key, value, 1, "BSND", scale=plain.scale, atten_mask=mask, **zero, **way
        )
        blocks, starts = tile_whole(1, [sizes]), plain.token_starts
        launch = Launch("", call, blocks, (target,), starts)
        if proof.disprove(plain, launch) is None and not call.violations(version="v2"):
            prices.append(price.price_call(call, weights=weights).nanoseconds)
    return min(prices)


@pytest.mark.parametrize("weights", [SHIPPED, CELLS], ids=lambda weights: weights.name)
def test_no_full_mask_is_cheaper_than_the_plan(
    weigh: Weigh, monkeypatch: pytest.MonkeyPatch, weights: Chip
) -> None:
    """In the matrix's own layout; a packed one, which drops rows, may be cheaper still."""
    monkeypatch.setattr(sys.modules["attnkit.planner.lower"], "MOST_MASK_CELLS", 2**24)
    weigh(weights)
    sizes = (3, 3)
    masked = 0
    for cells in every_tiny_set()[sizes][::5]:
        plan = make_plan(request_of(cells, sizes), "emulated")
        assert plan.price is not None
        masked += any(c.atten_mask is not None and c.atten_mask.kind == "full" for c in plan.calls)
        with_mask = full_masks(cells, sizes, weights)
        assert plan.price.nanoseconds <= with_mask * (1 + 1e-9)
    assert masked
