"""The cuda backend without CUDA: its decisions on requests that say so, its calls on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import BACKENDS, AttentionOutput, Operands
from attnkit.backends.cuda import Cuda, CudaPlan
from attnkit.backends.flex import Flex
from attnkit.masks import Mask
from attnkit.planner import Composition, Request, read_request
from tests.agreement import agree, definition, slopes
from tests.backends.flex.eager import eager

CUDA = Cuda(Flex(eager))

HOW = {"num_heads", "num_kv_heads", "seqlens", "sink", "training"}


def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def ask(tensors: tuple[Tensor, ...], **how: Any) -> Request:
    """The request that these tensors would make on a CUDA device."""
    given = {name: how.pop(name) for name in HOW & set(how)}
    request = read_request(Composition(**how), *tensors, **{"training": True, **given})
    return replace(request, device="cuda")


def qkv(
    q_len: int = 6, kv_len: int = 6, heads: int = 4, kv_heads: int = 4, **rest: Any
) -> tuple[Tensor, ...]:
    return (
        make(2, q_len, heads, 16, **rest),
        make(2, kv_len, kv_heads, 16, **rest),
        make(2, kv_len, kv_heads, 24, **rest),
    )


FUSED = {
    "full": (masks.Full(), 6, 6, False),
    "causal": (masks.Causal(), 6, 6, True),
    "causal by another name": (masks.SlidingWindow(6), 6, 6, True),
    "causal from the corner": (masks.Causal("top_left"), 4, 6, True),
    "one query sees all keys": (masks.Causal(), 1, 6, False),
    "a prefix of everything": (masks.Prefix(9), 6, 6, False),
    "alike in all heads": (masks.PerHead([masks.Causal()] * 4), 6, 6, True),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_attention_is_recognised_by_its_cells(name: str) -> None:
    mask, q_len, kv_len, causal = FUSED[name]
    tensors = qkv(q_len, kv_len)
    request = ask(tensors, mask=mask)
    assert CUDA.refusals(request) == []
    plan = CUDA.plan(request)
    assert (plan.flex, plan.causal) == (None, causal)
    compare(CUDA.run(plan, Operands(*tensors)), tensors, mask=mask)


def compare(found: AttentionOutput, tensors: tuple[Tensor, ...], **how: Any) -> None:
    agree({"out": found.output, "lse": found.stats.lse}, *definition(tensors, **how))


LATER: dict[str, dict[str, Any]] = {
    "bottom-right": {"mask": masks.Causal(), "lengths": (4, 6)},
    "window": {"mask": masks.SlidingWindow(3)},
    "bias": {"pse": pse.ALiBi(4)},
    "soft-cap": {"softcap": 2.0},
    "sink": {"sink": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "a function": {"mask": masks.Predicate(lambda b, h, i, j: i >= j)},
    "scale": {"scale": -0.3},
    "heads that differ": {"mask": masks.PerHead([masks.Causal()] * 3 + [masks.Full()])},
}


@pytest.mark.parametrize("name", LATER)
def test_all_else_is_flex_and_the_plan_says_why(name: str) -> None:
    how = dict(LATER[name])
    tensors = qkv(*how.pop("lengths", (6, 6)))
    plan = CUDA.plan(ask(tensors, **how))
    assert plan.flex is not None
    assert {r.code for r in plan.refusals} == {"cuda-unfused"}
    found = CUDA.run(plan, Operands(*tensors, pse=how.get("pse"), sink=how.get("sink")))
    compare(found, tensors, **how)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_key_heads(dtype: torch.dtype) -> None:
    tensors = qkv(heads=4, kv_heads=2, dtype=dtype)
    plan = CUDA.plan(ask(tensors, mask=masks.Causal()))
    assert (plan.flex is None) == (dtype == torch.bfloat16)
    found = CUDA.run(plan, Operands(*tensors)).output
    agree({"out": found}, *definition(tensors, mask=masks.Causal()))


@pytest.mark.parametrize("lengths", [[5, 5, 5], [4, 6, 5]], ids=str)
def test_packed_sequences_of_one_length_are_a_batch(lengths: list[int]) -> None:
    tensors = make(15, 4, 16), make(15, 4, 16), make(15, 4, 24)
    how = {"mask": masks.Causal(), "layout": "TND", "seqlens": ak.SeqLens(lengths)}
    plan = CUDA.plan(ask(tensors, **how))
    assert (plan.flex is None) == (len(set(lengths)) == 1)
    compare(CUDA.run(plan, Operands(*tensors)), tensors, **how)


@pytest.mark.parametrize("layout", ["BNSD", "SBH"])
def test_other_layouts(layout: str) -> None:
    tensors = tuple(ak.layouts.get(layout).from_bnsd(t.transpose(1, 2)) for t in qkv())
    how = {"mask": masks.Causal(), "layout": layout, "num_heads": 4}
    plan = CUDA.plan(ask(tensors, **how, num_kv_heads=4))
    assert plan.flex is None
    compare(CUDA.run(plan, Operands(*tensors)), tensors, **how)


def test_gradients_and_dropout_of_the_fused_call() -> None:
    tensors = tuple(t.requires_grad_() for t in qkv())
    plan = CUDA.plan(ask(tensors, mask=masks.Causal()))
    out = CUDA.run(plan, Operands(*tensors)).output
    grads = torch.autograd.grad(out, tensors, slopes(out))
    found = {"out": out, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    agree(found, *definition(tensors, mask=masks.Causal()))
    dropped = CUDA.run(CUDA.plan(ask(tensors, dropout=0.5)), Operands(*tensors))
    plain = CUDA.run(CUDA.plan(ask(tensors)), Operands(*tensors))
    assert not torch.equal(dropped.output, plain.output)
    torch.testing.assert_close(dropped.stats.lse, plain.stats.lse)


def test_refusals_give_both_sides() -> None:
    codes = [r.code for r in CUDA.refusals(ask(qkv(), mask=masks.SlidingWindow(2), dropout=0.1))]
    assert codes == ["flex-dropout", "cuda-unfused"]
    small = make(2, 6, 4, 8)
    assert CUDA.refusals(ask((small,) * 3)) == []
    codes = [r.code for r in CUDA.refusals(ask((small,) * 3, pse=pse.ALiBi(4)))]
    assert codes == ["flex-head-dim", "cuda-unfused"]
    with pytest.raises(ak.BackendRefused, match=r"keeps no log-sum-exp.*reference"):
        _ = CUDA.run(CUDA.plan(ask((small,) * 3)), Operands(small, small, small)).stats.lse
    assert {r.subject for r in CUDA.refusals(ask(qkv(), softcap=2.0, dropout=0.1))} == {"cuda"}


def test_it_is_for_cuda_alone() -> None:
    x = make(1, 4, 2, 16)
    with pytest.raises(ak.BackendRefused, match="not on a CUDA device"):
        ak.attention(x, x, x, backend="cuda")
    assert isinstance(BACKENDS["cuda"], Cuda)


@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(2)], ids=str)
def test_plans_are_values(mask: Mask) -> None:
    one, other = (CUDA.plan(ask(qkv(), mask=mask)) for _ in range(2))
    assert (one, hash(one)) == (other, hash(other))
    assert isinstance(one, CudaPlan)
    assert "backend 'cuda'" in one.explain()


def test_keys_behind_the_square_may_hold_anything() -> None:
    """``is_causal`` from the corner leaves keys that no query sees: they are not handed over."""
    query, key, value = qkv(4, 6)
    plan = CUDA.plan(ask((query, key, value), mask=masks.Causal("top_left")))
    clean = CUDA.run(plan, Operands(query, key, value)).output
    for tensor in (key, value):
        tensor[:, 4:] = torch.nan
    assert torch.equal(CUDA.run(plan, Operands(query, key, value)).output, clean)
