"""From cells to regions: both ways to read them, against rows taken one by one."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from attnkit import masks
from attnkit.errors import CompositionError
from attnkit.geometry import Region
from attnkit.masks import runs
from attnkit.masks.runs import Runs, read_cells


def by_rows(cells):
    framed = np.pad(cells.astype(int), ((0, 0), (1, 1)))
    ends = [np.flatnonzero(np.diff(row)).tolist() for row in framed]
    return Region.from_rows([list(zip(row[::2], row[1::2], strict=True)) for row in ends])


def drawn(rng, height, width):
    """A few slices, one over the other, or noise."""
    if rng.random() < 0.2:
        return np.random.default_rng(rng.randrange(1 << 30)).random((height, width)) < 0.5
    cells = np.zeros((height, width), dtype=bool)
    i, j = np.ogrid[:height, :width]
    for _ in range(rng.randint(1, 4)):
        (i0, i1), (j0, j1) = (sorted(rng.choices(range(n + 1), k=2)) for n in (height, width))
        low, high = sorted(rng.choices(range(-height, width + 1), k=2))
        cells ^= (i0 <= i) & (i < i1) & (j0 <= j) & (j < j1) & (low <= j - i) & (j - i <= high)
    return cells


def test_both_ways_to_read_cells_find_the_region(monkeypatch):
    monkeypatch.setattr(runs, "_FEW_CELLS", 0)
    monkeypatch.setattr(runs, "_SPARSE", 0)
    rng, compared = random.Random(0), 0
    for _ in range(1500):
        cells = drawn(rng, rng.randint(1, 24), 8 * rng.randint(1, 4))
        want = by_rows(cells)
        assert Runs.of_cells(cells).region() == want
        found = read_cells(cells)
        compared += isinstance(found, Region)
        assert (found if isinstance(found, Region) else found.region()) == want
    assert 800 < compared < 1500


@pytest.mark.parametrize("keep", [True, False])
def test_a_long_tensor_is_compared_row_by_row(keep):
    n = 1024
    for mask in (masks.Causal(), masks.Documents([300, 24, 700]) & masks.SlidingWindow(50)):
        cells = mask.materialize(n, n)[0, 0]
        found = masks.recover(cells if keep else ~cells, keep=keep)
        assert found.region == mask.region(n, n)
        assert found.mask == mask


def test_a_bool_may_be_any_byte():
    """`view(torch.bool)` of bytes that are not 0 or 1: all but 0 are True."""
    cells = masks.Causal().materialize(256, 256)[0, 0]
    strange = (cells.to(torch.uint8) * torch.arange(1, 257).clamp(max=255).byte()).view(torch.bool)
    assert masks.recover(strange).region == masks.Causal().region(256, 256)


def test_a_function_of_a_cache_that_slides():
    found = masks.recover(lambda b, h, i, j: i - j < 8, 4, 12, q_offset=20, kv_offset=12)
    want = torch.arange(20, 24)[:, None] - torch.arange(12, 24) < 8
    assert found.mask.materialize(4, 12)[0, 0].equal(want)
    with pytest.raises(CompositionError, match="kv_offset"):
        masks.recover(torch.ones(2, 2).bool(), kv_offset=1)
