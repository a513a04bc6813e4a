"""The layers that select blocks: equal to the dense computation, and they learn."""

from __future__ import annotations

import moba
import nsa
import pytest
import torch

from lm.steps import apart


@pytest.mark.parametrize("layer", [moba.MoBA, nsa.NSA])
@pytest.mark.parametrize("backend", ["auto", "emulated"])
def test_a_layer_is_its_dense_computation(layer: type[moba.MoBA | nsa.NSA], backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 256, 64, dtype=torch.float64)
    assert apart(layer(backend=backend).double(), layer(plainly=True).double(), x) < 1e-12


@pytest.mark.parametrize("script", [moba, nsa])
def test_a_script_trains_and_says_its_plan(
    script: object, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main(steps=6)  # type: ignore[attr-defined]
    printed = capsys.readouterr().out
    first, last = (float(printed.split(word)[1].split()[0]) for word in ("byte: ", "at first, "))
    assert last < first - 1
    assert "selected blocks gathered" in " ".join(printed.split())
