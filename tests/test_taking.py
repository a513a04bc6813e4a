"""`Region.take` against its definition, and against `Block.image`, which puts cells back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import permutations, product

from attnkit.geometry import Region, Slice
from attnkit.planner.sequences import Block
from attnkit.ranges import in_order, total


def positions(ranges) -> list[int]:
    return [position for one in ranges for position in one]


def by_definition(region: Region, rows, keys) -> Region:
    """Row by row, cell by cell."""
    found = []
    for i in positions(rows):
        seen = {j for a, b in region.row(i) for j in range(a, b)}
        at = [j in seen for j in positions(keys)]
        edges = [v for v in range(len(at) + 1) if (v < len(at) and at[v]) != (v > 0 and at[v - 1])]
        found.append(list(zip(edges[::2], edges[1::2], strict=True)))
    return Region.from_rows(found)


def disprove(region: Region, rows, keys, whole: tuple[int, int]) -> str | None:
    """Return in what way these rows and keys of a region are not what they should be."""
    found = region.take(rows, keys)
    if found != by_definition(region, rows, keys):
        return "another set"
    if not found.is_canonical:
        return "not written in its one form"
    block = Block(0, rows, keys)
    given = block.image(found)
    inside = region & block.image(Region.full(*block.sizes))
    if given != inside or found.area != inside.area:
        return "not put back where it was"
    if Region.full(*whole).take(rows, keys) != Region.full(*block.sizes):
        return "not all of a full one"
    seen = in_order(range(j, j + 1) for i in positions(rows) for a, b in region.row(i)
                    for j in range(a, b))  # fmt: skip
    if region.seen(rows) != seen:
        return "other keys are seen"
    cells = sum(b - a for i in positions(rows) for a, b in region.row(i))
    return None if region.cells(rows) == cells else "another number of cells"


def choices(length: int) -> list[tuple[range, ...]]:
    """Every way to take some of a few positions, each range rising or falling."""
    found: list[tuple[range, ...]] = [()]
    spans = [(a, b) for a in range(length) for b in range(a + 1, length + 1)]
    for count in (1, 2, 3):
        for some in permutations(spans, count):
            if any(a < d and c < b for (a, b), (c, d) in product(some, some) if (a, b) != (c, d)):
                continue
            for back in product((False, True), repeat=count):
                each = zip(some, back, strict=True)
                found.append(tuple(range(b - 1, a - 1, -1) if r else range(a, b)
                                   for (a, b), r in each if not r or b - a > 1))  # fmt: skip
    return list(dict.fromkeys(found))


def every_region(q_len: int, kv_len: int) -> Iterator[Region]:
    for cells in range(1 << q_len * kv_len):
        yield Region.of(
            *(Slice(i, i + 1, j, j + 1) for i in range(q_len) for j in range(kv_len)
              if cells >> (kv_len * i + j) & 1)
        )  # fmt: skip


def test_every_choice_of_rows_and_keys_of_every_small_set() -> None:
    some, more = choices(2), choices(3)
    assert (len(some), len(more)) == (7, 30)
    for region in every_region(2, 2):
        for pair in product(some, some):
            assert disprove(region, *pair, (2, 2)) is None, (region, pair)
    for number, region in enumerate(every_region(3, 3)):
        rng = random.Random(number)
        for _ in range(3):
            pair = rng.choice(more), rng.choice(more)
            assert disprove(region, *pair, (3, 3)) is None, (region, pair)


def drawn(rng: random.Random, q_len: int, kv_len: int) -> Region:
    parts = []
    for _ in range(rng.randint(1, 4)):
        i0, i1 = sorted(rng.sample(range(q_len + 1), 2))
        j0, j1 = sorted(rng.sample(range(kv_len + 1), 2))
        lo, hi = sorted((rng.randint(-q_len, kv_len), rng.randint(-q_len, kv_len)))
        parts.append(Slice(i0, i1, j0, j1, *rng.choice([(lo, hi), (None, hi), (lo, None), ()])))
    return Region.of(*parts)


def picked(rng: random.Random, length: int, falls: bool) -> tuple[range, ...]:
    ends = sorted(rng.sample(range(length + 1), rng.choice([2, 2, 4, 6, 8])))
    found = [range(a, b) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    found += [range(b, c) for b, c in zip(ends[1:-1:2], ends[2::2], strict=True)
              if rng.random() < 0.2]  # fmt: skip
    found.sort(key=lambda one: one.start)
    if rng.random() < 0.5:
        rng.shuffle(found)
    if falls:
        found = [one[::-1] if rng.random() < 0.3 else one for one in found]
    return tuple(found)


def test_random_ranges_of_random_regions() -> None:
    rng = random.Random(0)
    for round in range(700):
        q_len, kv_len = rng.randint(9, 24), rng.randint(9, 24)
        region = drawn(rng, q_len, kv_len)
        rows, keys = (picked(rng, n, round % 4 == 0) for n in (q_len, kv_len))
        told = disprove(region, rows, keys, (q_len, kv_len))
        assert told is None, (told, region, rows, keys)


def test_what_is_given_is_taken_back() -> None:
    rng = random.Random(1)
    for _ in range(200):
        rows, keys = picked(rng, 20, True), picked(rng, 20, True)
        sizes = total(rows), total(keys)
        if min(sizes) < 2:
            continue
        region = drawn(rng, *sizes)
        assert Block(0, rows, keys).image(region).take(rows, keys) == region


def test_its_cost_follows_ranges_and_not_positions() -> None:
    # Counted: an end is looked up for each piece of a strip, not for each row.
    n = 1 << 20
    causal = Region.of(Slice(0, n, 0, n, hi=0))
    ranges = tuple(range(k * 4096, k * 4096 + 1024) for k in range(256))
    own = causal.take(ranges, ranges)
    assert len(own.strips) == 1 == len(own.slices)
    assert own == Region.of(Slice(0, n // 4, 0, n // 4, hi=0))
    others = tuple(range(k * 4096 + 2048, k * 4096 + 2560) for k in range(256))
    assert len(causal.take(ranges, others).strips) == 255
    assert causal.take((range(n - 1, -1, -1),), (range(n - 1, -1, -1),)).area == causal.area
