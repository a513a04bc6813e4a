"""What the planner has to find by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks, pse
from attnkit.kernel import UNBOUNDED
from attnkit.planner import Launch, Solution

Planned = Callable[..., ak.Plan]


# -- masks by what they are, not by what they are called -----------------------------------


def test_a_window_wider_than_the_text_is_plain_causal(planned: Planned) -> None:
    (call,) = planned(masks.Causal() & masks.SlidingWindow(4096), 2048).calls
    assert call.sparse_mode in (2, 3)
    assert (call.pre_tokens, call.next_tokens) == (UNBOUNDED, UNBOUNDED)
    assert call == planned(masks.Causal(), 2048).calls[0]


@pytest.mark.parametrize("size", [1, 2, 256, 2047])
def test_a_window_is_mode_4_that_counts_distances(planned: Planned, size: int) -> None:
    (call,) = planned(masks.SlidingWindow(size), 2048).calls
    assert (call.sparse_mode, call.pre_tokens, call.next_tokens) == (4, size - 1, 0)
    assert call.inner_precise == 0


def test_a_window_at_the_end_of_longer_keys_is_anchored_there(planned: Planned) -> None:
    (call,) = planned(masks.SlidingWindow(16), 32, 100).calls
    assert (call.sparse_mode, call.pre_tokens, call.next_tokens) == (4, 15, 0)
    (call,) = planned(masks.SlidingWindow(16, align="top_left"), 32, 100).calls
    shift = 100 - 32
    if call.sparse_mode == 4 and not call.is_packed:
        assert (call.pre_tokens, call.next_tokens) == (15 + shift, -shift)
    else:  # without the keys that nobody sees, it is a window of a square
        assert (call.sparse_mode, call.pre_tokens, call.actual_seq_kvlen[0]) == (4, 15, 32)


def test_full_attention_has_no_mask(planned: Planned) -> None:
    (call,) = planned(masks.Full(), 64).calls
    assert call.atten_mask is None
    assert call.sparse_mode == 0


def test_a_dense_tensor_that_is_causal_is_a_causal_mode(planned: Planned) -> None:
    square = torch.ones(96, 96, dtype=torch.bool)
    for mask in (masks.Dense.keep(square.tril()), masks.Dense.drop(square.triu(1))):
        (call,) = planned(mask, 96).calls
        assert call.sparse_mode in (2, 3)
        assert call.atten_mask.kind == "causal"


def test_top_left_causal_with_more_queries_than_keys_has_no_empty_row(planned: Planned) -> None:
    (call,) = planned(masks.Causal(align="top_left"), 96, 64).calls
    assert (call.sparse_mode, call.inner_precise) == (2, 0)
    assert not any(call.empty_rows())


def test_bottom_right_causal_with_more_queries_than_keys_has_empty_rows(planned: Planned) -> None:
    plan = planned(masks.Causal(), 96, 64)
    calls = [plan.calls[0], *(step.call for other in plan.alternatives for step in other.launches)]
    # In the dense layout the first rows are empty: inner_precise=2, or their mean of V is
    # computed. Packed, those rows are a sequence without keys, which answers 0 by itself.
    dense = next(call for call in calls if not call.is_packed)
    assert (dense.sparse_mode, dense.inner_precise) == (3, 2)
    assert dense.empty_rows() == (((0, 32),),)
    for call in calls:
        assert not any(call.averaged_rows())


def test_prefix_lm_is_mode_6_where_it_is_legal(planned: Planned) -> None:
    (call,) = planned(masks.PrefixLM(100), 1024).calls
    assert (call.sparse_mode, call.prefix) == (6, (100,))
    assert call.atten_mask.kind == "prefix"
    (call,) = planned(masks.PrefixLM((10, 1024, 0)), 1024, batch=3).calls
    assert (call.sparse_mode, call.prefix) == (6, (10, 1024, 1))  # row 0 sees key 0 in any case


def test_padding_per_batch_is_one_packed_call_without_a_mask(planned: Planned) -> None:
    plan = planned(masks.Padding([3, 64, 40]), 64, batch=3)
    assert len(plan.calls) == 1
    (call,) = plan.calls
    assert call.atten_mask is None
    assert [s for s in call.sequences if all(s)] == [(64, 3), (64, 64), (64, 40)]


def test_masks_per_head_are_calls_per_head_group_or_one_full_mask(planned: Planned) -> None:
    mixed = masks.PerHead([masks.Causal(), masks.SlidingWindow(8)] * 2)
    plan = planned(mixed, 64)
    plan.verify()
    if len(plan.calls) == 1:
        assert plan.calls[0].atten_mask.shape == (1, 4, 64, 64)
    else:
        assert all(call.atten_mask.kind != "full" for call in plan.calls)
    alike = planned(masks.PerHead([masks.Causal()] * 4), 64)
    assert alike.calls == planned(masks.Causal(), 64).calls


# -- packed documents -------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH", "SBH"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_documents_in_a_dense_layout_are_one_packed_call(
    planned: Planned, layout: str, causal: bool, batch: int
) -> None:
    mask = masks.Documents([200, 56, 1800])
    mask = mask & masks.Causal() if causal else mask
    (call,) = planned(mask, 2056, layout=layout, batch=batch).calls
    assert call.input_layout == "TND"
    assert call.sequences == ((200, 200), (56, 56), (1800, 1800)) * batch
    if causal:
        assert call.sparse_mode in (2, 3)
    else:
        assert call.atten_mask is None


def test_a_packed_batch_is_one_call(planned: Planned) -> None:
    lens = ak.SeqLens([7, 0, 9], [7, 3, 9])
    (call,) = planned(masks.Causal(), 16, 19, layout="TND", seqlens=lens).calls
    assert (call.actual_seq_qlen, call.actual_seq_kvlen) == ((7, 7, 16), (7, 10, 19))
    assert call.sparse_mode in (2, 3)


# -- no mask of one entry per cell where a compressed one does -----------------------------


def without_full_mask(launches: tuple[Launch, ...]) -> tuple[Launch, ...]:
    """The calls, if none of them reads a mask of one entry per cell; else none."""
    found = [step.call.atten_mask for step in launches]
    return () if any(mask is not None and mask.kind == "full" for mask in found) else launches


@pytest.mark.parametrize("q_len", [1, 2, 8, 64, 300])
@pytest.mark.parametrize(
    "mask",
    [
        masks.Full(),
        masks.Causal(),
        masks.Causal("top_left"),
        masks.SlidingWindow(3),
        masks.Band(2, 1),
        masks.Band(None, 1),
        masks.PrefixLM(1),
        masks.Columns(0, 1),
        masks.Chunked(3),
        masks.Chunked(3) & masks.Causal(),
        masks.Padding([1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["BSND", "BNSD"])
def test_a_region_mode_never_loses_to_a_full_mask(
    planned: Planned, mask: ak.masks.Mask, q_len: int, layout: str
) -> None:
    plan = planned(mask, q_len, layout=layout)
    options = [plan.steps, *(other.launches for other in plan.alternatives)]
    if any(
        len(some) == 1 and not some[0].packs(plan.request)
        for some in map(without_full_mask, options)
    ):
        assert without_full_mask(plan.steps)
        assert "full-mask-not-needed" in {refusal.code for refusal in plan.refusals}
    else:  # the call packs blocks of the matrix, which start tiles of their own
        assert all(step.packs(plan.request) for step in without_full_mask(plan.steps))
    assert all(Solution(some).price.nanoseconds >= plan.price.nanoseconds for some in options)


# -- biases -------------------------------------------------------------------------------


def test_alibi_on_a_square_goes_by_slopes(planned: Planned) -> None:
    (call,) = planned(masks.Causal(), 128, pse=pse.ALiBi(4)).calls
    assert (call.pse_type, call.pse.shape, call.pse.dtype) == (2, (4,), torch.float32)
    assert call.q_start_idx is None
    (call,) = planned(masks.Causal(), 128, pse=pse.SqrtALiBi(4)).calls
    assert (call.pse_type, call.pse.shape) == (3, (4,))


def test_alibi_off_the_square_is_a_small_matrix_or_channels(planned: Planned) -> None:
    (call,) = planned(masks.Causal(), 64, 128, pse=pse.ALiBi(4), dtype=torch.float32).calls
    assert (call.pse_type, call.pse.shape) == (0, (1, 4, 64, 128))
    (call,) = planned(masks.Causal(), 8192, 16384, pse=pse.ALiBi(4), dtype=torch.float32).calls
    assert (call.pse, call.head_dim) == (None, 66)
    plan = planned(masks.Causal(), 64, 128, pse=pse.ALiBi(4))  # which bfloat16 would round
    assert [call.head_dim > 64 for call in plan.calls] == [True]
    assert "pse-precision" in {refusal.code for refusal in plan.refusals}


def test_a_root_of_distances_in_bfloat16_is_refused_off_the_square(planned: Planned) -> None:
    with pytest.raises(ak.BackendRefused) as refused:
        planned(masks.Causal(), 64, 128, pse=pse.SqrtALiBi(4))
    assert "pse-precision" in {r.code for r in refused.value.refusals}


def test_alibi_of_packed_documents_is_slopes_in_one_packed_call(planned: Planned) -> None:
    mask = masks.Causal() & masks.Documents([256, 128, 640])
    (call,) = planned(mask, 1024, pse=pse.ALiBi(4)).calls
    assert (call.input_layout, call.pse_type) == ("TND", 2)


@pytest.mark.parametrize(("before", "kind"), [(True, 1), (False, 0)])
def test_a_dense_bias_goes_before_or_after_the_scale(
    planned: Planned, before: bool, kind: int
) -> None:
    table = torch.zeros(4, 64, 64, dtype=torch.bfloat16, device="meta")
    (call,) = planned(masks.Causal(), 64, pse=pse.Dense(table, before_scale=before)).calls
    assert (call.pse_type, call.pse.shape) == (kind, (1, 4, 64, 64))
    assert call.sparse_mode in (2, 3)


def test_terms_that_the_kernel_lacks_are_refused_by_code_and_run_on_the_reference() -> None:
    x = torch.randn(1, 8, 2, 4)
    bent: dict[str, Any] = {"score_fn": lambda score, b, h, i, j: score * 2}
    for rest, code in (({"softcap": 5.0}, "softcap"), (bent, "score-function")):
        for name in ("emulated", "ascend"):
            with pytest.raises(ak.BackendRefused) as refused:
                ak.attention(x, x, x, backend=name, **rest)
            assert code in {r.code for r in refused.value.refusals}
            with pytest.raises(ak.BackendRefused, match=code):
                ak.Attention(2, 4, backend=name, **rest)
        assert ak.attention(x, x, x, backend="reference", **rest).shape == x.shape


# -- what is refused ----------------------------------------------------------------------


def test_a_batch_of_none_is_refused(planned: Planned) -> None:
    with pytest.raises(ak.BackendRefused, match="empty-batch"):
        planned(masks.Causal(), 8, batch=0)


def test_a_sink_without_any_key_is_refused(planned: Planned) -> None:
    sink = torch.zeros(4, device="meta")
    with pytest.raises(ak.BackendRefused, match="sink-no-keys"):
        planned(masks.Full(), 8, 0, sink=sink)
    # Beside sequences with keys, the calls leave the sink to the merge.
    lens = ak.SeqLens([4, 4], [3, 0])
    plan = planned(masks.Full(), 8, 3, layout="TND", seqlens=lens, sink=sink)
    assert all(call.sink is None for call in plan.calls)


def test_the_losers_are_kept(planned: Planned) -> None:
    plan = planned(masks.SlidingWindow(16), 64)
    assert {"wrong-cells", "full-mask-not-needed"} <= {r.code for r in plan.refusals}
    assert all(r.subject and r.reason for r in plan.refusals)
    report = plan.explain()
    assert report == str(plan)
    assert all(len(line) <= 80 for line in report.splitlines())
    assert "mode" in report


def test_planning_is_a_function_of_the_record(planned: Planned) -> None:
    one = planned(masks.Causal() & masks.SlidingWindow(9), 64)
    two = planned(masks.SlidingWindow(9) & masks.Causal(), 64)
    assert one is two  # equal requests share a plan
    assert one.request == two.request


# -- what needs no copy --------------------------------------------------------------------


@pytest.mark.usefixtures("no_full_masks", "side_by_side")
def test_pieces_that_share_no_key_read_keys_where_they_are(planned: Planned) -> None:
    """The strip of a sink has one range of keys; Longformer's two have keys between them."""
    window = masks.SlidingWindow(8) | masks.Columns(0, 2)
    for mask, sequences in (
        (masks.Causal() & window, {1}),
        (masks.Band(8, 8) | masks.Columns(0, 2) | masks.Rows(0, 2), {1, 3}),
    ):
        plan = planned(mask, 128)
        assert {len(call.sequences) for call in plan.calls} == sequences
        for step in plan.steps:
            # Six launches merge a part; one more gathers its queries where they are several.
            assert step.small_launches - 6 == (len(step.blocks) > 1)


@pytest.mark.usefixtures("no_full_masks")
def test_one_token_documents_are_packed_with_longer_ones(planned: Planned) -> None:
    """A band of single cells fits no other document's window; its cells fit any."""
    for mask in (masks.Documents([1, 1, 30]), masks.Causal() & masks.Documents([1, 1, 30])):
        (call,) = planned(mask, 32).calls
        assert call.sequences == ((1, 1), (1, 1), (30, 30))
