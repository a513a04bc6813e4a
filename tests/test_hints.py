"""What an argument may be written as, and what is said where it is something else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import attnkit as ak
from attnkit import masks, pse
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks.parse import as_mask
from attnkit.pse.parse import as_pse

X = torch.randn(1, 6, 2, 8)


@pytest.mark.parametrize("text", ["Causal()", "Causal() & SlidingWindow(2) | Columns(0, 1)"])
def test_a_mask_may_be_its_text(text: str) -> None:
    mask = masks.parse(text)
    assert as_mask(text) == as_mask(mask) == mask
    assert ak.Attention(2, 8, mask=text).mask == mask
    assert ak.plan(X, X, X, mask=text).request.mask == mask
    expected = ak.attention(X, X, X, mask=mask)
    assert torch.equal(ak.attention(X, X, X, mask=text), expected)
    assert torch.equal(ak.Attention(2, 8)(X, X, X, mask=text), expected)


def test_a_bias_may_be_its_text() -> None:
    bias = pse.ALiBi(2)
    assert as_pse("ALiBi(2)") == as_pse(bias) == bias
    assert as_pse(None) is None
    layer = ak.Attention(2, 8, pse="T5Relative(2)")
    assert len(list(layer.parameters())) == 1
    assert layer.pse == pse.T5Relative(2)
    expected = ak.attention(X, X, X, pse=bias)
    assert torch.equal(ak.attention(X, X, X, pse="ALiBi(2)"), expected)
    assert torch.equal(ak.Attention(2, 8)(X, X, X, pse="ALiBi(2)"), expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (masks.Causal, ["Causal'> is the class", "mask=Causal(...)"]),
        (torch.ones(4, 4, dtype=torch.bool), ["masks.Dense.keep(t)", "masks.Padding.of(t)"]),
        (np.ones((4, 4), bool), ["masks.Dense.keep(t)"]),
        (lambda b, h, i, j: i >= j, ["masks.Predicate(fn)"]),
        ([masks.Causal(), masks.Full()], ["masks.PerHead([...])", "masks.PerBatch([...])"]),
        (3, ["mask=3 is a int", "or the text of one"]),
        ("Casual()", ["Casual", "did you mean 'Causal'"]),
        ("causal", ["causal"]),
        (pse.ALiBi(2), ["must be a mask"]),
    ],
)
def test_what_is_not_a_mask_is_told_how_to_become_one(given: object, words: list[str]) -> None:
    for take in (as_mask, lambda mask: ak.Attention(2, 8, mask=mask)):
        with pytest.raises(CompositionError) as caught:
            take(given)
        assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (pse.ALiBi, ["ALiBi'> is the class", "pse=ALiBi(...)"]),
        (torch.zeros(4, 4), ["pse.Dense(t)"]),
        (torch.ones(4, 4, dtype=torch.bool), ["is a mask", "masks.Dense.keep(t)"]),
        ([0.5, 0.25], ["pse.ALiBi(slopes=[...])"]),
        (masks.Causal(), ["must be a bias"]),
        ("ALiBy(2)", ["did you mean 'ALiBi'"]),
    ],
)
def test_what_is_not_a_bias_is_told_how_to_become_one(given: object, words: list[str]) -> None:
    for take in (as_pse, lambda bias: ak.Attention(2, 8, pse=bias)):
        with pytest.raises(CompositionError) as caught:
            take(given)
        assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("SlidingWindow(window=64)", ["takes no 'window': did you mean size=64", "size, align"]),
        ("Causal(aling='top_left')", ["did you mean align='top_left'"]),
        ("PrefixLM(lenght=3)", ["unexpected keyword argument 'lenght'"]),
    ],
)
def test_text_with_a_wrong_argument_is_told_the_right_ones(text: str, words: list[str]) -> None:
    with pytest.raises(CompositionError) as caught:
        masks.parse(text)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_wrong_kind_is_a_type_error() -> None:
    with pytest.raises(CompositionTypeError):
        as_mask(masks.Causal)


@pytest.mark.parametrize(("word", "name"), [("bshd", "BSND"), ("BHSD", "BNSD"), ("thd", "TND")])
def test_the_op_takes_its_own_names_of_layouts_and_tells_them(word: str, name: str) -> None:
    with pytest.raises(ak.KernelContractError, match=f"{word}', which is {name} here"):
        ak.fusion_attention(X, X, X, 2, word)
    with pytest.raises(ak.KernelContractError, match="input_layout='abcd'"):
        ak.fusion_attention(X, X, X, 2, "abcd")
