"""Attention on ranks equals one process: results, gradients, and the bytes that go between."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from attnkit import masks, pse
from attnkit.layouts import SeqLens
from tests.parallel.cases import (
    CAUSAL,
    GALLERY,
    LENGTH,
    SHARDINGS,
    Case,
    run_on_threads,
    worst,
)

EXACT = 1e-12
METHODS = ("needed", "ring", "gather")

HEADS = masks.PerHead([CAUSAL, masks.SlidingWindow(5), masks.Full(), masks.Chunked(9)])
CELLS = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.3
PACKED = SeqLens([20, 1, 0, 13, 14])


def t5() -> pse.Pse:
    return pse.T5Relative(4, 8, max_distance=16)


def trained() -> pse.Pse:
    return pse.Dense(torch.zeros(1, 4, LENGTH, LENGTH, requires_grad=True))


def slopes() -> pse.Pse:
    return pse.ALiBi(4) + pse.SqrtALiBi(4)


def several() -> pse.Pse:
    before = pse.Dense(torch.zeros(2, 4, LENGTH, LENGTH, requires_grad=True), before_scale=True)
    return before + pse.KeyBias(torch.zeros(LENGTH, requires_grad=True)) + t5()


def turned(ranks: int, ways: int) -> dict[str, Any]:
    method = "ulysses" if ranks == ways else "hybrid"
    return {"ranks": ranks, "heads_ways": ways, "method": method}


SOME = {
    "causal": Case(),
    "ring": Case(GALLERY["Longformer"], 3, "random", "ring"),
    "stages": Case(GALLERY["Packed documents, causal"], 4, "contiguous", stages=3),
    "gather": Case(GALLERY["Sink and window"], 4, "even", "gather", layout="SBH"),
    "kept": Case(GALLERY["Dilated window"], 3, "random", keep=True),
    "reference": Case(GALLERY["Neighborhood"], 2, backend="reference", sink=False),
    "ulysses": Case(sharding="random", layout="BSH", **turned(4, 4)),
    "hybrid, kept": Case(GALLERY["Prefix LM"], keep=True, **turned(4, 2)),
    "a rank without heads": Case(heads=(2, 1), layout="BSH", **turned(3, 3)),
    "no heads, split as bnsd": Case(heads=(1, 1), layout="BNSD", sharding="even", **turned(4, 2)),
    "cross-attention": Case(lengths=(40, 56), ranks=3, sharding="random", softcap=2.0),
    "cross, even": Case(lengths=(33, 17), ranks=3, sharding="even", bias=slopes),
    "empty rows": Case(masks.Columns(40, 44) & CAUSAL, 3, "contiguous", sink=False),
    "nothing is seen": Case(masks.Columns(0, 1) - masks.Full(), 2, sink=False, method="ring"),
    "fewer tokens than ranks": Case(lengths=(3, 2), ranks=4, method="ring"),
    "one token": Case(masks.Full(), lengths=(1, 1), heads=(1, 1), **turned(3, 3)),
    "one rank": Case(ranks=1, bias=t5),
    "dropout": Case(masks.SlidingWindow(9), 3, "random", dropout=0.3),
    "dropout of heads": Case(dropout=0.3, heads=(4, 4), **turned(4, 2)),
    "alibi": Case(bias=lambda: pse.ALiBi(4), ranks=3, sharding="random"),
    "slopes": Case(bias=slopes, ranks=4, sharding="even"),
    "t5": Case(bias=t5, ranks=2, method="ring", backend="reference"),
    "several biases": Case(bias=several, ranks=4, sharding="random", keep=True),
    "biases of heads": Case(bias=several, **turned(4, 2)),
    "dense bias": Case(bias=trained, sharding="even", heads=(4, 1), **turned(3, 3)),
    "packed": Case(ranks=3, sharding="even", layout="TND", seqlens=PACKED),
    "packed, biased": Case(
        GALLERY["Prefix LM"], 4, "random", bias=t5, dropout=0.2, layout="TND", seqlens=PACKED
    ),
    "packed, turned": Case(bias=t5, layout="TND", seqlens=PACKED, **turned(4, 4)),
    "padded": Case(masks.Padding([30, 41]) & CAUSAL, 3, "even"),
    "heads apart": Case(HEADS, 3, "even"),
    "heads apart, turned": Case(HEADS, **turned(4, 2)),
    "cells": Case(masks.Dense.keep(CELLS), 3, "random"),
    "calls": Case(GALLERY["Sink and window"], 4, backend="emulated", stages=2),
    "calls, ring": Case(
        GALLERY["Packed documents, causal"], 3, "random", "ring", backend="emulated"
    ),
    "calls, turned": Case(backend="emulated", bias=lambda: pse.ALiBi(4), **turned(4, 2)),
    "calls, t5": Case(bias=t5, ranks=3, sharding="even", keep=True, backend="emulated"),
    "predicate": Case(masks.Predicate(lambda b, h, i, j: (i + j + h) % 3 != 0), **turned(2, 2)),
}


def check(case: Case) -> None:
    assert worst(case, run_on_threads(case)) < EXACT


@pytest.mark.parametrize("name", SOME)
def test_ranks_equal_one_process(name: str) -> None:
    check(SOME[name])


def matrix() -> dict[str, Case]:
    """Every mask of the gallery, sharding, number of ranks and method; and turned to heads.

    All have a sink and a bias that train; dropout, where the tokens are dealt at random.
    """
    found = {}
    for name, sharding, ranks in itertools.product(GALLERY, (*SHARDINGS, "even"), (2, 3, 4)):
        ways = {ranks, 2} if ranks == 4 else {ranks}
        hows: list[dict[str, Any]] = [{"ranks": ranks, "method": one} for one in METHODS]
        for how in (*hows, *(turned(ranks, way) for way in ways)):
            drops = 0.2 if sharding == "random" else 0.0
            told = f"{name}, {sharding}, {ranks}, {how['method']}"
            found[told] = Case(GALLERY[name], sharding=sharding, dropout=drops, bias=t5, **how)
    return found


@pytest.mark.sweep
@pytest.mark.parametrize("name", matrix())
def test_every_mask_sharding_and_method_equals_one_process(name: str) -> None:
    check(matrix()[name])


def test_many_masks_of_the_docs_are_spread_over_ranks() -> None:
    assert 20 <= len(GALLERY) <= 25  # all that differ in kind, and no more than there is time for
    assert {mask.extent for mask in GALLERY.values()} <= {
        (None, None),
        (LENGTH, LENGTH),
        (10, LENGTH),
    }
