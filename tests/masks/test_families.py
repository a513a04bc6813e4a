"""Every family is its docstring's formula, as a region and as a tensor, at every small size."""

from __future__ import annotations

import pytest
import torch

from attnkit import masks
from tests.masks.oracle import ALIGNS, SIZES, Case, cases, first_difference


@pytest.mark.parametrize(("q_len", "kv_len"), SIZES)
def test_every_family_is_its_formula(q_len, kv_len):
    for case in cases(q_len, kv_len):
        assert first_difference(case, q_len, kv_len) is None, case.mask


@pytest.mark.parametrize(("q_len", "kv_len"), [(4, 4), (2, 5), (0, 3)])
def test_what_batch_elements_share_is_what_each_has(q_len, kv_len):
    each = [case.mask for case in cases(q_len, kv_len)]
    apart = [mask for mask in each if mask.batches == 3 and mask.heads is None]
    joined = [a & b | c for a, b, c in zip(each, apart * 9, apart[::-1] * 9, strict=False)
              if a.batches in (None, 3) and a.heads is None]  # fmt: skip
    assert len(joined) > 20
    for mask in [*each, *joined, *(~mask for mask in joined)]:
        count = mask.batches or 3
        shared = mask.enclosures(q_len, kv_len, count)
        assert shared == [mask.enclosure(q_len, kv_len, b) for b in range(count)]


def test_every_registered_family_is_proven():
    proven = {type(case.mask).__name__ for case in cases(4, 4)}
    made_by_the_algebra = {"And", "Or", "Not", "Cut", "Taken", "OfHeads"}
    registered = {family.__name__ for _, family in masks.MASKS.items()}
    assert registered - made_by_the_algebra <= proven


