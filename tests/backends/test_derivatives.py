"""Derivatives of every order, through the output and the log-sum-exp: right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import matrix

WIDE = torch.float64
SINK_AND_WINDOW = masks.Causal() & (masks.SlidingWindow(3) | masks.Columns(0, 2))


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=WIDE).requires_grad_()


def table() -> pse.Pse:
    bias = pse.T5Relative(4, 8, 6)
    nn.init.normal_(bias.tensors[0], generator=torch.Generator().manual_seed(1))
    return bias


# Rows without keys, one call and several, sorted positions, cells, and biases on every route.
COMPOSITIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {"mask": masks.Causal()},
    "window": lambda: {"mask": masks.SlidingWindow(3)},
    "several calls": lambda: {"mask": SINK_AND_WINDOW},
    "sorted positions": lambda: {"mask": masks.Dilated(2)},
    "empty rows": lambda: {"mask": masks.Causal("top_left") & masks.Columns(3, 14)},
    "per batch": lambda: {"mask": masks.Padding([5, 14])},
    "cells": lambda: {"mask": masks.Dense.keep(draw(12, 14) > 0)},
    "learnable slopes": lambda: {"mask": masks.Causal(), "pse": pse.ALiBi(4, learnable=True)},
    "levels": lambda: {"pse": table()},
    "key bias": lambda: {"mask": SINK_AND_WINDOW, "pse": pse.KeyBias(nn.Parameter(draw(4, 14)))},
    "soft-cap": lambda: {"mask": masks.Causal(), "softcap": 2.0},
    "matrix": lambda: {"pse": pse.Dense(nn.Parameter(draw(4, 12, 14)))},
}
PACKED = {"layout": "TND", "seqlens": ak.SeqLens([5, 0, 7], [6, 3, 5])}


def operands() -> list[Tensor]:
    return [draw(2, 12, 4, 8), draw(2, 14, 2, 8, seed=1), draw(2, 14, 2, 8, seed=2)]


def packed() -> list[Tensor]:
    return [draw(12, 4, 8), draw(14, 2, 8, seed=1), draw(14, 2, 8, seed=2)]


def loss(found: ak.AttentionOutput, through: str) -> Tensor:
    total = torch.zeros((), dtype=WIDE)
    if "output" in through:
        weights = torch.linspace(-1, 1, found.output.numel(), dtype=WIDE).view(found.output.shape)
        total = total + (weights * found.output.sin()).sum()
    if "lse" in through:
        seen = found.stats.lse > -torch.inf
        total = total + found.stats.lse[seen].square().sum()
    return total


def leaves_of(tensors: list[Tensor], how: dict[str, Any]) -> list[Tensor]:
    bias, sink = how.get("pse"), how.get("sink")
    trained = [] if bias is None else [t for t in bias.tensors if t.requires_grad]
    return [*tensors, *trained, *([] if sink is None else [sink])]


UNKNOWN_TO_THE_KERNEL = ("soft-cap",)
EVERY = [
    (name, backend)
    for backend in ("tiled", "emulated")
    for name in [*COMPOSITIONS, "packed"]
    if backend == "tiled" or name not in UNKNOWN_TO_THE_KERNEL
]


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("name", UNKNOWN_TO_THE_KERNEL)
def test_what_the_kernel_does_not_have_is_refused(name: str, with_sink: bool) -> None:
    how = COMPOSITIONS[name]() | ({"sink": draw(4, seed=3)} if with_sink else {})
    with pytest.raises(ak.BackendRefused):
        ak.attention(*operands(), backend="emulated", **how)


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize(("name", "backend"), EVERY)
def test_first_derivatives_and_statistics(name: str, with_sink: bool, backend: str) -> None:
    """Statistics mean one thing, and gradients flow through the log-sum-exp."""
    how = dict(COMPOSITIONS[name]()) if name != "packed" else {"mask": masks.Causal(), **PACKED}
    how |= {"sink": draw(4, seed=3)} if with_sink else {}
    tensors = packed() if name == "packed" else operands()
    leaves = leaves_of(tensors, how)
    for through in ("output", "lse", "output and lse"):
        found, meant = (
            ak.attention(*tensors, backend=one, return_stats=True, **how)
            for one in (backend, "reference")
        )
        stats = [
            (s.lse.detach(), s.max, s.sum, *(torch.zeros(0) if g is None else g for g in grads))
            for s, grads in (
                (one.stats, torch.autograd.grad(loss(one, through), leaves, allow_unused=True))
                for one in (found, meant)
            )
        ]
        for mine, right in zip(*stats, strict=True):
            if mine.numel() == right.numel():  # a tensor without a part may get None, or zeros
                torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)
            else:
                assert not mine.any()
                assert not right.any()


def test_statistics_of_no_rows() -> None:
    x, none = draw(0, 2, 4), draw(7, 2, 4)
    for lens, keys in ((ak.SeqLens([0]), x), (ak.SeqLens([0, 0], [3, 4]), none)):
        for backend in ("tiled", "reference", "emulated"):
            how = {"layout": "TND", "seqlens": lens, "backend": backend}
            stats = ak.attention(x, keys, keys, return_stats=True, **how).stats
            assert stats.lse.shape == stats.max.shape == stats.sum.shape == (0, 2)
    empty = draw(2, 0, 2, 4)
    stats = ak.attention(empty, empty, empty, backend="tiled", return_stats=True).stats
    assert stats.lse.shape == stats.max.shape == (2, 2, 0)


def test_dropout_has_no_part_in_the_gradient_of_the_lse() -> None:
    for backend, mask in product(("tiled", "emulated"), (masks.Causal(), SINK_AND_WINDOW)):
        tensors, each = operands(), []
        for dropout in (0.0, 0.5):
            found = ak.attention(
                *tensors, mask=mask, dropout=dropout, backend=backend, return_stats=True
            )
            each.append(torch.autograd.grad(loss(found, "lse"), tensors[:2]))
        torch.testing.assert_close(*each, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [*COMPOSITIONS, "packed"])
def test_second_derivatives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A penalty on a gradient trains as with the definition, whatever the gradient came through.

    One tensor stands in all places, and the incoming gradients are constants or not.
    """
    how = dict(COMPOSITIONS[name]()) if name != "packed" else {"mask": masks.Causal(), **PACKED}
    how["sink"] = draw(4, seed=3)
    each = []
    for backend, cells in (("tiled", 60), ("reference", 60), ("reference", 1 << 21)):
        monkeypatch.setattr(matrix, "CELLS", cells)  # 60 makes several blocks of rows
        lin = nn.Linear(8, 8, bias=False, dtype=WIDE)
        nn.init.normal_(lin.weight, std=0.3, generator=torch.Generator().manual_seed(5))
        tensors = [lin(t) for t in (packed() if name == "packed" else operands())]
        if name == "causal":
            tensors = tensors[:1] * 3
        leaves = leaves_of(tensors, how)
        found = ak.attention(*tensors, backend=backend, return_stats=True, **how)
        total = found.output.sum() + loss(found, "output and lse")
        first = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        penalty = sum(g.pow(2).sum() for g in first if g is not None)
        wanted = [lin.weight, *leaves[3:]]
        each.append(torch.autograd.grad(penalty, wanted, allow_unused=True))
    for *blocks, right in zip(*each, strict=True):
        exact = 1e-9 if all(leaf.dtype == WIDE for leaf in leaves) else 1e-5
        for mine in blocks:
            assert (mine - right).abs().max() <= exact * right.abs().max()


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("name", [*COMPOSITIONS, "packed"])
def test_blocks_of_rows_are_the_definition(
    name: str, with_sink: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = dict(COMPOSITIONS[name]()) if name != "packed" else {"mask": masks.Causal(), **PACKED}
    how |= {"sink": draw(4, seed=3)} if with_sink else {}
    tensors = packed() if name == "packed" else operands()
    leaves, each = leaves_of(tensors, how), []
    for cells in (1 << 21, 60):
        monkeypatch.setattr(matrix, "CELLS", cells)
        found = ak.attention(*tensors, backend="reference", return_stats=True, **how)
        grads = torch.autograd.grad(loss(found, "output and lse"), leaves)
        each.append((found.output, found.stats.lse, found.stats.max, *grads))
    for whole, blocks in zip(*each, strict=True):
        exact = 1e-12 if whole.dtype == WIDE else 1e-4
        torch.testing.assert_close(blocks, whole, rtol=exact, atol=exact)


def test_blocks_of_rows_drop_the_same_cells_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient by the values tells what was dropped."""
    monkeypatch.setattr(matrix, "CELLS", 60)
    q, k, _ = (t.detach() for t in operands())
    v = torch.eye(14, dtype=WIDE).expand(2, 2, 14, 14).transpose(1, 2).clone().requires_grad_()
    out = ak.attention(q, k, v, dropout=0.5, backend="reference")
    assert isinstance(out, Tensor)
    (slope,) = torch.autograd.grad(out.sum(), v)
    shares = out.detach().unflatten(2, (2, 2)).sum((1, 3))  # of each key, by key head
    torch.testing.assert_close(slope[..., 0], shares.transpose(1, 2), rtol=1e-12, atol=1e-12)


def test_the_gradient_of_a_constant_gradient() -> None:
    """The case that torch's `once_differentiable` lets pass: what arrives does not train."""
    found = []
    for backend in ("tiled", "reference"):
        lin = nn.Linear(4, 4, bias=False, dtype=WIDE)
        nn.init.eye_(lin.weight)
        x = draw(1, 6, 2, 4)
        y = lin(x)
        (slope,) = torch.autograd.grad(
            ak.attention(y, y, y, backend=backend).sum(), x, create_graph=True
        )
        slope.pow(2).sum().backward()
        found.append(lin.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_third_derivatives_and_gradgradcheck() -> None:
    tensors = [draw(1, 4, 1, 3, seed=k) for k in range(3)]

    def call(*tensors: Tensor, backend: str = "tiled") -> Tensor:
        out: Tensor = ak.attention(*tensors, mask=masks.SlidingWindow(2), backend=backend)
        return out

    assert torch.autograd.gradgradcheck(call, tensors)
    third = []
    for backend in ("tiled", "reference"):
        slope = call(*tensors, backend=backend).sin().sum()
        for _ in range(3):
            (slope,) = torch.autograd.grad(slope.pow(2).sum(), tensors[:1], create_graph=True)
        third.append(slope.detach())
    torch.testing.assert_close(*third, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mask", [masks.Causal(), SINK_AND_WINDOW, masks.Dilated(2)])
def test_the_kernel_has_no_second_derivatives(mask: masks.Mask) -> None:
    x = draw(1, 6, 2, 4)
    for through in ("output", "lse"):
        found = ak.attention(x, x, x, mask=mask, backend="emulated", return_stats=True)
        (slope,) = torch.autograd.grad(loss(found, through), x, create_graph=True)
        with pytest.raises(ak.KernelContractError, match="second derivatives need"):
            slope.pow(2).sum().backward()
    (out, *_) = ak.fusion_attention(x, x, x, 2, "BSND")
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(ak.KernelContractError, match="second derivatives need"):
        slope.pow(2).sum().backward()


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_second_derivatives_drop_the_same_cells_once_more(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the first pass, in the definition's blocks of rows."""
    monkeypatch.setattr(matrix, "CELLS", 60)
    tensors = packed() if form == "packed" else operands()
    how = {"mask": masks.Causal(), **(PACKED if form == "packed" else {})}
    each = []
    for backend in ("tiled", "reference"):
        torch.manual_seed(3)
        found = ak.attention(*tensors, dropout=0.5, backend=backend, return_stats=True, **how)
        total = found.output.square().sum() + loss(found, "lse")
        first = torch.autograd.grad(total, tensors, create_graph=True)
        torch.manual_seed(4)  # another pass would drop others
        penalty = sum(slope.pow(2).sum() for slope in first)
        each.append(torch.autograd.grad(penalty, tensors))
    for mine, right in zip(*each, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("backend", ["tiled", "reference", "emulated"])
def test_no_second_derivatives_in_a_graph(compiler: str, backend: str) -> None:
    x = draw(1, 6, 2, 4)
    torch.compiler.reset()
    call = torch.compile(
        lambda x: ak.attention(x, x, x, backend=backend), backend=compiler, fullgraph=True
    )
    (slope,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second derivatives|double backward"):
        slope.pow(2).sum().backward()


def test_transforms_of_torch() -> None:
    """They follow torch's operators alone, so "auto" takes the reference, and says why."""
    x, mask = draw(1, 6, 2, 4).detach(), masks.Causal()

    def total(x: Tensor, backend: str = "auto") -> Tensor:
        out: Tensor = ak.attention(x, x, x, mask=mask, backend=backend).square().sum()
        return out

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    torch.testing.assert_close(grad(total)(x), slope.detach())
    tangent = draw(1, 6, 2, 4, seed=9).detach()
    torch.testing.assert_close(jvp(total, (x,), (tangent,))[1], (slope * tangent).sum().detach())
    (curve,) = torch.autograd.grad((slope * tangent).sum(), leaf)
    found = torch.einsum("bsndBSND,BSND->bsnd", hessian(total)(x), tangent)
    torch.testing.assert_close(found, curve)
    batch = torch.stack([x, 2 * x])
    torch.testing.assert_close(
        vmap(grad(total))(batch), torch.stack([grad(total)(one) for one in batch])
    )
    for backend in ("tiled", "emulated"):
        with pytest.raises(ak.BackendRefused) as caught:
            grad(lambda x, name=backend: total(x, name))(x)
        assert [refusal.code for refusal in caught.value.refusals] == ["transform"]
    told = []
    grad(lambda x: told.append(ak.plan(x, x, x, mask=mask)) or x.sum())(x)  # type: ignore[func-returns-value]
    assert told[0].backend == "reference"
    assert "transform" in [refusal.code for refusal in told[0].passed_over]


def test_functional_call_with_gradients() -> None:
    layer = ak.MultiHeadAttention(8, 2, mask=masks.Causal(), pse=pse.KeyBias(nn.Parameter(draw(6))))
    layer = layer.double()
    y = draw(1, 6, 8, seed=4).detach()
    params = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}

    def total(params: dict[str, Tensor]) -> Tensor:
        out: Tensor = functional_call(layer, params, (y,)).square().sum()
        return out

    slopes = torch.autograd.grad(total(params), list(params.values()))
    transformed = grad(total)({name: p.detach() for name, p in params.items()})
    for mine, right in zip(transformed.values(), slopes, strict=True):
        torch.testing.assert_close(mine, right)


def test_merged_parts_have_no_silent_gradient() -> None:
    from attnkit.kernel import merge_partials

    x = draw(1, 2, 6, 4)
    halves = [ak.fusion_attention(x, t, t, 2, "BNSD") for t in x.split(3, dim=2)]
    parts = [[half[k] if k == 0 else half[k][..., 0] for half in halves] for k in range(3)]
    with pytest.raises(ak.KernelContractError, match="carry none"):
        merge_partials(*parts)
    with torch.no_grad():
        merged, _, _ = merge_partials(*parts)
    whole, *_ = ak.fusion_attention(x, x, x, 2, "BNSD")
    torch.testing.assert_close(merged, whole)
