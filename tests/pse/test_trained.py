"""Biases that train: their definitions, values, errors, text and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from attnkit import pse
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.pse import KeyBias, LearnableALiBi, T5Relative, t5_bucket


def published(relative: torch.Tensor, bidirectional: bool, buckets: int, longest: int):
    """`_relative_position_bucket` of T5, written out as published; `relative` is key - query."""
    ret = 0
    n = -relative
    if bidirectional:
        buckets //= 2
        ret += (n < 0).long() * buckets
        n = torch.abs(n)
    else:
        n = torch.max(n, torch.zeros_like(n))
    max_exact = buckets // 2
    is_small = n < max_exact
    val_if_large = (
        max_exact
        + (
            torch.log(n.float() / max_exact) / math.log(longest / max_exact) * (buckets - max_exact)
        ).long()
    )
    val_if_large = torch.min(val_if_large, torch.full_like(val_if_large, buckets - 1))
    return ret + torch.where(is_small, n, val_if_large)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 20), (64, 1000), (4, 3), (32, 17)])
def test_buckets_are_those_of_t5(bidirectional: bool, buckets: int, longest: int) -> None:
    distance = torch.arange(-3000, 3001)
    expected = published(distance, bidirectional, buckets, longest)
    assert torch.equal(t5_bucket(distance, buckets, longest, bidirectional), expected)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_steps_are_the_buckets(bidirectional: bool) -> None:
    steps = T5Relative(1, 16, 40, bidirectional).structure.steps(-99, 99)
    told = [row for first, last, row in steps for _ in range(first, last + 1)]
    assert told == t5_bucket(torch.arange(-99, 100), 16, 40, bidirectional).tolist()


def test_a_new_table_is_a_parameter_of_zeros() -> None:
    bias = T5Relative(4)
    assert isinstance(bias.table, nn.Parameter)
    assert bias.requires_grad
    assert not bias.materialize(5, 5).any()


def test_learnable_alibi_starts_as_alibi() -> None:
    fixed, bias = pse.ALiBi(6), pse.ALiBi(6, learnable=True)
    assert isinstance(bias, LearnableALiBi)
    assert not isinstance(bias, pse.Sloped)
    for sizes in ((5, 5), (2, 7), (7, 2)):
        assert torch.equal(bias.materialize(*sizes), fixed.materialize(*sizes))
    assert pse.ALiBi(6, learnable=False) == fixed
    bias.materialize(3, 3).sum().backward()
    assert torch.equal(bias.weight.grad, torch.full((6,), -8.0))


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (
            lambda: pse.ALiBi(2, learnable=1),
            CompositionTypeError,
            "learnable=1; it is True or",
        ),
        (lambda: T5Relative(2, 6), CompositionError, "multiple of 4"),
        (lambda: T5Relative(2, 7, bidirectional=False), CompositionError, "multiple of 2"),
        (lambda: T5Relative(2, 32, 8), CompositionError, "larger one"),
        (lambda: T5Relative(0), CompositionError, "num_heads=0 .* >= 1"),
        (lambda: T5Relative(2, buckets=3), CompositionTypeError, "did you mean num_buckets=3"),
        (lambda: T5Relative("2"), CompositionTypeError, "num_heads='2' .* an int"),
        (lambda: T5Relative(2, align="left"), CompositionError, "bottom_right"),
        (lambda: T5Relative(2, bidirectional=1), CompositionTypeError, "True or False"),
        (lambda: T5Relative(2, table=torch.zeros(2, 32)), CompositionError, r"\[32, 2\]"),
        (lambda: T5Relative(2, table=[1.0]), CompositionTypeError, "give a torch tensor"),
        (lambda: KeyBias([1.0]), CompositionTypeError, "give a torch tensor"),
        (lambda: KeyBias(torch.zeros(3).long()), CompositionTypeError, "int64"),
        (lambda: KeyBias(torch.zeros(1, 1, 1, 1)), CompositionError, "pse.Dense"),
        (lambda: KeyBias(torch.zeros(3)).check(3, 4), CompositionError, "any x 3 .* 3 x 4"),
        (lambda: pse.ALiBi(2, learnable=True).check(3, 3, 1, 4), CompositionError, "2 heads"),
        (lambda: T5Relative(2).materialize(1, 1, dtype=torch.int8), CompositionTypeError, "float"),
    ],
)
def test_what_is_wrong_is_said(make, error: type[Exception], told: str) -> None:
    with pytest.raises(error, match=told):
        make()
