"""Parting rows into gathered sequences: images make up the region, and none could be fewer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import pytest

from attnkit.geometry import Region, Slice
from attnkit.planner import staircases
from attnkit.planner.grouping import Segment, group
from attnkit.planner.in_place import in_place
from attnkit.planner.sequences import Block
from attnkit.planner.staircases import partitions
from attnkit.ranges import are_distinct


def region_of(rows: list[int]) -> Region:
    """The region whose row i has the keys that are bits of ``rows[i]``."""
    return Region.from_rows([list(runs_of(row)) for row in rows])


def runs_of(keys: int) -> Iterator[tuple[int, int]]:
    at = 0
    while keys >> at:
        if keys >> at & 1:
            start = at
            while keys >> at & 1:
                at += 1
            yield start, at
        at += 1


def wrong(region: Region, segments: tuple[Segment, ...]) -> str:
    """Say why segments are not a partition of the region's rows; empty if they are."""
    images = []
    for one in segments:
        if not are_distinct(one.block.rows, 1 << 20) or not are_distinct(one.block.keys, 1 << 20):
            return f"{one} has a row or a key twice"
        images.append(one.block.image(Region.of(one.target)))
    whole = Region.union(images)
    if whole != region:
        return f"they are {whole} and not {region}"
    rows = sorted(row for one in segments for some in one.block.rows for row in some)
    if rows != [row for strip in region.strips for row in range(strip.i0, strip.i1)]:
        return "a row is in two of them, or one without keys in one"
    return ""


def fewest_chains(rows: list[int]) -> int:
    """A minimum path cover by trying every follower of every row."""
    rows = [row for row in rows if row]

    def links(k: int, taken: frozenset[int]) -> int:
        if k == len(rows):
            return 0
        best = links(k + 1, taken)
        for n, row in enumerate(rows):
            new = row & ~rows[k]
            if n not in taken and row & rows[k] == rows[k] and new and not new & (new - 1):
                best = max(best, 1 + links(k + 1, taken | {n}))
        return best

    return len(rows) - links(0, frozenset())


def is_class(one: Segment) -> bool:
    return one.lo is None and one.hi is None


def is_chain(one: Segment) -> bool:
    return one.rows == 1 or (one.lo is None and one.hi == one.keys - one.rows)


def check(rows: list[int]) -> None:
    region = region_of(rows)
    found = list(partitions(region))
    assert bool(found) == bool(region)
    for segments in found:
        assert not wrong(region, segments), (rows, wrong(region, segments))
    if region:
        classes = [len(some) for some in found if all(map(is_class, some))]
        assert min(classes) == len({row for row in rows if row}), rows
        chains = [len(some) for some in found if all(map(is_chain, some))]
        assert min(chains) == fewest_chains(rows), rows


def steps_at_random(seed: int, count: int = 6, keys: int = 6) -> list[int]:
    """Rows of which many have a key more than another, in any order."""
    chance = random.Random(seed)
    rows = [chance.getrandbits(keys)]
    while len(rows) < count:
        rows.append(chance.choice(rows) ^ 1 << chance.randrange(keys))
    chance.shuffle(rows)
    return rows


def test_every_small_mask() -> None:
    for q_len, kv_len in ((1, 4), (2, 4), (3, 4), (4, 2)):
        for rows in product(range(1 << kv_len), repeat=q_len):
            check(list(rows))
    chance = random.Random(0)
    for _ in range(500):
        check([chance.getrandbits(4) for _ in range(4)])
    for seed in range(150):
        check(steps_at_random(seed))


