"""The definition itself, against a loop and against torch's scaled_dot_product_attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

import attnkit as ak
from attnkit import layouts, masks, pse
from attnkit.geometry import Region
from tests.properties.compositions import Case
from tests.properties.strategies import cases


def by_loops(case: Case, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Output and lse, one number at a time: ``[sequence][head][row]`` in order."""
    form = layouts.get(case.layout)
    counts = (case.heads, case.kv_heads, case.kv_heads)
    if case.seqlens is not None:
        lens = (case.seqlens.q, case.seqlens.kv, case.seqlens.kv)
        parts = zip(*map(form.split, tensors[:3], lens, counts), strict=True)
        matrices = [tuple(t[0] for t in part) for part in parts]
    else:
        dense = [form.to_bnsd(t, n) for t, n in zip(tensors, counts, strict=False)]
        matrices = [tuple(t[b] for t in dense) for b in range(case.batch)]
    scale = case.scale if case.scale is not None else 1 / math.sqrt(case.dim)
    rows, lses = [], []
    for b, (q, k, v) in enumerate(matrices):
        q_len, kv_len = q.shape[1], k.shape[1]
        for h in range(case.heads):
            allowed = case.mask.materialize(q_len, kv_len, case.batch, case.heads)[b, h]
            bias = torch.zeros(q_len, kv_len, dtype=torch.float64)
            for part in case.pse.parts if case.pse is not None else ():
                table = part.materialize(q_len, kv_len, dtype=torch.float64)[0]
                weight = scale if part.before_scale else 1.0
                bias = bias + weight * table[h if len(table) > 1 else 0]
            for i in range(q_len):
                keys = [j for j in range(kv_len) if allowed[i, j]]
                terms = [
                    math.exp(scale * float(q[h, i] @ k[h // case.group, j]) + float(bias[i, j]))
                    for j in keys
                ]
                total = sum(terms) + (math.exp(float(tensors[3][h])) if case.sink else 0.0)
                row = torch.zeros(case.value_dim, dtype=torch.float64)
                for weight, j in zip(terms, keys, strict=True):
                    row = row + weight / total * v[h // case.group, j]
                rows.append(row)
                lses.append(math.log(total) if total else -math.inf)
    return torch.stack(rows), torch.tensor(lses, dtype=torch.float64)


@settings(max_examples=60)
@given(cases())
def test_reference_is_the_formula(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    found = case.run("reference", tensors)
    rows, lses = by_loops(case, tensors)
    form = layouts.get(case.layout)
    if case.seqlens is not None:
        parts = form.split(found["out"], case.seqlens.q, case.heads)
        output = torch.cat([part.reshape(-1, case.value_dim) for part in parts])
        lse = torch.cat([part.T.flatten() for part in found["lse"].split(case.seqlens.q)])
    else:
        output = form.to_bnsd(found["out"], case.heads).reshape(-1, case.value_dim)
        lse = found["lse"].flatten()
    torch.testing.assert_close(output, rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, lses, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("q_len", "kv_len"), [(8, 8), (5, 8), (8, 5)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_agrees_with_sdpa_where_it_means_the_same(
    q_len: int, kv_len: int, kv_heads: int, causal: bool
) -> None:
    # torch's is_causal is anchored top-left.
    q = torch.randn(2, 4, q_len, 16, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(2, kv_heads, kv_len, 16, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    mask = masks.Causal(align="top_left") if causal else None
    ours = ak.attention(q, k, v, mask=mask, layout="BNSD", backend="reference")
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), dy),
        torch.autograd.grad(theirs, (q, k, v), dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_a_boolean_mask_and_a_bias_agree_with_sdpa() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64)
    keep = torch.rand(6, 6) < 0.7
    keep.fill_diagonal_(True)
    ours = ak.attention(q, k, v, mask=masks.Dense.keep(keep), layout="BNSD", scale=0.3)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=0.3)
    torch.testing.assert_close(ours, theirs)
    table = torch.randn(4, 6, 6, dtype=torch.float64)
    ours = ak.attention(q, k, v, pse=pse.Dense(table), layout="BNSD")
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=table)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_a_key_give_nothing(backend: str, dtype: torch.dtype) -> None:
    q = torch.randn(1, 6, 2, 4, dtype=dtype, requires_grad=True)
    k, v = torch.randn(2, 1, 4, 2, 4, dtype=dtype).unbind()
    k.requires_grad_()
    found = ak.attention(q, k, v, mask=masks.Causal(), backend=backend, return_stats=True)
    assert torch.equal(found.output[:, :2], torch.zeros(1, 2, 2, 4, dtype=dtype))
    assert (found.stats.lse[..., :2] == -torch.inf).all()
    assert (found.stats.max[..., :2] == -torch.inf).all()
    assert (found.stats.sum[..., :2] == 0).all()
    dq, dk = torch.autograd.grad(found.output.sum(), (q, k))
    # The kernel divides by a sum of FLT_MAX there: what is left is far below any rounding.
    assert dq[:, :2].abs().max() <= (0 if backend == "reference" else 1e-36)
    assert dq.isfinite().all()
    assert dk.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "emulated"])
def test_with_a_sink_a_row_without_a_key_has_the_sink_alone(backend: str) -> None:
    q = torch.randn(1, 4, 2, 4)
    k = torch.randn(1, 2, 2, 4)
    sink = torch.tensor([0.5, -1.0], requires_grad=True)
    found = ak.attention(
        q, k, k, mask=masks.Causal(), sink=sink, backend=backend, return_stats=True
    )
    assert (found.output[:, :2] == 0).all()
    torch.testing.assert_close(found.stats.lse[0, :, 0], sink.detach())
    (gradient,) = torch.autograd.grad(found.output.square().sum(), sink)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "emulated"])
@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(2, 0, 3), (2, 3, 0), (1, 0, 0)])
def test_empty_axes_give_empty_or_zero(backend: str, batch: int, q_len: int, kv_len: int) -> None:
    q = torch.randn(batch, q_len, 2, 4, requires_grad=True)
    k = torch.randn(batch, kv_len, 2, 4)
    for mask in (masks.Full(), masks.Causal(), masks.SlidingWindow(2), masks.Dilated(2)):
        found = ak.attention(q, k, k, mask=mask, backend=backend, return_stats=True)
        assert found.output.shape == q.shape
        assert (found.output == 0).all()
        assert (found.stats.lse == -torch.inf).all()
        (dq,) = torch.autograd.grad(found.output.sum(), q)
        assert (dq == 0).all()


def test_full_masks_are_not_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks.Mask, "materialize", lambda *_, **__: pytest.fail("painted"))
    q = torch.randn(1, 4, 2, 4)
    full = masks.SlidingWindow(9) | masks.Band(None, None)
    assert torch.equal(ak.attention(q, q, q, mask=full), ak.attention(q, q, q))
    assert Region.full(4, 4) == masks.Band(None, None).region(4, 4)
