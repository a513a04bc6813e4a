"""The sparse masks of models and papers through torch_npu, without a mask of their every cell."""

from __future__ import annotations

import sys

import pytest

from benchmarks._sparse_masks import SMALL, SPARSE, Sparse
from tests.npu.compare import check
from tests.npu.compositions import Case


@pytest.fixture(autouse=True)
def masks_of_tiles(no_full_masks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weigh masks that are as large as some tiles, and smaller than all but two of the masks."""
    monkeypatch.setattr(sys.modules["attnkit.planner.lower"], "MOST_MASK_CELLS", 6000)


@pytest.mark.parametrize("sparse", SPARSE, ids=lambda one: one.label(SMALL))
def test_grouped_heads_odd_sizes_and_empty_rows_equal_the_reference(sparse: Sparse):
    mask, q_len, kv_len = sparse.odd()
    check(Case(sparse.name, mask, batch=1, q_len=q_len, kv_len=kv_len, kv_heads=2))
