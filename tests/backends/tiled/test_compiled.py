"""The tiled backend inside a compiled graph: one operator, whatever the plan."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
import attnkit.backends.tiled
from attnkit import masks, pse
from attnkit.backends import BACKENDS, Operands
from attnkit.backends.tiled.compiled import HANDLES, tiled
from attnkit.errors import CompositionError

COMPOSITIONS: dict[str, dict[str, Any]] = {
    "causal": {"mask": masks.Causal()},
    "window": {"mask": masks.SlidingWindow(9)},
    "alibi": {"mask": masks.SlidingWindow(9), "pse": pse.ALiBi(2)},
    "sqrt alibi": {"mask": masks.SlidingWindow(9), "pse": pse.SqrtALiBi(2)},
    "sink": {"mask": masks.Causal(), "sink": torch.zeros(2, requires_grad=True)},
    "learnable alibi": {"pse": pse.ALiBi(2, learnable=True), "mask": masks.Causal()},
    "t5": {"pse": pse.T5Relative(2, align="top_left"), "mask": masks.SlidingWindow(9)},
    "key bias": {"pse": pse.KeyBias(torch.zeros(2, 48, requires_grad=True))},
    "dense bias": {"pse": pse.Dense(torch.zeros(2, 48, 48, requires_grad=True))},
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_one_graph(name: str) -> None:
    how = COMPOSITIONS[name]
    x = torch.randn(1, 2, 48, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plan = ak.plan(x, x, x, layout="BNSD", backend="tiled", **how)
    bias, sink = how.get("pse"), how.get("sink")
    leaves = [x, *([] if sink is None else [sink]), *(bias.tensors if bias is not None else ())]

    def call(x: Tensor) -> Tensor:
        found = BACKENDS["tiled"].run(plan, Operands(x * 2, x, x, bias, sink))
        return found.output + found.stats.lse[..., None]

    torch.compiler.reset()  # each case is a graph of the same function, and few are kept
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = compiled(x), call(x)
    assert torch.equal(found, expected)
    slope = torch.linspace(-1, 1, found.numel()).view(found.shape)
    grads = [torch.autograd.grad(out, leaves, slope) for out in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_dropout_in_a_graph() -> None:
    x = torch.randn(1, 2, 48, 16).requires_grad_()
    plan = ak.plan(x, x, x, layout="BNSD", backend="tiled", dropout=0.5)
    call = torch.compile(
        lambda x: BACKENDS["tiled"].run(plan, Operands(x, x, x)).output,
        fullgraph=True,
        backend="aot_eager",
    )
    torch.manual_seed(0)
    one, two = call(x), call(x)
    torch.manual_seed(0)
    assert torch.equal(one, call(x))
    assert not torch.equal(one, two)
    one.sum().backward()
    assert x.grad is not None


def test_the_operator_keeps_its_contract() -> None:
    x = torch.randn(1, 2, 20, 8)
    plan = ak.plan(x, x, x, layout="BNSD", mask=masks.SlidingWindow(3), backend="tiled")
    arguments = (x.requires_grad_(), x, x, None, [], None, plan.handle)  # type: ignore[attr-defined]
    torch.library.opcheck(
        tiled,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_a_plan_that_is_gone() -> None:
    x = torch.randn(1, 2, 20, 8)
    job = ak.plan(x, x, x, layout="BNSD", backend="tiled").outline  # type: ignore[attr-defined]
    handle = HANDLES.add(job)
    assert HANDLES.job(handle, []) is job
    ak.backends.make_plan.cache_clear()
    del job
    gc.collect()
    with pytest.raises(CompositionError, match="is gone"):
        HANDLES.job(handle, [])
