"""Cumulative lengths as masks, against flash-attention's formula in each sequence."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from attnkit import masks
from attnkit.errors import CompositionError


def dense(rows, keys, causal, left, right):
    """Allowed where ``i + sk - sq - left <= j <= i + sk - sq + right``, in each sequence."""
    allowed = torch.zeros(rows[-1], keys[-1], dtype=torch.bool)
    for a, b, c, d in zip(rows, rows[1:], keys, keys[1:], strict=False):
        i, j = torch.arange(b - a)[:, None] + (d - c) - (b - a), torch.arange(d - c)
        seen = torch.ones(b - a, d - c, dtype=torch.bool)
        if causal:
            seen &= j <= i
        if left >= 0:
            seen &= j >= i - left
        if right >= 0:
            seen &= j <= i + right
        allowed[a:b, c:d] = seen
    return allowed


@pytest.mark.parametrize("causal", [True, False])
def test_every_window_of_a_few_sequences(causal):
    for rows, keys in (([0, 3, 3, 8], [0, 5, 6, 8]), ([0, 4, 9], [0, 2, 9]), ([0, 7], None)):
        for left, right in product((-1, 0, 1, 3), repeat=2):
            if causal and right > 0:
                continue  # flash-attention sets it to 0
            cu = [
                None if one is None else torch.tensor(one, dtype=torch.int32)
                for one in (rows, keys)
            ]
            found = masks.from_cu_seqlens(*cu, causal=causal, window_size=(left, right))
            want = dense(rows, keys or rows, causal, left, right)
            assert found.mask.materialize(*want.shape)[0, 0].equal(want), found


def test_lengths_that_are_none_are_refused():
    for bad in ([1, 3], [0, 4, 3], [0]):
        with pytest.raises(CompositionError, match="begin with 0"):
            masks.from_cu_seqlens(torch.tensor(bad))
    with pytest.raises(CompositionError, match="each has both"):
        masks.from_cu_seqlens([0, 3], [0, 3, 4])
    with pytest.raises(CompositionError, match="no end"):
        masks.from_cu_seqlens([0, 3], window_size=3)
