"""Attention on ranks equals one process: results, gradients, and the bytes that go between."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest

from attnkit import masks
from tests.parallel.cases import GALLERY, SHARDINGS, Case, run_on_threads, worst

EXACT = 1e-12
METHODS = ("needed", "ring", "gather")


def check(case: Case) -> None:
    assert worst(case, run_on_threads(case)) < EXACT


SOME = [
    Case(),
    Case(GALLERY["Longformer"], ranks=3, sharding="random", method="ring"),
    Case(GALLERY["Packed documents, causal"], ranks=4, sharding="contiguous", stages=3),
    Case(GALLERY["Sink and window"], ranks=4, method="gather", layout="SBH"),
    Case(GALLERY["Dilated window"], ranks=3, sharding="random", keep=True),
    Case(GALLERY["Neighborhood"], ranks=2, backend="reference", sink=False),
    Case(ranks=4, heads_ways=4, method="ulysses", sharding="random", layout="BSH"),
    Case(GALLERY["Prefix LM"], ranks=4, heads_ways=2, method="hybrid", keep=True),
    Case(GALLERY["Causal"], ranks=3, heads_ways=3, method="ulysses", heads=(3, 1), layout="BNSD"),
    Case(lengths=(40, 56), ranks=3, sharding="random", softcap=2.0),
    Case(masks.Columns(40, 44) & masks.Causal(), ranks=3, sharding="contiguous", sink=False),
    Case(masks.Causal(), lengths=(3, 2), ranks=4, method="ring"),
    Case(masks.Full(), lengths=(1, 1), ranks=3, heads_ways=3, method="ulysses", heads=(1, 1)),
    Case(masks.SlidingWindow(9), dropout=0.3, ranks=3, sharding="random"),
    Case(dropout=0.3, ranks=4, heads_ways=2, method="hybrid", heads=(4, 4)),
]


@pytest.mark.parametrize("case", SOME, ids=lambda case: f"{case.method}{case.ranks}{case.sharding}")
def test_ranks_equal_one_process(case: Case) -> None:
    check(case)


def sweep() -> list[Case]:
    each = itertools.product(GALLERY.values(), SHARDINGS, (2, 3, 4))
    found = [
        Case(mask, ranks, sharding, method) for mask, sharding, ranks in each for method in METHODS
    ]
    turned = itertools.product(GALLERY.values(), SHARDINGS, ((2, 2), (3, 3), (4, 4), (4, 2)))
    found += [
        Case(mask, ranks, sharding, "ulysses" if ranks == ways else "hybrid", ways)
        for mask, sharding, (ranks, ways) in turned
    ]
    return found


@pytest.mark.sweep
@pytest.mark.parametrize("number", range(len(sweep())))
def test_every_mask_sharding_and_method_equals_one_process(number: int) -> None:
    check(sweep()[number])


def test_the_gallery_here_is_that_of_the_docs() -> None:
    path = Path(__file__).parents[2] / "docs" / "make_gallery.py"
    spec = importlib.util.spec_from_file_location("make_gallery", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("make_gallery", module)
    spec.loader.exec_module(module)
    assert list(GALLERY) == list(module.GALLERY)
