"""The Ascend backend against a recording stand-in for torch.ops.npu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import BACKENDS, Operands
from attnkit.backends.ascend import Ascend
from attnkit.planner import Composition, read_request
from tests.backends.standin import Ops


def attend(
    ops: Ops,
    query: Tensor,
    key: Tensor | None = None,
    *,
    mask: masks.Mask | None = None,
    bias: pse.Pse | None = None,
    layout: str = "BSND",
    seqlens: ak.SeqLens | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Run on a stand-in that serves the CPU; refused requests raise `BackendRefused`."""
    backend = Ascend(ops, device="cpu")
    key = query if key is None else key
    composition = Composition(masks.Full() if mask is None else mask, bias, layout, scale, dropout)
    request = read_request(
        composition, query, key, key, num_heads=2, seqlens=seqlens, sink=sink, training=True
    )
    reasons = backend.refusals(request)
    if reasons:
        raise ak.BackendRefused("refused", reasons)
    plan = backend.plan(request)
    plan.verify()
    return backend.run(plan, Operands(query, key, key, bias, sink)).output


def x(*shape: int) -> Tensor:
    return torch.randn(*shape or (2, 6, 2, 4))


def test_plain_attention_passes_what_is_not_a_default() -> None:
    ops, q = Ops(), x()
    out = attend(ops, q)
    ((name, given),) = ops.calls
    assert name == "npu_fusion_attention"
    assert set(given) == {"query", "key", "value", "head_num", "input_layout", "scale"}
    assert (given["head_num"], given["input_layout"], given["scale"]) == (2, "BSND", 0.5)
    assert given["query"] is q
    torch.testing.assert_close(out, ak.attention(q, q, q, backend="reference"))


def test_a_window_is_spelled_as_the_version_spells_it() -> None:
    ops, q = Ops(), x()
    attend(ops, q, mask=masks.SlidingWindow(3))
    attend(ops, q, mask=masks.SlidingWindow(3), bias=pse.ALiBi(2))
    (v1, old), (v2, new) = ops.calls
    assert (v1, v2) == ("npu_fusion_attention", "npu_fusion_attention_v2")
    assert (old["pre_tockens"], old["next_tockens"], old["sparse_mode"]) == (2, 0, 4)
    assert (new["pre_tokens"], new["next_tokens"], new["pse_type"]) == (2, 0, 2)
    assert torch.equal(new["pse"], torch.tensor(pse.ALiBi(2).slopes))


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
def test_the_mask_says_true_for_masked(align: Any) -> None:
    ops, q = Ops(), x()
    attend(ops, q, mask=masks.Causal(align))
    compressed = ops.calls[-1][1]["atten_mask"]
    assert torch.equal(compressed, torch.ones(2048, 2048).triu(1).bool())
    keep = torch.rand(6, 6) < 0.6
    attend(ops, q, mask=masks.Predicate(lambda b, h, i, j: keep[i, j]))
    given = ops.calls[-1][1]
    assert torch.equal(given["atten_mask"], ~keep)
    assert (given["sparse_mode"], given["inner_precise"]) == (1, 2)


def test_packed_lengths_are_cumulative_host_lists() -> None:
    ops, q = Ops(), x(9, 2, 4)
    attend(ops, q, mask=masks.Causal(), layout="TND", seqlens=ak.SeqLens([4, 0, 5]))
    given = ops.calls[-1][1]
    assert given["actual_seq_qlen"] == given["actual_seq_kvlen"] == [4, 4, 9]


@pytest.mark.parametrize(
    ("bias", "version", "kind"),
    [
        (pse.ALiBi(2), "npu_fusion_attention_v2", 2),
        (pse.SqrtALiBi(2), "npu_fusion_attention_v2", 3),
        (pse.Dense(torch.randn(2, 6, 6)), "npu_fusion_attention_v2", 0),
        (pse.Dense(torch.randn(2, 6, 6), before_scale=True), "npu_fusion_attention", None),
    ],
    ids=["alibi", "sqrt", "after", "before"],
)
def test_bias_types_choose_the_version(bias: pse.Pse, version: str, kind: int | None) -> None:
    ops, q = Ops(), x()
    out = attend(ops, q, mask=masks.Causal(), bias=bias)
    ((name, given),) = ops.calls
    assert (name, given.get("pse_type")) == (version, kind)
    meant = ak.attention(q, q, q, mask=masks.Causal(), pse=bias, backend="reference")
    torch.testing.assert_close(out, meant)


def test_a_sink_travels_in_float32() -> None:
    ops, q = Ops(), x().bfloat16()
    attend(ops, q, mask=masks.Causal(), sink=torch.zeros(2, dtype=torch.bfloat16))
    assert ops.calls[-1][1]["sink"].dtype == torch.float32


def test_dropout_passes_no_seed_so_that_the_op_draws_its_own() -> None:
    ops, q = Ops(), x()
    first, second = (attend(ops, q, dropout=0.5) for _ in range(2))
    for _, given in ops.calls:
        assert given["keep_prob"] == 0.5
        assert not {"seed", "offset", "dropout_mask"} & set(given)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("release", "rest", "lacks"),
    [
        ("7.1.0", {"sink": torch.zeros(2)}, "sink"),
        ("6.0.0", {"bias": pse.ALiBi(2)}, "npu_fusion_attention_v2"),
        ("5.0.0", {"layout": "TND", "seqlens": ak.SeqLens([6])}, "actual_seq_qlen"),
    ],
)
def test_what_a_release_lacks_is_refused_before_any_call(
    release: str, rest: dict[str, Any], lacks: str
) -> None:
    ops = Ops(release)
    q = x(6, 2, 4) if rest.get("layout") == "TND" else x(1, 6, 2, 4)
    with pytest.raises(ak.BackendRefused) as refused:
        attend(ops, q, mask=masks.Causal(), **rest)
    (reason,) = refused.value.refusals
    assert (reason.code, reason.subject) == ("op-version", "ascend")
    assert lacks in reason.reason
    assert not ops.calls
    attend(Ops(), q, mask=masks.Causal(), **rest)  # the newest release takes it


