"""Models of each kind on attnkit give what eager attention gives, and call attnkit for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnkit.interop.transformers import enable
from attnkit.interop.transformers.site import site_of
from tests.interop.transformers.models import CASES, pair


def rows(inputs: dict[str, Any], output: Tensor) -> Tensor:
    """What a model says of tokens that exist: how rows without keys are filled is nobody's."""
    mask = inputs.get("attention_mask")
    if mask is None or "decoder_input_ids" in inputs:
        return output
    return output[mask.bool()]


def results(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The output, and the gradients of everything that trains."""
    output = rows(inputs, model(**inputs)[0])
    slopes = torch.arange(output.numel()).mul(0.7).sin().view(output.shape)
    (output * slopes).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **grads}


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str) -> None:
    eager, model, inputs = pair(name)
    enable(model)
    wanted, found = results(eager, inputs), results(model, inputs)
    assert found.keys() == wanted.keys()
    largest = max(float(one.abs().max()) for n, one in wanted.items() if n != "output")
    for n, one in wanted.items():
        # The gradient of a key's bias is 0 in theory: what is left of it is rounding.
        scale = max(float(one.abs().max()), 1e-3 * largest)
        torch.testing.assert_close(found[n], one, rtol=0, atol=2e-5 * scale, msg=f"{name}: {n}")
    assert sum(site_of(module).calls for module in model.modules()) == CASES[name].calls
