"""Biases beside masks that no single call computes: slopes, matrices of pieces, compressed rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks, pse
from attnkit.errors import KernelContractError
from attnkit.planner import Plan

pytestmark = pytest.mark.usefixtures("no_full_masks")

HEADS = 2
SINK = masks.Causal() & (masks.SlidingWindow(8) | masks.Columns(0, 3))


def table(*shape: int) -> pse.Dense:
    return pse.Dense(torch.randn(*shape, dtype=torch.float64))


def t5() -> pse.T5Relative:
    """A table of buckets that does not train."""
    entries = torch.randn(32, HEADS, dtype=torch.float64)
    return pse.T5Relative(HEADS, bidirectional=False, table=entries)


def proven(
    mask: masks.Mask,
    bias: pse.Pse,
    q_len: int,
    kv_len: int | None = None,
    seqlens: ak.SeqLens | None = None,
    kv_heads: int = HEADS,
    batch: int = 2,
) -> Plan:
    """Check outputs, statistics and gradients against the reference, and return the plan."""
    many = (batch,) if seqlens is None else ()
    shapes = [(*many, q_len, HEADS, 4)] + 2 * [(*many, kv_len or q_len, kv_heads, 4)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    rest: dict[str, Any] = {"mask": mask, "pse": bias, "seqlens": seqlens}
    rest["layout"] = "BSND" if seqlens is None else "TND"
    found, meant = (run(tensors, **rest, backend=name) for name in ("emulated", "reference"))
    for one, other in zip(found, meant, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    plan = ak.plan(*tensors, **rest, backend="emulated")
    plan.verify()
    assert not any(call.atten_mask and call.atten_mask.kind == "full" for call in plan.calls)
    return plan


def run(tensors: list[Tensor], **rest: Any) -> tuple[Tensor, ...]:
    out = ak.attention(*tensors, **rest, return_stats=True)
    assert isinstance(out, ak.AttentionOutput)
    slope = torch.linspace(-1, 1, out.output.numel(), dtype=torch.float64).view_as(out.output)
    return out.output, out.stats.lse, *torch.autograd.grad(out.output, tensors, slope)


@pytest.mark.parametrize(
    "bias",
    [
        pse.ALiBi(HEADS),
        pse.SqrtALiBi(HEADS),
        table(40, 40),
        table(1, HEADS, 40, 40),
        table(2, 1, 40, 40),
        pse.Dense(torch.randn(2, HEADS, 40, 40, dtype=torch.float64), before_scale=True),
        pse.ALiBi(HEADS) + table(HEADS, 40, 40),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "mask",
    [
        SINK,
        masks.Documents([16, 24]) & masks.Causal(),
        masks.Documents([20, 20]) & SINK,
        masks.PerHead([SINK, masks.Causal()]),
        masks.Padding([40, 33]) & masks.Causal(),
    ],
    ids=str,
)
def test_any_bias_goes_with_any_region(mask: masks.Mask, bias: pse.Pse) -> None:
    proven(mask, bias, 40)
    proven(mask, bias, 40, kv_heads=1)


@pytest.mark.parametrize("bias", [pse.ALiBi(HEADS), t5(), pse.ALiBi(HEADS) + t5()], ids=str)
@pytest.mark.parametrize("mask", [masks.Causal(), SINK, masks.SlidingWindow(5)], ids=str)
@pytest.mark.parametrize("lengths", [(20, 20), (7, 25, 1)], ids=str)
def test_packed_sequences_with_a_bias(
    mask: masks.Mask, bias: pse.Pse, lengths: tuple[int, ...]
) -> None:
    proven(mask, bias, sum(lengths), seqlens=ak.SeqLens(list(lengths)))


def test_unequal_lengths_with_a_bias() -> None:
    proven(SINK, pse.ALiBi(HEADS), 24, 40)
    proven(SINK, pse.ALiBi(HEADS, align="top_left"), 40, 24)
    proven(SINK, table(24, 40), 24, 40)


@pytest.mark.usefixtures("side_by_side")
def test_a_matrix_is_that_of_the_pieces() -> None:
    plan = proven(SINK, pse.ALiBi(HEADS), 40)
    shapes = {call.pse.shape for call in plan.calls if call.pse is not None}
    assert shapes == {(HEADS,), (1, HEADS, 32, 3)}  # slopes for the window, a strip for the sink
    plan = proven(masks.Documents([10] * 4) & masks.Causal(), table(HEADS, 40, 40), 40)
    assert [call.pse.shape for call in plan.calls if call.pse] == [(8, HEADS, 10, 10)]


def test_a_long_sink_makes_no_matrix_of_all_cells() -> None:
    x = torch.empty(1, 65536, 8, 64, device="meta")
    mask = masks.Causal() & (masks.SlidingWindow(1024) | masks.Columns(0, 4))
    plan = ak.plan(x, x, x, mask=mask, pse=pse.ALiBi(8), backend="emulated")
    assert plan.price is not None
    assert plan.price.bias_bytes < 10e6
    strip = pse.ALiBi(8).cut((1028, 65536), (0, 4), q_len=65536, kv_len=65536)
    assert strip.materialize(64508, 4).shape == (1, 8, 64508, 4)


# -- compressed rows -------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [(200, 200), (1030,), (1100, 1100)], ids=str)
def test_a_bias_by_distance_needs_1024_rows(documents: tuple[int, ...]) -> None:
    length = sum(documents)
    mask = masks.Documents(list(documents)) & masks.Causal()
    plan = proven(mask, t5(), length, batch=1)
    (call,) = plan.calls
    assert call.pse is not None
    assert call.pse.shape == (1, HEADS, 1024, documents[0])
    packed = proven(masks.Causal(), t5(), length, seqlens=ak.SeqLens(list(documents)))
    assert [call.pse and call.pse.shape for call in packed.calls] == [call.pse.shape]


@pytest.mark.parametrize("lengths", [(40, 20), (20, 7, 40), (1030, 300, 1100)], ids=str)
def test_compressed_rows_serve_sequences_of_unequal_lengths(lengths: tuple[int, ...]) -> None:
    """The kernel reads them by distance: the last rows of the longest sequence are everyone's."""
    plan = proven(masks.Causal(), t5(), sum(lengths), seqlens=ak.SeqLens(list(lengths)))
    assert [call.pse and call.pse.shape for call in plan.calls] == [(1, HEADS, 1024, max(lengths))]
    documents = masks.Documents(list(lengths)) & masks.Causal()
    plan = proven(documents, t5(), sum(lengths), batch=1)
    assert [call.pse and call.pse.shape for call in plan.calls] == [(1, HEADS, 1024, max(lengths))]


