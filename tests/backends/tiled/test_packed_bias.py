"""Packed sequences of different lengths: a bias that tiled binds at one size is refused there."""

from __future__ import annotations

import pytest
import torch

import attnkit as ak
from attnkit import masks, pse

BIASES = (pse.ALiBi(4), pse.SqrtALiBi(4), pse.ALiBi(4, learnable=True), pse.T5Relative(4))


@pytest.mark.parametrize("lens", [ak.SeqLens([7, 4], [9, 9]), ak.SeqLens([5, 9, 10])], ids=repr)
@pytest.mark.parametrize("bias", BIASES, ids=lambda bias: type(bias).__name__)
def test_auto_equals_the_reference(lens: ak.SeqLens, bias: pse.Pse) -> None:
    torch.manual_seed(0)
    for tensor in bias.tensors:
        torch.nn.init.normal_(tensor)
    q = torch.randn(lens.total_q, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, lens.total_kv, 4, 8, dtype=torch.float64)
    given = {"mask": masks.Causal(), "pse": bias, "layout": "TND", "seqlens": lens}
    out = ak.attention(q, k, v, **given)
    meant = ak.attention(q, k, v, backend="reference", **given)
    torch.testing.assert_close(out, meant, atol=1e-10, rtol=0)
    if bias.tensors:
        with pytest.raises(ak.BackendRefused) as refused:
            ak.plan(q, k, v, backend="tiled", **given)
        assert {r.code for r in refused.value.refusals} == {"tiled-packed-bias"}
