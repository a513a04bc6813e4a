"""Block masks and mask functions against torch's `create_block_mask` and the masks themselves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import (
    BlockMask,
    _convert_mask_to_block_mask,
    _create_sparse_block_from_block_mask,
    create_block_mask,
)

import attnkit as ak
from attnkit import masks
from attnkit.backends.flex import block_mask, mask_mod
from attnkit.backends.flex.blocks import MaskMod, tables_of
from attnkit.masks import Mask
from tests.masks.oracle import anchored_cases, free_cases, sized_cases
from tests.properties.strategies import atoms, composed

LISTS = [name for name in BlockMask._TENSOR_ATTRS if not name.startswith("dq")]


def check(
    mask: Mask,
    q_len: int,
    kv_len: int,
    blocks: Sequence[tuple[int, int]],
    batch: int | None = None,
    heads: int | None = None,
) -> None:
    """Every tensor, tails of index lists included, and every cell of the mask function."""
    batch, heads = batch or mask.batches, heads or mask.heads
    meant = mask.materialize(q_len, kv_len, batch or 1, heads or 1)
    assert torch.equal(cells(mask_mod(mask, q_len, kv_len), meant.shape), meant), mask
    for block in blocks:
        found = block_mask(mask, q_len, kv_len, batch=batch, heads=heads, block=block)
        compare(found, evaluated(meant, block), (mask, q_len, kv_len, block))


def cells(fn: MaskMod, shape: torch.Size) -> Tensor:
    """A mask function on all of its cells at once."""
    index = [torch.arange(n) for n in shape]
    found = fn(*torch.meshgrid(*index, indexing="ij"))
    return found.expand(shape)


def evaluated(meant: Tensor, block: tuple[int, int]) -> BlockMask:
    """What `create_block_mask` makes of the cells once it has evaluated them."""
    tiles = _convert_mask_to_block_mask(meant, *block, separate_full_blocks=True)
    return _create_sparse_block_from_block_mask(tiles, None, tuple(meant.shape[2:]), *block)


def compare(found: BlockMask, theirs: BlockMask, what: object) -> None:
    for name in LISTS:
        one, other = getattr(found, name), getattr(theirs, name)
        assert (one.dtype, one.shape) == (other.dtype, other.shape), (name, what)
        assert torch.equal(one, other), (name, what)
        assert one.is_contiguous()
    assert (found.seq_lengths, found.BLOCK_SIZE) == (theirs.seq_lengths, theirs.BLOCK_SIZE)
    assert found.shape == theirs.shape


def families(q_len: int, kv_len: int) -> list[Mask]:
    cases = [*free_cases(), *sized_cases(q_len, kv_len)]
    for align in ("bottom_right", "top_left"):
        cases += anchored_cases(align)
    return [case.mask for case in cases]


@pytest.mark.parametrize("lengths", [(1, 1), (4, 4), (6, 6), (5, 7), (7, 3), (1, 8)], ids=str)
def test_every_family(lengths: tuple[int, int]) -> None:
    for mask in families(*lengths):
        check(mask, *lengths, [(1, 1), (2, 2), (3, 2)])


@pytest.mark.sweep
def test_every_pair_of_families() -> None:
    checked = 0
    for one, other in product(families(6, 6)[::2], repeat=2):
        try:
            mask = (one & ~other) | (other - one)
            mask.check(6, 6, mask.batches or 1, mask.heads or 1)
        except ak.CompositionError:  # made for different batches, heads or lengths
            continue
        check(mask, 6, 6, [(2, 3)])
        checked += 1
    assert checked > 3000


@settings(max_examples=150)
@given(st.data())
def test_random_compositions(data: st.DataObject) -> None:
    q_len, kv_len = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    mask = data.draw(composed(atoms(2, 3, (q_len, kv_len), kv_len)))
    block = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    check(mask, q_len, kv_len, [block], 2, 3)


LARGE = {
    "causal": masks.Causal(),
    "window": masks.SlidingWindow(70),
    "window and sinks": masks.Causal() & (masks.SlidingWindow(70) | masks.Prefix(4)),
    "documents": masks.Documents((100, 1, 160, 39)) & masks.Causal(),
    "blocks": masks.BlockCausal(50),
    "nothing": masks.Causal() - masks.Full(),
    "a hole": ~masks.Band(20, 60),
}


@pytest.mark.parametrize("name", LARGE)
def test_blocks_of_real_size(name: str) -> None:
    check(LARGE[name], 300, 300, [(32, 32), (128, 128), (64, 128)])


@pytest.mark.parametrize("name", LARGE)
def test_create_block_mask_itself_on_our_function(name: str) -> None:
    found = block_mask(LARGE[name], 300, 300, batch=2)
    theirs = create_block_mask(found.mask_mod, 2, None, 300, 300, "cpu")
    compare(found, theirs, name)


@pytest.mark.parametrize(
    "mask",
    [masks.Padding([3, 9]), masks.PerHead([masks.Causal()] * 2 + [masks.Dilated(2)])],
    ids=str,
)
def test_create_block_mask_where_matrices_differ(mask: Mask) -> None:
    for both in (mask, mask & masks.Padding([9, 2]), mask & masks.Dilated(3)):
        where = (both.batches or 2, both.heads or 3, 9, 9)
        found = block_mask(both, 9, 9, batch=where[0], heads=where[1], block=(4, 4))
        theirs = create_block_mask(found.mask_mod, *where, "cpu", BLOCK_SIZE=4)
        compare(found, theirs, both)


def test_batch_and_heads() -> None:
    padded = masks.Padding([3, 9]) & masks.Causal()
    each = masks.PerHead([masks.Causal(), masks.Dilated(3), masks.Causal()])
    check(padded, 9, 9, [(2, 2)], 2, 3)
    check(padded & each, 9, 9, [(2, 2)], 2, 3)
    check(masks.Padding([5, 5]), 9, 9, [(2, 2)], 2, 3)
    assert block_mask(masks.Padding([5, 5]), 9, 9).kv_num_blocks.shape[:2] == (2, 1)
    assert block_mask(masks.Causal(), 9, 9).kv_num_blocks.shape[:2] == (1, 1)


def test_equal_matrices_are_kept_once() -> None:
    mask = masks.PerHead([masks.Causal(), masks.SlidingWindow(2), masks.Causal()])
    tables = tables_of(mask, 6, 6)
    assert tables.start is not None
    assert len(tables.start) == 2
    assert tables.group.tolist() == [[0, 1, 0]]


def test_rows_of_many_runs_are_bits() -> None:
    mask = masks.Slices([(0, 80, k, k + 1, None, None) for k in range(0, 80, 3)], 80, 80)
    assert mask.is_region(80, 80)
    check(mask, 80, 80, [(16, 16)])
    for bits in (mask, masks.Dilated(3)):
        assert tables_of(bits, 80, 80).shape == (None, False, False)


def test_mistakes_are_explained() -> None:
    with pytest.raises(ak.CompositionError, match="each is at least 1"):
        block_mask(masks.Causal(), 0, 4)
    with pytest.raises(ak.CompositionError, match="batch"):
        block_mask(masks.Padding([1, 2]), 4, 4, batch=3)
    with pytest.raises(ak.CompositionError, match="built for"):
        mask_mod(masks.Documents([2, 3]), 4, 4)
