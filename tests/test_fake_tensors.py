"""Fake tensors: shapes without memory, and nothing of theirs is left for real calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import attnkit as ak
from attnkit import masks, pse
from attnkit.errors import CompositionTypeError

# Lengths that no other test asks for: what they make is not there already.
LENGTH = 787

COMPOSITIONS: dict[str, dict[str, Any]] = {
    "window": {"mask": masks.SlidingWindow(333)},
    "documents": {"mask": masks.Documents([400, 387]) & masks.Causal()},
    "slopes": {"mask": masks.Causal(), "pse": pse.ALiBi(2)},
    "two calls": {"mask": masks.Causal() & (masks.SlidingWindow(99) | masks.Columns(0, 7))},
    "sorted positions": {"mask": masks.Causal() & masks.Dilated(3)},
}


@pytest.mark.parametrize("backend", ["tiled", "reference", "emulated"])
@pytest.mark.parametrize("name", COMPOSITIONS)
def test_real_calls_follow_fake_ones(name: str, backend: str) -> None:
    composed = {"layout": "BNSD", **COMPOSITIONS[name]}
    with FakeTensorMode():
        x = torch.randn(1, 2, LENGTH, 8, requires_grad=True)
        output = ak.attention(x, x, x, backend=backend, **composed)
        assert isinstance(output, FakeTensor)
        assert output.shape == x.shape
        (slope,) = torch.autograd.grad(output.sum(), x)
        assert slope.shape == x.shape
    x = torch.randn(1, 2, LENGTH, 8, dtype=torch.float64, requires_grad=True)
    found, meant = (
        ak.attention(x, x, x, backend=name, **composed) for name in (backend, "reference")
    )
    torch.testing.assert_close(found, meant, rtol=1e-10, atol=1e-12)


def test_compiled_code_is_not_run_on_them() -> None:
    with FakeTensorMode():
        x = torch.randn(1, 2, LENGTH, 8)
        with pytest.raises(CompositionTypeError, match="no memory to run it on"):
            ak.attention(x, x, x, mask=masks.SlidingWindow(333), layout="BNSD", backend="flex")


@pytest.mark.parametrize("strict", [False, True])
def test_a_module_is_exported_with_one_operator(strict: bool) -> None:
    layer = ak.MultiHeadAttention(32, 2, mask=masks.SlidingWindow(33)).eval()
    x = torch.randn(1, 150, 32)
    exported = torch.export.export(layer, (x,), strict=strict)
    ours = [node for node in exported.graph.nodes if "attnkit" in str(node.target)]
    assert len(ours) == 1
    torch.testing.assert_close(exported.module()(2 * x), layer(2 * x))
