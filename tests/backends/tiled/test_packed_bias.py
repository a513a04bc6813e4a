"""Biases on packed sequences of different lengths, and without a matrix wherever there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnkit as ak
import attnkit.backends.tiled
from attnkit import masks, pse
from attnkit.backends import BACKENDS
from attnkit.backends.tiled import terms
from tests.agreement import agreement
from tests.backends.memory import Allocated

HEADS = 4
RAGGED = {
    "square": ak.SeqLens([5, 9, 40, 10]),
    "cross": ak.SeqLens([7, 4, 33], [9, 30, 4]),
    "empty ones": ak.SeqLens([6, 0, 0, 3, 150], [9, 0, 5, 0, 131]),
    "repeated": ak.SeqLens([8, 3, 8, 3, 8], [8, 5, 8, 5, 8]),
}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameter(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.Parameter(noise(*shape, seed=seed))


def learnable(align: pse.Align = "bottom_right") -> pse.Pse:
    bias = pse.ALiBi(HEADS, align=align, learnable=True)
    (weight,) = bias.tensors
    weight.data = weight.data.double() + 0.1
    return bias


def t5(align: pse.Align = "bottom_right", bidirectional: bool = True) -> pse.Pse:
    return pse.T5Relative(HEADS, 8, 20, bidirectional, align, table=parameter(8, HEADS))


@dataclass(frozen=True, eq=False)
class Waves(pse.ByDistance):
    """A family of one's own: one wave for all heads, before the scale."""

    align: pse.Align = "bottom_right"
    pace: Tensor = field(default_factory=lambda: parameter(1))

    @property
    def before_scale(self) -> bool:
        return True

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        return (distance * self.pace.to(dtype)).sin()[None]


@dataclass(frozen=True, eq=False)
class Cells(pse.Pse):
    """A family that is nothing but its matrices: one for all sequences, or one for each."""

    weight: Tensor = field(default_factory=lambda: parameter(1, HEADS, 1, 1))

    @property
    def batch(self) -> int | None:
        return len(self.weight) if len(self.weight) > 1 else None

    def _values(self, at: pse.Rectangle, dtype: torch.dtype, device: Any) -> Tensor:
        i, j = torch.arange(*at.rows)[:, None], torch.arange(*at.keys)
        return self.weight.to(dtype) * ((i * i + 3 * j) % 7).to(dtype)


BIASES: dict[str, Callable[[], pse.Pse]] = {
    "alibi": lambda: pse.ALiBi(HEADS, align="top_left"),
    "sqrt alibi": lambda: pse.SqrtALiBi(HEADS),
    "learnable": learnable,
    "learnable top left": lambda: learnable("top_left"),
    "t5": t5,
    "t5 top left": lambda: t5("top_left", bidirectional=False),
    "before the scale": Waves,
    "cells": Cells,
    "sum": lambda: learnable() + pse.ALiBi(HEADS) + Waves("top_left") + t5() + Cells(),
}
MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "causal top left": masks.Causal(align="top_left"),
    "window": masks.SlidingWindow(4),
    "no region": masks.Predicate(lambda b, h, i, j: (i * j) % 3 == 0),
    "heads that differ": masks.PerHead([masks.Causal(), masks.Full()] * 2),
}


def packed(lens: ak.SeqLens, kv_heads: int = 2) -> list[Tensor]:
    return [
        noise(lens.total_q, HEADS, 8, seed=1),
        noise(lens.total_kv, kv_heads, 8, seed=2),
        noise(lens.total_kv, kv_heads, 6, seed=3),
    ]


def check(operands: list[Tensor], bias: pse.Pse, **how: Any) -> None:
    agreement(operands, "tiled", pse=bias, **how)


def check_packed(lens: ak.SeqLens, bias: pse.Pse, kv_heads: int = 2, **how: Any) -> None:
    check(packed(lens, kv_heads), bias, layout="TND", seqlens=lens, **how)


# -- the same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("lens", RAGGED)
def test_ragged(lens: str, bias: str, name: str) -> None:
    check_packed(RAGGED[lens], BIASES[bias](), mask=MASKS[name])


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("bias", ["learnable", "t5", "sum"])
def test_heads_softcap_and_sink(bias: str, kv_heads: int) -> None:
    sink = torch.linspace(-1.0, 1.0, HEADS, dtype=torch.float64)
    how = {"mask": masks.SlidingWindow(40), "softcap": 2.0, "sink": sink}
    check_packed(RAGGED["empty ones"], BIASES[bias](), kv_heads, **how)


