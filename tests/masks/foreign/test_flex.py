"""BlockMasks and mask_mods as sets, against torch's own dense masks of them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import (
    BlockMask,
    and_masks,
    create_block_mask,
    create_mask,
    noop_mask,
    or_masks,
)

from attnkit import masks
from attnkit.errors import CompositionError, CompositionTypeError

N = 100
IDS = torch.arange(N) // 23
STARTS = torch.tensor([0, 17, 40])


def causal(b, h, i, j):
    return i >= j


def window(b, h, i, j):
    return i - j < 20


def documents(b, h, i, j):
    return IDS[i] == IDS[j]


def padded(b, h, i, j):
    return j >= STARTS[b]


def by_head(b, h, i, j):
    return i - j < 10 * (h + 1)


def not_understood(b, h, i, j):
    return (i * j) % 5 != 0


FUNCTIONS = [
    noop_mask,
    causal,
    and_masks(causal, window),
    or_masks(window, documents),
    and_masks(causal, padded),
    and_masks(causal, by_head),
    and_masks(padded, by_head, documents),
    and_masks(not_understood, causal, padded),
    not_understood,
]


def made(fn, block, batch=3, heads=2, q_len=N, kv_len=N, **more):
    return create_block_mask(
        fn, batch, heads, q_len, kv_len, device="cpu", BLOCK_SIZE=block, **more
    )


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("block", [16, (32, 8)])
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_a_block_mask_is_its_cells(fn, block, separate):
    for q_len, kv_len in ((N, N), (N - 36, N)):
        given = made(fn, block, q_len=q_len, kv_len=kv_len, separate_full_blocks=separate)
        want = create_mask(fn, 3, 2, q_len, kv_len, device="cpu")
        found = masks.from_flex(given)
        assert found.mask.materialize(q_len, kv_len, 3, 2).equal(want), found
        alone = masks.from_flex(fn, q_len, kv_len, batch=3, heads=2)
        assert alone.mask.materialize(q_len, kv_len, 3, 2).equal(want), alone


def test_only_partial_blocks_are_asked_for_what_is_not_understood():
    def odd(b, h, i, j):
        return (i >= j) & (i * j >= 0)

    found = masks.from_flex(made(odd, 10, 1, 1))
    assert found.mask == masks.Causal()
    assert found.cells_read == 10 * 10 * 10
    assert masks.from_flex(made(causal, 10, 1, 1)).cells_read == 0


def test_score_matrices_that_are_alike_are_read_once():
    asked = []

    def odd(b, h, i, j):
        asked.append(1)
        return (i >= j) & (i * j >= 0)

    given = made(odd, 10, 3, 2)
    asked.clear()
    found = masks.from_flex(given)
    assert found.mask == masks.Causal()
    assert found.cells_read == 10 * 10 * 10
    assert len(asked) <= 4


def test_the_blocks_say_what_is_seen_where_they_say_more_than_the_function():
    counts, indices = torch.tensor([[[1, 2]]]), torch.tensor([[[[1, 0], [0, 1]]]])
    found = masks.from_flex(BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=4))
    assert found.mask.region(8, 8).area == 4 * 4 + 4 * 8
    assert "2 x 2" not in str(found)
    assert "0 full and 3 partial" in str(found)


def test_functions_of_a_batch_that_nobody_counts_are_refused():
    with pytest.raises(CompositionError, match="batch="):
        masks.from_flex(padded, N, N)
    with pytest.raises(CompositionError, match="heads="):
        masks.from_flex(made(by_head, 16, None, None))
    found = masks.from_flex(made(by_head, 16, None, None), heads=1)
    assert found.mask == masks.Band(9, None)


def test_a_sliced_block_mask_is_refused():
    whole = made(causal, 10, 1, 1)
    with pytest.raises(CompositionError, match="mask_mod"):
        masks.from_flex(whole[:, :, :])
    with pytest.raises(CompositionError, match="do not cover"):
        masks.from_flex(whole[:, :, torch.tensor([3])])


def test_what_is_no_mask_of_flex_attention_is_refused():
    with pytest.raises(CompositionTypeError, match="BlockMask or a function"):
        masks.from_flex(torch.ones(2, 2).bool())
    with pytest.raises(CompositionError, match="say both"):
        masks.from_flex(causal, N)
    with pytest.raises(CompositionError, match="kv_len=7"):
        masks.from_flex(made(causal, 16), N, 7)
    with pytest.raises(CompositionError, match="mask function"):
        masks.from_flex(lambda b, h, i, j: i >= j if i > 3 else i < j, N, N)
