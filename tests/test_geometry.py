"""Geometry against brute force: a set of cells is an int here, one bit for each cell."""

from __future__ import annotations

import copy
import pickle
import random
from itertools import pairwise, product
from operator import and_, or_, sub, xor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.geometry import Region, RowCount, Slice, TileCount

OPERATIONS = {
    "&": (and_, lambda a, b: a & b),
    "|": (or_, lambda a, b: a | b),
    "-": (sub, lambda a, b: a & ~b),
    "^": (xor, lambda a, b: a ^ b),
}


def bits_where(q_len, kv_len, allowed):
    cells = (allowed(i, j) << (i * kv_len + j) for i in range(q_len) for j in range(kv_len))
    return sum(cells)


def bits_of(region, q_len, kv_len):
    """Read a region through `row`, refusing cells outside of the grid."""
    bits = 0
    for i in range(-1, q_len + 1):
        for a, b in region.row(i):
            assert 0 <= i < q_len
            assert 0 <= a < b <= kv_len
            bits |= ((1 << (b - a)) - 1) << (i * kv_len + a)
    return bits


def region_of(bits, q_len, kv_len):
    """Build a region row by row: a function of the set of cells alone."""
    rows = []
    for i in range(q_len):
        row = [bits >> (i * kv_len + j) & 1 for j in range(kv_len)]
        edges = [j for j, (x, y) in enumerate(zip([0, *row], [*row, 0], strict=True)) if x != y]
        rows.append(list(zip(edges[::2], edges[1::2], strict=True)))
    return Region.from_rows(rows)


def cut_bits(bits, n, m, rows, keys):
    (i0, i1), (j0, j1) = rows, keys

    def allowed(i, j):
        return i + i0 < i1 and j + j0 < j1 and bits >> ((i + i0) * m + j + j0) & 1

    return bits_where(n, m, allowed)


def turned_bits(bits, n, m):
    return bits_where(m, n, lambda i, j: bits >> (j * m + i) & 1)


def all_slices(n, m):
    ends = [None, *range(-n, m + 1)]
    for i0, i1, j0, j1 in product(range(n + 1), range(n + 1), range(m + 1), range(m + 1)):
        for lo, hi in product(ends, ends):
            yield i0, i1, j0, j1, lo, hi


def slice_bits(n, m, i0, i1, j0, j1, lo, hi):
    def allowed(i, j):
        inside = i0 <= i < i1 and j0 <= j < j1
        return inside and (lo is None or j - i >= lo) and (hi is None or j - i <= hi)

    return bits_where(n, m, allowed)


@pytest.fixture(scope="module")
def slices_3x4():
    """Every slice of a 3 x 4 grid, by its cells, with all the ways to write it."""
    found = {}
    for bounds in all_slices(3, 4):
        found.setdefault(slice_bits(3, 4, *bounds), set()).add(Slice(*bounds))
    return found


# -- Slice -------------------------------------------------------------------------------------


def test_closure_gives_one_form_to_each_set(slices_3x4):
    assert all(len(forms) == 1 for forms in slices_3x4.values())
    assert slices_3x4[0] == {Slice(0, 0, 0, 0)}


def test_every_bound_of_a_slice_is_tight(slices_3x4):
    for bits, (part,) in slices_3x4.items():
        if not bits:
            continue
        cells = [(i, j) for i in range(3) for j in range(4) if bits >> (i * 4 + j) & 1]
        assert part.i0 == min(i for i, _ in cells)
        assert part.i1 == max(i for i, _ in cells) + 1
        assert part.j0 == min(j for _, j in cells)
        assert part.j1 == max(j for _, j in cells) + 1
        assert part.lo == min(j - i for i, j in cells)
        assert part.hi == max(j - i for i, j in cells)


def test_cells_area_emptiness_of_every_slice(slices_3x4):
    for bits, (part,) in slices_3x4.items():
        assert bits_where(3, 4, lambda i, j, part=part: (i, j) in part) == bits
        assert part.area == bits.bit_count()
        assert bool(part) is bool(bits)
        assert bits_of(Region.of(part), 3, 4) == bits
        box = (part.i1 - part.i0) * (part.j1 - part.j0)
        assert part.is_rectangle is (part.area == box) or not part


def test_intersection_and_inclusion_of_every_pair_of_slices(slices_3x4):
    forms = [(bits, part) for bits, (part,) in slices_3x4.items()]
    for (bits_a, a), (bits_b, b) in product(forms, forms[::3]):
        assert {a & b} == slices_3x4[bits_a & bits_b]
        assert (a <= b) is (bits_a & ~bits_b == 0)


