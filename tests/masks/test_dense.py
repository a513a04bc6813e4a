"""`Dense`: which shapes it takes, and what their axes count."""

from __future__ import annotations

import pytest
import torch

import attnkit as ak
from attnkit import masks

CELLS = torch.rand(3, 3, 5, 7, generator=torch.Generator().manual_seed(2)) < 0.5


@pytest.mark.parametrize(
    "shape", [(3, 1, 1), (3, 1, 5), (1, 3, 1), (1, 1, 1), (3, 3, 1), (1, 3, 5)]
)
def test_an_axis_of_one_serves_all(shape: tuple[int, int, int]) -> None:
    cells = CELLS[: shape[0], : shape[1], : shape[2]]
    for mask in (masks.Dense.keep(cells), masks.Dense.drop(~cells)):
        assert mask.materialize(5, 7, 3, 3).equal(cells.expand(3, 3, 5, 7))
        assert masks.parse(str(mask)) == mask
        assert mask.extent == (None if shape[2] == 1 else 5, 7)
        rows = mask[2:4, :] if shape[2] > 1 else mask.cut((2, 4), (0, None))
        assert rows.materialize(2, 7, 3, 3).equal(cells.expand(3, 3, 5, 7)[:, :, 2:4])


def test_a_key_mask_of_transformers() -> None:
    exists = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    mask = masks.Dense.keep(exists[:, None, None, :]) & masks.Causal()
    padding = masks.Padding.of(exists) & masks.Causal()
    assert all(mask.region(4, 4, b) == padding.region(4, 4, b) for b in range(2))
    x = torch.randn(2, 4, 2, 8)
    assert torch.equal(ak.attention(x, x, x, mask=mask), ak.attention(x, x, x, mask=padding))


def test_three_axes_count_heads_unless_they_may_count_batch_elements() -> None:
    """Exactly the doubtful case is refused, and both ways to write it are told."""
    x = {n: torch.randn(n, 5, 3, 8) for n in (2, 3)}
    three = masks.Dense.keep(CELLS[0, :, :, :5])
    per_head = masks.Dense.keep(CELLS[:1, :, :, :5])
    assert ak.attention(x[2], x[2], x[2], mask=three).equal(
        ak.attention(x[2], x[2], x[2], mask=per_head)
    )
    for mask in (three, three & masks.Causal()):
        with pytest.raises(ak.CompositionError, match=r"tensor\[:, None\].*tensor\[None\]"):
            ak.attention(x[3], x[3], x[3], mask=mask)
    ak.attention(x[3], x[3], x[3], mask=per_head)
    per_batch = masks.Dense.keep(CELLS[:2, :1, :, :5])
    four = torch.randn(3, 5, 4, 8)
    with pytest.raises(ak.CompositionError, match=r"tensor\[:, None\]"):
        ak.attention(four, four, four, mask=three)
    assert per_batch.batches == 2
    assert masks.parse(str(three)) == three != per_head
    assert masks.Dense.keep(CELLS[0, :1, :, :5]) == masks.Dense.keep(CELLS[0, 0, :, :5])
