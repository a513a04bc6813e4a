"""Masks of trees: all small ones, those of other orders and of any size, and how they are said."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
import torch

from attnkit import masks
from attnkit.errors import CompositionError
from attnkit.masks import Rectangle, Tree
from attnkit.masks import tree as module


def ancestors(parents):
    """The definition: the tokens on the way to a root; None where there is no end to it."""
    each = []
    for token in range(len(parents)):
        way = [token]
        while parents[way[-1]] >= 0 and len(way) <= len(parents):
            way.append(parents[way[-1]])
        if len(way) > len(parents):
            return None
        each.append(set(way))
    return each


def assert_is(parents, prefix):
    ways, size = ancestors(parents), len(parents)
    cells = torch.tensor(
        [[j < prefix or j - prefix in way for j in range(prefix + size)] for way in ways]
    )
    right = masks.Dense.keep(cells).region(size, prefix + size)
    for mask in (Tree(parents), Tree(parents, prefix)):
        assert mask.region(size, prefix + size) == right, mask
        assert mask.materialize(size, prefix + size)[0, 0].equal(cells), mask
    for ends in (
        (0, prefix + size),
        (1, prefix + 1),
        (prefix, prefix + size),
        (prefix + 1, prefix + 2),
    ):
        at = Rectangle((size // 2, size), ends, size, prefix + size)
        assert Tree(parents)._read(at).equal(cells[size // 2 :, slice(*ends)])


def test_every_forest_of_up_to_four_tokens():
    found = cycles = 0
    for size in range(1, 5):
        for parents in product(range(-1, size), repeat=size):
            if ancestors(parents) is not None:
                found += 1
                assert_is(parents, found % 3)
                continue
            cycles += 1
            with pytest.raises(CompositionError, match="leads into a cycle"):
                Tree(parents)
    assert (found, cycles) == (1 + 3 + 16 + 125, 1 + 6 + 48 + 500)  # Cayley: (n + 1) ** (n - 1)


def test_large_trees_in_any_order():
    choose = random.Random(0)
    for size in (30, 80):
        parents = [choose.randrange(-1, i) for i in range(size)]
        assert_is(parents, 7)
        names = choose.sample(range(size), size)
        mixed = [-1] * size
        for token, parent in enumerate(parents):
            mixed[names[token]] = names[parent] if parent >= 0 else -1
        assert_is(mixed, 0)


def test_a_tree_of_too_many_runs_is_known_by_its_cells(monkeypatch):
    parents = [i - 2 if i > 1 else -1 for i in range(40)]
    right = Tree(parents).region(40, 45)
    monkeypatch.setattr(module, "MOST_RUNS", 50)
    mask = Tree(parents)
    assert not mask.is_region(40, 45)
    known = mask.enclosure(40, 45)
    assert known.inner <= right <= known.outer
    assert mask.materialize(40, 45)[0, 0].equal(Tree(parents, 5).materialize(40, 45)[0, 0])
    assert masks.Dense.keep(mask.materialize(40, 45)[0, 0]).region(40, 45) == right


def test_a_long_chain_is_causal():
    chain = Tree(range(-1, 3999))
    assert chain.region(4000, 5000) == masks.Causal().region(4000, 5000)
    assert Tree(range(1, 4000)[:0] or [-1]).region(1, 9) == masks.Full().region(1, 9)


@pytest.mark.parametrize("wrap", [list, tuple, torch.tensor, lambda x: torch.tensor(x).numpy()])
def test_parents_of_any_kind(wrap):
    assert Tree(wrap([-1, 0, 0])) == Tree([-1, 0, 0])
    assert Tree(wrap([[-1, 0, 0], [-1, -1, 1]])) == Tree([[-1, 0, 0], [-1, -1, 1]])
    assert str(Tree(wrap([-1, 0]), prefix=4)) == "Tree((-1, 0), 4)"


def test_trees_of_a_batch():
    mask = Tree([[-1, 0, 0], [1, -1, 0]])
    assert mask.batches == 2
    drawn = mask.materialize(3, 5, batch=2, heads=3)
    for b, parents in enumerate(([-1, 0, 0], [1, -1, 0])):
        assert drawn[b, 2].equal(Tree(parents).materialize(3, 5)[0, 0])
    joined = mask & masks.Padding([4, 5])
    assert joined.region(3, 5, batch=0).row(2) == ((0, 3),)


def test_a_cut_of_a_tree_asks_for_less():
    mask = Tree([-1, 0, 0, 1], prefix=2)
    assert mask[1:3, 1:4].region(2, 3).area == mask.materialize(4, 6)[0, 0, 1:3, 1:4].sum()
    assert np.array_equal(
        mask[:, 2:].materialize(4, 4)[0, 0], Tree([-1, 0, 0, 1]).materialize(4, 4)[0, 0]
    )
