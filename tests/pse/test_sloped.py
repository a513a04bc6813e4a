"""ALiBi and its square-root form against the published slopes and the formula, cell by cell."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.pse import ALiBi, SqrtALiBi, press_slopes

FAMILIES = [ALiBi, SqrtALiBi]


def published_slopes(n: int) -> list[float]:
    """`get_slopes` as the authors of ALiBi published it."""

    def power_of_2(m: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(m) - 3)))
        return [start * start**i for i in range(m)]

    if math.log2(n).is_integer():
        return power_of_2(n)
    closest = 2 ** math.floor(math.log2(n))
    return power_of_2(closest) + published_slopes(2 * closest)[0::2][: n - closest]


@pytest.mark.parametrize("n", range(1, 130))
def test_slopes_are_the_published_ones(n):
    assert press_slopes(n) == pytest.approx(published_slopes(n), rel=1e-12)
    assert len(press_slopes(n)) == n


def test_slopes_of_six_and_eight_heads_exactly():
    assert ALiBi(6).slopes == (0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125)
    assert ALiBi(8).slopes == tuple(2.0**-k for k in range(1, 9))


@pytest.mark.parametrize("family", FAMILIES)
@given(q_len=st.integers(1, 40), kv_len=st.integers(1, 40))
def test_the_anchors_agree_on_squares_and_shift_elsewhere(family, q_len, kv_len):
    right, left = family(4), family(4, align="top_left")
    size = max(q_len, kv_len)
    square = left.materialize(size, size)
    assert torch.equal(right.materialize(size, size), square)
    # Bottom-right: the last rows of the square, so decoding equals the whole.
    if q_len <= kv_len:
        assert torch.equal(right.materialize(q_len, kv_len), square[..., kv_len - q_len :, :])
    assert torch.equal(left.materialize(q_len, kv_len), square[..., :q_len, :kv_len])


def test_half_precision_rounds_once():
    bias = ALiBi((1.0,))
    exact = bias.materialize(1, 5000, dtype=torch.float64)
    assert torch.equal(bias.materialize(1, 5000, dtype=torch.bfloat16), exact.bfloat16())


def test_given_slopes_equal_computed_ones_however_they_are_spelled():
    same = [ALiBi(6), ALiBi(num_heads=6), ALiBi(press_slopes(6)), ALiBi(slopes=press_slopes(6))]
    same += [ALiBi(6, press_slopes(6)), ALiBi(list(press_slopes(6)))]
    assert len(set(same)) == 1
    assert all(bias == same[0] and bias.num_heads == 6 == bias.heads for bias in same)
    assert ALiBi(6) != ALiBi(6, align="top_left")
    assert ALiBi(6) != SqrtALiBi(6)
    assert ALiBi([1, 2]).slopes == (1.0, 2.0)


def test_sharded_heads_keep_their_own_slopes():
    whole = ALiBi(8).materialize(5, 5)
    shard = ALiBi(slopes=ALiBi(8).slopes[2:4])
    assert torch.equal(shard.materialize(5, 5, heads=2), whole[:, 2:4])
    assert shard != ALiBi(2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda f: f(), ["number of heads or one slope per head"]),
        (lambda f: f([]), ["number of heads or one slope per head"]),
        (lambda f: f(0), ["num_heads=0", ">= 1"]),
        (lambda f: f(-4), ["num_heads=-4", ">= 1"]),
        (lambda f: f(True), ["True"]),
        (lambda f: f(8.0), ["8.0"]),
        (lambda f: f("8"), ["'8'"]),
        (lambda f: f(4, (0.5, 0.25)), ["num_heads=4", "2 slopes"]),
        (lambda f: f((0.5,), (0.5,)), ["given twice"]),
        (lambda f: f((0.5, math.nan)), ["slope=nan", "finite"]),
        (lambda f: f((0.5, math.inf)), ["slope=inf", "finite"]),
        (lambda f: f((0.5, "x")), ["slope='x'", "int or float"]),
        (lambda f: f((True,)), ["slope=True", "int or float"]),
        (lambda f: f(torch.tensor([0.5])), ["tolist()", "learnable=True"]),
        (lambda f: f(4, align="left"), ["align='left'", "'bottom_right'", "'top_left'"]),
        (lambda f: f(4).check(5, 5, heads=8), ["4 heads", "query has 8", "per query head"]),
        (lambda f: f(4).materialize(5, 5, heads=8), ["4 heads", "query has 8"]),
        (lambda f: f(4).materialize(5, 5, dtype=torch.int32), ["torch.int32"]),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(family, build, words):
    with pytest.raises(CompositionError) as caught:
        build(family)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_type_errors_are_type_errors():
    for bad in ("8", 8.0, torch.tensor([0.5])):
        with pytest.raises(CompositionTypeError):
            ALiBi(bad)


def test_what_the_planner_reads():
    bias = ALiBi(8)
    assert (bias.before_scale, bias.requires_grad, bias.toeplitz) == (False, False, True)
    assert (bias.heads, bias.batch, bias.tensors, bias.parts) == (8, None, (), (bias,))
    assert bias.offset(3, 8) == 5
    assert ALiBi(8, align="top_left").offset(3, 8) == 0
    assert (ALiBi.kind, SqrtALiBi.kind) == ("alibi", "sqrt_alibi")


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        ALiBi(8).slopes = (1.0,)
