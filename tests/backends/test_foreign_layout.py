"""A layout that the kernel has never heard of runs on it all the same, packed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import attnkit as ak
from attnkit import layouts, masks, pse


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    layouts.register(layouts.Layout("SBND", "s b n d"))
    layouts.register(layouts.Layout("NTD", "n t d"))
    yield
    for name in ("SBND", "NTD"):
        layouts.LAYOUTS.remove(name)


@pytest.mark.parametrize(
    "mask",
    [
        masks.Full(),
        masks.Causal(),
        masks.Causal() & masks.Documents([2, 4]),
        masks.Padding([2, 6, 0]),
        masks.PerHead([masks.Causal(), masks.SlidingWindow(2)]),
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [None, pse.ALiBi(2)], ids=str)
def test_a_dense_layout(mask: masks.Mask, bias: pse.Pse | None) -> None:
    q = torch.randn(6, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    rest = {"mask": mask, "pse": bias, "layout": "SBND", "return_stats": True}
    found = ak.attention(q, q, q, **rest, backend="emulated")
    meant = ak.attention(q, q, q, **rest, backend="reference")
    torch.testing.assert_close(found.output, meant.output)
    torch.testing.assert_close(found.stats.lse, meant.stats.lse)
    dy = torch.randn_like(q)
    grads = (torch.autograd.grad(one.output, q, dy)[0] for one in (found, meant))
    torch.testing.assert_close(*grads)
    plan = ak.plan(q, q, q, mask=mask, pse=bias, layout="SBND", backend="emulated")
    assert {call.input_layout for call in plan.calls} <= {"TND", "BSND"}


def test_a_packed_layout() -> None:
    q = torch.randn(2, 9, 4, dtype=torch.float64)
    rest = {"mask": masks.Causal(), "layout": "NTD", "seqlens": ak.SeqLens([4, 0, 5])}
    found = ak.attention(q, q, q, **rest, backend="emulated", return_stats=True)
    meant = ak.attention(q, q, q, **rest, backend="reference", return_stats=True)
    torch.testing.assert_close(found.output, meant.output)
    assert found.stats.lse.shape == (9, 2)
    torch.testing.assert_close(found.stats.lse, meant.stats.lse)