def bands_at_random(seed: int) -> Region:
    """A band and a few keys or corners, or what they leave: strips of every kind."""
    chance = random.Random(seed)
    size = chance.choice([7, 11, 16])
    lo = chance.randint(-size // 2, size // 2)
    parts = [Slice(0, size, 0, size, lo, lo + chance.randint(0, 6))]
    for _ in range(chance.randint(0, 3)):
        (i0, i1), (j0, j1) = (sorted(chance.sample(range(size + 1), 2)) for _ in range(2))
        parts.append(Slice(i0, i1, j0, j1, chance.choice([None, j0 - i0]), None))
        parts.append(Slice(0, size, j0, j0 + 1))
    region = Region.of(*parts)
    return Region.full(size, size) - region if chance.random() < 0.4 else region


@pytest.mark.parametrize("few_rows", [0, 40, 256])
def test_strips_of_every_kind(few_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether strips are taken whole, or row by row."""
    monkeypatch.setattr(staircases, "_FEW_ROWS", few_rows)
    slid = 0
    for seed in range(250):
        region = bands_at_random(seed)
        found = list(partitions(region))
        assert bool(found) == bool(region)
        for segments in found:
            assert not wrong(region, segments), (seed, wrong(region, segments))
            slid += any(one.lo is not None for one in segments)
    assert slid > 50


def interleaved(documents: int, block: int, length: int) -> Region:
    """Causal documents whose blocks take turns."""
    rows = []
    for i in range(length):
        own = range(i // block % documents * block, i // block * block, documents * block)
        runs = [(start, start + block) for start in own]
        rows.append([*runs, (i // block * block, i + 1)])
    return Region.from_rows(rows)


def drafts(parents: list[int], prefix: int) -> Region:
    """Drafted tokens see a prefix, their ancestors and themselves."""
    rows: list[int] = []
    for k, parent in enumerate(parents):
        own = (1 << prefix) - 1 if parent < 0 else rows[parent]
        rows.append(own | 1 << prefix + k)
    return region_of(rows)


def test_documents_that_take_turns_are_a_chain_each() -> None:
    first, *_ = partitions(interleaved(8, 16, 1024))
    assert len(first) == 8
    assert sum(one.keys for one in first) == 1024
    (calls,) = group(first)[:1]
    assert [window.mode for window, _ in calls] == [3]


def test_a_tree_takes_as_many_chains_as_it_has_leaves() -> None:
    chance = random.Random(1)
    for count in (5, 40, 300):
        parents = [chance.randrange(max(-1, k - 6), k) if k else -1 for k in range(count)]
        leaves = count - len({parent for parent in parents if parent >= 0})
        found = [some for some in partitions(drafts(parents, 64)) if all(map(is_chain, some))]
        assert min(map(len, found)) == leaves


def test_a_sink_stands_in_the_middle_of_a_window() -> None:
    window, sink = Slice(0, 4096, 0, 4096, -255, 0), Slice(0, 4096, 0, 4, hi=0)
    slides, *_ = partitions(Region.of(window, sink))
    assert len(slides) == 16
    middle = slides[5].block
    assert [len(keys) for keys in middle.keys] == [256, 4, 255]
    assert middle.keys[1] == range(4)
    (calls,) = group(slides)[:1]  # the rows that grow to the window are in the same call
    assert [(one.mode, one.pre, one.next) for one, _ in calls] == [(4, 259, 0)]


def test_blocks_are_found_by_their_strips() -> None:
    chance = random.Random(2)
    table = [sorted(chance.sample(range(64), 9)) for _ in range(16)] * 2
    parts = [
        Slice(i * 64, i * 64 + 64, j * 64, j * 64 + 64) for i, row in enumerate(table) for j in row
    ]
    region = Region.of(*parts)
    (classes,) = partitions(region)
    assert len(classes) == 16
    assert classes[0].block.rows == (range(64), range(1024, 1088))
    assert not wrong(region, classes)
    assert list(partitions(region)) == [classes]


def test_too_many_rows_are_left_to_others() -> None:
    """Seven keys that all move, row by row: as many sequences as rows."""
    band = Slice(0, 8192, 0, 8192, 0, 0)
    every = Region.union(Region.of(band).shift(0, 64 * k) for k in range(7))
    assert list(partitions(every)) == []


def plant(change: Callable[[Segment], Segment]) -> str:
    region = interleaved(2, 4, 32)
    first, *others = next(partitions(region))
    return wrong(region, (change(first), *others))


def test_the_check_sees_what_is_planted() -> None:
    def keys(change: Callable[[tuple[range, ...]], tuple[range, ...]]) -> str:
        def changed(one: Segment) -> Segment:
            return replace(one, block=Block(0, one.block.rows, change(one.block.keys)))

        return plant(changed)

    assert not plant(lambda one: one)
    assert "they are" in keys(lambda own: own[::-1])
    assert "twice" in keys(lambda own: (*own[:-1], own[0]))
    assert "they are" in keys(lambda own: (range(40, 44), *own[1:]))
    assert "they are" in plant(lambda one: replace(one, hi=None))
    assert "they are" in plant(lambda one: replace(one, block=Block(0, (), ())))


def test_pieces_in_place_are_a_partition_too() -> None:
    """Cut where rows leave off, a chain keeps its triangle and a slide its band."""
    chance, cut, banded = random.Random(8), 0, 0
    for _ in range(1500):
        region = region_of([chance.choice([1, 3, 6, 7, 12, 14, 15, 31]) for _ in range(8)])
        for way in partitions(region):
            pieces = in_place(way)
            assert not wrong(region, pieces)
            if pieces == tuple(sorted(way, key=lambda one: (one.block.batch, one.block.ends))):
                continue
            cut += 1
            banded += any(one.hi is not None for one in pieces)
            assert all(len(one.block.rows) == 1 for one in pieces)
            assert sum(one.keys for one in pieces) <= sum(one.keys + one.rows for one in way)
    assert cut > 200
    assert banded > 50
    banded_slide = Segment(Block(0, (range(2), range(4, 6)), (range(6),)), 0, 2)
    first, last = in_place([banded_slide])
    assert (first.block.keys, first.lo, first.hi) == ((range(4),), 0, 2)
    assert (last.block.keys, last.lo, last.hi) == ((range(2, 6),), 0, 2)