@pytest.mark.parametrize("shape", [(9,), (HEADS, 9), (3, 1, 9), (3, HEADS, 9)], ids=str)
def test_numbers_per_key_serve_any_number_of_queries(shape: tuple[int, ...]) -> None:
    check_packed(ak.SeqLens([7, 0, 12], [9, 9, 9]), pse.KeyBias(parameter(*shape)))


@pytest.mark.parametrize("name", ["causal", "full"])
@pytest.mark.parametrize("lens", RAGGED)
def test_a_matrix_for_each_sequence(lens: str, name: str) -> None:
    bias = Cells(parameter(len(RAGGED[lens]), HEADS, 1, 1))
    check_packed(RAGGED[lens], t5() + bias, mask=MASKS[name])


@pytest.mark.parametrize(
    "mask",
    [masks.Documents([100, 7, 93]) & masks.Causal(), masks.SlidingWindow(30), masks.Full()],
    ids=["documents", "window", "full"],
)
@pytest.mark.parametrize("bias", [*BIASES, "keys", "keys per batch"])
def test_one_length(bias: str, mask: masks.Mask) -> None:
    keys = {"keys": (HEADS, 200), "keys per batch": (2, 1, 200)}
    made = pse.KeyBias(parameter(*keys[bias])) if bias in keys else BIASES[bias]()
    operands = [noise(2, 200, n, 8, seed=n) for n in (HEADS, 2, 2)]
    check(operands, made, mask=mask)
    lens = ak.SeqLens([200, 200])
    check([t.flatten(0, 1) for t in operands], made, mask=mask, layout="TND", seqlens=lens)


@pytest.mark.parametrize("lengths", [(1, 300), (300, 420), (420, 280)], ids=str)
@pytest.mark.parametrize("bias", ["learnable", "t5 top left", "before the scale"])
def test_more_rows_or_keys_than_a_tile_holds(bias: str, lengths: tuple[int, int]) -> None:
    q_len, kv_len = lengths
    operands = [noise(2, q_len, HEADS, 8), noise(2, kv_len, 2, 8), noise(2, kv_len, 2, 8)]
    check(operands, BIASES[bias](), mask=masks.Causal() | masks.Columns(0, 3))


@pytest.mark.parametrize("bias", ["alibi", "learnable", "t5", "before the scale", "cells"])
def test_cuts(bias: str) -> None:
    whole = BIASES[bias]()
    once = whole.cut((5, 60), (10, 70), q_len=80, kv_len=90)
    twice = once.cut((3, 33), (1, 51), q_len=55, kv_len=60)
    operands = [noise(1, 30, HEADS, 8), noise(1, 50, 2, 8), noise(1, 50, 2, 8)]
    check(operands, twice, mask=masks.Causal())


@st.composite
def batches(draw: st.DrawFn) -> tuple[ak.SeqLens, pse.Pse, dict[str, Any]]:
    """A packed batch, a bias of one to three addends, and the rest of a composition."""
    rows = st.integers(0, 20) | st.integers(120, 140)
    count = draw(st.integers(1, 5))
    lens = [draw(st.lists(rows, min_size=count, max_size=count)) for _ in range(2)]
    names = draw(st.lists(st.sampled_from(list(BIASES)), min_size=1, max_size=3))
    bias = BIASES[names[0]]()
    for name in names[1:]:
        bias = bias + BIASES[name]()
    mask = draw(st.sampled_from([masks.Full(), masks.Causal(), masks.Causal(align="top_left")]))
    if draw(st.booleans()):
        mask = mask & masks.SlidingWindow(draw(st.integers(1, 60)))
    how = {
        "mask": mask,
        "kv_heads": draw(st.sampled_from([1, 2, 4])),
        "softcap": draw(st.sampled_from([None, 1.5])),
        "scale": draw(st.sampled_from([None, 1.0])),
    }
    return ak.SeqLens(*lens), bias, how


@pytest.mark.sweep
@settings(max_examples=25)
@given(batches())
def test_random_batches(case: tuple[ak.SeqLens, pse.Pse, dict[str, Any]]) -> None:
    lens, bias, how = case
    check_packed(lens, bias, **how)


