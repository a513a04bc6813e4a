"""Bad input to biases: each error is ours, names what was given, and is short."""

from __future__ import annotations

import pytest
import torch

from attnkit import pse
from attnkit.errors import CompositionError, CompositionTypeError

X = torch.ones(4, 4)
HUGE = 10**5000

BAD = {
    "slope of 10**400": (lambda: pse.ALiBi([10**400]), CompositionError, "1329 bits"),
    "slope of nan": (lambda: pse.ALiBi([float("nan")]), CompositionError, "nan"),
    "2**40 heads": (lambda: pse.ALiBi(2**40), CompositionError, "at most 65,536"),
    "5,000 digits of heads": (lambda: pse.press_slopes(HUGE), CompositionError, "16610 bits"),
    "2**40 buckets": (lambda: pse.T5Relative(2, 2**40), CompositionError, "at most"),
    "distance of 10**400": (lambda: pse.T5Relative(2, 32, 10**400), CompositionError, "at most"),
    "table of 2**32": (lambda: pse.T5Relative(2**16, 2**16), CompositionError, "entries"),
    "bucket of 0": (lambda: pse.t5_bucket(torch.arange(3), 0), CompositionError, ">= 1"),
    "sparse": (lambda: pse.Dense(X.to_sparse()), CompositionTypeError, "give a dense one"),
    "mkldnn": (lambda: pse.Dense(X.to_mkldnn()), CompositionTypeError, "mkldnn"),
    "nested": (
        lambda: pse.Dense(torch.nested.as_nested_tensor([X, X[:2]])),
        CompositionTypeError,
        "nested",
    ),
    "float8": (
        lambda: pse.KeyBias(X[0].to(torch.float8_e4m3fn)),
        CompositionTypeError,
        "cast it first",
    ),
    "complex": (lambda: pse.Dense(X.to(torch.complex64)), CompositionTypeError, "floating dtype"),
    "table of int": (
        lambda: pse.T5Relative(4, 4, 8, table=X.int()),
        CompositionTypeError,
        "floating dtype",
    ),
    "align of a tensor": (lambda: pse.ALiBi(2, align=X), CompositionError, "bottom_right"),
    "lengths of a tensor": (lambda: pse.ALiBi(2).materialize(X, X), CompositionTypeError, "q_len"),
    "lengths of 2**70": (lambda: pse.ALiBi(2).materialize(2**70, 2), CompositionError, "q_len"),
    "range of floats": (
        lambda: pse.Cut(pse.ALiBi(2), (0.0, 2.0), (0, 1), 4, 4),
        CompositionTypeError,
        "two ints",
    ),
    "range of one": (
        lambda: pse.Dense(X).cut((1,), (0, 1)),
        CompositionTypeError,
        "two ints",
    ),
    "cut of a tensor": (
        lambda: pse.Cut(X, (0, 1), (0, 1), 4, 4),
        CompositionTypeError,
        "takes a positional bias",
    ),
    "sum of 3": (lambda: pse.Sum(3), CompositionTypeError, "list of biases"),
    "keyword twice": (
        lambda: pse.parse("ALiBi(num_heads=2, num_heads=4)"),
        CompositionError,
        "'num_heads' twice",
    ),
    "10 MB of text": (lambda: pse.parse("ALiBi(2)+" * 10**6), CompositionError, "too long"),
    "5,000 digits": (lambda: pse.parse(f"ALiBi({'9' * 5000})"), CompositionError, "cannot read"),
    "a null": (lambda: pse.parse("ALiBi(2)\0"), CompositionError, "null"),
    "deep brackets": (lambda: pse.parse("(" * 10**5), CompositionError, "parentheses"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_explained(name):
    ask, kind, words = BAD[name]
    with pytest.raises(kind, match=words) as caught:
        ask()
    assert len(str(caught.value)) < 600


def test_a_cut_of_a_cut_is_one_cut():
    """However often a bias is cut, it nests no deeper."""
    bias = pse.T5Relative(2)
    part = bias
    for n in range(300, 20, -1):
        part = pse.Cut(part, (0, n), (0, n), n + 1, n + 1)
    assert part == pse.Cut(bias, (0, 21), (0, 21), 301, 301)
    assert part.materialize(21, 21).equal(bias.materialize(301, 301)[..., :21, :21])
    moved = pse.Cut(pse.Cut(bias, (2, 9), (1, 8), 12, 12), (1, 3), (2, 4), 7, 7)
    assert (moved.q_range, moved.kv_range) == ((3, 5), (3, 5))
    with pytest.raises(CompositionError, match="is cut as one of 8 x 7"):
        pse.Cut(pse.Cut(bias, (2, 9), (1, 8), 12, 12), (1, 3), (2, 4), 8, 7)