# -- start indices -----------------------------------------------------------------------------


def test_a_first_document_that_is_cut_is_mode_8() -> None:
    chunk = (masks.Documents([32, 20, 12]) & masks.Causal())[24:64, 0:64]
    plan = proven(chunk, pse.ALiBi(HEADS), 40, 64, batch=1)
    (call,) = plan.calls
    assert (call.sparse_mode, call.q_start_idx) == (8, (24,))


def tampered(plan: Plan, **changes: Any) -> Plan:
    (step,) = plan.steps
    return replace(plan, steps=(replace(step, call=replace(step.call, **changes)),))


def caught(plan: Plan) -> str:
    with pytest.raises(KernelContractError) as error:
        plan.verify()
    return error.value.codes[0]


def test_slopes_from_another_key_are_caught() -> None:
    chunk = (masks.Documents([32, 20, 12]) & masks.Causal())[24:64, 0:64]
    plan = proven(chunk, pse.ALiBi(HEADS), 40, 64, batch=1)
    assert caught(tampered(plan, q_start_idx=(23,))) == "alibi-anchor"
    assert caught(tampered(plan, q_start_idx=None, kv_start_idx=None)) == "alibi-anchor"
    # In other modes a start counts in every sequence.
    assert caught(tampered(plan, sparse_mode=3)) == "alibi-anchor"
    square = proven(masks.Causal(), pse.ALiBi(HEADS), 8)
    assert caught(tampered(square, q_start_idx=(1,), kv_start_idx=(0,))) == "alibi-anchor"


