"""Functions of indices read as sets: every form of them against its cells."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch

from attnkit import masks
from attnkit.geometry import Region
from attnkit.masks.relations import TooManyRuns, compare
from attnkit.masks.symbolic import symbolic
from attnkit.masks.symbols import Extent

N = 10
IDS = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0, 0, -1])
DOCS = torch.tensor([0] * 4 + [1] * 6, dtype=torch.int32)
OFFSETS = torch.tensor([0, 4, 10])
LENGTHS = torch.tensor([3, 5], dtype=torch.int32)
EXISTS = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 0, 0], [1] * 8 + [0] * 2]).bool()
PLACES = torch.tensor([[9, 3, 4, 1, 1, 0, 7, 2, 8, 8]]).expand(2, N)


def causal(b, h, i, j):
    return i >= j


def natten(b, h, i, j):
    x, y = (i // 4).clamp(1, 1), (i % 4).clamp(1, 2)
    return ((x - j // 4).abs() <= 1) & ((y - j % 4).abs() <= 1)


UNDERSTOOD = {
    "causal": causal,
    "mirrored": lambda b, h, i, j: j <= i,
    "window": lambda b, h, i, j: (i - j < 4) & (i >= j),
    "window of positions": lambda b, h, i, j: PLACES[b, i] - PLACES[b, j] <= 2,
    "both sides": lambda b, h, i, j: (i - j).abs() <= 2,
    "not near": lambda b, h, i, j: torch.abs(i - j) > 2,
    "documents": lambda b, h, i, j: (IDS[i] == IDS[j]) & (i >= j),
    "others": lambda b, h, i, j: IDS[i] != IDS[j],
    "ids of none": lambda b, h, i, j: (IDS[i] == IDS[j]) & (IDS[i] >= 0),
    "later ids": lambda b, h, i, j: IDS[i] < IDS[j],
    "prefix": lambda b, h, i, j: (i >= j) | (j < LENGTHS[b]),
    "padding": lambda b, h, i, j: (i >= j) & EXISTS[b, j],
    "token types": lambda b, h, i, j: EXISTS[b, i] == EXISTS[b, j],
    "chunks": lambda b, h, i, j: i // 3 == j // 3,
    "blocks": lambda b, h, i, j: torch.div(i, 3, rounding_mode="floor") >= j // 3,
    "inside of documents": lambda b, h, i, j: (
        (DOCS[i] == DOCS[j]) & causal(b, h, i - OFFSETS[DOCS[i]], j - OFFSETS[DOCS[j]])
    ),
    "all": lambda b, h, i, j: i.new_ones((), dtype=torch.bool),
    "none": lambda b, h, i, j: b.new_zeros((), dtype=torch.bool),
    "chosen": lambda b, h, i, j: torch.where(i < 4, j < 6, i >= j),
    "by head": lambda b, h, i, j: (i - j < h + 2) & (i >= j),
    "functions": lambda b, h, i, j: torch.logical_and(torch.ge(i, j), ~(IDS[j] == 2)),
    "floats": lambda b, h, i, j: IDS[i].float() * 0.5 <= IDS[j].double(),
    "neither": lambda b, h, i, j: ~((i < j) | torch.logical_not(j > 1)),
    "xor": lambda b, h, i, j: (i > 3) ^ (j > 3) ^ (i >= j),
    "offsets": lambda b, h, i, j: 2 - i + j <= 1 + (-j) - (-j),
    "neighbourhood": natten,
    "global": lambda b, h, i, j: (i < 1) | (j < 1) | ((i - j).abs() < 2),
    "late numbers": lambda b, h, i, j: i - 5 >= j.to(torch.int64) - LENGTHS[b],
}
NOT_UNDERSTOOD = {
    "dilated": lambda b, h, i, j: (i - j) % 2 == 0,
    "products": lambda b, h, i, j: i * j < 9,
    "a table": lambda b, h, i, j: EXISTS[i % 2, j],
    "rounded sums": lambda b, h, i, j: i * 0.5 - j < 1,
    "bytes that begin anew": lambda b, h, i, j: i.to(torch.uint8) - j.to(torch.uint8) > 200,
    "rows of features": lambda b, h, i, j: (PLACES.T[i] * 1).sum(-1) > j,
}


def cells(fn, q_len=N, kv_len=N, **offsets):
    mask = masks.Predicate(fn, 2, 2)
    return mask.materialize(q_len, kv_len, 2, 2)


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_what_a_function_says_is_read_from_it(name):
    fn = UNDERSTOOD[name]
    want = cells(fn)
    for b in range(2):
        for h in range(2):
            region = symbolic(fn, Extent(N, N), b, h)
            assert region is not None
            assert masks.Slices.of(region, N, N).materialize(N, N)[0, 0].equal(want[b, h])
            cut = symbolic(fn, Extent(3, 4, 5, 2), b, h)
            assert cut == region.cut((5, 8), (2, 6))


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_everything_else_is_left_to_its_cells(name):
    fn = NOT_UNDERSTOOD[name]
    assert symbolic(fn, Extent(N, N)) is None
    found = masks.recover(fn, N, N, batch=2, heads=2)
    assert found.mask.materialize(N, N, 2, 2).equal(cells(fn))


def test_a_function_that_treats_indices_otherwise_is_found_out():
    """It asks what it is given; no reading of it can be trusted, so some rows are compared."""

    def sly(b, h, i, j):
        return i >= j if isinstance(i, torch.Tensor) else i < j

    assert symbolic(sly, Extent(N, N)) is None
    assert masks.recover(sly, N, N).mask == masks.Causal()


def test_recover_says_how_it_knows():
    found = masks.recover(causal, N, N)
    assert found.exact
    assert "comparisons of rows with keys" in found.reason
    assert "cells read" in masks.recover(NOT_UNDERSTOOD["products"], N, N).reason


def test_a_million_rows_are_read_without_a_matrix():
    n = 1 << 20
    region = symbolic(lambda b, h, i, j: (i >= j) & (i - j < 256), Extent(n, n))
    assert region == masks.SlidingWindow(256).region(n, n)


@pytest.mark.parametrize("order", ["le", "ge", "eq", "lt", "gt", "ne"])
def test_numbers_are_compared_whatever_their_order(order):
    drawn = np.random.default_rng(0)
    for sort in range(40):
        rows, keys = (drawn.integers(0, drawn.integers(1, 9), drawn.integers(0, 9)) for _ in "rk")
        rows = np.sort(rows) if sort & 1 else rows
        keys = np.sort(keys)[:: -1 if sort & 4 else 1] if sort & 2 else keys
        want = getattr(operator, order)(rows[:, None], keys)
        region = compare(rows, order, keys)
        assert region.area == want.sum()
        assert all((i, j) in region for i, j in np.argwhere(want).tolist())


def test_too_many_runs_are_no_small_set():
    noise = np.random.default_rng(0).permutation(1 << 12)
    with pytest.raises(TooManyRuns):
        compare(noise, "le", noise)
    assert compare(noise, "eq", noise).area == 1 << 12
    assert compare(np.zeros(0), "le", noise) == Region.empty()
