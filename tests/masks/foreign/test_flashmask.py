"""FlashMask's bounds as sets, against the loop that its documentation gives."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from attnkit import masks
from attnkit.errors import CompositionError, CompositionTypeError

FORMS = [(True, 1), (True, 2), (False, 2), (False, 4)]


def dense(bounds, causal, q_len):
    """Key by key, as PaddlePaddle's `flashmask_to_densemask`; causal from the last of each."""
    b, n, kv_len, k = bounds.shape
    allowed = torch.ones(b, n, q_len, kv_len, dtype=torch.bool)
    for e, h, j in product(range(b), range(n), range(kv_len)):
        ends, column = bounds[e, h, j].tolist(), allowed[e, h, :, j]
        column[ends[0] : ends[1] if (causal and k == 2) or k == 4 else None] = False
        if causal:
            column[: max(0, j - (kv_len - q_len))] = False
        elif k == 4:
            column[ends[2] : ends[3]] = False
        else:
            column[: ends[1]] = False
    return allowed


@pytest.mark.parametrize(("causal", "k"), FORMS)
def test_every_bound_of_a_small_matrix(causal, k):
    for q_len, kv_len in ((3, 1), (2, 2)) if k < 4 else ((2, 1),):
        entries = product(range(q_len + 2), repeat=k)
        for bounds in product(entries, repeat=kv_len):
            given = torch.tensor(bounds).view(1, 1, kv_len, k)
            found = masks.from_flashmask(given, causal=causal, q_len=q_len)
            assert found.mask.materialize(q_len, kv_len).equal(dense(given, causal, q_len)), bounds


@pytest.mark.parametrize(("causal", "k"), FORMS)
@pytest.mark.parametrize("q_len", [None, 5, 9])
def test_random_bounds(causal, k, q_len):
    torch.manual_seed(0)
    for _ in range(2):
        given = torch.randint(0, 9, (1, 2, 7, k), dtype=torch.int32)
        if torch.rand(()) < 0.5:
            given = given.sort(2).values
        found = masks.from_flashmask(given, causal=causal, q_len=q_len, heads=4)
        want = dense(given, causal, q_len or 7).repeat_interleave(2, 1)
        assert found.mask.materialize(q_len or 7, 7, 1, 4).equal(want)
        assert found.cells_read == 0


def test_common_masks_get_their_names():
    n = 64
    packed = torch.where(torch.arange(n) < 20, 20, 64)[None, None, :, None]
    assert masks.from_flashmask(packed, causal=True).mask == (
        masks.Documents([20, 44]) & masks.Causal()
    )
    window = (torch.arange(n) + 8)[None, None, :, None]
    assert masks.from_flashmask(window, causal=True).mask == masks.SlidingWindow(8)
    both = torch.stack((torch.arange(n) + 8, (torch.arange(n) - 7).clamp(min=0)), -1)[None, None]
    assert masks.from_flashmask(both, causal=False).mask == masks.Band(7, 7)


def test_a_million_keys_are_read_without_a_matrix():
    n = 1 << 20
    window = (torch.arange(n) + 256)[None, None, :, None]
    found = masks.from_flashmask(window, causal=True)
    assert found.mask == masks.SlidingWindow(256)


def test_bounds_of_another_form_are_refused():
    with pytest.raises(CompositionTypeError, match="integers"):
        masks.from_flashmask(torch.ones(1, 1, 4, 1), causal=True)
    for causal, k in ((True, 4), (False, 1), (True, 3)):
        with pytest.raises(CompositionError, match="k = 1 or 2"):
            masks.from_flashmask(torch.ones(1, 1, 4, k, dtype=torch.int64), causal=causal)
    with pytest.raises(CompositionError, match="the row -1"):
        masks.from_flashmask(torch.full((1, 1, 4, 1), -1), causal=True)
    with pytest.raises(CompositionError, match="3 heads"):
        masks.from_flashmask(torch.ones(1, 3, 4, 1).long(), causal=True, heads=4)
