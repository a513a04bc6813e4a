"""What the fused kernel does not have, on the device: tiles of torch's own operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks, pse
from tests.agreement import Results, agree, slopes


def bent(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where((i + j) % 5 == b, -torch.inf, torch.tanh(score) - 0.1 * h * (i - j))


CASES: dict[str, dict[str, Any]] = {
    "soft-cap": {"mask": masks.Causal(), "softcap": 1.5},
    "soft-cap and slopes": {"mask": masks.SlidingWindow(40), "softcap": 1.5, "pse": pse.ALiBi(4)},
    "a function": {"mask": masks.Causal(), "score_fn": bent},
    "a function, packed": {
        "mask": masks.Causal(), "score_fn": bent, "layout": "TND",
        "seqlens": ak.SeqLens([70, 31, 99]),
    },
    "a function of the mask": {"mask": masks.Causal() & masks.Dilated(3), "score_fn": bent},
}  # fmt: skip


def run(how: dict[str, Any], backend: str, device: str, dtype: torch.dtype) -> Results:
    generator = torch.Generator().manual_seed(0)
    sizes = ((200, 4, 16), (200, 2, 16), (200, 2, 8))
    shapes = [size if "seqlens" in how else (2, *size) for size in sizes]
    leaves = [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .to(device)
        .requires_grad_()
        for shape in shapes
    ]
    found = ak.attention(*leaves, backend=backend, return_stats=True, **how)
    grads = torch.autograd.grad(found.output, leaves, slopes(found.output.cpu()).to(device))
    results = {"out": found.output, "lse": found.stats.lse, "max": found.stats.max}
    results |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


@pytest.mark.parametrize("name", CASES)
def test_tiles_equal_the_reference(name: str) -> None:
    how = CASES[name]
    exact, single = (run(how, "reference", "cpu", t) for t in (torch.float64, torch.float32))
    agree(run(how, "tiled", "npu", torch.float32), exact, single)


@pytest.mark.parametrize("how", [{"softcap": 30.0}, {"score_fn": bent}])
def test_auto_goes_to_tiles(how: dict[str, Any]) -> None:
    x = torch.randn(1, 2048, 8, 16, device="npu")
    plan = ak.plan(x, x, x, mask=masks.Causal(), **how)
    assert plan.backend == "tiled"
    assert {"softcap", "score-function"} & {one.code for one in plan.passed_over}


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 300, 2, 16, device="npu", requires_grad=True)

    def call() -> Tensor:
        return ak.attention(x, x, x, mask=masks.Causal(), score_fn=bent, backend="tiled")

    def refuse(self: Tensor, *rest: Any) -> Any:
        raise AssertionError("a number was looked at")

    call()  # small tensors that follow from values are copied once
    looks: dict[str, Callable[..., Any]] = dict.fromkeys(("item", "tolist", "__bool__"), refuse)
    for name, look in looks.items():
        monkeypatch.setattr(Tensor, name, look)
    output = call()
    output.backward(torch.ones_like(output))
