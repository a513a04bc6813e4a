"""Everything again with tiny tiles, so that small calls are cut along every axis."""

from __future__ import annotations

import pytest
import torch

from attnkit.kernel import AttenMask, call_tensors, emulate
from tests.kernel import test_numbers
from tests.kernel.plain import DENSE, call_for
from tests.kernel.test_numbers import check_dense, check_packed
from tests.kernel.test_numbers import operands as random_operands


@pytest.fixture(params=[(2, 3, 12), (1, 1, 1), (4, 2, 40)])
def tiny(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    rows, columns, cells = request.param
    monkeypatch.setattr(call_tensors, "_TILE_ROWS", rows)
    monkeypatch.setattr(call_tensors, "_TILE_COLUMNS", columns)
    monkeypatch.setattr(call_tensors, "_TILE_CELLS", cells)


@pytest.mark.usefixtures("tiny")
def test_dense_calls_in_tiny_tiles():
    for n, mode in enumerate((0, 1, 2, 3, 4, 5, 6)):
        layout = list(DENSE)[n % 4]
        check_dense(layout, mode, (None, 0, 1, 2, 3)[n % 5], 0.7)
        check_dense(layout, mode, None, sink=True)


@pytest.mark.usefixtures("tiny")
def test_packed_calls_in_tiny_tiles():
    for mode in (0, 1, 2, 3, 4, 6, 7, 8):
        check_packed(mode, None, 0.7)
    check_packed(3, 0, 0.7)
    check_packed(2, 3)


@pytest.mark.usefixtures("tiny")
def test_biases_that_differ_between_batch_elements_in_tiny_tiles():
    test_numbers.test_bias_shapes(2)
    test_numbers.test_start_indices_work_only_together_and_slopes_may_differ_between_batches()


def test_statistics_do_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch):
    """Rows without a key count every visited key, in however many tiles."""
    q, k, v = random_operands(1, 1, 1, 4, 9)
    mask = torch.zeros(4, 9, dtype=torch.bool)
    mask[1] = True
    call = call_for(q, k, v, 1, "BNSD", atten_mask=AttenMask.full((4, 9)))
    whole = emulate(call, q, k, v, atten_mask=mask)
    monkeypatch.setattr(call_tensors, "_TILE_COLUMNS", 2)
    for got, want in zip(emulate(call, q, k, v, atten_mask=mask), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert whole[2][0, 0, 1, 0] == 9