def test_dropout_beside_a_bias_that_trains_needs_the_operator_that_draws_it() -> None:
    ops = Ops()
    q = x(1, 6, 2, 4).requires_grad_()
    bias = pse.Dense(torch.zeros(2, 6, 6, requires_grad=True), before_scale=True)
    attend(ops, q, bias=bias)
    with pytest.raises(ak.BackendRefused) as refused:
        attend(ops, q, bias=bias, dropout=0.5)
    (reason,) = refused.value.refusals
    assert (reason.code, reason.subject) == ("op-version", "ascend")
    assert "no _npu_dropout_gen_mask" in reason.reason


def test_without_an_npu_it_is_refused_with_every_reason() -> None:
    q = x().double().requires_grad_()
    table = pse.Dense(torch.zeros(2, 6, 6, dtype=torch.float64, requires_grad=True))
    with pytest.raises(ak.BackendRefused) as refused:
        ak.attention(q, q, q, pse=table, softcap=3.0, backend="ascend")
    codes = {r.code for r in refused.value.refusals}
    assert {"device", "dtype", "softcap"} <= codes
    assert str(refused.value).count("\n") >= 3


def test_an_npu_without_torch_npu_is_refused() -> None:
    backend = Ascend(device="cpu")
    q = x()
    request = read_request(Composition(masks.Full()), q, q, q)
    assert {r.code for r in backend.refusals(request)} == {"torch-npu"}


@pytest.mark.usefixtures("no_full_masks", "side_by_side")
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_several_calls_are_trained_through_their_grad_ops(dropout: float) -> None:
    ops, q = Ops(), x(1, 48, 2, 4).requires_grad_()
    mask = masks.Causal() & (masks.SlidingWindow(4) | masks.Columns(0, 1))
    out = attend(ops, q, mask=mask, dropout=dropout)
    dy = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, q, dy)
    forward = [given for name, given in ops.calls if not name.endswith("_grad")]
    backward = [given for name, given in ops.calls if name.endswith("_grad")]
    assert len(forward) == len(backward) > 1
    for given in backward:
        assert given["scale_value"] == 0.5
        assert (given["numels"] > 0) == (dropout > 0) or not dropout
    if not dropout:
        meant = ak.attention(q, q, q, mask=mask, backend="reference")
        torch.testing.assert_close(out, meant)
        torch.testing.assert_close(found, torch.autograd.grad(meant, q, dy)[0])


@pytest.mark.usefixtures("no_full_masks")
def test_a_release_without_the_grad_op_is_refused_in_training_only() -> None:
    mask = masks.Causal() & (masks.SlidingWindow(2) | masks.Columns(0, 1))
    attend(Ops("7.1.0"), x(), mask=mask)
    with pytest.raises(ak.BackendRefused) as refused:
        attend(Ops("7.1.0"), x().requires_grad_(), mask=mask)
    assert "npu_fusion_attention_grad" in refused.value.refusals[0].reason


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH", "SBH"])
def test_whole_compositions_agree_with_the_reference(layout: str) -> None:
    ops = Ops()
    shapes = {"BSND": (2, 6, 2, 4), "BNSD": (2, 2, 6, 4), "BSH": (2, 6, 8), "SBH": (6, 2, 8)}
    q = x(*shapes[layout])
    for mask in (
        masks.Causal() & masks.Documents([2, 4]),
        masks.PrefixLM(3),
        masks.Causal() & (masks.SlidingWindow(2) | masks.Columns(0, 1)),
        masks.Padding([3, 6]),
        masks.Band(1, 1),
    ):
        out = attend(ops, q, mask=mask, layout=layout)
        meant = ak.attention(q, q, q, mask=mask, layout=layout, num_heads=2, backend="reference")
        torch.testing.assert_close(out, meant)
    assert BACKENDS["ascend"].name == "ascend"


@pytest.mark.usefixtures("no_full_masks", "side_by_side")
def test_auto_leaves_a_small_bias_on_a_route_to_the_definition() -> None:
    """Channels and levels cost launches, which the estimates weigh against whole matrices."""
    backend = Ascend(Ops(), device="cpu")

    def dearer(length: int, bias: pse.Pse | None) -> ak.Refusal | None:
        query = torch.empty(1, length, 2, 64, device="meta", requires_grad=True)
        # Two calls that merge: the price of one is less than that of any dozen operators.
        mask = masks.Causal() & (masks.SlidingWindow(3) | masks.Prefix(2))
        request = read_request(Composition(mask, bias), query, query, query, training=True)
        return backend.yields(backend.plan(request))

    table = pse.T5Relative(2)
    assert dearer(8192, table) is None
    small = dearer(16, table)
    assert small is not None
    assert small.code == "dearer"
    assert "microseconds by estimate" in small.reason
    assert dearer(16, None) is None, "without a bias there is no such question"


def test_auto_passes_over_what_yields(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ak.Refusal("dearer", "the next one is cheaper", "tiled")
    monkeypatch.setattr(type(BACKENDS["tiled"]), "yields", lambda self, plan: told)
    q = x(3, 17, 2, 4)  # plans are kept, and those of other tests are not to be found
    plan = ak.plan(q, q, q)
    assert plan.backend == "reference"
    assert told in plan.passed_over
    assert ak.plan(q, q, q, backend="tiled").backend == "tiled"
