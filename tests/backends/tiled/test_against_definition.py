"""The tiled backend against the reference: outputs, statistics and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnkit as ak
import attnkit.backends.tiled
from attnkit import masks, pse
from tests.agreement import agreement


def check(operands: list[Tensor], sink: Tensor | None = None, **how: Any) -> None:
    agreement(operands, "tiled", sink=sink, **how)


def tensors(
    layout: str,
    batch: int,
    q_len: int,
    kv_len: int,
    heads: int,
    kv_heads: int,
    dim: int,
    v_dim: int,
) -> list[Tensor]:
    """Query, key and value in a layout, by way of a [b s n d] tensor."""
    generator = torch.Generator().manual_seed(q_len * 31 + kv_len)
    out = []
    for length, count, width in (
        (q_len, heads, dim),
        (kv_len, kv_heads, dim),
        (kv_len, kv_heads, v_dim),
    ):
        x = torch.randn(batch, length, count, width, generator=generator, dtype=torch.float64)
        if layout in ("BNSD", "BSND"):
            out.append(x.transpose(1, 2).contiguous() if layout == "BNSD" else x)
        else:
            x = x.flatten(2)
            out.append(x.transpose(0, 1).contiguous() if layout == "SBH" else x)
    return out


MASKS = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "causal top left": masks.Causal(align="top_left"),
    "window": masks.SlidingWindow(64),
    "narrow window": masks.SlidingWindow(7),
    "band": masks.Band(5, 9),
    "prefix": masks.Prefix(100) | masks.Causal(),
    "sink": masks.Causal() & (masks.SlidingWindow(100) | masks.Columns(0, 4)),
    "rows": masks.Rows(3, 40),
    "column": masks.Columns(5, 6),
    "block causal": masks.BlockCausal(32),
    "chunked": masks.Chunked(50) & masks.Causal(),
    "not a window": ~masks.SlidingWindow(30),
    "nothing": masks.Causal() - masks.Full(),
    "stripes": masks.Chunked(3) | masks.Columns(200, 210),
}


@pytest.mark.parametrize("lengths", [(300, 300), (300, 420), (420, 280), (1, 300)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, lengths: tuple[int, int]) -> None:
    check(tensors("BSND", 2, *lengths, 4, 2, 8, 8), mask=MASKS[name])


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH", "SBH"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
def test_layouts_and_heads(layout: str, heads: tuple[int, int]) -> None:
    operands = tensors(layout, 2, 290, 310, *heads, 8, 6)
    merged = {"num_heads": heads[0], "num_kv_heads": heads[1]} if layout.endswith("H") else {}
    check(operands, mask=masks.SlidingWindow(100), layout=layout, **merged)


def packed(q_lens: list[int], kv_lens: list[int], heads: int, kv_heads: int) -> list[Tensor]:
    return [x[0] for x in tensors("BSND", 1, sum(q_lens), sum(kv_lens), heads, kv_heads, 8, 8)]


@pytest.mark.parametrize("name", ["causal", "full", "window", "narrow window", "rows"])
@pytest.mark.parametrize(
    "lengths",
    [
        ([40] * 6, [40] * 6),
        ([300] * 3, [300] * 3),
        ([1, 0, 5, 270, 33], [4, 3, 0, 290, 33]),
        ([3, 3, 9, 3, 3], [3, 3, 9, 3, 3]),
    ],
    ids=["equal", "long", "ragged", "tiny"],
)
def test_packed(name: str, lengths: tuple[list[int], list[int]]) -> None:
    if name == "rows" and min(lengths[0]) < 40:
        name = "causal"
    check(packed(*lengths, 4, 2), mask=MASKS[name], layout="TND", seqlens=ak.SeqLens(*lengths))


def test_masks_that_differ_by_batch_and_head() -> None:
    operands = tensors("BSND", 3, 280, 280, 4, 2, 8, 8)
    check(operands, mask=masks.Padding([280, 100, 1]) & masks.Causal())
    check(operands, mask=masks.Padding([270, 270, 20], side="left"))
    check(operands, mask=masks.Documents([100, 50, 50, 80]))
    heads = [masks.Causal(), masks.SlidingWindow(9), masks.SlidingWindow(9), masks.Full()]
    check(operands, mask=masks.PerHead(heads))


@pytest.mark.parametrize(
    "mask",
    [
        masks.Predicate(lambda b, h, i, j: (i * j) % 3 == 0),
        masks.Predicate(lambda b, h, i, j: (i + h + b) % 5 != j % 5, 2, 4) & masks.Causal(),
        masks.Dilated(3) & masks.SlidingWindow(64),
    ],
    ids=["predicate", "by batch and head", "dilated"],
)
def test_masks_that_are_no_regions(mask: masks.Mask) -> None:
    check(tensors("BSND", 2, 200, 200, 4, 2, 8, 8), mask=mask)
    lengths = [33, 150]
    check(packed(lengths, lengths, 4, 4), mask=mask, layout="TND", seqlens=ak.SeqLens(lengths))


BIASES = {
    "alibi": pse.ALiBi(4),
    "alibi top left": pse.ALiBi(4, align="top_left"),
    "sqrt": pse.SqrtALiBi(4) + pse.ALiBi(4),
}


@pytest.mark.parametrize("name", ["full", "causal", "window", "sink"])
@pytest.mark.parametrize("bias", BIASES)
def test_biases_of_distances(name: str, bias: str) -> None:
    check(tensors("BSND", 2, 290, 310, 4, 2, 8, 8), mask=MASKS[name], pse=BIASES[bias])
    lengths = [40, 40, 130]
    check(
        packed(lengths, lengths, 4, 4),
        mask=MASKS[name],
        pse=BIASES[bias],
        layout="TND",
        seqlens=ak.SeqLens(lengths),
    )


@pytest.mark.parametrize("shape", [(200, 230), (4, 200, 230), (2, 1, 200, 230), (1, 4, 200, 230)])
@pytest.mark.parametrize("before_scale", [False, True])
def test_dense_biases_have_gradients(shape: tuple[int, ...], before_scale: bool) -> None:
    operands = tensors("BSND", 2, 200, 230, 4, 2, 8, 8)
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    bias = pse.Dense(tensor.requires_grad_(), before_scale) + pse.ALiBi(4)
    check(operands, mask=MASKS["sink"], pse=bias)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dense_biases_in_16_bits_are_scaled_in_32(dtype: torch.dtype) -> None:
    operands = [t.to(dtype) for t in tensors("BSND", 1, 64, 64, 4, 2, 16, 16)]
    bias = pse.Dense((8 * torch.randn(4, 64, 64)).to(dtype), before_scale=True)
    check(operands, pse=bias)


@pytest.mark.parametrize("name", ["causal", "window", "rows", "full", "nothing"])
def test_sinks_and_softcap(name: str) -> None:
    operands = tensors("BSND", 2, 300, 300, 4, 2, 8, 8)
    sink = torch.linspace(-2.0, 2.0, 4, dtype=torch.float64)
    check(operands, sink, mask=MASKS[name])
    check(operands, sink, mask=MASKS[name], softcap=1.5, pse=pse.ALiBi(4))
    check(operands, mask=MASKS[name], softcap=1.5)


@st.composite
def compositions(draw: st.DrawFn) -> dict[str, Any]:
    """A mask and the lengths it applies to."""
    q_len, kv_len = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    atoms = [
        masks.Causal(align=draw(st.sampled_from(["top_left", "bottom_right"]))),
        masks.SlidingWindow(draw(st.integers(1, 300))),
        masks.Prefix(draw(st.integers(1, kv_len))),
        masks.Chunked(draw(st.integers(1, 90))),
        masks.Rows(0, draw(st.integers(1, q_len))),
        masks.Columns(0, draw(st.integers(1, kv_len))),
        masks.Band(draw(st.integers(0, 60)), draw(st.integers(0, 60))),
    ]
    mask = draw(st.sampled_from(atoms))
    for _ in range(draw(st.integers(0, 3))):
        other = draw(st.sampled_from(atoms))
        operation = draw(st.sampled_from(["and", "or", "minus"]))
        mask = (
            mask & other
            if operation == "and"
            else mask | other
            if operation == "or"
            else mask - other
        )
    return {
        "mask": mask,
        "lengths": (q_len, kv_len),
        "heads": draw(st.sampled_from([(2, 2), (4, 2)])),
    }


@settings(max_examples=25)
@given(compositions())
def test_random_compositions(case: dict[str, Any]) -> None:
    check(
        tensors("BNSD", 2, *case["lengths"], *case["heads"], 4, 4), mask=case["mask"], layout="BNSD"
    )
