"""The same call gives the same bits, and who cannot promise that says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import BACKENDS, make_plan
from attnkit.errors import BackendRefused, CompositionError, CompositionTypeError
from attnkit.layouts import SeqLens
from attnkit.planner.repeats import is_repeatable
from tests.agreement import results

TABLE = pse.Table(nn.Parameter(torch.zeros(40, 4)), torch.arange(90_000).view(300, 300) * 7 % 40)
CASES: dict[str, dict[str, Any]] = {
    "causal": {"mask": masks.Causal()},
    "window": {"mask": masks.Causal() & (masks.SlidingWindow(50) | masks.Columns(0, 4))},
    "cells": {"mask": masks.Causal() & masks.Dilated(3)},
    "buckets that train": {"mask": masks.Causal(), "pse": pse.T5Relative(4)},
    "slopes that train": {"pse": pse.ALiBi(4, learnable=True)},
    "a matrix that trains": {"pse": pse.Dense(nn.Parameter(torch.zeros(4, 300, 300)))},
    "a table that trains": {"pse": TABLE},
    "packed": {"layout": "TND", "seqlens": SeqLens([120, 1, 179]), "mask": masks.Causal()},
    "a function": {"score_fn": lambda s, b, h, i, j: torch.sin(s) - 0.1 * (i - j)},
}


def operands(how: dict[str, Any]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((300, 4, 16), (300, 2, 16), (300, 2, 16))
    shapes = [size if "seqlens" in how else (2, *size) for size in sizes]
    return [torch.randn(shape, generator=generator) for shape in shapes]


class AnyOrder(TorchDispatchMode):
    """Sees the operators that add up in any order on the CPU, unless torch's switch is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        adds = "accumulate" in str(func._schema) and (len(args) > 3 and args[3])
        if adds or name.startswith(("scatter_add", "scatter_reduce")):
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def supported(name: str, backend: str) -> bool:
    return backend != "emulated" or name != "a function"


PAIRS = [
    (name, backend)
    for name in CASES
    for backend in ("tiled", "reference", "emulated")
    if supported(name, backend)
]


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_every_run_gives_the_same_bits(name: str, backend: str) -> None:
    how = {**CASES[name], "deterministic": True, "backend": backend}
    first = results(tensors=operands(how), **how)
    for _ in range(2):
        again = results(tensors=operands(how), **how)
        assert [name for name in first if not again[name].equal(first[name])] == []


@pytest.mark.parametrize(("name", "backend"), PAIRS)
def test_nothing_adds_in_any_order(name: str, backend: str) -> None:
    """Bits may happen to be the same: so which operators ran is looked at, too."""
    how = {**CASES[name], "deterministic": True, "backend": backend}
    with AnyOrder() as mode:
        results(tensors=operands(how), **how)
    assert mode.seen == set()


def test_dropout_repeats_with_its_seed() -> None:
    how = {"dropout": 0.3, "deterministic": True}
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(results("tiled", operands(how), **how))
    assert all(found[0][name].equal(found[1][name]) for name in found[0])


@pytest.fixture
def switched_on() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_torch_switch_asks_for_it(switched_on: None) -> None:
    x = torch.randn(1, 8, 2, 16)
    layer = ak.Attention(2, 16)
    assert layer.plan(x, x, x).request.deterministic
    torch.use_deterministic_algorithms(True, warn_only=True)  # who only warns asks for nothing
    assert not layer.plan(x, x, x).request.deterministic
    torch.use_deterministic_algorithms(False)
    assert not layer.plan(x, x, x).request.deterministic
    assert ak.Attention(2, 16, deterministic=True).plan(x, x, x).request.deterministic


def test_plans_say_so() -> None:
    x = torch.randn(1, 8, 2, 16)
    layer = ak.MultiHeadAttention(32, 2, deterministic=True)
    assert "deterministic=True" in repr(layer.attention)
    text = layer.explain(torch.randn(1, 8, 32))
    assert "the same bits in every run, by operators that add in a fixed order" in text.replace(
        "\n                ", " "
    )
    plain = ak.plan(x, x, x)
    assert "repeats" not in plain.explain()
    assert plain.request != ak.plan(x, x, x, deterministic=True).request
    there = replace(plain, request=replace(plain.request, device="npu", deterministic=True))
    assert "by torch.use_deterministic_algorithms" in there.explain().replace("\n", " ")
    config = ak.AttentionConfig(num_heads=2, head_dim=16, deterministic=True)
    assert ak.AttentionConfig.from_yaml(config.to_yaml()) == config
    assert config.build().composition.deterministic


def test_compiled_graphs_keep_it() -> None:
    x = torch.randn(1, 8, 2, 16)
    layer = ak.Attention(2, 16, deterministic=True, mask=masks.Causal())
    graph = torch.compile(layer, fullgraph=True, backend="eager")
    assert graph(x, x, x).equal(layer(x, x, x))


def test_devices_take_torch_switch_as_well() -> None:
    x = torch.empty(1, 8, 2, 16, device="meta")
    assert ak.plan(x, x, x, deterministic=True).request.deterministic
    with pytest.raises(CompositionError, match=r"call torch\.use_deterministic_algorithms"):
        is_repeatable(True, "cuda", False)
    slope = torch.ones((), requires_grad=True)
    y = torch.randn(1, 8, 2, 16)
    with pytest.raises(CompositionError, match="reads a tensor that trains"):
        ak.attention(y, y, y, score_fn=lambda s, *cell: s * slope, deterministic=True)
    with pytest.raises(CompositionTypeError, match="deterministic"):
        ak.Attention(2, 16, deterministic=1)  # type: ignore[arg-type]


def test_flex_refuses_gradients_of_what_its_kernels_read(switched_on: None) -> None:
    x = torch.empty(1, 64, 2, 16, device="meta", requires_grad=True)
    for bias, refused in ((pse.ALiBi(2, learnable=True), True), (pse.ALiBi(2), False)):
        asked = replace(ak.plan(x, x, x, pse=bias).request, device="cuda")
        codes = {one.code for one in BACKENDS["flex"].refusals(asked)}
        assert ("flex-deterministic" in codes) == refused
        plan = make_plan(asked)
        assert (plan.backend == "cuda") != refused
        if refused:
            assert "flex-deterministic" in {one.code for one in plan.passed_over}
            with pytest.raises(BackendRefused, match="in any order"):
                make_plan(asked, "flex")
