"""Score functions: FlexAttention's `score_mod`, on every backend that calls one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import make_plan
from attnkit.config import AttentionConfig
from attnkit.errors import BackendRefused, CompositionError, CompositionTypeError, ConfigError
from attnkit.layouts import SeqLens
from tests.agreement import agreement, distance, near, results
from tests.backends.definition import meant

BACKENDS = ("reference", "tiled", "flex-eager")
WIDE = torch.float64
INF = float("inf")


def make(*shape: int, dtype: torch.dtype = WIDE) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=WIDE).to(dtype)


def operands(
    length: int = 20, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = WIDE
) -> tuple[Tensor, ...]:
    sizes = ((heads, 0), (kv_heads, 1), (kv_heads, 2))
    return tuple(make(2, length, count, 8 + more, dtype=dtype)[..., :8] for count, more in sizes)


TABLE, FEATURES, SLOPES, NUMBERS = make(4, 64), make(64, 3), make(4), make(2, 4, 64, 64)
IDS = torch.arange(64) // 7

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "as it is": lambda s, b, h, i, j: s,
    "causal": lambda s, b, h, i, j: torch.where(i >= j, s, -INF),
    "relative": lambda s, b, h, i, j: s + (i - j),
    "slopes": lambda s, b, h, i, j: s - SLOPES[h] * (i - j).abs(),
    "soft-cap": lambda s, b, h, i, j: 2.0 * torch.tanh(s / 2.0),
    "cells": lambda s, b, h, i, j: s + NUMBERS[b, h, i, j],
    "documents": lambda s, b, h, i, j: torch.where(IDS[i] == IDS[j], s, -INF),
    "every batch and head its own": lambda s, b, h, i, j: s * (1 + 0.3 * b) - 0.2 * h,
    "one row of a table": lambda s, b, h, i, j: s * TABLE[h][(i - j).abs()],
    "a product of vectors": lambda s, b, h, i, j: s + torch.dot(FEATURES[i], FEATURES[j]),
    "bent by the cell": lambda s, b, h, i, j: torch.sin(s * (1 + 0.1 * i)) + 0.1 * s * s * j,
}
"""FlexAttention's examples, and what a function per cell may do that broadcasting may not."""

COMPOSITIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "window and first keys": {"mask": masks.Causal() & (masks.SlidingWindow(5) | masks.Prefix(2))},
    "cells": {"mask": masks.Dilated(3) & masks.Causal()},
    "heads apart": {"mask": masks.PerHead([masks.Causal(), masks.Full(), masks.Band(2, 2)] * 2)},
    "padding": {"mask": masks.Padding([20, 13])},
    "soft-cap and bias": {"mask": masks.Causal(), "softcap": 1.5, "pse": pse.ALiBi(4)},
}


def heads_of(composed: dict[str, Any]) -> int:
    return 6 if composed.get("mask", masks.Full()).heads else 4


@pytest.mark.parametrize("name", ["documents", "cells", "one row of a table", "bent by the cell"])
def test_is_what_flex_attention_does(name: str) -> None:
    q, k, v = (t.transpose(1, 2).float() for t in operands(kv_heads=4))
    there = flex_attention(q, k, v, score_mod=FUNCTIONS[name])
    for backend in ("reference", "tiled"):
        here = ak.attention(q, k, v, layout="BNSD", score_fn=FUNCTIONS[name], backend=backend)
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_is_its_definition(name: str) -> None:
    """Cell by cell, after scale, soft-cap and bias; output, statistics and gradients."""
    tensors = operands(9)
    mask, bias = masks.Causal() & masks.SlidingWindow(4), make(4, 9, 9)
    how = {"softcap": 1.5, "scale": 0.6, "score_fn": FUNCTIONS[name]}
    exact = meant(tensors, mask.materialize(9, 9, 2, 4), bias=bias[None], **how)
    term = pse.Dense(nn.Parameter(bias))
    for backend in BACKENDS:
        found = results(backend, tensors, mask=mask, pse=term, statistics=("lse",), **how)
        near(found, exact | {"dbias 0": exact["dbias 0"][0]}, 1e-6, 1e-6)