def test_shift_and_transpose_of_every_slice(slices_3x4):
    for bits, (part,) in slices_3x4.items():
        moved = part.shift(-2, 5)
        assert moved.area == part.area
        assert moved.shift(2, -5) == part
        assert bits_of(Region.of(part).transpose(), 4, 3) == turned_bits(bits, 3, 4)
        assert Region.of(part.transpose()) == Region.of(part).transpose()


@pytest.mark.parametrize("bounds", [(None, 1, 0, 1), (0, 1.0, 0, 1), (0, 1, True, 1)])
def test_bounds_are_integers(bounds):
    with pytest.raises(CompositionTypeError, match=r"Slice got [ij][01]=.*Python ints"):
        Slice(*bounds)
    with pytest.raises(CompositionTypeError, match="None for no bound"):
        Slice(0, 1, 0, 1, lo=0.5)


# -- Region: canonical form --------------------------------------------------------------------


def test_every_subset_of_a_grid_has_one_form():
    for n, m in ((3, 3), (4, 2), (2, 4)):
        for bits in range(2 ** (n * m)):
            rows = region_of(bits, n, m)
            assert bits_of(rows, n, m) == bits
            cells = [divmod(k, m) for k in range(n * m) if bits >> k & 1]
            single = Region.of(*(Slice(i, i + 1, j, j + 1) for i, j in reversed(cells)))
            assert single == rows
            assert hash(single) == hash(rows)
            assert single.area == bits.bit_count()
            assert Region.of(*rows.slices) == rows
            assert sum(part.area for part in rows.slices) == rows.area
            assert bool(rows) is bool(bits)


def test_every_operation_on_every_pair_of_subsets():
    n, m = 3, 2
    forms = [region_of(bits, n, m) for bits in range(2 ** (n * m))]
    for (x, a), (y, b) in product(enumerate(forms), enumerate(forms)):
        for on_regions, on_bits in OPERATIONS.values():
            assert on_regions(a, b) == forms[on_bits(x, y)]
        assert (a <= b) is (x & ~y == 0)
        assert a.isdisjoint(b) is (x & y == 0)


@pytest.mark.sweep
@pytest.mark.parametrize("sign", OPERATIONS)
def test_every_operation_on_every_pair_of_subsets_of_a_wider_grid(sign):
    n, m = 4, 2
    on_regions, on_bits = OPERATIONS[sign]
    forms = [region_of(bits, n, m) for bits in range(2 ** (n * m))]
    for (x, a), (y, b) in product(enumerate(forms), enumerate(forms)):
        assert on_regions(a, b) == forms[on_bits(x, y)]


