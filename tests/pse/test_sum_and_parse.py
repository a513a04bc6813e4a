"""Sums of biases, the registry of families, and the text form."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnkit import pse
from attnkit.errors import AttnkitError, CompositionError, CompositionTypeError
from attnkit.pse import PSE, ALiBi, Dense, Pse, SqrtALiBi, Sum

slopes = st.tuples(*[st.floats(-8, 8, allow_nan=False)] * 3)
sloped = st.builds(
    lambda family, values, align: family(values, align=align),
    st.sampled_from([ALiBi, SqrtALiBi]),
    slopes,
    st.sampled_from(["bottom_right", "top_left"]),
)
sums = st.lists(sloped, min_size=1, max_size=5).map(lambda parts: sum(parts[1:], parts[0]))


def before(*shape: int) -> Dense:
    return Dense(torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape), before_scale=True)


@given(sums)
def test_text_is_read_back_as_the_same_value(bias):
    assert pse.parse(str(bias)) == bias == pse.parse(f"  ({bias!r}) ")
    assert hash(pse.parse(str(bias))) == hash(bias)


@given(st.lists(sloped, min_size=3, max_size=3))
def test_sums_flatten_however_they_are_grouped(parts):
    a, b, c = parts
    left, right = (a + b) + c, a + (b + c)
    assert left == right == Sum(parts) == Sum([Sum([a]), b + c])
    assert left.parts == (a, b, c)
    assert pickle.loads(pickle.dumps(left)) == left == copy.deepcopy(left)
    expected = a.materialize(3, 4) + b.materialize(3, 4) + c.materialize(3, 4)
    assert torch.equal(left.materialize(3, 4, batch=2, heads=3), expected)


def test_a_sum_reports_what_its_parts_say():
    weight = torch.nn.Parameter(torch.zeros(2, 1, 4, 4))
    bias = Dense(weight) + ALiBi(3)
    assert (bias.heads, bias.batch, bias.requires_grad) == (3, 2, True)
    assert (bias.before_scale, bias.toeplitz, bias.tensors) == (False, False, (weight,))
    assert (ALiBi(3) + SqrtALiBi(3)).toeplitz
    assert (before(4, 4) + before(4, 4)).before_scale is True
    assert bias.key() == (Dense(torch.nn.Parameter(torch.ones(2, 1, 4, 4))) + ALiBi(3)).key()
    assert bias.key() != (ALiBi(3) + Dense(weight)).key()
    assert ALiBi(3) + SqrtALiBi(3) != SqrtALiBi(3) + ALiBi(3)


def test_parts_on_both_sides_of_the_scale_stay_apart():
    after = ALiBi(2)
    mixed = before(2, 3) + after
    with pytest.raises(CompositionError, match="before and after the scale"):
        _ = mixed.before_scale
    with pytest.raises(CompositionError, match="term"):
        mixed.materialize(2, 3)
    # scale*(q.k + b) + a == scale*q.k + term
    scores = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -1.0]])
    by_hand = 0.5 * (scores + before(2, 3).tensor) + after.materialize(2, 3)
    assert torch.allclose(0.5 * scores + mixed.term(2, 3, scale=0.5, heads=2), by_hand)


def test_term_scales_only_what_comes_before_the_scale():
    assert torch.equal(ALiBi(2).term(2, 3, scale=0.5), ALiBi(2).materialize(2, 3))
    assert torch.equal(before(2, 3).term(2, 3, scale=0.5)[0, 0], before(2, 3).tensor / 2)


def test_parts_that_cannot_describe_the_same_scores_are_refused_at_once():
    with pytest.raises(CompositionError, match=r"ALiBi\(8\), made for 8 heads.*ALiBi\(4\)"):
        ALiBi(8) + ALiBi(4)
    with pytest.raises(CompositionError, match="batch elements"):
        before(2, 1, 3, 3) + before(3, 1, 3, 3)
    with pytest.raises(CompositionError, match="no biases"):
        Sum([])
    for other in (torch.zeros(3, 3), 1, None):
        with pytest.raises(CompositionTypeError, match=r"pse\.Dense\(tensor\)"):
            ALiBi(2) + other
        with pytest.raises(CompositionTypeError, match=r"pse\.Dense\(tensor\)"):
            Sum([ALiBi(2), other])
    with pytest.raises(CompositionError, match="2 x 3"):
        (ALiBi(2) + before(2, 3)).check(3, 3, heads=2)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ALiBi",
        "ALiBi(",
        "ALiBy(8)",
        "Dense(8)",
        "8",
        "1 + 2",
        "'ALiBi(8)'",
        "ALiBi(8) - ALiBi(8)",
        "ALiBi(8) + 1",
        "1 + ALiBi(8)",
        "ALiBi(8) * 2",
        "~ALiBi(8)",
        "-ALiBi(8)",
        "ALiBi(8)[0]",
        "ALiBi(heads=8)",
        "ALiBi(8, 9)",
        "ALiBi(8, (), 'top_left', 4)",
        "ALiBi(0)",
        "ALiBi(ALiBi)",
        "ALiBi(8).slopes",
        "ALiBi(len('abc'))",
        "__import__('os').getcwd()",
        "(lambda: ALiBi(8))()",
        "ALiBi(8) if 1 else ALiBi(4)",
        "ALiBi(8); ALiBi(4)",
        "ALiBi(8) + ALiBi(4)",
        "[ALiBi(8)]",
    ],
)
def test_other_text_is_refused_with_an_error_that_repeats_it(text):
    with pytest.raises(AttnkitError) as caught:
        pse.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", [None, 8, b"ALiBi(8)"])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(AttnkitError):
        pse.parse(text)


def test_a_new_family_is_one_class_and_one_registration():
    @PSE.register("constant")
    @dataclass(frozen=True)
    class Constant(Pse):
        value: float = 0.0

        def _values(self, at, dtype, device):
            return torch.full(at.shape, self.value, dtype=dtype, device=device)

    try:
        assert Constant.kind == "constant"
        bias = pse.parse("Constant(2.0)") + ALiBi(2)
        assert bias.parts[0] == Constant(2.0)
        assert bias.heads == 2
        expected = ALiBi(2).materialize(3, 3) + 2
        assert torch.equal(bias.materialize(3, 3), expected)
        with pytest.raises(CompositionError, match="registered already"):
            PSE.add("other", type("Constant", (Pse,), {}))
    finally:
        PSE.remove("constant")
    assert list(PSE) == ["alibi", "learnable_alibi", "sqrt_alibi", "t5_relative"]