# -- channels ----------------------------------------------------------------------------------


def test_slopes_beside_ragged_pieces_are_channels_of_one_call() -> None:
    lengths = [37, 64, 12, 80, 55, 90, 41, 21]
    plan = proven(SINK, pse.ALiBi(HEADS), sum(lengths), seqlens=ak.SeqLens(lengths))
    assert len(plan.calls) == 1
    assert plan.route is not None
    assert all(call.pse is None for call in plan.calls)


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_channels_hold_slopes_in_bfloat16(align: Any) -> None:
    bias = pse.ALiBi(HEADS, align=align)
    tensors = [torch.randn(1, 600, HEADS, 16, dtype=torch.bfloat16) for _ in range(3)]
    assert ak.plan(*tensors, mask=SINK, pse=bias, backend="emulated").route is not None

    def error(bias: pse.Pse | None) -> float:
        found = ak.attention(*tensors, mask=SINK, pse=bias, backend="emulated")
        wide = [tensor.double() for tensor in tensors]
        meant = ak.attention(*wide, mask=SINK, pse=bias, backend="reference")
        assert isinstance(found, Tensor)
        assert isinstance(meant, Tensor)
        return float((found.double() - meant).abs().mean())

    assert error(bias) <= 1.2 * error(None)  # the bias adds nothing to what bfloat16 loses


def test_a_dilated_mask_keeps_its_slopes() -> None:
    plan = proven(masks.SlidingWindow(9) & masks.Dilated(2), pse.ALiBi(HEADS), 40)
    assert plan.route is not None


# -- what a bias is, not what it is called ---------------------------------------------------------


class Named(pse.ALiBi):
    """ALiBi by another name."""


class NamedRoot(pse.SqrtALiBi):
    """Square-root ALiBi by another name."""


class Squared(pse.ALiBi):
    """No ALiBi at all, though it is a subclass."""

    def curve(self, distance: Tensor) -> Tensor:
        return distance.square()


@pytest.mark.parametrize(("bias", "kind"), [(Named(HEADS), 2), (NamedRoot(HEADS), 3)])
def test_a_subclass_keeps_its_slopes(bias: pse.Pse, kind: int) -> None:
    (call,) = proven(masks.Causal(), bias, 12).calls
    assert (call.pse_type, call.pse.shape) == (kind, (HEADS,))
    for sizes in ((5, 12), (12, 5)):
        proven(masks.Causal(), bias, *sizes)


def test_a_subclass_with_another_curve_is_a_matrix() -> None:
    (call,) = proven(masks.Causal(), Squared(HEADS), 12).calls
    assert (call.pse_type, call.pse.shape) == (0, (1, HEADS, 12, 12))
    assert isinstance(Squared(HEADS).structure, pse.Toeplitz)


def test_a_decoded_row_has_the_biases_of_the_whole_text() -> None:
    """Slopes and numbers per key in one matrix, each cut out of its own whole."""
    torch.manual_seed(0)
    length, keys = 40, torch.randn(40)
    for dtype, near in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        q, k, v = (torch.randn(1, length, HEADS, 8, dtype=dtype) for _ in range(3))
        bias = pse.SqrtALiBi(HEADS) + pse.KeyBias(keys)
        whole = ak.attention(q, k, v, mask=masks.Causal(), pse=bias, backend="reference")
        for row in (0, 1, 7, 38, 39):
            part = bias.cut((row, row + 1), (0, row + 1), q_len=length, kv_len=length)
            given = (q[:, row : row + 1], k[:, : row + 1], v[:, : row + 1])
            found = ak.attention(*given, mask=masks.Causal(), pse=part, backend="emulated")
            assert (found - whole[:, row : row + 1]).abs().max() < near