# -- dropout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["learnable", "t5 top left", "before the scale", "cells"])
def test_dropout(bias: str) -> None:
    """With the weights that one seed keeps, the definition has the same output and gradients."""
    lens, made, p = RAGGED["cross"], BIASES[bias](), 0.25
    operands = packed(lens, HEADS)
    how = {"mask": masks.Causal(), "layout": "TND", "seqlens": lens}

    def tiled(value: Tensor) -> Tensor:
        torch.manual_seed(5)
        found = ak.attention(*operands[:2], value, pse=made, dropout=p, backend="tiled", **how)
        assert isinstance(found, Tensor)
        return found

    def weights(dropped: bool) -> Tensor:
        """The weights themselves, [t n j]: the values are an identity matrix."""
        ones = torch.eye(lens.total_kv, dtype=torch.float64)[:, None].expand(-1, HEADS, -1)
        if dropped:
            return tiled(ones)
        found = ak.attention(*operands[:2], ones, pse=made, backend="reference", **how)
        assert isinstance(found, Tensor)
        return found

    leaves = [t.requires_grad_() for t in operands] + [t for t in made.tensors if t.requires_grad]
    kept = weights(dropped=True).detach() != 0
    share = kept.sum() / (weights(dropped=False) != 0).sum()
    assert 0.6 < share < 0.9
    expected = torch.einsum("tnj,jnd->tnd", weights(dropped=False) * kept / (1 - p), operands[2])
    found = tiled(operands[2])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    pairs = zip(
        *(torch.autograd.grad(x.sin().sum(), leaves) for x in (found, expected)), strict=True
    )
    for mine, right in pairs:
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


# -- graphs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES)
def test_one_graph(bias: str) -> None:
    """As one operator of a compiled graph it gives the very same numbers."""
    lens, made = RAGGED["cross"], BIASES[bias]()
    operands = [t.requires_grad_() for t in packed(lens)]
    how = {"mask": masks.Causal(), "layout": "TND", "seqlens": lens, "backend": "tiled"}
    leaves = operands + [t for t in made.tensors if t.requires_grad]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = ak.attention(q * 2, k, v, pse=made, **how)
        return out

    torch.compiler.reset()  # each case is a graph of the same function, and few are kept
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*operands), call(*operands)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slope = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
    grads = [torch.autograd.grad(out, leaves, slope) for out in (found, expected)]
    for mine, right in zip(*grads, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


# -- memory ------------------------------------------------------------------------------------


def largest(backend: str, rows: int, made: pse.Pse, mask: masks.Mask, **how: Any) -> int:
    """The largest tensor of a forward and a backward pass."""
    x = noise(rows, HEADS, 8, dtype=torch.float32).requires_grad_()
    operands = x if how else x[None]
    with Allocated() as seen:
        out = ak.attention(
            operands, operands, operands, mask=mask, pse=made, backend=backend, **how
        )
        assert isinstance(out, Tensor)
        out.sum().backward()
    return seen.numbers


@pytest.mark.parametrize("mask", [masks.Causal(), masks.SlidingWindow(200)], ids=str)
@pytest.mark.parametrize("bias", ["learnable", "t5", "before the scale", "keys"])
def test_no_matrix_is_made(bias: str, mask: masks.Mask) -> None:
    rows = 8192
    made = pse.KeyBias(parameter(HEADS, rows)) if bias == "keys" else BIASES[bias]()
    assert largest("tiled", rows, made, mask) < rows * rows / 32


@pytest.mark.parametrize("bias", ["learnable", "t5", "before the scale"])
def test_no_matrix_is_made_of_a_packed_batch(bias: str) -> None:
    rows, mask = 8192, masks.SlidingWindow(1000)
    how = {"layout": "TND", "seqlens": ak.SeqLens([rows - 200, 200])}
    assert largest("tiled", rows, BIASES[bias](), mask, **how) < rows * rows / 32


def test_a_matrix_would_be_seen() -> None:
    assert largest("reference", 500, t5(), masks.Causal()) >= HEADS * 500 * 500
    assert largest("tiled", 500, Cells(), masks.Causal()) >= HEADS * 500 * 500


# -- planted faults ----------------------------------------------------------------------------


def turned(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given, **named: right(*given, **named).flip(-1)


@pytest.mark.parametrize(
    ("place", "function", "seen"),
    [
        (pse.ByDistance, "diagonals", "out"),
        (terms, "_sums_of_diagonals", "dbias 0"),
    ],
)
def test_a_wrong_order_is_seen(
    place: Any, function: str, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, function, turned(getattr(place, function)))
    with pytest.raises(AssertionError, match=seen):
        check_packed(RAGGED["square"], t5(), mask=masks.Causal())


def test_matrices_of_other_sequences_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(self: Any, tensor: Tensor, step: Any, first: int, count: int) -> Tensor:
        cells = tensor[:, : step.block.rows * count]
        return cells.view(1, -1, step.block.rows, count)

    monkeypatch.setattr(terms.Stored, "window", first)
    with pytest.raises(AssertionError, match="out"):
        check_packed(RAGGED["square"], Cells())


# -- the choice --------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", BIASES)
def test_auto_takes_it(bias: str) -> None:
    lens = RAGGED["square"]
    plan = ak.plan(*packed(lens), pse=BIASES[bias](), layout="TND", seqlens=lens)
    assert plan.backend == "tiled"
    assert BACKENDS["tiled"].refusals(plan.request) == []
