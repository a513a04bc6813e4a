"""Masks nest to a stated depth, chains are flat, and everything that follows parts survives."""

from __future__ import annotations

import copy
import pickle
from functools import reduce
from operator import and_, or_

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.errors import CompositionError
from attnkit.masks.base import LONGEST_REPR
from attnkit.masks.composite import MAX_DEPTH, MAX_PARTS

N = 16


def alternating(depth):
    mask = masks.Causal()
    for k in range(depth - 1):
        other = masks.Columns(k % 7, 9 + k)
        mask = mask & other if k % 2 else mask | other
    return mask


def complements(depth):
    mask = masks.Causal()
    for k in range((depth - 1) // 2):
        mask = ~(mask | masks.Columns(k % N, k % N + 1))
    return mask if depth % 2 else mask & masks.Full()


def cuts(depth):
    return reduce(lambda mask, _: mask[0:, 0:], range(depth - 1), masks.Band(3, 3, "top_left"))


def documents(depth):
    return reduce(
        lambda mask, _: masks.Documents([N], inside=mask), range(depth - 1), masks.Causal()
    )


NESTS = [alternating, complements, cuts, documents]


def survives(mask, q_len=N):
    """Ask for everything that walks over the parts of a mask."""
    assert len(repr(mask)) <= LONGEST_REPR + 40
    assert masks.parse(str(mask)) == mask
    for twin in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert twin == mask
        assert hash(twin) == hash(mask)
    region = mask.region(q_len, q_len)
    assert mask.simplify(q_len, q_len).region(q_len, q_len) == region
    mask.lint(q_len, q_len)
    drawn = mask.materialize(q_len, q_len)
    assert int(drawn.sum()) == region.area
    x = torch.randn(1, q_len, 2, 4, dtype=torch.float64)
    assert torch.isfinite(ak.attention(x, x, x, mask=mask)).all()
    held = ak.AttentionConfig(num_heads=2, head_dim=4, mask=mask).model_dump_json()
    assert ak.AttentionConfig.model_validate_json(held).mask == mask


@pytest.mark.parametrize("nest", NESTS)
def test_the_deepest_mask_survives_everything(nest):
    mask = nest(MAX_DEPTH)
    assert mask._nesting[0] == MAX_DEPTH
    survives(mask)


@pytest.mark.parametrize("nest", NESTS)
def test_a_deeper_mask_is_refused(nest):
    for depth in (MAX_DEPTH + 2, 3000):
        with pytest.raises(CompositionError, match=f"nest at most {MAX_DEPTH} deep"):
            nest(depth)


@pytest.mark.parametrize("join", [or_, and_])
def test_a_long_chain_is_flat(join):
    parts = [masks.Columns(k, k + 1) for k in range(500)]
    mask = reduce(join, parts if join is or_ else [~part for part in parts])
    assert len(mask.parts) == 500
    assert mask._nesting[0] == (2 if join is or_ else 3)
    assert mask == type(mask)(mask.parts) == type(mask).of(*mask.parts)
    survives(mask)


def test_complements_do_not_pile_up():
    mask = reduce(lambda mask, _: ~mask, range(5001), masks.Causal())
    assert mask == ~masks.Causal()
    assert masks.parse("~" * 180 + "Full()") == masks.Full()


def test_a_mask_that_repeats_itself_is_bounded():
    def twice(mask, k):
        return (mask & masks.Columns(0, k + 3)) | (mask - masks.Columns(k % 5, 9))

    with pytest.raises(CompositionError, match=f"at most {MAX_PARTS} are taken"):
        reduce(twice, range(30), masks.Causal())


def test_parts_that_are_there_already_add_nothing():
    a, b, c = masks.Causal(), masks.SlidingWindow(4), masks.Prefix(2)
    both = a | b
    for mask in (both | a, a | both, both | both, (both | c) | (c | both)):
        assert mask._nesting == type(mask)(mask.parts)._nesting
    assert (both | a) == both
    assert ((a & b) | (b & a)) == a & b
    assert (both | c | a).parts == (a, b, c)


def test_lint_finds_needless_parts_wherever_they_are():
    a, b = masks.Causal(), masks.SlidingWindow(4)
    needless = masks.Columns(0, 2)
    for mask, whole in (
        (a & (b | (needless & b)), a & b),
        (~(~b | (~a & ~masks.Full())), b),
        (masks.PerHead([a, b]) & (masks.Full() | needless), masks.PerHead([a, b])),
    ):
        found = [f for f in mask.lint(8, 8) if f.code == "part-changes-nothing"]
        assert found
        for h in range(mask.heads or 1):
            assert mask.region(8, 8, head=h) == whole.region(8, 8, head=h)
