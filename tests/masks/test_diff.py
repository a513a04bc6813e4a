"""Two masks or stacks compared: what is found is the first cell of their dense masks."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

import attnkit as ak
from attnkit import masks
from attnkit.errors import CompositionError, CompositionTypeError

SOME = [
    masks.Full(),
    masks.Causal(),
    masks.Causal("top_left"),
    masks.SlidingWindow(3),
    masks.Band(3, 0),
    masks.Padding([5, 3]),
    masks.PerHead([masks.Causal(), masks.SlidingWindow(3), masks.Causal()]),
    masks.Dilated(2) & masks.SlidingWindow(3),
    masks.Dilated(2) & masks.Band(3, 0),
    masks.Predicate(lambda b, h, i, j: (i + b) % 3 <= (j * h) % 5, 2, 3),
]


@pytest.mark.parametrize(("q_len", "kv_len"), [(5, 5), (4, 7)])
def test_the_first_cell_is_that_of_the_dense_masks(q_len, kv_len):
    for a, b in [*combinations(SOME, 2), *((one, one) for one in SOME)]:
        found = masks.diff(a, b, q_len, kv_len, batch=2, heads=3)
        cells = [one.materialize(q_len, kv_len, 2, 3) for one in (a, b)]
        unlike = torch.nonzero(cells[0] ^ cells[1])
        assert found.equal == (not len(unlike)), (a, b)
        if found.first is not None:
            first = found.first
            at = first.batch, first.head, first.i, first.j
            assert list(at) == unlike[0].tolist(), (a, b)
            assert bool(cells[0][at]) == (first.allowed_by == "a")
            assert first.cells == (cells[0] ^ cells[1])[at[:2]].sum()
            assert f"query {first.i} sees key {first.j}" in str(found)


def test_a_million_rows_are_compared_without_cells():
    n = 1 << 20
    window = masks.Causal() & masks.SlidingWindow(4096)
    equal = masks.diff(window, masks.Band(4095, 0), n)
    assert equal.equal
    assert equal.read == 0
    other = masks.diff(window, masks.Band(4096, 0), n)
    assert (other.first.i, other.first.j, other.first.allowed_by) == (4096, 0, "b")
    assert other.first.cells == n - 4096


def test_what_is_no_region_is_read_inside_of_its_bounds():
    n = 4096
    a, b = (masks.Dilated(2) & masks.SlidingWindow(w) for w in (64, 66))
    found = masks.diff(a, b, n)
    assert not found.equal
    assert found.read < n * n / 8
    assert found.first.i == 64


def test_stacks_are_compared_layer_by_layer():
    window, causal = masks.SlidingWindow(4), masks.Causal()
    a = {"h.0": window, "h.1": causal, "h.2": None}
    assert masks.diff(a, [masks.Band(3, 0), causal, masks.Full()], 9).equal
    found = masks.diff(a, [window, window, masks.Columns(1)], 9)
    assert found.differing == ("h.1", "h.2")
    assert found.layers == 3
    assert found.message.startswith("2 of 3 layers differ (h.1, h.2); first: layer h.1, ")
    with pytest.raises(CompositionError, match="3 layers in a"):
        masks.diff(a, [window], 9)


def test_models_of_attnkit_are_compared_by_their_layers():
    def model(*layers):
        return nn.Sequential(*(ak.Attention(2, 8, mask=mask) for mask in layers))

    window = masks.SlidingWindow(8)
    a = model(window, masks.Causal())
    assert masks.diff(a, model(masks.Band(7, 0), masks.Causal()), 32).equal
    found = masks.diff(a, model(masks.Band(8, 0), masks.Causal()), 32)
    assert (found.differing, found.first.i) == (("0",), 8)
    assert masks.diff(a, [window, masks.Causal()], 32).equal
    with pytest.raises(CompositionError, match="no submodule"):
        masks.diff(nn.Linear(2, 2), a, 32)


def test_lengths_are_the_masks_own_where_they_have_some():
    dense = masks.Dense.keep(torch.ones(6, 8).bool())
    assert masks.diff(dense, masks.Full()).equal
    assert "at 6 x 8" in masks.diff(dense, masks.Full()).message
    with pytest.raises(CompositionError, match="nothing says q_len"):
        masks.diff(masks.Causal(), masks.Full())
    with pytest.raises(CompositionError, match="built for"):
        masks.diff(dense, masks.Full(), 7, 8)
    with pytest.raises(CompositionError, match="batch=2 and batch=3"):
        masks.diff(masks.Padding([1, 2]), masks.Padding([1, 2, 3]), 4)


def test_a_difference_has_no_truth_value():
    found = masks.diff(masks.Causal(), masks.Full(), 4)
    with pytest.raises(CompositionTypeError, match=r"found\.equal"):
        bool(found)
    with pytest.raises(CompositionTypeError, match="takes a mask"):
        masks.diff(masks.Causal(), "causal", 4)
