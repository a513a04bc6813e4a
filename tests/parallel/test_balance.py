"""Shardings that are even in tokens and in cells: all masks of a table at all small sizes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnkit as ak
from attnkit import masks
from attnkit.geometry import Region
from attnkit.layouts import SeqLens
from attnkit.parallel import Sharding
from attnkit.parallel.balance import WITHIN, balanced, candidates, even, keys_of, line
from attnkit.parallel.load import Load, load_of
from attnkit.parallel.sharding import even_sizes
from attnkit.ranges import Ranges, in_order, total, without

CAUSAL, WINDOW = masks.Causal(), masks.SlidingWindow(3)


def documents(length: int) -> masks.Mask:
    """Documents of 1, 2, 3, ... tokens."""
    lengths, left = [], length
    while left:
        lengths.append(min(left, len(lengths) + 1))
        left -= lengths[-1]
    return masks.Documents(lengths or [0])


def some(kind: type[masks.Mask], start: int, stop: int) -> masks.Mask:
    """Rows or columns, which may be none."""
    return kind(start, stop) if start < stop else ~masks.Full()


MASKS: dict[str, Callable[[int], masks.Mask]] = {
    "full": lambda n: masks.Full(),
    "nothing": lambda n: ~masks.Full(),
    "causal": lambda n: CAUSAL,
    "window": lambda n: WINDOW,
    "itself": lambda n: masks.SlidingWindow(1),
    "the others": lambda n: masks.Band(None, -1) | masks.Band(-1, None),
    "what comes": lambda n: masks.Band(0, None),
    "the next": lambda n: masks.Band(-2, 2),
    "sink and window": lambda n: CAUSAL & (WINDOW | some(masks.Columns, 0, 1)),
    "prefix-LM": lambda n: CAUSAL | some(masks.Columns, 0, n // 3),
    "documents": documents,
    "documents, causal": lambda n: documents(n) & CAUSAL,
    "chunks": lambda n: masks.Chunked(4),
    "block causal": lambda n: masks.BlockCausal(3),
    "global rows": lambda n: WINDOW | some(masks.Rows, n // 2, min(n, n // 2 + 2)),
    "some rows alone": lambda n: CAUSAL & some(masks.Rows, n // 3, n // 2),
    "dilated, which is no region": lambda n: masks.Dilated(2) & CAUSAL,
    "of each head": lambda n: masks.PerHead([CAUSAL, WINDOW, masks.Full()]),
    "of each element": lambda n: masks.Padding([n, n // 2]) & CAUSAL,
}
SIZES = [(n, p) for n in (*range(10), 13, 16, 31) for p in (1, 2, 3, 5, 8)]


def counted(mask: masks.Mask, q_len: int, kv_len: int) -> torch.Tensor:
    """Return the cells of each row, over all heads and elements, by looking at each."""
    known = [
        mask.outer(q_len, kv_len, b, h)
        for b, h in product(range(mask.batches or 1), range(mask.heads or 1))
    ]
    rows = [[sum(b - a for one in known for a, b in one.row(i))] for i in range(q_len)]
    return torch.tensor(rows, dtype=torch.int64).view(-1)


def bound(load: Load, sharding: Sharding, within: float) -> None:
    """Assert what `even` promises."""
    counts = [load.at(row) for row in range(load.length)]
    ranks = sharding.size
    half = (max(counts) - min(counts)) / 2 if counts else 0
    more = half * (1 + 2 * sum(1 / k for k in range(1, ranks)))
    for rank, cells in enumerate(load.of_ranks(sharding)):
        mean = load.total * sharding.sizes[rank] / max(load.length, 1)
        assert cells <= (1 + within) ** 2 * mean + (1 + within) * more + 1e-6


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_a_load_has_the_cells_of_each_row_and_the_borders_of_blocks(
    make: Callable[[int], masks.Mask],
) -> None:
    for length in sorted({n for n, _ in SIZES}):
        mask = make(length)
        load = load_of([mask], length)
        counts = counted(mask, length, length).tolist()
        if length == 1:  # heads that are alike count once
            counts = [load.at(0)]
        assert [load.at(row) for row in range(length)] == counts
        assert [load.before(row) for row in range(length + 1)] == [
            sum(counts[:row]) for row in range(length + 1)
        ]
        assert load.exact == mask.is_region(length, length)
        places = product(range(mask.batches or 1), range(mask.heads or 1))
        planes = [mask.outer(length, length, *place) for place in places]
        apart = [b for b in range(1, length) if all(_parted(one, length, b) for one in planes)]
        assert [b for one in load.borders for b in one] == apart


def _parted(region: Region, length: int, border: int) -> bool:
    above = [stop for i in range(border) for _, stop in region.row(i)]
    below = [start for i in range(border, length) for start, _ in region.row(i)]
    return max(above, default=0) <= min(below, default=length)


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("within", [0.0, WITHIN, 0.3])
def test_even_is_a_partition_even_in_tokens_and_in_cells(
    make: Callable[[int], masks.Mask], within: float
) -> None:
    for length, ranks in SIZES:
        load = load_of([make(length)], length)
        found = even(load, ranks, within)
        assert found.sizes == tuple(even_sizes(length, ranks))
        bound(load, found, within)


def test_the_bound_is_one_that_other_shardings_miss() -> None:
    load = load_of([CAUSAL], 512)
    bound(load, Sharding.zigzag(512, 8), WITHIN)
    lengths = [*[4] * 32, 256, *[4] * 32]
    packed = load_of([masks.Documents(lengths)], 512)
    bound(packed, even(packed, 8), WITHIN)
    for wrong in (Sharding.contiguous(512, 8), Sharding.zigzag(512, 8)):
        with pytest.raises(AssertionError):
            bound(packed, wrong, WITHIN)


@st.composite
def loads(draw: st.DrawFn) -> Load:
    """Rows with any cells: no structure, or some."""
    counts = draw(st.lists(st.integers(0, 60), min_size=1, max_size=40))
    times = draw(st.sampled_from([1, 3, 16]))
    rows = [[(0, n)] if n else [] for n in counts for _ in range(times)]
    return Load.of({Region.from_rows(rows): draw(st.integers(1, 3))}, len(rows))


@given(loads(), st.integers(1, 24), st.sampled_from([0.0, WITHIN, 0.1]))
@settings(max_examples=150, deadline=None)
def test_any_rows_are_dealt_evenly(load: Load, ranks: int, within: float) -> None:
    found = even(load, ranks, within)
    assert found.sizes == tuple(even_sizes(load.length, ranks))
    bound(load, found, within)


@given(loads(), st.integers(1, 24), st.sampled_from([0.0, 1.0, 1e4]))
@settings(max_examples=60, deadline=None)
def test_a_line_is_even_in_time(load: Load, ranks: int, token_cells: float) -> None:
    found = line(load, ranks, token_cells)
    most = max(load.at(row) for row in range(load.length)) + token_cells
    mean = (load.total + token_cells * load.length) / ranks
    for cells, tokens in zip(load.of_ranks(found), found.sizes, strict=True):
        # A stretch that counts as its mean has rows that are little over it.
        assert cells + token_cells * tokens <= (1 + WITHIN) * (mean + most) + 1e-6


def test_even_is_zigzag_under_a_causal_mask_and_contiguous_under_a_window() -> None:
    for ranks, chunk in product((1, 2, 3, 8), (1, 4, 5)):
        length = 2 * ranks * chunk
        assert even(load_of([CAUSAL], length), ranks) == Sharding.zigzag(length, ranks)
    for mask in (masks.SlidingWindow(8), masks.Full(), masks.Chunked(64)):
        assert even(load_of([mask], 1 << 15), 8) == Sharding.contiguous(1 << 15, 8)


def test_blocks_that_fit_stay_whole() -> None:
    # Documents with a window have rows with fewer cells and rows with as many: both in one stretch.
    mask = masks.Documents([256] * 8) & masks.SlidingWindow(128)
    assert even(load_of([mask], 2048), 8) == Sharding.contiguous(2048, 8)
    lengths = [700, 90, 300, 110, 400, 448]
    region = (masks.Documents(lengths) & masks.SlidingWindow(128)).region(2048, 2048)
    dealt = even(Load.of({region: 1}, 2048), 2)
    received = [total(without(region.seen(own), own)) for own in dealt.ranks]
    assert max(received) <= 2 * 127  # of the documents that are cut, which are two


def test_rows_with_many_cells_do_not_take_up_those_with_few() -> None:
    # 16 rows that see everything, 256 that see less than others, and 32 ranks: where the rows with
    # few cells went to the first that have room for them, the others could not make up for a row.
    load = load_of([masks.SlidingWindow(256) | masks.Rows(0, 16)], 8192)
    half = 0.5 * 8192 * 32 / load.total
    assert load.imbalance(even(load, 32)) < half < 0.06


def test_layers_with_other_masks_share_a_sharding() -> None:
    window = masks.SlidingWindow(64)
    both = [CAUSAL, window]
    load = load_of(both, 512)
    rows = [load.at(row) for row in range(512)]
    assert rows == [row + 1 + min(row + 1, 64) for row in range(512)]
    shared, _ = balanced(both, 512, None, None, 4)
    assert load.imbalance(shared) < 0.01 < load.imbalance(Sharding.contiguous(512, 4))
    # Heads told apart do not make a layer count more than one where all are alike.
    apart = load_of([masks.PerHead([CAUSAL] * 3 + [window]), window], 512)
    assert apart.at(511) == 3 * 512 + 64 + 4 * 64
    assert Load.of({}, 4).lines == ((0, 4, 0, 0),)


def test_a_packed_batch_is_one_axis_of_tokens() -> None:
    lens = SeqLens([40, 3, 0, 21])
    load = load_of([CAUSAL], None, seqlens=lens)
    apart = load_of([CAUSAL & masks.Documents([40, 3, 21])], 64)
    assert load == apart
    queries, keys = balanced([CAUSAL], None, None, lens, 4)
    assert keys is queries
    bound(load, queries, WITHIN)
    # A mask of each sequence.
    each = load_of([masks.Prefix([40, 1, 0, 20])], None, seqlens=lens)
    assert [each.at(row) for row in (0, 40, 43)] == [40, 1, 20]


CROSS: dict[str, tuple[masks.Mask, int, int]] = {
    "all keys": (masks.Full(), 12, 30),
    "causal": (CAUSAL, 12, 30),
    "documents": (masks.Documents([6, 2, 4], [4, 20, 6]), 12, 30),
    "more queries than keys": (CAUSAL, 30, 12),
    "no keys": (masks.Full(), 12, 0),
}


@pytest.mark.parametrize(("mask", "q_len", "kv_len"), CROSS.values(), ids=CROSS)
def test_keys_of_cross_attention_are_even_and_few_of_them_travel(
    mask: masks.Mask, q_len: int, kv_len: int
) -> None:
    for ranks in (1, 2, 3, 5, 16):
        queries, keys = balanced([mask], q_len, kv_len, None, ranks)
        assert keys.sizes == tuple(even_sizes(kv_len, ranks))
        bound(load_of([mask], q_len, kv_len), queries, WITHIN)
        region = mask.region(q_len, kv_len)
        seen = [region.seen(rows) for rows in queries.ranks]
        assert keys == keys_of(seen, kv_len)
        assert moved(seen, keys) <= moved(seen, Sharding.contiguous(kv_len, ranks))
        simple = balanced([mask], q_len, kv_len, None, ranks, "zigzag")
        assert simple == (Sharding.zigzag(q_len, ranks), Sharding.zigzag(kv_len, ranks))


def moved(seen: Sequence[Ranges], keys: Sharding) -> int:
    return sum(total(without(a, b)) for a, b in zip(seen, keys.ranks, strict=True))


def fewest(seen: Sequence[Ranges], kv_len: int) -> int:
    """Return how many keys travel at least: the best of every way to deal them evenly."""
    sizes = tuple(even_sizes(kv_len, len(seen)))
    ways: dict[tuple[int, ...], int] = {sizes: 0}
    for key in range(kv_len):
        step: dict[tuple[int, ...], int] = {}
        who = {rank for rank, own in enumerate(seen) if any(key in one for one in own)}
        for room, cost in ways.items():
            for rank, free in enumerate(room):
                if free:
                    left = (*room[:rank], free - 1, *room[rank + 1 :])
                    now = cost + len(who - {rank})
                    step[left] = min(step.get(left, now), now)
        ways = step
    return ways[(0,) * len(seen)]


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)).map(sorted), min_size=1, max_size=4)
)
@settings(max_examples=80, deadline=None)
def test_where_each_rank_sees_a_range_the_fewest_keys_travel(spans: list[list[int]]) -> None:
    seen = [in_order((range(a, b),)) for a, b in spans]
    assert moved(seen, keys_of(seen, 7)) == fewest(seen, 7)


def test_candidates_are_every_kind_once() -> None:
    lengths = [500, 20, 20, 100, 384]
    found = candidates([masks.Documents(lengths) & CAUSAL], 1024, None, None, 4)
    assert list(found) == ["even", "contiguous", "zigzag", "line"]
    for name, pair in found.items():
        again = balanced([masks.Documents(lengths) & CAUSAL], 1024, None, None, 4, name)
        assert again == pair
    same = found["even"][0]
    assert balanced([CAUSAL], 1024, None, None, 4, same) == (same, same)
    assert next(iter(candidates([WINDOW], 64, None, None, 4))) == "even"


def test_the_order_of_regions_does_not_matter_and_loads_are_values() -> None:
    a, b = CAUSAL.region(64, 64), masks.Chunked(16).region(64, 64)
    one, other = Load.of({a: 1, b: 2}, 64), Load.of({b: 2, a: 1}, 64)
    assert one == other == pickle.loads(pickle.dumps(one))
    assert even(one, 5) == even(other, 5)


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "a kind that is none": (lambda: balanced([CAUSAL], 8, None, None, 2, "fair"), "'even'"),
    "no ranks": (lambda: balanced([CAUSAL], 8, None, None, 0), "ranks=0"),
    "a sharding of other tokens": (
        lambda: balanced([CAUSAL], 8, None, None, 2, Sharding.zigzag(9, 2)),
        "9 tokens on 2 ranks, not of 8 on 2",
    ),
    "a sharding of other ranks": (
        lambda: balanced([CAUSAL], 8, None, None, 2, Sharding.zigzag(8, 3)),
        "on 3 ranks, not of 8 on 2",
    ),
    "documents of another length": (
        lambda: balanced([masks.Documents([4, 5])], 8, None, None, 2),
        "8",
    ),
    "no length": (lambda: balanced([CAUSAL], None, None, None, 2), "tokens=None"),
    "a text for a mask": (lambda: balanced(["causal"], 8, None, None, 2), "no mask"),  # type: ignore[list-item]
    "one mask for those of layers": (lambda: load_of(CAUSAL, 8), "[mask]"),  # type: ignore[arg-type]
    "a load of other tokens": (
        lambda: load_of([CAUSAL], 8).imbalance(Sharding.zigzag(9, 2)),
        "9 tokens",
    ),
    "rows that are not": (lambda: Load.of({CAUSAL.region(9, 9): 1}, 8), "8 tokens"),
    "within that is none": (lambda: even(load_of([CAUSAL], 8), 2, within=1.0), "within=1.0"),
    "negative costs": (lambda: line(load_of([CAUSAL], 8), 2, token_cells=-1), "token_cells=-1"),
}


@pytest.mark.parametrize(("call", "told"), WRONG.values(), ids=WRONG)
def test_wrong_input_teaches(call: Callable[[], object], told: str) -> None:
    with pytest.raises(ak.CompositionError) as caught:
        call()
    assert told in str(caught.value)
