"""Biases of packed sequences whose lengths differ, and biases that train without a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends.tiled import bias as forms
from attnkit.masks import Mask
from attnkit.pse import Pse

LENGTHS = (
    ak.SeqLens([7, 4], [9, 9]),
    ak.SeqLens([5, 9, 10]),
    ak.SeqLens([4, 0, 9, 1], [3, 5, 0, 30]),
    ak.SeqLens([300, 20, 141]),
)
MASKS: tuple[Mask, ...] = (
    masks.Full(),
    masks.Causal(),
    masks.Causal("top_left"),
    masks.SlidingWindow(6),
    masks.SlidingWindow(3) | masks.Prefix(2),
)


def biases(align: Any) -> dict[str, Pse]:
    torch.manual_seed(0)
    found: dict[str, Pse] = {
        "slopes": pse.ALiBi(4, align=align),
        "roots": pse.SqrtALiBi(4, align=align),
        "slopes that train": pse.ALiBi(4, align=align, learnable=True),
        "buckets": pse.T5Relative(4, align=align),
        "few buckets": pse.T5Relative(4, num_buckets=8, max_distance=7, align=align),
    }
    found["a sum"] = found["buckets"] + found["slopes"] + found["slopes that train"]
    for bias in found.values():
        for tensor in bias.tensors:
            torch.nn.init.normal_(tensor)
    return found


def results(backend: str, tensors: list[Tensor], bias: Pse, **how: Any) -> list[Tensor]:
    """Output, statistics and gradients, those of the bias included."""
    out, stats = ak.attention(*tensors, pse=bias, backend=backend, return_stats=True, **how)
    slope = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    leaves = [*tensors, *bias.tensors]
    return [out, stats.lse, *torch.autograd.grad(out, leaves, slope)]


def compare(bias: Pse, mask: Mask, tensors: list[Tensor], **how: Any) -> None:
    found, meant = (results(b, tensors, bias, mask=mask, **how) for b in ("tiled", "reference"))
    for one, other in zip(found, meant, strict=True):
        # The tables are float32; what is summed into them is not.
        tolerance = 1e-10 if one.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


def packed(lens: ak.SeqLens) -> list[Tensor]:
    sizes = ((lens.total_q, 4, 8), (lens.total_kv, 2, 8), (lens.total_kv, 2, 5))
    return [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("name", list(biases("top_left")))
def test_packed_lengths(name: str, align: str) -> None:
    for lens, mask in product(LENGTHS, MASKS):
        compare(biases(align)[name], mask, packed(lens), layout="TND", seqlens=lens)


@pytest.mark.parametrize("name", list(biases("top_left")))
def test_dense_layouts_of_every_shape(name: str) -> None:
    bias = biases("bottom_right")[name]
    for (q_len, kv_len), mask in product([(1, 1), (1, 7), (7, 1), (5, 9), (200, 333)], MASKS):
        sizes = ((2, q_len, 4, 8), (2, kv_len, 2, 8), (2, kv_len, 2, 5))
        tensors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
        compare(bias, mask, tensors, softcap=3.0)


def test_a_bias_per_key_trains() -> None:
    for shape in ((70,), (4, 70), (2, 4, 70)):
        bias = pse.KeyBias(torch.randn(shape, dtype=torch.float64, requires_grad=True))
        sizes = ((2, 130, 4, 8), (2, 70, 2, 8), (2, 70, 2, 5))
        tensors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
        compare(bias, masks.Causal(), tensors)


def test_a_wrong_entry_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = forms._first_entry
    monkeypatch.setattr(forms, "_first_entry", lambda *given: max(0, right(*given) - 1))
    lens = LENGTHS[1]
    with pytest.raises(AssertionError):
        compare(
            biases("top_left")["buckets"], masks.Causal(), packed(lens), layout="TND", seqlens=lens
        )


class Largest(TorchDispatchMode):
    """Notes the most bytes that any tensor's memory has."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return made


@dataclass(frozen=True)
class Long:
    """A composition at a length where a matrix would be the largest thing by far."""

    bias: Pse
    mask: Mask


LONG = {
    "buckets": Long(pse.T5Relative(2), masks.SlidingWindow(64)),
    "slopes that train": Long(pse.ALiBi(2, learnable=True), masks.SlidingWindow(64)),
    "per key": Long(pse.KeyBias(torch.nn.Parameter(torch.zeros(4096))), masks.SlidingWindow(64)),
}


@pytest.mark.parametrize("name", LONG)
def test_no_matrix_is_made(name: str) -> None:
    case, length = LONG[name], 4096
    layer = ak.Attention(2, 8, mask=case.mask, pse=case.bias, backend="tiled")
    x = torch.randn(1, length, 2, 8, requires_grad=True)
    layer.plan(x, x, x)
    with Largest() as seen:
        layer(x, x, x).sum().backward()
    assert 0 < seen.bytes < 4 * length * length / 16
