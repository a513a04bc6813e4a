"""`torch.export`: programs that hold masks and biases as texts, and run in any process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from tests.docs.pages import ROOT

WINDOW = masks.Causal() & (masks.SlidingWindow(5) | masks.Prefix(2))


class Packed(nn.Module):
    """Lengths are constants of a program."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ak.MultiHeadAttention(32, 4, mask=masks.Causal(), rotary=True)
        self.seqlens = ak.SeqLens(range(1, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1), seqlens=self.seqlens)


class MadeInside(nn.Module):
    """A mask of the call joins that of the layer; there is a call without a module, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = ak.MultiHeadAttention(32, 4, mask=masks.Causal())

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x, mask=masks.SlidingWindow(7), pse=pse.ALiBi(4))
        return ak.attention(*[x.unflatten(-1, (4, 8))] * 3, mask=masks.Full(), softcap=5.0)


def frozen() -> nn.Module:
    return ak.MultiHeadAttention(32, 4, pse=pse.T5Relative(4)).requires_grad_(False)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "window": lambda: ak.MultiHeadAttention(32, 4, mask=WINDOW, rotary=True),
    "biases": lambda: ak.MultiHeadAttention(
        32, 4, pse=pse.T5Relative(4) + pse.ALiBi(4, learnable=True), sink=True
    ),
    "frozen": frozen,
    "no mask": lambda: ak.MultiHeadAttention(32, 4),
    "cells": lambda: ak.MultiHeadAttention(
        32, 4, mask=masks.Dense.keep(torch.arange(33 * 33).view(33, 33) % 3 > 0)
    ),
    "packed": Packed,
    "made inside": MadeInside,
    "emulated": lambda: ak.MultiHeadAttention(32, 4, mask=masks.Causal(), backend="emulated"),
}


def trained(name: str) -> nn.Module:
    """Return a layer whose biases are not what they start with."""
    torch.manual_seed(0)
    layer = LAYERS[name]().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def tokens(batch: int = 2, length: int = 33) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", sorted(LAYERS.keys() - {"window", "biases", "made inside"}))
def test_a_program_computes_the_same(name: str) -> None:
    layer = trained(name)
    with torch.no_grad():
        program = torch.export.export(layer, (tokens(),))
        torch.testing.assert_close(program.module()(tokens()), layer(tokens()))


def test_programs_run_in_another_process(tmp_path: Path) -> None:
    names = ("biases", "packed")
    for name in names:
        layer = trained(name)
        with torch.no_grad():
            program = torch.export.export(layer, (tokens(),))
            torch.save((tokens(), layer(tokens())), tmp_path / f"{name}.pt")
        torch.export.save(program, tmp_path / f"{name}.pt2")
    run = """
import sys, torch, attnkit
for name in sys.argv[1:]:
    given, wanted = torch.load(name + ".pt")
    torch.testing.assert_close(torch.export.load(name + ".pt2").module()(given), wanted)
    print("same")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", run, *(str(tmp_path / name) for name in names)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["same"] * len(names), done.stderr


@pytest.mark.parametrize("name", ["window", "biases", "made inside"])
def test_sizes_may_be_left_open(name: str) -> None:
    layer = trained(name)
    open_ = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("s", min=2, max=4096)}
    with torch.no_grad():
        program = torch.export.export(layer, (tokens(),), dynamic_shapes={"x": open_})
        for batch, length in ((1, 5), (3, 80), (2, 33)):
            x = tokens(batch, length)
            torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["window", "biases", "packed"])
def test_the_strict_form_is_the_same_program(name: str) -> None:
    layer = trained(name)
    with torch.no_grad():
        program = torch.export.export(layer, (tokens(),), strict=True)
        torch.testing.assert_close(program.module()(tokens()), layer(tokens()))


def test_a_program_trains() -> None:
    layer = trained("biases")
    module = torch.export.export(layer, (tokens(),)).module()
    grads = []
    for form in (layer, module):
        parameters = dict(form.named_parameters())
        names = sorted(parameters)
        loss = form(tokens()).square().sum()
        grads.append(torch.autograd.grad(loss, [parameters[name] for name in names]))
    for found, meant in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(found, meant)


def test_a_program_says_its_mask_and_holds_no_number_of_this_process() -> None:
    program = torch.export.export(trained("window"), (tokens(),))
    (node,) = [n for n in program.graph.nodes if n.target is torch.ops.attnkit.attend.default]
    assert str(WINDOW) in node.args[3]
    (handle,) = node.args[2]
    assert handle.target is torch.ops.aten.zeros.default


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"mask": masks.Predicate(lambda b, h, i, j: i >= j)}, "Predicate .* has no text"),
        ({"pse": pse.Dense(torch.zeros(4, 33, 33))}, "Dense.* has no text"),
        ({"mask": masks.Causal() | masks.Predicate(lambda b, h, i, j: i > 3)}, "has no text"),
        ({"score_fn": lambda score, b, h, i, j: score / 2}, "score_fn is a function"),
    ],
)
def test_what_no_text_says_is_refused_when_it_is_exported(how: dict[str, Any], told: str) -> None:
    layer = ak.MultiHeadAttention(32, 4, **how).eval()
    with pytest.raises(ak.CompositionError, match=told):
        torch.export.export(layer, (tokens(),))


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore:.*treespec.*:FutureWarning")
def test_a_compiled_package() -> None:
    layer = trained("window").requires_grad_(False)
    with torch.no_grad():
        program = torch.export.export(layer, (tokens(),))
        path = torch._inductor.aoti_compile_and_package(program)
        loaded = torch._inductor.aoti_load_package(path)
        torch.testing.assert_close(loaded(tokens()), layer(tokens()))
