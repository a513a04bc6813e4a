"""`memory_efficient_attention` against the code that xFormers documents as its meaning."""

from __future__ import annotations

import inspect
from itertools import product

import pytest
import torch

from attnkit.errors import CompositionError
from attnkit.interop import xformers as xops
from tests.interop.formulas import near, softmax_attention
from tests.interop.test_flash_attn import drawn
from tests.masks.foreign.test_xformers import FAMILIES, xf

theirs = pytest.importorskip("xformers.ops.fmha")


def documented(q, k, v, bias=None, scale=None):
    """The docstring's code on ``b s n d``: scale, then the bias; rows of -inf alone are 0."""
    cells = torch.zeros(q.shape[1], k.shape[1]) if bias is None else bias
    out, lse = softmax_attention(
        *(x.transpose(1, 2) for x in (q, k, v)),
        cells > -torch.inf,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        bias=cells.masked_fill(cells == -torch.inf, 0.0).double(),
    )
    return out.transpose(1, 2), lse


def inputs(q_len, kv_len, heads=2, batch=1):
    return (
        drawn(batch, q_len, heads, 6),
        drawn(batch, kv_len, heads, 6, seed=1),
        drawn(batch, kv_len, heads, 5, seed=2),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_class(name: str) -> None:
    for n, (bias, q_len, kv_len) in enumerate(FAMILIES[name]()):
        if n % 3:  # the sets are held against each other elsewhere, all of them
            continue
        cells = bias.materialize((q_len, kv_len))
        q, k, v = inputs(*cells.shape)
        out, lse = xops.memory_efficient_attention_forward_requires_grad(q, k, v, bias)
        meant, meant_lse = documented(q, k, v, cells)
        near(out, meant)
        near(lse, meant_lse)


BIASES = {
    "numbers": drawn(2, 2, 3, 5),
    "a mask": torch.zeros(2, 2, 3, 5).masked_fill(drawn(2, 2, 3, 5) > 0.5, -torch.inf).double(),
    "both": drawn(2, 2, 3, 5).masked_fill(drawn(2, 2, 3, 5, seed=3) > 0.5, -torch.inf),
    "one for all heads": drawn(2, 1, 3, 5).expand(2, 2, 3, 5),
    "one row for all": drawn(1, 1, 1, 5).expand(2, 2, 3, 5),
}


@pytest.mark.parametrize("name", BIASES)
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("causal", [False, True])
def test_a_tensor_alone_and_below_the_diagonal(name, scale, causal) -> None:
    q, k, v = (x.requires_grad_() for x in inputs(3, 5, batch=2))
    leaf = BIASES[name].clone() if name == "numbers" else BIASES[name]
    leaf = leaf.requires_grad_(name == "numbers")
    bias = xf.LowerTriangularMask().add_bias(leaf) if causal else leaf
    cells = bias.materialize((3, 5), torch.float64) if causal else leaf
    found = xops.memory_efficient_attention(q, k, v, bias, 0.0, scale)
    meant, _ = documented(q, k, v, cells, scale)
    near(found, meant)
    wanted = [q, k, v, *([leaf] if leaf.requires_grad else [])]
    grads = zip(*(torch.autograd.grad(x.sum(), wanted) for x in (found, meant)), strict=True)
    for ours, others in grads:
        near(ours, others)


@pytest.mark.parametrize("expanded", ["", "key", "key and value"])
def test_groups_of_heads_and_no_heads(expanded: str) -> None:
    q, bias = drawn(2, 3, 2, 4, 6), drawn(2, 2, 4, 3, 5)
    k, v = (
        drawn(2, 5, 2, 1 if name in expanded else 4, n).expand(2, 5, 2, 4, n)
        for name, n in (("key", 6), ("value", 5))
    )
    out, lse = xops.memory_efficient_attention_forward_requires_grad(q, k, v, bias)
    flat = [x.flatten(2, 3) for x in (q, k, v)]
    meant, meant_lse = documented(*flat, bias.flatten(1, 2))
    near(out, meant.unflatten(2, (2, 4)))
    near(lse, meant_lse.unflatten(1, (2, 4)))
    bare = [x[:, :, 0, 0] for x in (q, k, v)]
    for own in (None, bias[:, 0, 0], xf.LowerTriangularMask()):
        cells = own.materialize((3, 5)) if isinstance(own, xf.AttentionBias) else own
        cells = cells[:, None] if isinstance(own, torch.Tensor) else cells
        near(
            xops.memory_efficient_attention(*bare, own),
            documented(*(x[:, :, None] for x in bare), cells)[0][:, :, 0],
        )


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("groups", [False, True])
def test_parts_that_are_merged(stacked: bool, groups: bool) -> None:
    q, k, v = inputs(4, 6, heads=4, batch=2)
    bias = torch.zeros(2, 4, 4, 6).masked_fill(drawn(2, 4, 4, 6) > 0.3, -torch.inf).double()
    bias[0, 0, 1], bias[1, 2, 3, :3] = -torch.inf, -torch.inf  # nothing at all; nothing in one part
    if groups:
        q, k, v = (x.unflatten(2, (2, 2)) for x in (q, k, v))
    some = bias.unflatten(1, (2, 2)) if groups else bias
    parts = [
        xops.memory_efficient_attention_partial(q, k[:, own], v[:, own], some[..., own])
        for own in (slice(0, 3), slice(3, 6))
    ]
    outs, lses = (list(x) for x in zip(*parts, strict=True))
    merged, lse = xops.merge_attentions(
        torch.stack(outs) if stacked else outs, torch.stack(lses) if stacked else lses
    )
    meant, meant_lse = documented(*(x.flatten(2, -2) for x in (q, k, v)), bias)
    near(merged.flatten(2, -2), meant)
    near(lse.flatten(1, -2), meant_lse)
    assert xops.merge_attentions(outs, lses, False)[1] is None
    assert xops.merge_attentions(outs, lses, output_dtype=torch.float16)[0].dtype == torch.float16


@pytest.mark.parametrize("axes", [3, 4, 5])
def test_the_backward_of_a_part_of_the_keys(axes: int) -> None:
    q, k, v = inputs(4, 6, heads=4, batch=2)
    bias = torch.zeros(2, 4, 4, 6).masked_fill(drawn(2, 4, 4, 6) > 0.3, -torch.inf).double()
    bias[0, 0, 1], bias[1, 2, 3, :3] = -torch.inf, -torch.inf
    if axes == 5:
        q, k, v, bias = *(x.unflatten(2, (2, 2)) for x in (q, k, v)), bias.unflatten(1, (2, 2))
    if axes == 3:
        q, k, v, bias = *(x[:, :, 0] for x in (q, k, v)), bias[:, 0]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = xops.memory_efficient_attention_forward_requires_grad(*leaves, bias)
    grad = drawn(*out.shape)
    meant = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    found = [
        xops.memory_efficient_attention_backward(
            grad, out.detach(), lse.detach(), q, k[:, own], v[:, own], bias[..., own]
        )
        for own in (slice(0, 3), slice(3, 6))
    ]
    near(found[0][0] + found[1][0], meant[0])
    for n in (1, 2):
        near(torch.cat([part[n] for part in found], 1), meant[n])
    with pytest.raises(CompositionError, match="in the shapes"):
        xops.memory_efficient_attention_backward(grad, out, lse[:1], q, k, v, bias)


def test_the_backward_of_blocks() -> None:
    leaves = [x.requires_grad_() for x in inputs(3, 4)]
    bias = BLOCKS.make_causal_from_bottomright()
    out, lse = xops.memory_efficient_attention_forward_requires_grad(*leaves, bias)
    meant, _ = documented(*leaves, bias.materialize((3, 4)))
    grad = drawn(*out.shape)
    found = xops.memory_efficient_attention_backward(grad, out, lse, *leaves, bias)
    for ours, others in zip(found, torch.autograd.grad(meant, leaves, grad), strict=True):
        near(ours, others)


def test_dtypes_of_outputs() -> None:
    q, k, v = (x.half() for x in inputs(3, 4))
    meant = documented(q.double(), k.double(), v.double())[0]
    assert xops.memory_efficient_attention(q, k, v).dtype == torch.float16
    wide = xops.memory_efficient_attention(q, k, v, output_dtype=torch.float32)
    partial, _ = xops.memory_efficient_attention_partial(q, k, v)
    assert wide.dtype == partial.dtype == torch.float32
    near(wide, meant, 1e-6)  # not rounded on the way
    near(partial, meant, 1e-6)


def test_dropout_acts_and_repeats() -> None:
    q, k, v = inputs(16, 16)
    torch.manual_seed(0)
    one = xops.memory_efficient_attention(q, k, v, None, 0.5)
    torch.manual_seed(0)
    near(xops.memory_efficient_attention(q, k, v, None, 0.5), one)
    assert not torch.allclose(one, xops.memory_efficient_attention(q, k, v))


@pytest.mark.parametrize("name", xops.__all__)
def test_names_order_and_defaults_are_the_library_s(name: str) -> None:
    ours, others = (inspect.signature(getattr(where, name)) for where in (xops, theirs))
    facts = [[(p.name, p.default, p.kind) for p in s.parameters.values()] for s in (ours, others)]
    assert facts[0] == facts[1]


Q, K, V = inputs(3, 4)
BLOCKS = xf.BlockDiagonalMask.from_seqlens([1, 2], [2, 2])
WRONG = {
    "a kernel": ({"op": theirs.MemoryEfficientAttentionCutlassOp}, "names one of"),
    "a bias that broadcasts": ({"attn_bias": torch.zeros(3, 4).double()}, r"\[1, 2, 3, 4\]"),
    "NaN": ({"attn_bias": torch.full((1, 2, 3, 4), torch.nan).double()}, "NaN"),
    "all dropped": ({"p": 1.0}, "below 1"),
    "blocks of others": ({"attn_bias": xf.BlockDiagonalMask.from_seqlens([1, 1])}, "2 queries"),
    "an integer": ({"output_dtype": torch.int32}, "output_dtype"),
    "a word": ({"attn_bias": "causal"}, "attn_bias object|attn_bias"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    how, told = WRONG[name]
    with pytest.raises(CompositionError, match=told):
        xops.memory_efficient_attention(Q, K, V, **how)


def test_shapes_that_are_refused() -> None:
    for q, k, v in ((Q, K[:, :, :, None], V), (Q, K, V[:, 1:]), (Q[0, 0], K[0, 0], V[0, 0])):
        with pytest.raises(CompositionError, match="give "):
            xops.memory_efficient_attention(q, k, v)
    two = [x.expand(2, *x.shape[1:]) for x in (Q, K, V)]
    with pytest.raises(CompositionError, match="a batch of 1"):
        xops.memory_efficient_attention(*two, BLOCKS)
    with pytest.raises(CompositionError, match="without dropout"):
        xops.memory_efficient_attention_partial(Q, K, V, p=0.1)
    for lse in (torch.zeros(1, 2, 4), torch.zeros(1, 3, 2)):
        with pytest.raises(CompositionError, match="as many of each"):
            xops.merge_attentions([Q], [lse])


def test_blocks_are_one_packed_call(monkeypatch) -> None:
    seen = []
    real = xops.attention
    monkeypatch.setattr(xops, "attention", lambda *a, **k: seen.append((a, k)) or real(*a, **k))
    for n, bias in product((0, 3), (BLOCKS, BLOCKS.make_causal())):
        xops.memory_efficient_attention(Q, K, V + n, bias)
    assert len(seen) == 4
    assert all(k["layout"] == "TND" and a[1].data_ptr() == K.data_ptr() for a, k in seen)
