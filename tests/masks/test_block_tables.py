"""Masks by blocks: every small table, its forms, and what does not fit."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from attnkit import masks
from attnkit.errors import CompositionError
from attnkit.masks import Blocks, Rectangle
from attnkit.masks import block_table as module

SIZES = list(product((1, 2, 3), repeat=2))


def cells_of(table, q_block, kv_block, q_len, kv_len, shift=None):
    """The definition, cell by cell; `shift` is the position of query 0 under a causal edge."""
    return torch.tensor(
        [
            [
                bool(table[i // q_block, j // kv_block]) and (shift is None or j <= i + shift)
                for j in range(kv_len)
            ]
            for i in range(q_len)
        ]
    )


def assert_is(mask, cells):
    q_len, kv_len = cells.shape
    assert mask.region(q_len, kv_len) == masks.Dense.keep(cells).region(q_len, kv_len), mask
    assert mask.materialize(q_len, kv_len)[0, 0].equal(cells), mask
    at = Rectangle((q_len // 3, q_len), (1, kv_len), q_len, kv_len)
    assert mask._read(at).equal(cells[q_len // 3 :, 1:]), mask


@pytest.mark.parametrize(("q_block", "kv_block"), SIZES)
def test_every_table_of_two_by_two_is_its_formula(q_block, kv_block):
    for bits in product((False, True), repeat=4):
        table = torch.tensor(bits).view(2, 2)
        for q_len, kv_len in ((2 * q_block, 2 * kv_block), (q_block + 1, kv_block + 1)):
            lengths = {"q_len": q_len, "kv_len": kv_len}
            assert_is(
                Blocks(table, q_block, kv_block, **lengths),
                cells_of(table, q_block, kv_block, q_len, kv_len),
            )
            for align, shift in (("top_left", 0), ("bottom_right", kv_len - q_len)):
                assert_is(
                    Blocks(table, q_block, kv_block, causal=True, align=align, **lengths),
                    cells_of(table, q_block, kv_block, q_len, kv_len, shift),
                )


def test_a_table_has_planes_for_batch_elements_and_heads():
    tables = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = Blocks(tables, 3, 2, q_len=11, kv_len=9)
    assert (mask.batches, mask.heads) == (2, 3)
    drawn = mask.materialize(11, 9, 2, 3)
    for b, h in product(range(2), range(3)):
        cells = cells_of(tables[b, h], 3, 2, 11, 9)
        assert drawn[b, h].equal(cells)
        assert mask.region(11, 9, b, h) == masks.Dense.keep(cells).region(11, 9)
    assert Blocks(tables[0], 3, 2) == Blocks(tables[:1], 3, 2)
    assert Blocks(tables[:, :1], 3, 2).heads is None
    assert Blocks(tables[:, 0], 3, 2).heads == 2


def test_every_form_of_a_table_is_the_same_mask():
    cells = torch.tensor([[True, False, True], [False, True, True]])
    mask = Blocks("#.# .##", 4, 2)
    packed = masks.Dense.keep(cells).packed
    forms = [cells, cells.numpy(), np.asfortranarray(cells.numpy()), cells.tolist(), packed]
    for form in (*forms, tuple(map(tuple, cells.tolist())), "\n  #.#\n  .##\n"):
        assert Blocks(form, 4, 2) == mask, form
        assert hash(Blocks(form, 4, 2)) == hash(mask)
        assert str(Blocks(form, 4, 2)) == "Blocks('#.# .##', 4, 2)"
    assert mask != Blocks("#.# .#.", 4, 2)
    assert mask != Blocks("#.# .##", 4, 2, causal=True)
    large = Blocks(torch.ones(64, 64).tril() > 0, 16, 16)
    assert repr(large) == "<masks.Blocks 1x1x64x64 of 16 x 16, 2080 allowed>"
    assert len(str(large)) < 1000
    assert masks.parse(str(large)) == large
    cells[0] = False
    assert mask == Blocks("#.# .##", 4, 2)


def test_a_table_of_no_structure_is_known_by_its_cells(monkeypatch):
    table = torch.rand(40, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    table[:5], table[:, 35:] = False, False
    mask = Blocks(table, 2, 3)
    region = mask.region(80, 120)
    monkeypatch.setattr(module, "MOST_RUNS", 50)
    assert not mask.is_region(80, 120)
    assert region <= mask.outer(80, 120)
    assert mask.outer(80, 120).bounds.i0 == region.bounds.i0
    assert mask.outer(80, 120).bounds.j1 == region.bounds.j1
    drawn = mask.materialize(80, 120)[0, 0]
    assert drawn.equal(cells_of(table, 2, 3, 80, 120))
    ahead = Blocks(table, 2, 3, causal=True)
    assert ahead.outer(80, 120) <= masks.Causal().region(80, 120)


def test_the_last_blocks_may_be_ragged_where_it_is_said():
    assert Blocks("## #.", 4, 2, q_len=8, kv_len=4) == Blocks("## #.", 4, 2)
    ragged = Blocks("## #.", 4, 2, q_len=5)
    assert str(ragged) == "Blocks('## #.', 4, 2, q_len=5)"
    assert ragged.extent == (5, 4)
    for bad in (4, 9):
        with pytest.raises(CompositionError, match=f"q_len={bad}, but 2 blocks of 4.*5 .*8"):
            Blocks("## #.", 4, 2, q_len=bad)
    with pytest.raises(CompositionError, match="is built for q_len=5"):
        (masks.Causal() & ragged).materialize(8, 4)


def test_cuts_of_blocks():
    mask = Blocks("#. ##", 4, 4, kv_len=7)
    whole = mask.materialize(8, 7)[0, 0]
    assert mask[3:, 1:].region(5, 6).area == whole[3:, 1:].sum()
    assert mask[2:6, :].materialize(4, 7)[0, 0].equal(whole[2:6])
