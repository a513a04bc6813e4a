"""Bool and float masks of torch: every shape that broadcasts, against broadcasting itself."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import attnkit as ak
from attnkit import masks, pse
from attnkit.errors import CompositionError, CompositionTypeError

B, N, SQ, SK = 2, 3, 4, 5
SHAPES = [
    shape[4 - axes :]
    for axes in (1, 2, 3, 4)
    for shape in product((1, B), (1, N), (1, SQ), (1, SK))
    if all(size == full for size, full in zip(shape[: 4 - axes], (1, 1, 1, 1), strict=False))
]


def drawn(mask):
    return mask.materialize(SQ, SK, B, N)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_bool_tensor_of_any_shape_that_broadcasts(shape, keep):
    torch.manual_seed(0)
    for share in (0.0, 0.5, 0.8, 1.0):
        given = torch.rand(shape) < share
        want = (given if keep else ~given).expand(B, N, SQ, SK)
        for tensor in (given, given.expand(B, N, SQ, SK), given.expand(*given.shape[:-1], SK)):
            found = masks.from_torch(tensor, keep=keep)
            assert drawn(found.mask).equal(want), found
            assert found.cells_read == given.numel()


def test_padding_is_recognised_and_never_expanded():
    exists = torch.arange(1 << 20) < torch.tensor([[1 << 20], [1 << 19]])
    found = masks.from_torch(exists[:, None, None].expand(2, 8, 1 << 20, 1 << 20), keep=True)
    assert found.mask == masks.Padding([1 << 20, 1 << 19])
    assert found.cells_read == 1 << 21
    left = masks.from_torch(exists.flip(1)[:, None, None], keep=True)
    assert left.mask == ~masks.Prefix([0, 1 << 19])


def test_a_row_for_all_keeps_no_batch():
    row = torch.tensor([True, False, True])
    assert masks.from_torch(row, keep=True).mask == masks.Prefix(1) | masks.Columns(2)
    assert masks.from_torch(row[:2], keep=False).mask == masks.Columns(1)


def test_what_is_no_mask_is_refused():
    with pytest.raises(CompositionTypeError, match="split_additive"):
        masks.from_torch(torch.zeros(2, 2), keep=True)
    with pytest.raises(CompositionTypeError, match="keep=1"):
        masks.from_torch(torch.ones(2, 2).bool(), keep=1)
    for shape in ((), (0, 2), (1, 1, 1, 2, 2)):
        with pytest.raises(CompositionError, match="broadcasts"):
            masks.from_torch(torch.ones(shape).bool(), keep=True)
    with pytest.raises(CompositionError, match="kv_len=7"):
        masks.from_torch(torch.ones(2, 2).bool(), keep=True, kv_len=7)


# -- what is added -------------------------------------------------------------------------


@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float64).min])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_float_mask_is_a_set_and_a_bias(shape, biased, least):
    torch.manual_seed(1)
    given = torch.randn(shape).double() if biased else torch.zeros(shape).double()
    given = given.masked_fill(torch.rand(shape) < 0.3, least).requires_grad_(biased)
    query, key, value = (torch.randn(B, N, s, 8).double() for s in (SQ, SK, SK))
    mask, bias = pse.split_additive(given, kv_len=SK)
    assert (bias is None) == (not biased)
    out = ak.attention(query, key, value, mask=mask, pse=bias, layout="BNSD")

    dropped = given.detach() == least
    again = given.detach().masked_fill(dropped, -torch.inf).requires_grad_(biased)
    want = sdpa(query, key, value, again.expand(B, N, SQ, SK))
    seen = ~dropped.expand(B, N, SQ, SK).all(-1)
    torch.testing.assert_close(out[seen], want[seen], rtol=1e-12, atol=1e-12)
    assert not out[~seen].any()
    if biased:
        out[seen].sin().sum().backward()
        want[seen].sin().sum().backward()
        torch.testing.assert_close(given.grad, again.grad.nan_to_num(), rtol=1e-10, atol=1e-12)


def test_half_of_the_least_number_is_masked_and_above_it_is_not():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        least = torch.finfo(dtype).min
        row = torch.tensor([0.0, least, least / 2, least / 4, -torch.inf], dtype=dtype)
        mask, bias = pse.split_additive(row)
        assert mask == masks.Prefix(1) | masks.Columns(3, 4)
        assert bias == pse.KeyBias(torch.tensor([0, 0, 0, least / 4, 0], dtype=dtype))


def test_a_float_mask_with_nothing_masked_or_nothing_added():
    assert pse.split_additive(torch.zeros(3, 3)) == (masks.Full(), None)
    assert pse.split_additive(torch.full((3,), -torch.inf)) == (~masks.Full(), None)
    trained = torch.zeros(2, 3, requires_grad=True)
    assert pse.split_additive(trained).bias is not None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_float_mask_that_is_no_number_is_refused(bad):
    with pytest.raises(CompositionError, match="NaN or"):
        pse.split_additive(torch.tensor([[0.0, bad], [-torch.inf, 0.0]]))


def test_a_number_per_query_needs_the_number_of_keys():
    with pytest.raises(CompositionError, match="kv_len"):
        pse.split_additive(torch.ones(4, 1))