@pytest.mark.parametrize("composed", COMPOSITIONS)
@pytest.mark.parametrize("name", ["documents", "one row of a table", "bent by the cell"])
def test_backends_agree(name: str, composed: str) -> None:
    how = COMPOSITIONS[composed]
    heads = heads_of(how)
    fn = FUNCTIONS[name]
    if heads == 6:  # the tables are for four

        def fn(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return FUNCTIONS[name](s, b, h % 4, i, j)

    agreement(operands(heads=heads), *BACKENDS[1:], precision=torch.float32, score_fn=fn, **how)


@pytest.mark.parametrize("name", ["documents", "cells", "every batch and head its own"])
def test_a_packed_batch_counts_in_its_own_sequences(name: str) -> None:
    lens = SeqLens([5, 0, 12, 7], [5, 3, 14, 9])
    q, k, v = make(24, 4, 8), make(31, 4, 8), make(31, 4, 7)
    fn = FUNCTIONS[name]
    if name == "cells":

        def fn(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + NUMBERS[b % 2, h, i, j]

    how = {"layout": "TND", "seqlens": lens, "score_fn": fn}
    mask = masks.Causal(align="top_left")
    agreement((q, k, v), *BACKENDS[1:], precision=torch.float32, mask=mask, **how)
    # The third sequence, alone.
    rows, keys = slice(5, 17), slice(8, 22)

    def alone(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return fn(s, b + 2, h, i, j)

    packed = ak.attention(q, k, v, mask=mask, backend="tiled", **how)
    one = (q[None, rows], k[None, keys], v[None, keys])
    torch.testing.assert_close(packed[None, rows], ak.attention(*one, mask=mask, score_fn=alone))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_the_function_leaves_no_key_are_empty(backend: str) -> None:
    def fn(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i % 3 == h, -INF, s)

    found = results(backend, operands(), mask=masks.SlidingWindow(6), score_fn=fn)
    rows = torch.arange(20) % 3 == torch.arange(4)[:, None]
    assert (found["lse"] == -INF).equal(rows.expand(2, 4, 20))
    assert (found["max"] == -INF).equal(rows.expand(2, 4, 20))
    out, dq = (found[name].transpose(1, 2)[rows.expand(2, 4, 20)] for name in ("out", "dq"))
    assert not out.any()
    assert not dq.any()
    assert not any(tensor.isnan().any() for tensor in found.values())


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_what_it_returns_where_the_mask_is_counts_for_nothing(backend: str) -> None:
    """NaN and -inf beyond the diagonal, in values and in slopes."""

    def wild(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s * torch.sqrt(i - j + 1.0) - torch.log(i - j + 1.0)

    def tame(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = (i - j).clamp(min=0) + 1.0
        return s * torch.sqrt(distance) - torch.log(distance)

    for mask in (masks.Causal(), masks.Causal() & masks.Dilated(2)):
        exact = results("reference", operands(), mask=mask, score_fn=tame)
        near(results(backend, operands(), mask=mask, score_fn=wild), exact, 1e-10, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    how = {"mask": masks.Causal(), "score_fn": FUNCTIONS["bent by the cell"]}
    agreement(operands(dtype=dtype), "tiled", "flex-eager", **how)


def test_large_scores_keep_their_digits() -> None:
    """Where the statistics swallow the log of a sum, weights are made of maxima and sums."""

    def far(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + 1e6 * (1 + b)

    exact = results("reference", operands(90), mask=masks.Causal())
    found = results("tiled", operands(90), mask=masks.Causal(), score_fn=far)
    near(found, exact, 1e-6, 1e-6, ("out", "dq", "dk", "dv"))


def test_a_sink_and_dropout_stand_beside_it() -> None:
    how = {"mask": masks.Causal(), "score_fn": FUNCTIONS["documents"]}
    agreement(operands(), "tiled", sink=make(4), **how)
    q, k, v = operands()
    torch.manual_seed(0)
    first = ak.attention(q, k, v, dropout=0.5, backend="tiled", **how)
    torch.manual_seed(0)
    assert first.equal(ak.attention(q, k, v, dropout=0.5, backend="tiled", **how))


def test_second_derivatives() -> None:
    x = make(1, 6, 1, 3).requires_grad_()

    def call(x: Tensor) -> Tensor:
        how = {"mask": masks.Causal(), "score_fn": FUNCTIONS["bent by the cell"]}
        return ak.attention(x, x, x, backend="tiled", **how)

    torch.autograd.gradgradcheck(call, x, fast_mode=True)


# -- who calls it ------------------------------------------------------------------------------


def test_modules_plans_and_reports_name_it() -> None:
    def favourite(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return 2 * s

    x = make(1, 6, 2, 8)
    layer = ak.Attention(2, 8, score_fn=favourite)
    assert "score_fn=test_modules_plans_and_reports_name_it.<locals>.favourite" in repr(layer)
    assert layer(x, x, x).equal(ak.attention(x, x, x, score_fn=favourite))
    torch.testing.assert_close(layer(x, x, x), ak.attention(x, x, x, scale=2 * 8**-0.5))
    text = layer.explain(x, x, x)
    assert "favourite" in text
    assert "score-function" in text
    one, same = (ak.plan(x, x, x, score_fn=favourite) for _ in range(2))
    assert one is same
    assert one.request != ak.plan(x, x, x, score_fn=lambda s, *cell: 2 * s).request
    one.verify()
    whole = ak.MultiHeadAttention(16, 2, score_fn=favourite, mask=masks.Causal())
    tokens = torch.randn(1, 6, 16)
    assert whole(tokens).shape == tokens.shape
    with pytest.raises(CompositionError, match="takes no cache"), torch.no_grad():
        whole(tokens, cache=ak.KVCache())


def test_a_module_can_be_the_function() -> None:
    class Tilt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("slopes", SLOPES)

        def forward(self, s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s - self.slopes[h] * (i - j).abs()

    agreement(operands(), "tiled", score_fn=Tilt())
    q, k, v = operands()
    found = ak.attention(q, k, v, score_fn=Tilt())
    assert distance(found, ak.attention(q, k, v, score_fn=FUNCTIONS["slopes"])) == 0


def test_kernels_that_run_their_own_code_alone_refuse_it() -> None:
    x = make(1, 6, 2, 16, dtype=torch.float32)
    for call in (
        lambda: ak.Attention(2, 16, score_fn=FUNCTIONS["causal"], backend="emulated"),
        lambda: ak.Attention(2, 16, score_fn=FUNCTIONS["causal"], backend="ascend"),
        lambda: ak.attention(x, x, x, score_fn=FUNCTIONS["causal"], backend="emulated"),
    ):
        with pytest.raises(BackendRefused, match="runs no code but its own") as caught:
            call()
        assert "score-function" in {one.code for one in caught.value.refusals}
    found = ak.plan(x, x, x, score_fn=FUNCTIONS["causal"])
    assert "score-function" in {one.code for one in found.passed_over if one.subject == "ascend"}
    on_cuda = make_plan(replace(found.request, device="cuda"))
    assert on_cuda.backend == "cuda"
    assert "calls no score function" in on_cuda.refusals[0].reason


def test_what_it_reads_may_train_where_that_is_recorded() -> None:
    slopes = SLOPES.clone().requires_grad_()

    def tilted(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s - slopes[h] * (i - j).abs()

    layer = ak.Attention(4, 8, num_kv_heads=2, score_fn=tilted, mask=masks.Causal())
    q, k, v = operands()
    plan = layer.plan(q, k, v)
    assert plan.backend == "reference"
    assert "score-gradient" in {reason.code for reason in plan.passed_over}
    (found,) = torch.autograd.grad(layer(q, k, v).square().sum(), slopes)
    bias = pse.ALiBi(slopes.detach().tolist(), learnable=True)
    said = ak.attention(q, k, v, pse=bias, mask=masks.Causal(), backend="tiled")
    (exact,) = torch.autograd.grad(said.square().sum(), bias.tensors[0])
    torch.testing.assert_close(found.to(exact.dtype), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(BackendRefused, match="asks for a gradient"):
        ak.attention(q, k, v, score_fn=tilted, backend="tiled")
    with pytest.raises(Exception, match=r"inside of torch\.compile none"):
        torch.compile(layer, fullgraph=True, backend="eager")(q, k, v)
    with torch.no_grad():
        assert layer.plan(q, k, v).backend == "tiled"
    slopes.requires_grad_(False)  # the same module, frozen between two calls
    assert layer.plan(q, k, v).backend == "tiled"


def test_configurations_hold_no_function() -> None:
    for read in (
        lambda: AttentionConfig(num_heads=2, head_dim=8, score_fn=FUNCTIONS["causal"]),
        lambda: AttentionConfig.from_yaml("{num_heads: 2, head_dim: 8, score_fn: causal}"),
    ):
        with pytest.raises(ConfigError, match="is a function, which no file holds"):
            read()


class Odd(dict[str, Tensor]):
    """Callable, and the key of nothing."""

    def __call__(self, s: Tensor, *cell: Tensor) -> Tensor:
        return s


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "a number": (3, CompositionTypeError, r"takes a function fn\(score, b, h, i, j\), got 3"),
    "no hash": (Odd(), CompositionTypeError, "which has no hash"),
    "an integer": (lambda s, b, h, i, j: i, CompositionTypeError, "returned torch.int64"),
    "a bool": (lambda s, b, h, i, j: i >= j, CompositionTypeError, "returned torch.bool"),
    "no tensor": (lambda s, b, h, i, j: 1.0, CompositionTypeError, "returned float"),
    "a vector": (lambda s, b, h, i, j: s + SLOPES, CompositionError, r"returned shape \(4,\)"),
    "a branch": (lambda s, b, h, i, j: s if i > j else -s, CompositionError, "without `if`"),
    "a number of it": (lambda s, b, h, i, j: s.item(), CompositionError, "without `if`, .item()"),
    "two arguments": (lambda s, b: s, CompositionError, "cannot be asked for many cells"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_wrong_functions_are_told(name: str, backend: str) -> None:
    fn, error, told = WRONG[name]
    q, k, v = operands()
    with pytest.raises(error, match=told):
        ak.attention(q, k, v, score_fn=fn, backend=backend)