@pytest.mark.parametrize("sign", OPERATIONS)
def test_every_operation_on_pairs_of_slices(sign, slices_3x4):
    on_regions, on_bits = OPERATIONS[sign]
    forms = [(bits, Region.of(part)) for bits, (part,) in slices_3x4.items()]
    expected = {}
    for (x, a), (y, b) in product(forms, forms[:: len(forms) // 60]):
        bits = on_bits(x, y)
        if bits not in expected:
            expected[bits] = region_of(bits, 3, 4)
        assert on_regions(a, b) == expected[bits]


def test_the_brute_force_would_catch_an_off_by_one():
    """A fault planted in each bound of a band changes the cells that the tests compare."""
    right = Region.of(Slice(0, 3, 0, 4, lo=-1, hi=1))
    bits = bits_of(right, 3, 4)
    for wrong in (
        Slice(1, 3, 0, 4, -1, 1),
        Slice(0, 2, 0, 4, -1, 1),
        Slice(0, 3, 1, 4, -1, 1),
        Slice(0, 3, 0, 3, -1, 1),
        Slice(0, 3, 0, 4, 0, 1),
        Slice(0, 3, 0, 4, -1, 0),
    ):
        assert bits_of(Region.of(wrong), 3, 4) != bits
        assert Region.of(wrong) != right


# -- Region: questions and moves ---------------------------------------------------------------


def subsets():
    for n, m in ((3, 3), (2, 4), (4, 2)):
        for bits in range(2 ** (n * m)):
            yield n, m, bits, region_of(bits, n, m)


def test_cut_shift_transpose_complement_of_every_subset():
    for n, m, bits, region in subsets():
        i0, i1, j0, j1 = bits % (n + 1), n, 0, bits % (m + 1)
        cut = cut_bits(bits, n, m, (i0, i1), (j0, j1))
        assert region.cut((i0, i1), (j0, j1)) == region_of(cut, n, m)
        assert region.shift(3, -2).shift(-3, 2) == region
        assert region.shift(1, 1).cut((1, n + 1), (1, m + 1)) == region
        assert region.transpose() == region_of(turned_bits(bits, n, m), m, n)
        assert region.complement(n, m) == region_of(~bits & (1 << n * m) - 1, n, m)


def test_rows_counts_bounds_of_every_subset():
    for n, m, bits, region in subsets():
        row_bits = [bits >> i * m & (1 << m) - 1 for i in range(n)]
        counts = {}
        for i0, i1, first, step in region.row_counts():
            counts.update({i: first + step * (i - i0) for i in range(i0, i1)})
        assert counts == {i: row.bit_count() for i, row in enumerate(row_bits) if row}
        empty = [i for a, b in region.empty_rows(n) for i in range(a, b)]
        assert empty == [i for i, row in enumerate(row_bits) if not row]
        assert all(a[1] < b[0] for a, b in pairwise(region.empty_rows(n)))
        cells = [(i, j) for i in range(n) for j in range(m) if bits >> (i * m + j) & 1]
        assert all(((i, j) in region) is ((i, j) in cells) for i in range(n) for j in range(m))
        hull = region.bounds
        if not cells:
            assert hull is None
            continue
        assert (hull.lo, hull.hi) == (min(j - i for i, j in cells), max(j - i for i, j in cells))
        assert (hull.i0, hull.i1) == (cells[0][0], cells[-1][0] + 1)
        assert hull.j0 == min(j for _, j in cells)
        assert hull.j1 == max(j for _, j in cells) + 1
        assert region <= Region.of(hull)


def test_fits():
    for n, m, bits, region in subsets():
        for q_len, kv_len in product(range(n + 1), range(m + 1)):
            assert region.fits(q_len, kv_len) is (region <= Region.full(q_len, kv_len))
        assert region.shift(-1, 0).fits(9, 9) is (bits & (1 << m) - 1 == 0)
        assert region.shift(0, -m).fits(9, 9) is (bits == 0)


def brute_tiles(allowed, block_q, block_kv, q_len, kv_len):
    full = partial = empty = 0
    for i0, j0 in product(range(0, q_len, block_q), range(0, kv_len, block_kv)):
        cells = [
            (i, j) in allowed
            for i in range(i0, min(i0 + block_q, q_len))
            for j in range(j0, min(j0 + block_kv, kv_len))
        ]
        full += all(cells)
        empty += not any(cells)
        partial += any(cells) and not all(cells)
    return TileCount(full, partial, empty)


def test_tiles_of_every_subset():
    for n, m, bits, region in subsets():
        allowed = {divmod(k, m) for k in range(n * m) if bits >> k & 1}
        blocks = (1 + bits % 3, 1 + bits // 3 % 3)
        assert region.tiles(*blocks, n, m) == brute_tiles(allowed, *blocks, n, m)


@pytest.mark.parametrize("block_q", range(1, 6))
def test_tiles_of_every_band(block_q):
    n, m = 13, 11
    for lo, hi in product(range(-n, m, 3), range(-n, m, 2)):
        region = Region.of(Slice(0, n, 0, m, lo, hi))
        allowed = {(i, j) for i in range(n) for j in range(m) if lo <= j - i <= hi}
        for block_kv in (1, 2, 3, 5):
            expected = brute_tiles(allowed, block_q, block_kv, n, m)
            assert region.tiles(block_q, block_kv, n, m) == expected


def test_tiles_count_only_the_score_matrix():
    region = Region.of(Slice(-3, 9, -3, 9))
    assert region.tiles(2, 2, 4, 4) == TileCount(4, 0, 0)
    assert region.tiles(2, 2, 0, 4) == TileCount(0, 0, 0)
    with pytest.raises(CompositionError, match="block_q=0"):
        region.tiles(0, 2, 4, 4)


# -- larger, by hypothesis ---------------------------------------------------------------------

N = 24
bound = st.integers(0, N)
diagonal = st.none() | st.integers(-N, N)
slices = st.builds(Slice, bound, bound, bound, bound, diagonal, diagonal)
unions = st.lists(slices, max_size=6)


def cells_of(parts):
    return bits_where(N, N, lambda i, j: any((i, j) in part for part in parts))


@given(unions, unions)
def test_larger_unions_and_operations(a, b):
    x, y = Region.of(*a), Region.of(*reversed(b))
    bits_a, bits_b = cells_of(a), cells_of(b)
    assert x == region_of(bits_a, N, N)
    assert Region.union(Region.of(part) for part in b) == y
    for on_regions, on_bits in OPERATIONS.values():
        got = on_regions(x, y)
        assert got == region_of(on_bits(bits_a, bits_b), N, N)
        assert Region.of(*got.slices) == got
    assert x.transpose() == region_of(turned_bits(bits_a, N, N), N, N)


@given(unions, st.integers(1, 9), st.integers(1, 9), st.integers(0, N), st.integers(0, N))
def test_larger_tiles(parts, block_q, block_kv, q_len, kv_len):
    allowed = {
        (i, j) for i in range(q_len) for j in range(kv_len) if any((i, j) in p for p in parts)
    }
    expected = brute_tiles(allowed, block_q, block_kv, q_len, kv_len)
    assert Region.of(*parts).tiles(block_q, block_kv, q_len, kv_len) == expected


@given(unions, st.integers(1, 1000))
def test_scaling_a_region_scales_its_rectangles(parts, factor):
    """Areas at sizes beyond brute force: rectangles scale, and so does their union."""
    boxes = [(p.i0, p.i1, p.j0, p.j1) for p in parts]
    small = Region.of(*(Slice(*box) for box in boxes))
    large = Region.of(*(Slice(*(factor * end for end in box)) for box in boxes))
    assert large.area == small.area * factor * factor


def test_a_million_tokens_cost_what_their_slices_cost():
    n = 1 << 20
    causal = Region.of(Slice(0, n, 0, n, hi=0))
    window = Region.of(Slice(0, n, 0, n, lo=-4095, hi=0))
    ends = [k * n // 1000 for k in range(1001)]
    documents = Region.of(*(Slice(a, b, a, b) for a, b in pairwise(ends)))
    assert causal.area == n * (n + 1) // 2
    assert len(causal.strips) == 1
    assert len((causal & window).strips) == 2
    packed = documents & causal
    assert len(packed.strips) == 1000
    assert packed.area == sum((b - a) * (b - a + 1) // 2 for a, b in pairwise(ends))
    assert packed | (documents - causal) == documents
    assert window.tiles(128, 128, n, n).full == 31 * 8192 - 31 * 32 // 2


# -- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        Slice(0, 4, 0, 4, hi=0),
        Slice(0, 0, 0, 0),
        Region.empty(),
        Region.of(Slice(0, 4, 0, 4, hi=0)),
        Region.of(*(Slice(k, k + 1, 2 * k, 2 * k + 1) for k in range(6))),
        RowCount(0, 4, 1, 1),
        TileCount(1, 2, 3),
    ],
)
def test_values_copy_pickle_and_hash(value):
    for twin in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
        assert twin == value
        assert hash(twin) == hash(value)
        assert repr(twin) == repr(value)


def test_reprs():
    assert repr(Region.empty()) == "Region.empty()"
    small = Region.of(Slice(0, 2, 0, 2, hi=0))
    assert eval(repr(small)) == small
    many = Region.of(*(Slice(k, k + 1, 2 * k, 2 * k + 1) for k in range(6)))
    assert repr(many) == "<Region of 6 slices, 6 cells, rows 0:6, keys 0:11>"


def test_a_region_combines_with_regions_only():
    for operation in (and_, or_, sub, xor):
        with pytest.raises(TypeError):
            operation(Region.full(2, 2), 3)
    with pytest.raises(TypeError):
        Region.full(2, 2) <= Slice(0, 2, 0, 2)  # noqa: B015
    with pytest.raises(TypeError):
        Slice(0, 2, 0, 2) & 3


@pytest.mark.parametrize("runs", [[(1, 1)], [(0, 2), (1, 3)], [(2, 3), (0, 1)], [(0, 1), (1, 2)]])
def test_from_rows_refuses_runs_that_are_not_maximal(runs):
    with pytest.raises(CompositionError, match="in row 1; runs are"):
        Region.from_rows([[(0, 1)], runs])


def test_rows_of_many_runs_and_sets_that_share_no_row():
    """More runs than are looked through one by one, met by bands of every kind."""
    chance, size = random.Random(0), 40
    for seed in range(24):
        step = chance.choice([2, 3])
        stripes = [Slice(0, size, k, k + 1) for k in range(0, size, step)]
        if seed % 2:
            stripes = [Slice(0, size, 0, size, k, k) for k in range(-size, size, step)]
        many = Region.of(*stripes)
        (i0, i1), (j0, j1) = (sorted(chance.sample(range(size + 1), 2)) for _ in range(2))
        lo, hi = (chance.choice([None, chance.randint(-20, 20)]) for _ in range(2))
        band = Region.of(Slice(i0, i1, j0, j1, lo, hi))
        both = bits_of(many, size, size) & bits_of(band, size, size)
        assert bits_of(many & band, size, size) == bits_of(band & many, size, size) == both
        left = many - band
        assert bits_of(left, size, size) == bits_of(many, size, size) & ~both
        rows = [left & Region.of(Slice(i, i + 1, 0, size)) for i in range(size)]
        assert Region.union(Region.union(rows[k::3]) for k in range(3)) == left
        lows, highs = (
            [f(getattr(part, name) for part in left.slices) for name in names]
            for f, names in ((min, ("i0", "j0", "lo")), (max, ("i1", "j1", "hi")))
        )
        ends = [end for pair in zip(lows, highs, strict=True) for end in pair]
        assert left.bounds == Slice(*ends)
