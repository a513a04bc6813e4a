"""MagiAttention's slices as sets, against the pictures of its docstring, and as a union."""

from __future__ import annotations

from enum import Enum
from itertools import product

import pytest
import torch

from attnkit import masks
from attnkit.errors import CompositionError, CompositionTypeError

# Rows of "the docstring of flex_flash_attn_func", for 5 x 2, 2 x 5 and 5 x 5.
PICTURES = {
    0: ("11 11 11 11 11", "11111 11111", "11111 11111 11111 11111 11111"),
    1: ("00 00 00 10 11", "11110 11111", "10000 11000 11100 11110 11111"),
    2: ("11 01 00 00 00", "11111 01111", "11111 01111 00111 00011 00001"),
    3: ("00 00 00 00 00", "11110 01111", "10000 01000 00100 00010 00001"),
}


class Kind(Enum):
    """As its own enumeration of types."""

    FULL = "full"
    CAUSAL = "causal"
    INVCAUSAL = "inv_causal"
    BICAUSAL = "bi_causal"


@pytest.mark.parametrize("kind", PICTURES)
def test_each_type_is_the_picture_of_it(kind):
    for picture in PICTURES[kind]:
        want = torch.tensor([[int(cell) for cell in row] for row in picture.split()]).bool()
        q_len, kv_len = want.shape
        for word in (kind, list(Kind)[kind], list(Kind)[kind].value, list(Kind)[kind].name):
            found = masks.from_magi([(0, q_len)], [(0, kv_len)], [word])
            assert found.mask.materialize(q_len, kv_len)[0, 0].equal(want)


def test_slices_are_a_union_wherever_they_lie():
    want = torch.zeros(12, 12, dtype=torch.bool)
    rows, keys, types = [(0, 5), (5, 7), (7, 12), (7, 9)], [(2, 7), (0, 9), (0, 5), (6, 11)], []
    for (a, b), (c, d), kind in zip(rows, keys, (1, 2, 3, 0), strict=True):
        types.append(kind)
        for i, j in product(range(a, b), range(c, d)):
            first, last = j - c >= i - a, j - d <= i - b
            want[i, j] |= (True, last, first, first and last)[kind]
    for form in (list, torch.tensor):
        found = masks.from_magi(form(rows), form(keys), form(types), q_len=12, kv_len=12)
        assert found.mask.materialize(12, 12)[0, 0].equal(want)
    assert "4 slices" in str(found)


def test_documents_and_windows_get_their_names():
    ranges = [(0, 300), (300, 1000)]
    found = masks.from_magi(ranges, ranges, [1, 1])
    assert found.mask == masks.Documents([300, 700]) & masks.Causal()
    assert (
        masks.from_magi([(0, 4), (4, 9)], [(0, 4), (0, 9)], ["causal"] * 2).mask == masks.Causal()
    )
    assert masks.from_magi(ranges, ranges).mask == masks.Documents([300, 700])


def test_slices_that_are_none_are_refused():
    with pytest.raises(CompositionError, match="share cells"):
        masks.from_magi([(0, 4), (2, 6)], [(0, 4), (0, 4)])
    with pytest.raises(CompositionError, match="one of each"):
        masks.from_magi([(0, 4)], [(0, 4)], [1, 1])
    with pytest.raises(CompositionError, match="the type 4"):
        masks.from_magi([(0, 4)], [(0, 4)], [4])
    with pytest.raises(CompositionError, match="up to 4"):
        masks.from_magi([(0, 4)], [(0, 4)], q_len=3)
    with pytest.raises(CompositionError, match="start <= end"):
        masks.from_magi([(4, 0)], [(0, 4)])
    with pytest.raises(CompositionTypeError, match="q_ranges"):
        masks.from_magi(torch.ones(1, 2), [(0, 4)])
