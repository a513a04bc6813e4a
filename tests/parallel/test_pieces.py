"""Ranks on fused calls equal one process; with a bias by distance a stage is taken in pieces."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from attnkit import masks, pse
from attnkit.geometry import Region
from attnkit.layouts import SeqLens
from attnkit.parallel.pieces import pieces
from attnkit.parallel.plane import planes
from attnkit.pse import Pse
from attnkit.ranges import Ranges
from tests.parallel.cases import GALLERY, SHARDINGS, Case, run_on_threads, worst

EXACT = 1e-12


def slopes() -> Pse:
    return pse.ALiBi(4)


def roots() -> Pse:
    return pse.SqrtALiBi(4)


def steps() -> Pse:
    return pse.T5Relative(4, 8, 12)


def keys_and_steps() -> Pse:
    return pse.KeyBias(torch.zeros(4, 48).requires_grad_()) + steps()


def check(case: Case, most: float = EXACT) -> None:
    assert worst(case, run_on_threads(case)) < most


SOME = [
    Case(backend="emulated"),
    Case(GALLERY["Sink and window"], ranks=3, method="ring", backend="emulated", layout="BNSD"),
    Case(GALLERY["Longformer"], ranks=4, method="gather", sharding="random", backend="emulated"),
    Case(ranks=4, heads_ways=2, method="hybrid", backend="emulated", bias=steps),
    Case(ranks=3, seqlens=SeqLens([11, 20, 17]), layout="TND", backend="emulated", bias=steps),
    Case(ranks=4, backend="emulated", bias=slopes, stages=2, keep=True),
    Case(masks.Full(), ranks=3, sharding="contiguous", backend="emulated", bias=roots),
    Case(ranks=3, backend="emulated", bias=keys_and_steps),
    Case(lengths=(40, 56), ranks=2, backend="emulated", bias=slopes, layout="SBH"),
]


@pytest.mark.parametrize("case", SOME, ids=lambda case: f"{case.method}{case.ranks}{case.layout}")
def test_ranks_on_fused_calls_equal_one_process(case: Case) -> None:
    check(case)


@pytest.mark.sweep
@pytest.mark.parametrize("name", GALLERY)
def test_every_mask_on_fused_calls(name: str) -> None:
    for sharding in SHARDINGS:
        for ranks in (2, 3, 4):
            check(Case(GALLERY[name], ranks, sharding, backend="emulated"))


@pytest.mark.sweep
@pytest.mark.parametrize("bias", [slopes, roots, steps, keys_and_steps])
def test_every_bias_on_fused_calls(bias: Callable[[], Pse]) -> None:
    for mask in (masks.Causal(), masks.Full(), GALLERY["Packed documents, causal"]):
        for sharding in ("contiguous", "zigzag"):
            for ranks in (2, 3, 4):
                check(Case(mask, ranks, sharding, backend="emulated", bias=bias))


# -- the pieces themselves ----------------------------------------------------------------------


def cells(region: Region, rows: Ranges, keys: Ranges) -> set[tuple[int, int]]:
    """The positions of the cells that a piece has."""
    return {
        (i, j)
        for s in region.slices
        for own in rows
        for others in keys
        for i in own
        for j in others
        if s.i0 <= i < s.i1 and s.j0 <= j < s.j1 and s.lo <= j - i <= s.hi
    }


@pytest.mark.parametrize("bias", [slopes, roots, steps])
@pytest.mark.parametrize(
    "mask", [masks.Causal(), masks.Full(), GALLERY["Sink and window"]], ids=str
)
def test_pieces_have_every_cell_once(bias: Callable[[], Pse], mask: masks.Mask) -> None:
    case = Case(mask, 3, "random", backend="emulated", bias=bias, lengths=(48, 48))
    region, sharding = mask.region(48, 48), SHARDINGS["random"](48, 3)
    rows, keys = sharding.ranks[:2]
    found = list(pieces(case.request, planes(case.request), rows, keys, "emulated"))
    assert all(len(own) == len(others) == 1 for own, others in found)
    some = [cells(region, *one) for one in found]
    assert set().union(*some) == cells(region, rows, keys)
    assert sum(map(len, some)) == len(cells(region, rows, keys))
    assert all(some)


def test_a_stage_is_one_piece_where_nothing_counts_distances() -> None:
    for case in (Case(backend="emulated"), Case(bias=slopes)):  # no bias, or not by calls
        assert [len(case.plan.pieces(r, s)) for r in (0, 1) for s in (0, 1)] == [1] * 4
    own = Case(backend="emulated", bias=slopes).plan
    assert [len(own.pieces(0, s)) for s in (0, 1)] == [3, 1]
    assert own.disprove() is None
