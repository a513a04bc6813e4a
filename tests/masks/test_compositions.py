"""The algebra of masks is the algebra of sets.

At all lengths up to 6: the sets of all families and their complements, all compositions of two
out of 25 of them, and every one of these joined with each of the 25. Deeper ones are random.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import masks
from attnkit.geometry import Region
from tests.masks.oracle import (
    ALIGNS,
    SIZES,
    Case,
    anchored_cases,
    cases,
    first_difference,
    formula_bits,
    free_cases,
    region_bits,
)


def joined(sign, x, y):
    """Combine two cases, masks and formulas alike."""
    if sign == "&":
        return Case(x.mask & y.mask, lambda c: x.formula(c) and y.formula(c))
    if sign == "|":
        return Case(x.mask | y.mask, lambda c: x.formula(c) or y.formula(c))
    return Case(x.mask - y.mask, lambda c: x.formula(c) and not y.formula(c))


def region_atoms(q_len, kv_len):
    """The distinct sets that single masks give at one size: bits, mask."""
    found = {}
    for case in cases(q_len, kv_len):
        if case.mask.heads is None and case.mask.is_region(q_len, kv_len):
            found.setdefault(formula_bits(case.formula, q_len, kv_len), case.mask)
    return found


def on_bits(sign, a, b):
    return a & b if sign == "&" else a | b if sign == "|" else a & ~b


def on_sets(sign, a, b):
    return a & b if sign == "&" else a | b if sign == "|" else a - b


class Sets:
    """One region for each set of cells; another form of the same cells is a failure."""

    def __init__(self, q_len, kv_len):
        self.size = q_len, kv_len
        self.known = {}

    def meet(self, bits: int, region: Region) -> bool:
        """Compare with what these cells gave before; return whether they are new."""
        if bits in self.known:
            assert region == self.known[bits]
            return False
        assert region_bits(region, *self.size) == bits
        self.known[bits] = region
        return True


def first_two_levels(q_len, kv_len):
    """Compose masks, check regions, and return the distinct sets by level."""
    atoms = region_atoms(q_len, kv_len)
    everything = (1 << q_len * kv_len) - 1
    sets = Sets(q_len, kv_len)
    for bits, mask in atoms.items():
        sets.meet(bits, mask.region(q_len, kv_len))
        sets.meet(everything & ~bits, (~mask).region(q_len, kv_len))
    few = [list(atoms.items())[k * len(atoms) // 25] for k in range(25)]
    for (a, x), (b, y) in product(few, few):
        for sign in "&|-" if x != y and x.batches in (None, y.batches or x.batches) else "":
            sets.meet(on_bits(sign, a, b), on_sets(sign, x, y).region(q_len, kv_len))
    return dict(few), sets


@pytest.mark.parametrize(("q_len", "kv_len"), SIZES)
def test_compositions_of_two(q_len, kv_len):
    first_two_levels(q_len, kv_len)


@pytest.mark.sweep
@pytest.mark.parametrize(("q_len", "kv_len"), SIZES)
def test_compositions_of_three(q_len, kv_len):
    atoms, sets = first_two_levels(q_len, kv_len)
    pairs = list(sets.known.items())
    for b, y in [(b, mask.region(q_len, kv_len)) for b, mask in atoms.items()]:
        for a, x in pairs:
            for sign in "&|-":
                sets.meet(on_bits(sign, a, b), on_sets(sign, x, y))


@pytest.mark.parametrize("size", [(0, 3), (3, 0), (1, 1), (2, 5), (5, 2), (4, 4)])
def test_materialized_compositions_of_two(size):
    """All families, the opaque ones included, with their batches and heads."""
    kinds = {type(case.mask): case for case in cases(*size)}.values()
    for x, y in product(kinds, kinds):
        pairs = ((x.mask.batches, y.mask.batches), (x.mask.heads, y.mask.heads))
        if x is y or any(None not in pair and len(set(pair)) > 1 for pair in pairs):
            continue
        for sign in "&|-":
            case = joined(sign, x, y)
            assert first_difference(case, *size) is None, case.mask


composable = [c for align in ALIGNS for c in anchored_cases(align)] + list(free_cases())
composable = [c for c in composable if c.mask.batches is None and c.mask.heads is None]


def deeper(inner):
    return st.one_of(
        inner.map(lambda x: Case(~x.mask, lambda c: not x.formula(c))),
        st.builds(joined, st.sampled_from("&|-"), inner, inner),
    )


compositions = st.recursive(st.sampled_from(composable), deeper, max_leaves=6)


@given(compositions, st.integers(0, 14), st.integers(0, 14))
def test_random_compositions_are_their_formula(case, q_len, kv_len):
    assert first_difference(case, q_len, kv_len) is None


@given(compositions, st.data())
def test_random_cuts_are_their_formula(case, data):
    q_len, kv_len = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    i0, j0 = data.draw(st.integers(0, q_len)), data.draw(st.integers(0, kv_len))
    i1, j1 = data.draw(st.integers(i0, q_len)), data.draw(st.integers(j0, kv_len))

    def formula(c):
        return case.formula(c._replace(i=c.i + i0, j=c.j + j0, q_len=q_len, kv_len=kv_len))

    cut = case.mask.cut((i0, i1), (j0, j1), q_len=q_len, kv_len=kv_len)
    assert cut.extent == (i1 - i0, j1 - j0)
    assert first_difference(Case(cut, formula), i1 - i0, j1 - j0) is None
    to_the_end = Case(case.mask[i0:, j0:], formula)
    assert first_difference(to_the_end, q_len - i0, kv_len - j0) is None


def test_decoding_cuts_the_last_rows():
    assert masks.Causal()[7:, :].region(1, 8) == masks.Causal().region(1, 8)
    window = masks.SlidingWindow(3)
    assert window[7:, :].region(1, 8) == window.region(8, 8).cut((7, 8), (0, 8))


def test_a_cut_of_a_cut():
    mask = masks.Documents([3, 2, 4])
    twice = mask[2:, 2:][1:, 1:]
    assert twice.extent == (6, 6)
    assert twice.region(6, 6) == mask.region(9, 9).cut((3, 9), (3, 9))


def test_a_cut_of_a_mask_that_knows_no_lengths():
    assert masks.Columns(1, 3)[0:4, 2:5].region(4, 3).area == 4
    assert masks.Padding([4, 1])[:, 0:2].region(3, 2, batch=0).area == 6
    opaque = masks.Predicate(lambda b, h, i, j: i != j) & masks.Padding([9])
    assert opaque[0:2, 1:3].materialize(2, 2)[0, 0].tolist() == [[True, True], [False, True]]


def test_an_empty_cut_is_a_matrix_without_cells():
    cut = masks.Causal().cut((2, 2), (0, 4), q_len=0 + 2, kv_len=4)
    assert cut.extent == (0, 4)
    assert masks.Causal().cut((0, None), (0, None), q_len=0, kv_len=3).extent == (0, 3)


def test_masks_of_papers_that_are_compositions():
    """Sparse Transformer (Child et al., 2019), both patterns, as its formulas have them."""
    i, j = torch.arange(40)[:, None], torch.arange(40)
    length, summary = 8, 3
    strided = masks.Causal() & (masks.SlidingWindow(length) | masks.Dilated(length))
    near = (i - j < length) | ((i - j) % length == 0)
    assert strided.materialize(40, 40)[0, 0].equal((j <= i) & near)
    ends = [(k + length - summary, k + length) for k in range(0, 40, length)]
    fixed = masks.Causal() & (masks.Chunked(length) | masks.Keys(ends))
    near = (i // length == j // length) | (j % length >= length - summary)
    assert fixed.materialize(40, 40)[0, 0].equal((j <= i) & near)