PLANTED = [
    Case(masks.Causal(), lambda c: c.j < c.p("bottom_right")),
    Case(masks.Causal(), lambda c: c.j <= c.p("top_left")),
    Case(masks.Causal("top_left"), lambda c: c.j <= c.p("bottom_right")),
    Case(masks.SlidingWindow(2), lambda c: c.p(ALIGNS[0]) - 2 <= c.j <= c.p(ALIGNS[0])),
    Case(masks.SlidingWindow(2), lambda c: c.p(ALIGNS[0]) - 2 < c.j <= c.p(ALIGNS[0]) + 1),
    Case(masks.Band(1, 1), lambda c: c.p(ALIGNS[0]) - 1 < c.j <= c.p(ALIGNS[0]) + 1),
    Case(masks.Band(1, 1), lambda c: c.p(ALIGNS[0]) - 1 <= c.j < c.p(ALIGNS[0]) + 1),
    Case(masks.Chunked(2), lambda c: (c.j + 1) // 2 == (c.p(ALIGNS[0]) + 1) // 2),
    Case(masks.BlockCausal(2), lambda c: c.j // 2 < c.p(ALIGNS[0]) // 2),
    Case(masks.Chunked(2, phase=1), lambda c: c.j // 2 == c.p(ALIGNS[0]) // 2),
    Case(masks.BlockCausal(2, before=1), lambda c: c.j // 2 <= c.p(ALIGNS[0]) // 2),
    Case(masks.Keys([(0, 2), (3, None)]), lambda c: c.j != 3),
    Case(masks.SameId([(0, 2), (1, 1), (0, 2)]), lambda c: (c.i < 2) == (c.j < 2)),
    Case(masks.Blocks("#.# .## ###", 2, 2, q_len=5, kv_len=5), lambda c: c.i // 2 != c.j // 2),
    Case(masks.Blocks("#", 5, 5, causal=True), lambda c: c.j < c.p(ALIGNS[0])),
    Case(masks.Tree([-1, 0, 0, 1, 1]), lambda c: c.j <= c.i),
    Case(masks.Placed(masks.Causal(), 1), lambda c: 1 <= c.j <= c.i + 1),
    Case(masks.Placed(masks.Full(), 1, 1), lambda c: c.i > 0 and c.j > 0),
    Case(masks.SlidingTiles(5, 1, 3), lambda c: abs(c.i - c.j) <= 1),
    Case(masks.ShiftedWindows(5, 1), lambda c: abs(c.i - c.j) <= 1),
    Case(masks.Neighborhood(5, 3), lambda c: abs(c.i - c.j) <= 1),
    Case(masks.Dilated(3), lambda c: (c.p(ALIGNS[0]) - c.j) % 3 == 1),
    Case(masks.Columns(1, 3), lambda c: 1 <= c.j <= 3),
    Case(masks.Rows(1, 3), lambda c: 1 < c.i < 3),
    Case(masks.Prefix(2), lambda c: c.j <= 2),
    Case(masks.Documents((2, 3)), lambda c: (c.i < 3) == (c.j < 3)),
    Case(masks.Padding((3,)), lambda c: c.j <= 3),
    Case(masks.Padding((3,), "left"), lambda c: c.j > c.kv_len - 3),
    Case(masks.Full(), lambda c: c.i + c.j < 8),
    Case(masks.Slices([(0, 5, 0, 5, -4, 0)], 5, 5), lambda c: c.j < c.i),
    Case(masks.PerHead([masks.Causal(), masks.Full()]), lambda c: c.h == 0 or c.j <= c.i),
    Case(masks.PerBatch([masks.Causal(), masks.Full()]), lambda c: c.b == 0 or c.j <= c.i),
]


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: repr(case.mask))
def test_a_planted_fault_is_found(case):
    sizes = [(5, 5)] if case.mask.extent != (None, None) else [(5, 5), (3, 5), (5, 3)]
    assert any(first_difference(case, *size) is not None for size in sizes)


@pytest.mark.parametrize("align", ALIGNS)
def test_empty_rows_of_causal(align):
    rows = masks.Causal(align).region(5, 3).empty_rows(5)
    assert rows == (((0, 2),) if align == "bottom_right" else ())


def test_materialize_spreads_over_batch_and_heads():
    drawn = masks.Padding([1, 3]).materialize(2, 3, batch=2, heads=4)
    assert drawn.shape == (2, 4, 2, 3)
    assert drawn[0].sum() == 4 * 2 * 1
    assert drawn[1].sum() == 4 * 2 * 3
    assert masks.Full().materialize(2, 3, batch=0).shape == (0, 1, 2, 3)
    assert masks.Causal().materialize(2, 3, device="meta").device.type == "meta"


def test_outer_bounds_are_kept_through_the_algebra():
    window = masks.SlidingWindow(256)
    for opaque in (masks.Dilated(2), masks.Predicate(lambda b, h, i, j: i != j)):
        outer = (opaque & window).outer(4096, 4096)
        assert outer == window.region(4096, 4096)
        assert (masks.Full() - opaque).outer(8, 8).area == 64
    assert (masks.Dilated(2) & masks.Rows(9)).region(4, 4).area == 0
    assert (masks.Dilated(2) | masks.Full()).is_region(4, 4)
    assert not masks.PerHead([masks.Full(), masks.Dilated(2)]).is_region(4, 4)


def test_numbers_that_change_with_each_token_are_known_by_their_cells():
    ids = torch.arange(512) % 2
    mask = masks.SameId.of(ids)
    assert not mask.is_region(512, 512)
    assert mask.outer(512, 512).area == 512 * 512
    assert mask.materialize(512, 512)[0, 0].equal(ids[:, None] == ids)
    some = masks.SameId.of(torch.where(torch.arange(512) < 8, -1, ids))
    assert some.outer(512, 512).area == 504 * 504
    rows = masks.SameId.of(torch.arange(512) // 16 % 4)
    assert rows.is_region(512, 512)


def test_keys_to_the_end_are_the_same_set_as_keys_are_added():
    mask = masks.Keys([(0, 2), (4, None)])
    assert not mask.anchored
    assert all(mask._extends(4, longer, 0, 0) for longer in (5, 9))


def test_a_dense_mask_recovers_its_region_and_its_band():
    cells = masks.SlidingWindow(3).materialize(6, 8)[0, 0]
    assert masks.Dense.keep(cells).region(6, 8) == masks.SlidingWindow(3).region(6, 8)
    assert masks.Dense.drop(~cells) == masks.Dense.keep(cells)
    scattered = torch.ones(300, 300).tril().bool()
    scattered[:, ::2] = False
    mask = masks.Dense.keep(scattered)
    assert not mask.is_region(300, 300)
    assert mask.outer(300, 300) <= masks.Causal().region(300, 300)
    assert mask.materialize(300, 300).equal(scattered[None, None])


def test_a_dense_mask_is_a_copy():
    cells = torch.ones(3, 3, dtype=torch.bool)
    mask = masks.Dense.keep(cells)
    cells[0] = False
    assert mask.region(3, 3).area == 9


def test_dense_planes_that_start_inside_a_byte():
    cells = torch.rand(3, 5, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    assert masks.Dense.keep(cells).materialize(3, 3, 3, 5).equal(cells)


@pytest.mark.parametrize("wrap", [list, tuple, torch.tensor, lambda x: torch.tensor(x).numpy()])
def test_documents_from_every_form(wrap):
    expected = masks.Documents((2, 1, 3))
    assert masks.Documents(wrap([2, 1, 3])) == expected
    assert masks.Documents.from_ids(wrap([4, 4, 0, 7, 7, 7])) == expected
    assert masks.Documents.from_cu_seqlens(wrap([0, 2, 3, 6])) == expected
    rows = [[5, 5, 6], [1, 2, 3]]
    assert masks.Documents.from_ids(wrap(rows)) == masks.Documents(((2, 1), (1, 1, 1)))
    assert masks.Documents(wrap([[2, 1], [3, 0]])) == masks.Documents(((2, 1), (3, 0)))
    cross = masks.Documents.from_cu_seqlens(wrap([0, 2, 3]), wrap([0, 1, 5]))
    assert cross == masks.Documents((2, 1), (1, 4))
    assert masks.Documents((2, 1), (2, 1)) == masks.Documents((2, 1))
