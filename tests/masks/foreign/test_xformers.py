"""xFormers' classes as sets: each against the matrix that it makes of itself."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import product

import pytest
import torch

from attnkit import masks
from attnkit.errors import CompositionError
from attnkit.masks.foreign.xformers import key_blocks

xf = pytest.importorskip("xformers.ops.fmha.attn_bias")

Q_LENS = ((2, 3), (1, 1, 1), (3,), (2, 0, 4))
SIZES = list(product((1, 2, 4, 5), (1, 3, 4, 7)))


def blocks():
    """Lengths of queries and keys, at least as many keys as queries where that is wanted."""
    for q_lens, more in product(Q_LENS, (0, 1, 3)):
        yield q_lens, tuple(n + more for n in q_lens)


def paged(bias, page, seed):
    """The same keys in pages of any order."""
    rows, room = len(bias.q_seqinfo.seqstart_py) - 1, 8 // page
    order = torch.randperm(rows * room, generator=torch.Generator().manual_seed(seed))
    return order.view(rows, room).int()


def plain():
    yield from ((xf.LowerTriangularMask(), *s) for s in SIZES)
    yield from ((xf.LowerTriangularFromBottomRightMask(), *s) for s in SIZES)
    for (q_len, kv_len), size in product(SIZES, (1, 2, 9)):
        made = xf.LowerTriangularFromBottomRightMask().make_local_attention(size)
        yield made, q_len, kv_len
    for (q_len, kv_len), left, right in product(SIZES, (0, 1, 9), (0, 2, 9)):
        yield xf.LocalAttentionFromBottomRightMask(left, right), q_len, kv_len


def whole_keys():
    for q_lens, kv_lens in blocks():
        made = xf.BlockDiagonalMask.from_seqlens(q_lens, kv_lens)
        found = [made, made.make_causal(), made.make_causal_from_bottomright()]
        found += [made.make_local_attention(n) for n in (1, 2, 9)]
        found += [made.make_local_attention_from_bottomright(n) for n in (1, 2, 9)]
        yield from ((one, sum(q_lens), sum(kv_lens)) for one in found)
    made = xf.BlockDiagonalMask.from_seqlens((3, 1), (1, 4))  # more queries than keys, too
    yield from ((one, 4, 5) for one in (made, made.make_causal(), made.make_local_attention(3)))


def padded_keys():
    for q_lens, kv_lens in blocks():
        room = 8
        sizes = sum(q_lens), room * len(q_lens)
        for kind in (
            xf.BlockDiagonalPaddedKeysMask,
            xf.BlockDiagonalCausalWithOffsetPaddedKeysMask,
        ):
            yield kind.from_seqlens(q_lens, room, kv_lens), *sizes
        base = xf.BlockDiagonalPaddedKeysMask.from_seqlens(q_lens, room, kv_lens)
        for left, right in product((0, 1, 9), repeat=2):
            yield base.make_local_attention(left, right), *sizes
        for size in (1, 2, 9):
            local = xf.BlockDiagonalCausalLocalAttentionPaddedKeysMask
            yield local.from_seqlens_local(q_lens, room, kv_lens, size), *sizes


def gappy_keys():
    for q_lens, kv_lens in blocks():
        starts, at = [], 1
        for n in kv_lens:
            starts, at = [*starts, at], at + n + 2
        # In order, and in an order of their own with keys that two blocks share.
        for own in ([*starts, at], [*starts[::-1], at], [*[0] * len(starts), at]):
            if all(a + n <= at for a, n in zip(own, kv_lens, strict=False)):
                for kind in (
                    xf.BlockDiagonalGappyKeysMask,
                    xf.BlockDiagonalCausalWithOffsetGappyKeysMask,
                ):
                    yield kind.from_seqlens(q_lens, own, kv_lens), sum(q_lens), at


def in_pages():
    for (q_lens, kv_lens), page in product(blocks(), (1, 2, 4)):
        base = xf.BlockDiagonalPaddedKeysMask.from_seqlens(q_lens, 8, kv_lens)
        table = paged(base, page, sum(kv_lens))
        logical = sum(q_lens), 8 * len(q_lens)
        for kind in (
            xf.PagedBlockDiagonalPaddedKeysMask,
            xf.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask,
        ):
            yield kind.from_seqlens(q_lens, kv_lens, table, page), *logical
        for kind in (
            xf.PagedBlockDiagonalGappyKeysMask,
            xf.PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
        ):
            # Its from_seqlens takes no lengths at all: it wants as many starts, and one more.
            starts = [8 * b + 1 % (9 - n) for b, n in enumerate(kv_lens)]
            gappy = xf.BlockDiagonalGappyKeysMask
            flat = gappy.from_seqlens(q_lens, [*starts, 8 * len(q_lens)], kv_lens)
            yield flat.make_paged(table, page, 8, kind), *logical


FAMILIES = {f.__name__: f for f in (plain, whole_keys, padded_keys, gappy_keys, in_pages)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_class_is_the_set_that_it_makes_of_itself(name: str) -> None:
    seen = 0
    for bias, q_len, kv_len in FAMILIES[name]():
        meant = bias.materialize((q_len, kv_len)) == 0
        lifted = masks.from_xformers(bias)
        found = lifted.mask.materialize(*meant.shape)[0, 0]
        assert torch.equal(found, meant), bias
        assert lifted.cells_read == 0
        seen += 1
    assert seen > 30


def test_no_class_is_left_out() -> None:
    tried = {type(bias) for family in FAMILIES.values() for bias, _, _ in family()}
    every = {
        kind
        for _, kind in inspect.getmembers(xf, inspect.isclass)
        if issubclass(kind, xf.AttentionBias) and kind is not xf.AttentionBias
    }
    assert every - tried == {xf.LowerTriangularMaskWithTensorBias}
    assert len(every) == 20


def test_it_tells_what_it_recognised() -> None:
    made = xf.BlockDiagonalPaddedKeysMask.from_seqlens([1, 2], 4, [3, 4])
    lifted = masks.from_xformers(made.make_local_attention(3, 0))
    assert str(lifted) == (
        "Documents((1, 0, 2), (3, 1, 4), inside=Band(3, 0)), of xFormers' "
        "BlockDiagonalLocalAttentionPaddedKeysMask: 2 blocks, keys with gaps, inside of each "
        "Band(3, 0)"
    )
    whole = masks.from_xformers(xf.BlockDiagonalMask.from_seqlens([2, 3]).make_causal())
    assert whole.mask == masks.Documents([2, 3], inside=masks.Causal("top_left"))


def test_a_subclass_is_its_parent_unless_it_says_its_cells() -> None:
    class Same(xf.LowerTriangularMask):
        pass

    @dataclass
    class Strided(xf.LowerTriangularMask):
        step: int

        def materialize(self, shape, dtype=torch.float32, device="cpu"):
            i, j = torch.arange(shape[0])[:, None], torch.arange(shape[1])
            keep = ((i - j) % self.step == 0) & (j <= i)
            return torch.zeros(shape, dtype=dtype).masked_fill(~keep, -torch.inf)

    assert masks.from_xformers(Same()).mask == masks.Causal("top_left")
    with pytest.raises(CompositionError, match="give q_len and kv_len"):
        masks.from_xformers(Strided(2))
    lifted = masks.from_xformers(Strided(2), q_len=6, kv_len=6)
    assert lifted.cells_read == 36
    assert torch.equal(lifted.mask.materialize(6, 6)[0, 0], Strided(2).materialize((6, 6)) == 0)


def test_what_is_no_mask_is_refused() -> None:
    biased = xf.LowerTriangularMask().add_bias(torch.zeros(2, 2))
    for given, told in (
        (biased, "a causal mask and a bias"),
        (torch.zeros(2, 2), "split_additive"),
        ("causal", "attn_bias"),
    ):
        with pytest.raises(CompositionError, match=told):
            masks.from_xformers(given)

    class Added(xf.AttentionBias):
        def materialize(self, shape, dtype=torch.float32, device="cpu"):
            return torch.ones(shape)

    with pytest.raises(CompositionError, match="other values than 0"):
        masks.from_xformers(Added(), q_len=2, kv_len=2)


def test_a_page_that_counts_twice_is_refused() -> None:
    table = torch.tensor([[1, 1]], dtype=torch.int32)
    twice = xf.PagedBlockDiagonalPaddedKeysMask.from_seqlens([1], [3], table, 2)
    with pytest.raises(CompositionError, match="a page twice"):
        masks.from_xformers(twice)
    # An unused entry may be any page.
    once = xf.PagedBlockDiagonalPaddedKeysMask.from_seqlens([1], [2], table, 2)
    assert masks.from_xformers(once).mask.materialize(1, 4).flatten().tolist() == [0, 0, 1, 1]


def test_keys_that_do_not_exist_are_refused() -> None:
    made = xf.BlockDiagonalGappyKeysMask.from_seqlens([1], [2, 4], [3])
    with pytest.raises(CompositionError, match="keys that exist"):
        key_blocks(made)
