"""A plan that a layer keeps is never taken for another mask, bias, scale, cap or dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import attnkit as ak
from attnkit import masks
from attnkit.interop.transformers import report
from attnkit.interop.transformers.interface import attend
from attnkit.interop.transformers.mask_tensor import MaskTensor
from attnkit.masks import Lifted

LENGTH = 40  # more rows than plans for any mask are made for


class Layer(nn.Module):
    """An attention module as the interface sees it."""


def _given(mask: masks.Mask) -> MaskTensor:
    return MaskTensor(Lifted(mask, "a test"), (2, 1, LENGTH, LENGTH), torch.float32)


MASKS: list[Any] = [
    None,
    _given(masks.Causal()),
    _given(masks.SlidingWindow(5)),
    _given(masks.Padding((40, 17))),
    _given(masks.Padding((40, 18))),
]
TERMS: list[dict[str, Any]] = [
    {},
    {"scaling": 0.3},
    {"softcap": 0.7},
    {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    {"position_bias": torch.randn(1, 4, LENGTH, LENGTH)},
    {"position_bias": torch.randn(2, 1, LENGTH, LENGTH)},
]


@pytest.mark.parametrize("grad", [False, True])
def test_every_pair_of_calls(grad: bool) -> None:
    """All masks and terms through one layer, twice, against attention without anything kept."""
    torch.manual_seed(0)
    layer = Layer().eval()
    query = torch.randn(2, 4, LENGTH, 8, requires_grad=grad)
    key, value = torch.randn(2, 2, LENGTH, 8), torch.randn(2, 2, LENGTH, 8)
    for _ in range(2):
        for given in MASKS:
            for terms in TERMS:
                found, _ = attend(layer, query, key, value, given, **terms)
                bias = terms.get("position_bias")
                wanted = ak.attention(
                    *(one.transpose(1, 2) for one in (query, key, value)),
                    mask=None if given is None else given.mask,
                    scale=terms.get("scaling"),
                    softcap=terms.get("softcap"),
                    sink=terms.get("s_aux"),
                    pse=None if bias is None else ak.pse.Dense(bias),
                    backend="reference",
                )
                torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


def test_dropout_acts_in_training_alone() -> None:
    layer = Layer().eval()
    query = torch.randn(1, 2, LENGTH, 8)
    plain, _ = attend(layer, query, query, query, None, dropout=0.5)
    torch.testing.assert_close(attend(layer, query, query, query, None)[0], plain)
    layer.train()
    torch.manual_seed(1)
    dropped, _ = attend(layer, query, query, query, None, dropout=0.5)
    torch.manual_seed(1)
    torch.testing.assert_close(attend(layer, query, query, query, None, dropout=0.5)[0], dropped)
    assert not torch.allclose(dropped, plain, atol=0.05)
    assert report(layer).calls == 4
