"""Rotary against complex multiplication in float64, and what makes it a position embedding."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit.errors import CompositionError
from attnkit.rotary import Rotary, positions


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_complex_numbers(rotary: Rotary, x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Pairs as complex numbers, turned by multiplication; the pairs picked by index."""
    r = rotary.rotary_dim or x.shape[-1]
    c = torch.arange(r // 2)
    first, second = (c, c + r // 2) if rotary.pairing == "half" else (2 * c, 2 * c + 1)
    angle = where.double()[:, None, None] * rotary.base ** (-2 * c.double() / r)
    turned = torch.complex(x[..., first], x[..., second]) * torch.polar(
        torch.ones_like(angle), angle
    )
    out = x.clone()
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


ROTARIES = [
    Rotary(),
    Rotary(pairing="interleaved"),
    Rotary(base=500000.0, rotary_dim=4),
    Rotary(rotary_dim=2, pairing="interleaved"),
]


@pytest.mark.parametrize("rotary", ROTARIES, ids=str)
def test_rotate_is_complex_multiplication(rotary):
    where = torch.tensor([0, 1, 7, 1000, 3])
    for shape in [(2, 5, 3, 8), (5, 3, 8)]:
        x = noise(*shape)
        got = rotary.rotate(x, where)
        assert torch.allclose(got, by_complex_numbers(rotary, x, where), rtol=0, atol=1e-12)
        assert torch.equal(got[..., 0, :, :], x[..., 0, :, :])  # position 0 does not turn


@pytest.mark.parametrize("rotary", ROTARIES, ids=str)
@given(i=st.integers(0, 50), j=st.integers(0, 50), shift=st.integers(0, 50))
def test_scores_depend_on_the_distance_only(rotary, i, j, shift):
    q, k = noise(2, 1, 1, 8)
    where = torch.tensor

    def score(a: int, b: int) -> torch.Tensor:
        return (rotary.rotate(q, where([a])) * rotary.rotate(k, where([b]))).sum()

    assert torch.allclose(score(i, j), score(i + shift, j + shift), atol=1e-10)


def test_the_two_pairings_are_a_permutation_of_one_another_and_differ():
    x, where = noise(4, 2, 8), torch.arange(4)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    half = Rotary().rotate(x[..., order], where)
    interleaved = Rotary(pairing="interleaved").rotate(x, where)
    assert torch.allclose(half, interleaved[..., order])
    assert not torch.allclose(Rotary().rotate(x, where), interleaved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_keeps_its_dtype_and_rounds_like_its_inputs(dtype):
    x, where = noise(300, 2, 8).to(dtype), torch.arange(300) + 5000
    got = Rotary().rotate(x, where)
    assert got.dtype == dtype
    exact = Rotary().rotate(x.double(), where)
    # One rounding of the result, and float32 angles of up to 5300 radians.
    bound = torch.finfo(dtype).eps * exact.abs() + 5300 * 2**-23 * x.double().norm(dim=-1).max()
    assert ((got.double() - exact).abs() <= bound).all()


def test_gradients_flow_and_meta_tensors_pass():
    x = noise(3, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: Rotary().rotate(t, torch.arange(3)), x)
    where = torch.arange(3, device="meta")
    assert Rotary().rotate(torch.empty(3, 2, 4, device="meta"), where).shape == (3, 2, 4)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 9))
def test_positions_count_from_the_offset_in_each_sequence(lengths, offset):
    expected = [offset + i for length in lengths for i in range(length)]
    assert positions(lengths, offset).tolist() == expected


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Rotary(base=0), ["base=0"]),
        (lambda: Rotary(base=math.nan), ["nan"]),
        (lambda: Rotary(base="10"), ["'10'"]),
        (lambda: Rotary(base=10**400), ["base=", "1e+30"]),
        (lambda: Rotary(base=1e-320), ["base=1e-320", "1e-30"]),
        (lambda: Rotary(base=None), ["base=None"]),
        (lambda: Rotary(rotary_dim=2**70).dims(8), ["head of 8"]),
        (lambda: Rotary(rotary_dim=True), ["rotary_dim=True"]),
        (lambda: Rotary().dims(8.0), ["head_dim=8.0"]),
        (lambda: Rotary().rotate(3, torch.arange(4)), ["heads is a int"]),
        (lambda: Rotary().rotate(noise(4, 2, 8), [0, 1, 2, 3]), ["positions is a list"]),
        (lambda: Rotary().rotate(noise(4, 2, 8).int(), torch.arange(4)), ["torch.int32"]),
        (lambda: Rotary().rotate(noise(4, 2, 8), torch.ones(4) > 0), ["torch.bool"]),
        (lambda: Rotary().rotate(noise(4, 2, 8), torch.arange(4).to_sparse()), ["sparse"]),
        (lambda: Rotary().rotate(noise(4, 2, 8), torch.arange(4, device="meta")), ["on meta"]),
        (lambda: Rotary().rotate(noise(4, 2, 8), torch.zeros(4, 1)), ["[4, 1]", "[s]"]),
        (lambda: Rotary(pairing=np.ones(2)), ["pairing=array"]),
        (lambda: positions("12"), ["lengths", "list of ints"]),
        (lambda: positions([2, -1]), ["lengths[1] is -1"]),
        (lambda: positions(range(10**12)), ["lengths", "entries"]),
        (lambda: positions([2**60]), ["tokens from 0 on"]),
        (lambda: positions([2], 0.5), ["offset=0.5"]),
        (lambda: positions([2], 10**30), ["positions", "0000000"]),
        (lambda: positions([2], 0, 1.5), ["device=1.5"]),
        (lambda: positions([2], 0, "abacus"), ["device='abacus' is not there"]),
        (lambda: Rotary(rotary_dim=3), ["rotary_dim=3", "even"]),
        (lambda: Rotary(rotary_dim=0), ["rotary_dim=0"]),
        (lambda: Rotary(pairing="neox"), ["'neox'", "'half'", "'interleaved'"]),
        (lambda: Rotary(rotary_dim=16).dims(8), ["16 dimensions", "head of 8"]),
        (lambda: Rotary().dims(7), ["head of 7"]),
        (lambda: Rotary().rotate(noise(4, 2, 8), torch.arange(3)), ["[4, 2, 8]", "[3]"]),
        (lambda: Rotary().rotate(noise(4, 8), torch.arange(4)), ["[..., s, n, d]"]),
    ],
)
def test_errors_say_what_was_given_and_what_to_do(call, words):
    with pytest.raises(CompositionError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("rotary", ROTARIES, ids=str)
def test_it_is_a_value(rotary):
    assert pickle.loads(pickle.dumps(rotary)) == rotary == copy.deepcopy(rotary)
    assert hash(copy.deepcopy(rotary)) == hash(rotary)
    assert eval(repr(rotary)) == rotary
