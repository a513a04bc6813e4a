"""Where the sequences of a call lie, and what the planner keeps."""

from __future__ import annotations

import pytest

from attnkit import masks
from attnkit.geometry import Region, Slice
from attnkit.planner.calls import diagonal_blocks
from attnkit.planner.sequences import Block


@pytest.mark.parametrize(
    ("mask", "sizes"),
    [
        (masks.Full(), [(6, 6)]),
        (masks.Causal(), [(6, 6)]),
        (masks.Documents([2, 4]), [(2, 2), (4, 4)]),
        (masks.Documents([2, 4]) & masks.Causal(), [(2, 2), (4, 4)]),
        (masks.Chunked(4), [(4, 4), (2, 2)]),
        (masks.Columns(0, 2), [(6, 2), (0, 4)]),
        (masks.Columns(4), [(0, 4), (6, 2)]),
        (masks.Rows(4), [(4, 0), (2, 6)]),
        (~masks.Full(), [(6, 0), (0, 6)]),
    ],
    ids=str,
)
def test_blocks_are_the_finest_chain(mask: masks.Mask, sizes: list[tuple[int, int]]) -> None:
    assert [b.sizes for b in diagonal_blocks(mask.region(6, 6), 6, 6, 0)] == sizes


def test_blocks_cover_every_cell_in_order() -> None:
    staircase = Region.of(Slice(0, 3, 0, 2), Slice(5, 6, 4, 9), Slice(6, 9, 9, 10))
    blocks = diagonal_blocks(staircase, 12, 12, 3)
    row = key = 0
    for block in blocks:
        (q_len, kv_len), ends = block.sizes, (row, row + block.sizes[0], key, key + block.sizes[1])
        assert block == Block.at(3, *ends)
        row, key = row + q_len, key + kv_len
    assert (row, key) == (12, 12)
    inside = Region.union(block.image(Region.full(*block.sizes)) for block in blocks)
    assert staircase <= inside
