"""A score function of a share is told the numbers of the whole."""

from __future__ import annotations

import pickle

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.errors import CompositionError
from attnkit.layouts import SeqLens
from attnkit.planner.scoring import modified, taken_score, trains
from attnkit.ranges import Excerpt

TABLE = torch.randn(3, 4, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def cells(score, b, h, i, j):
    return score * 2 + TABLE[b, h, i, j]


def numbers(*counts: int) -> list[torch.Tensor]:
    return [torch.arange(count) for count in counts]


def places(ranges) -> list[int]:
    return [position for one in ranges for position in one]


def test_positions_of_rows_keys_and_heads() -> None:
    rows, keys = (range(8, 12), range(3, -1, -1)), (range(2, 5), range(40, 44))
    share = taken_score(cells, [Excerpt(64, 64, rows, keys)], first_head=2)
    scores = torch.randn(3, 2, 8, 7, dtype=torch.float64)
    found = modified(share, scores, *numbers(3, 2, 8, 7))
    right = scores * 2 + TABLE[:, 2:4][:, :, places(rows)][..., places(keys)]
    assert torch.equal(found, right)
    assert share == taken_score(cells, [Excerpt(64, 64, rows, keys)], first_head=2)
    assert share != taken_score(cells, [Excerpt(64, 64, rows, keys)], first_head=1)
    assert hash(share) == hash(pickle.loads(pickle.dumps(share)))
    assert taken_score(None, []) is None
    assert repr(share) == "cells of a share"
    assert not trains(share, scores)


def test_each_sequence_has_its_own() -> None:
    excerpts = [
        Excerpt(9, 9, (range(2, 4),), (range(5),), batch=2),
        Excerpt(30, 30, (range(7, 9), range(20, 21)), (range(9, 11),), batch=0),
    ]
    share = taken_score(cells, excerpts)
    for number, one in enumerate(excerpts):
        scores = torch.randn(1, 4, *one.sizes, dtype=torch.float64)
        index = numbers(1, 4, *one.sizes)
        found = modified(share, scores, index[0] + number, *index[1:])
        right = TABLE[one.batch][None, :, places(one.rows)][..., places(one.keys)]
        assert torch.equal(found, scores * 2 + right)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_rows_of_a_share_are_those_of_the_whole(backend: str) -> None:
    # All keys are here: what the rows get is what they get in the whole.
    q, k, v = (
        torch.randn(2, 24, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        for n in range(3)
    )
    rows, keys = (range(4, 9), range(20, 24)), (range(12, 24), range(12))
    mask = masks.Causal() & masks.SlidingWindow(16)
    whole = ak.attention(q, k, v, mask=mask, score_fn=cells, backend="reference")
    order = places(keys)
    here = ak.attention(
        q[:, places(rows)], k[:, order], v[:, order], backend=backend,
        mask=mask.take(rows, keys, q_len=24, kv_len=24),
        score_fn=taken_score(cells, [Excerpt(24, 24, rows, keys)]),
    )  # fmt: skip
    torch.testing.assert_close(here, whole[:, places(rows)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_rows_of_a_packed_share(backend: str) -> None:
    lengths = (9, 5, 16)
    q, k, v = (
        torch.randn(30, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        for n in range(3)
    )
    packed = {"layout": "TND", "seqlens": SeqLens(lengths)}
    whole = ak.attention(
        q, k, v, mask=masks.Causal(), score_fn=cells, backend="reference", **packed
    )
    excerpts = [
        Excerpt(9, 9, (range(6, 9),), (range(9),), batch=0),
        Excerpt(16, 16, (range(3), range(13, 16)), (range(16),), batch=2),
    ]
    rows, keys = [6, 7, 8, 14, 15, 16, 27, 28, 29], [*range(9), *range(14, 30)]
    here = ak.attention(
        q[rows], k[keys], v[keys], layout="TND", seqlens=SeqLens((3, 6), (9, 16)), backend=backend,
        mask=masks.Causal().take_excerpts(excerpts), score_fn=taken_score(cells, excerpts),
    )  # fmt: skip
    torch.testing.assert_close(here, whole[rows], rtol=0, atol=1e-12)


def test_a_function_that_fails_is_named() -> None:
    def wrong(score, b, h, i, j):
        return score if i > 0 else score * 2

    share = taken_score(wrong, [Excerpt(4, 4, (range(2),), (range(2),))])
    with pytest.raises(CompositionError, match="wrong of a share"):
        modified(share, torch.zeros(1, 1, 2, 2), *numbers(1, 1, 2, 2))
