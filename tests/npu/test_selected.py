"""Blocks selected at run time on the device: one packed call, and the reference's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit.backends import selected
from attnkit.masks import SelectedBlocks
from tests.agreement import Results, agree
from tests.npu.device import DEVICE
from tests.selections import some_selection

SHAPE = (2, 2, 6, 2)


def mask_on(device: str, dtype: torch.dtype, **changes: bool) -> SelectedBlocks:
    """Return gated blocks of 16 keys for query blocks of 8, up to two of them."""
    causal = changes.get("causal", True)
    indices = some_selection(SHAPE, 8, 16, 48, causal)
    generator = torch.Generator().manual_seed(3)
    gates = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    counts = torch.randint(0 if causal else 1, 3, SHAPE[:3], generator=generator)
    return SelectedBlocks(
        indices.to(device), 8, 16, causal, gates.to(device).requires_grad_(), counts.to(device)
    )


def run(backend: str, device: str, dtype: torch.dtype, causal: bool) -> Results:
    """Return output, statistics and gradients on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 48, 4, 16), (2, 48, 2, 16), (2, 48, 2, 16), (2, 48, 4, 16))
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    *inputs, grad = (t.to(dtype).to(device) for t in drawn)
    leaves = [t.requires_grad_() for t in inputs]
    mask = mask_on(device, dtype, causal=causal)
    out, stats = ak.attention(*leaves, mask=mask, backend=backend, return_stats=True)
    out.backward(grad)
    found: dict[str, Tensor | None] = {"out": out, "max": stats.max, "sum": stats.sum}
    names = ("dq", "dk", "dv", "dgates")
    found |= {
        name: t.grad for name, t in zip(names, (*leaves, mask.gates), strict=True) if t is not None
    }
    return {name: t.detach().cpu() for name, t in found.items() if t is not None}


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_reference(causal: bool) -> None:
    with DEVICE.recording() as calls:
        found = run("ascend", "npu", torch.float32, causal)
    exact, rounded = (run("reference", "cpu", d, causal) for d in (torch.float64, torch.float32))
    agree(found, exact, rounded)
    forward, backward = [call for call in calls if "FlashAttention" in call["op"]]
    assert "Grad" in backward["op"]
    for call in (forward, backward):
        assert len(call["actual_seq_qlen"]) == 2 * 2 * 6
        assert call["sparse_mode"] == (3 if causal else 0)


def test_auto_takes_it_and_one_plan_serves_every_selection() -> None:
    x = torch.randn(2, 48, 4, 16, device="npu")
    layer = ak.Attention(4, 16)
    masks = [
        SelectedBlocks(some_selection((2, 4, 6, 2), 8, 16, 48, True, seed).to("npu"), 8, 16, True)
        for seed in range(2)
    ]
    plans = [layer.plan(x, x, x, mask=mask) for mask in masks]
    assert plans[0] is plans[1]
    assert plans[0].backend == "ascend"
    for mask in masks:
        assert layer(x, x, x, mask=mask).isfinite().all()


def test_wrong_indices_are_never_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 48, 4, 16, device="npu")
    indices = some_selection((2, 4, 6, 2), 8, 16, 48, True)
    indices[0, 0, 5, 0] = 2  # its own block
    monkeypatch.setattr(selected, "_asserts", lambda device: False)
    out = ak.attention(x, x, x, mask=SelectedBlocks(indices.to("npu"), 8, 16, True))
    assert out.isnan().all()
