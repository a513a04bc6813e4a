"""Biases that train on the fused kernel: as channels, as levels, or by a pass beside the calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import Operands, run_plan
from attnkit.backends.ascend import Ascend
from attnkit.errors import KernelContractError
from attnkit.planner import Plan, Request
from attnkit.planner.lower import lower, on_route
from attnkit.planner.route_proof import disprove_route
from attnkit.planner.routes import Route, routes
from attnkit.planner.search import Search
from attnkit.planner.sorting import Sorted
from attnkit.pse import Align
from tests.agreement import slope_error
from tests.backends.standin import Ops

EXACT = 1e-10
BATCH, LENGTH, HEADS, KV_HEADS, DIM = 2, 24, 4, 2, 4


def wide(bias: pse.Pse) -> pse.Pse:
    """The same bias with float64 tensors of random content, so that nothing is rounded."""
    for tensor in bias.tensors:
        tensor.data = torch.randn(tensor.shape, dtype=torch.float64)
    return bias


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, dtype=torch.float64))


def alibi(align: Any = "bottom_right") -> pse.Pse:
    return wide(pse.ALiBi(HEADS, align=align, learnable=True))


def t5(bidirectional: bool = False, align: Any = "bottom_right") -> pse.Pse:
    return wide(pse.T5Relative(HEADS, 8, 12, bidirectional, align))


BIASES: dict[str, Callable[[], pse.Pse]] = {
    "alibi": alibi,
    "keys": lambda: pse.KeyBias(parameter(LENGTH)),
    "keys per head": lambda: pse.KeyBias(parameter(HEADS, LENGTH)),
    "keys per batch": lambda: pse.KeyBias(parameter(BATCH, 1, LENGTH)),
    "keys per both": lambda: pse.KeyBias(parameter(BATCH, HEADS, LENGTH)),
    "t5": t5,
    "all of them": lambda: alibi() + pse.KeyBias(parameter(HEADS, LENGTH)) + t5() + pse.ALiBi(4),
}
CAUSAL = masks.Causal()
MASKS: dict[str, masks.Mask] = {
    "causal": CAUSAL,
    "window": CAUSAL & masks.SlidingWindow(5),
    "documents": CAUSAL & masks.Documents([7, 13, 4]),
    "sink and window": masks.SlidingWindow(4) | (masks.Columns(0, 2) & CAUSAL),
    "rows without keys": CAUSAL & masks.Rows(3, 20),
    "no region": CAUSAL & masks.Dense.keep(torch.rand(LENGTH, LENGTH) < 0.7),
    "dilated": CAUSAL & masks.Dilated(2),
    "heads": masks.PerHead([CAUSAL, CAUSAL & masks.SlidingWindow(6)] * 2),
    "full": masks.Full(),
    "prefix": masks.PrefixLM(7),
    "blocks": masks.BlockCausal(5),
    "documents, one with a prefix": masks.Documents([7, 17]) & (CAUSAL | masks.Prefix(11)),
    "window with global tokens": masks.Band(3, 3) | masks.Columns(0, 2) | masks.Rows(0, 2),
    "spans": CAUSAL | masks.Documents([3, 9, 4, 8]),
    "dilated, both sides": masks.Band(9, 7) & masks.Dilated(3),
    "heads, some on both sides": masks.PerHead([CAUSAL, masks.Full()] * 2),
}


def tensors(
    q_len: int = LENGTH, kv_len: int = LENGTH, layout: str = "BSND", sink: bool = False
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)

    def make(length: int, heads: int) -> Tensor:
        shape = {
            "BSND": (BATCH, length, heads, DIM),
            "BNSD": (BATCH, heads, length, DIM),
            "BSH": (BATCH, length, heads * DIM),
            "TND": (length, heads, DIM),
        }[layout]
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    made = [make(q_len, HEADS), make(kv_len, KV_HEADS), make(kv_len, KV_HEADS)]
    return [*made, parameter(HEADS)] if sink else made


def gradients(result: Any, leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    dy = torch.randn(result.output.shape, dtype=torch.float64, generator=generator)
    found = torch.autograd.grad(result.output, leaves, dy.to(result.output.dtype))
    return [result.output.detach(), result.stats.lse, *found]


def run(backend: str, bias: pse.Pse, leaves: list[Tensor], **rest: Any) -> list[Tensor]:
    sink = leaves[3] if len(leaves) > 3 else None
    found = ak.attention(
        *leaves[:3],
        pse=bias,
        sink=sink,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        backend=backend,
        return_stats=True,
        **rest,
    )
    return gradients(found, [*leaves, *bias.tensors])


def agree(found: list[Tensor], meant: list[Tensor]) -> None:
    for one, other in zip(found, meant, strict=True):
        torch.testing.assert_close(one, other, atol=EXACT, rtol=0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bias", BIASES)
def test_every_gradient_is_the_references(bias: str, mask: str) -> None:
    torch.manual_seed(0)
    made = BIASES[bias]()
    leaves = tensors(sink=len(bias + mask) % 2 == 0)  # with and without, by no rule
    meant = run("reference", made, leaves, mask=MASKS[mask])
    agree(run("emulated", made, leaves, mask=MASKS[mask]), meant)


@pytest.mark.parametrize("layout", ["BNSD", "BSH"])
@pytest.mark.parametrize("mask", [CAUSAL, masks.BlockCausal(5)], ids=str)
def test_other_layouts(layout: str, mask: masks.Mask) -> None:
    bias, leaves = BIASES["all of them"](), tensors(layout=layout)
    rest = {"mask": mask, "layout": layout, "scale": 0.3}
    agree(run("emulated", bias, leaves, **rest), run("reference", bias, leaves, **rest))


@pytest.mark.parametrize("lengths", [([5, 9, 10], [5, 9, 10]), ([4, 1, 7], [6, 9, 7])])
@pytest.mark.parametrize("bias", [alibi, t5, lambda: alibi() + t5()])
def test_packed_sequences(bias: Any, lengths: tuple[list[int], list[int]]) -> None:
    made, seqlens = bias(), ak.SeqLens(*lengths)
    leaves = tensors(sum(lengths[0]), sum(lengths[1]), layout="TND", sink=True)
    rest = {"mask": CAUSAL, "layout": "TND", "seqlens": seqlens}
    agree(run("emulated", made, leaves, **rest), run("reference", made, leaves, **rest))


@pytest.mark.parametrize(
    ("mask", "align"),
    [
        (CAUSAL, "bottom_right"),
        (masks.Causal(align="top_left"), "top_left"),
        (~masks.Causal() | masks.Band(0, 0), "bottom_right"),
        (masks.Band(-1, 9), "bottom_right"),
    ],
)
@pytest.mark.parametrize("sizes", [(9, 24), (24, 9)])
def test_slopes_on_either_side(mask: masks.Mask, align: Any, sizes: tuple[int, int]) -> None:
    bias, leaves = alibi(align), tensors(*sizes)
    agree(run("emulated", bias, leaves, mask=mask), run("reference", bias, leaves, mask=mask))


# -- both sides ----------------------------------------------------------------------------


def flipped(plan: Plan, k: int) -> Plan:
    """The plan with the signs of one call's channels turned, or turned back."""
    step = plan.steps[k]
    zone, turned = (
        step.zone,
        {t for s in plan.steps if s.zone for t in s.zone.turned},
    )
    assert zone is not None
    zone = replace(zone, turned=tuple(turned - set(zone.turned)))
    wrong = replace(step, zone=zone)
    return replace(plan, steps=(*plan.steps[:k], wrong, *plan.steps[k + 1 :]))


def sided_masks(q_len: int, kv_len: int) -> Iterator[masks.Mask]:
    """Masks that let queries see keys on both sides, at one size."""
    yield from (masks.Full(), masks.Band(1, 1), masks.Band(-1, 3) | masks.Band(2, -1))
    aligns: tuple[Align, ...] = ("bottom_right", "top_left")
    for align in aligns:
        yield masks.PrefixLM(2, align)
        yield masks.BlockCausal(2, align)
        yield masks.Band(1, 1, align) | masks.Columns(0, 1) | masks.Rows(0, 1)
        if q_len > 2 and kv_len > 2:
            spans = masks.Documents((1, q_len - 1), (1, kv_len - 1))
            yield from (spans, masks.Causal(align) | spans)


@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("q_len", range(1, 6))
@pytest.mark.parametrize("kv_len", range(1, 6))
def test_two_sides_at_every_small_size(q_len: int, kv_len: int, align: Any) -> None:
    torch.manual_seed(q_len + 7 * kv_len)
    bias, leaves = alibi(align), tensors(q_len, kv_len, sink=kv_len == 3)
    for mask in sided_masks(q_len, kv_len):
        meant = run("reference", bias, leaves, mask=mask)
        for plan in plans_of(request_of(bias, leaves, mask)):
            plan.verify()
            found = run_plan(plan, Operands(*leaves[:3], bias, leaves[3] if leaves[3:] else None))
            agree(gradients(found, [*leaves, *bias.tensors]), meant)
            for k in range(len(plan.steps)) if plan.route and plan.route.zones else ():
                if all(block.sizes == (1, 1) for block in plan.steps[k].blocks):
                    continue  # it may be the diagonal, where a bias of 0 has any sign
                with pytest.raises(KernelContractError, match="wrong sign"):
                    flipped(plan, k).verify()
        agree(run("emulated", bias, leaves, mask=mask), meant)


@pytest.mark.parametrize(
    "lengths",
    [([5, 9, 10], [5, 9, 10]), ([4, 1, 7], [6, 9, 7]), ([7, 3], [2, 5]), ([0, 5, 6], [3, 0, 12])],
)
@pytest.mark.parametrize("align", ["bottom_right", "top_left"])
@pytest.mark.parametrize("mask", [masks.Full(), masks.PrefixLM(3), masks.BlockCausal(2)], ids=str)
def test_two_sides_of_packed_sequences(mask: masks.Mask, align: Any, lengths: Any) -> None:
    bias, seqlens = alibi(align) + pse.ALiBi(HEADS), ak.SeqLens(*lengths)
    leaves = tensors(sum(lengths[0]), sum(lengths[1]), layout="TND", sink=True)
    rest = {"mask": mask, "layout": "TND", "seqlens": seqlens}
    agree(run("emulated", bias, leaves, **rest), run("reference", bias, leaves, **rest))


@pytest.mark.parametrize("sizes", [(24, 24), (18, 24), (24, 18)])
@pytest.mark.parametrize("scale", [None, -0.7])
def test_biases_with_anchors_of_their_own(sizes: tuple[int, int], scale: float | None) -> None:
    """Two anchors make zones between them, where one addend has a sign and the other has not."""
    bias = alibi() + alibi("top_left") + t5(True, "top_left") + pse.KeyBias(parameter(sizes[1]))
    leaves = tensors(*sizes)
    for mask in (masks.Full(), masks.PrefixLM(6), masks.BlockCausal(5)):
        meant = run("reference", bias, leaves, mask=mask, scale=scale)
        for plan in plans_of(request_of(bias, leaves, mask, scale=scale)):
            plan.verify()
            found = run_plan(plan, Operands(*leaves, bias))
            agree(gradients(found, [*leaves, *bias.tensors]), meant)


def test_a_sign_that_is_wrong_changes_the_result() -> None:
    bias, leaves = alibi(), tensors()
    meant = run("reference", bias, leaves, mask=masks.Full())
    (plan,) = plans_of(request_of(bias, leaves, masks.Full()))
    assert len(plan.steps) == 2
    for k in range(2):
        wrong = run_plan(flipped(plan, k), Operands(*leaves, bias))
        assert (wrong.output - meant[0]).abs().max() > 0.01
        with pytest.raises(KernelContractError, match="wrong sign"):
            flipped(plan, k).verify()


def test_a_sign_that_is_wrong_is_found_out_where_positions_are_sorted() -> None:
    bias, leaves, mask = alibi(), tensors(), masks.Band(9, 7) & masks.Dilated(3)
    (plan,) = plans_of(request_of(bias, leaves, mask))
    plan.verify()
    for k in range(len(plan.steps)):
        with pytest.raises(KernelContractError, match="wrong sign"):
            flipped(plan, k).verify()
    assert plan.in_order is not None
    other = replace(plan.in_order, mask=Sorted(masks.Band(8, 7) & masks.Dilated(3)))
    with pytest.raises(KernelContractError):
        replace(plan, in_order=other).verify()


def test_the_report_says_that_signs_differ(planned: Callable[..., Plan]) -> None:
    plan = planned(masks.Full(), 4096, pse=pse.ALiBi(4, learnable=True))
    assert len(plan.calls) == 2
    assert "bias as 26 channels, signs by side" in plan.explain()
    assert plan.to_dict()["route"] == "bias as 26 channels, signs by side"
    assert [step.label.endswith("signs turned") for step in plan.steps] == [False, True]
    both = planned(masks.Full(), 4096, pse=pse.ALiBi(4, learnable=True) + pse.T5Relative(4))
    assert both.to_dict()["route"].endswith("signs by side, bias as 2 logits at the merge")


def test_more_pieces_than_a_call_has_sequences_are_several_calls(
    planned: Callable[..., Plan],
) -> None:
    bias = pse.ALiBi(4, learnable=True)
    plan = planned(masks.BlockCausal(32), 4096, batch=32, pse=bias)
    plan.verify()
    assert [len(step.blocks) for step in plan.steps] == [32, 2048, 2048]


def test_constant_slopes_on_both_sides_take_what_is_cheaper(planned: Callable[..., Plan]) -> None:
    bias = pse.ALiBi(4)
    assert planned(masks.Full(), 4096, pse=bias).calls[0].pse_type == 2
    spans = CAUSAL | masks.Documents([700, 1000, 300, 2096])
    plan = planned(spans, 4096, pse=bias)
    assert plan.route is None
    assert {call.pse_type for call in plan.calls} == {2}
    ends = masks.Band(256, 256) | masks.Columns(0, 16) | masks.Rows(0, 16)
    (call,) = planned(ends, 4096, pse=bias).calls  # strips of odd sizes would need matrices
    assert (call.pse_type, call.atten_mask.kind) == (2, "full")
    plan = planned(ends, 4224, pse=bias)  # beyond what a full mask is weighed up to
    assert plan.route is not None
    assert any(step.zone and step.zone.turned for step in plan.steps)
    assert all("mode 1" in other.label for other in plan.alternatives)  # with a full mask


# -- levels --------------------------------------------------------------------------------


def request_of(bias: pse.Pse, leaves: list[Tensor], mask: masks.Mask, **rest: Any) -> Request:
    sink = leaves[3] if len(leaves) > 3 else None
    return ak.plan(*leaves[:3], mask=mask, pse=bias, sink=sink, backend="reference", **rest).request


def plans_of(request: Request) -> list[Plan]:
    """A plan of every route, whatever it costs."""
    found = []
    for route in routes(request):
        if isinstance(route, Route):
            option = on_route(request, route, Search())
            if option.steps:
                found.append(replace(option, backend="emulated", route=route))
    return found


@pytest.mark.parametrize(
    "mask",
    [
        CAUSAL,
        masks.Full(),
        CAUSAL & masks.Documents([27, 9], [30, 10]),
        masks.Band(30, 5) & masks.Dilated(2),
    ],
    ids=str,
)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_every_split_into_channels_and_levels(mask: masks.Mask, bidirectional: bool) -> None:
    bias = t5(bidirectional) + pse.KeyBias(parameter(HEADS, 40))
    leaves = tensors(36, 40, sink=True)
    meant = run("reference", bias, leaves, mask=mask)
    plans = plans_of(request_of(bias, leaves, mask))
    assert {bool(plan.route and plan.route.levels) for plan in plans} == {False, True}
    for plan in plans:
        plan.verify()
        found = run_plan(plan, Operands(*leaves[:3], bias, leaves[3]))
        agree(gradients(found, [*leaves, *bias.tensors]), meant)


@pytest.mark.parametrize("mask", [CAUSAL, masks.Full()], ids=str)
@pytest.mark.parametrize("aligns", [("bottom_right", "bottom_right"), ("top_left", "bottom_right")])
def test_two_tables_are_one(mask: masks.Mask, aligns: tuple[Align, Align]) -> None:
    other = wide(pse.T5Relative(HEADS, 16, 20, True, aligns[1]))
    bias, leaves = t5(False, aligns[0]) + other + alibi(), tensors(40, 40, sink=True)
    meant = run("reference", bias, leaves, mask=mask)
    plans = plans_of(request_of(bias, leaves, mask))
    assert {bool(plan.route and plan.route.levels) for plan in plans} == {False, True}
    for plan in plans:
        plan.verify()
        found = run_plan(plan, Operands(*leaves[:3], bias, leaves[3]))
        agree(gradients(found, [*leaves, *bias.tensors]), meant)


def test_levels_alone() -> None:
    bias, leaves = wide(pse.T5Relative(HEADS, 8, 40, bidirectional=False)), tensors(40, 40)
    far = masks.Band(None, -4)
    plans = plans_of(request_of(bias, leaves, far))
    alone = [plan for plan in plans if plan.route and plan.route.stepped.span is None]
    assert alone
    meant = run("reference", bias, leaves, mask=far)
    for plan in alone:
        plan.verify()
        assert {call.head_dim for call in plan.calls} == {DIM}
        agree(gradients(run_plan(plan, Operands(*leaves, bias)), [*leaves, *bias.tensors]), meant)


@pytest.mark.parametrize("other", [masks.Columns(1, 40), masks.Rows(5, 40), masks.SlidingWindow(4)])
def test_heads_with_masks_of_their_own_have_levels_of_their_own(other: masks.Mask) -> None:
    bias, leaves = t5(), tensors(40, 40)
    # heads that are alike at near distances are still apart there, if they are at others
    mask = masks.PerHead([CAUSAL, CAUSAL & other] * 2)
    meant = run("reference", bias, leaves, mask=mask)
    plans = plans_of(request_of(bias, leaves, mask))
    assert any(plan.route and plan.route.levels for plan in plans)
    for plan in plans:
        plan.verify()
        agree(gradients(run_plan(plan, Operands(*leaves, bias)), [*leaves, *bias.tensors]), meant)


def test_the_gradient_of_a_level_counts_dropout() -> None:
    bias, leaves = t5(), tensors(20, 20)
    request = request_of(bias, leaves, CAUSAL, dropout=0.3)
    (plan,) = [p for p in plans_of(request) if p.route and len(p.route.levels) == 1]

    def loss() -> Tensor:
        torch.manual_seed(5)
        return run_plan(plan, Operands(*leaves, bias)).output.sin().sum()

    (table,) = bias.tensors
    assert slope_error(loss, table) < 1e-6


def test_a_long_t5_is_two_calls(planned: Callable[..., Plan]) -> None:
    plan = planned(CAUSAL, 8192, pse=pse.T5Relative(4, bidirectional=False))
    near, far = plan.calls
    # the last bucket begins at distance 113: that many distances are channels, in two pieces
    assert (near.head_dim, far.head_dim) == (64 + 2 * 113, 64)
    assert all(call.pse is None for call in plan.calls)
    assert plan.steps[0].label.endswith("bias as 226 channels, bias as 1 logit at the merge")
    both = planned(masks.Full(), 8192, pse=pse.T5Relative(4))
    assert len(both.calls) == 3


# -- low precision -------------------------------------------------------------------------


def low_errors(bias: pse.Pse | None, plan: Plan | None = None) -> list[float]:
    """Errors of output, dq, dk, dv in bfloat16 at 4,096 positions, each of its largest value."""
    torch.manual_seed(1)
    low = [torch.randn(1, length, 4, 16).bfloat16() for length in (48, 4096, 4096)]
    found = []
    for dtype, backend in ((torch.float64, "reference"), (torch.bfloat16, "emulated")):
        leaves = [t.to(dtype).requires_grad_() for t in low]
        if plan is not None and backend == "emulated":
            result = run_plan(plan, Operands(*leaves, bias))
        else:
            result = ak.attention(
                *leaves, mask=CAUSAL, pse=bias, backend=backend, return_stats=True
            )
        found.append(gradients(result, leaves))
    meant, low_found = found
    return [
        float((a.double() - b).abs().max() / b.abs().max())
        for k, (a, b) in enumerate(zip(low_found, meant, strict=True))
        if k != 1
    ]


@pytest.fixture(scope="module")
def own_errors() -> list[float]:
    """The kernel's own errors: the same without any bias."""
    return low_errors(None)


@pytest.mark.parametrize(
    "bias",
    [
        lambda: pse.ALiBi((0.5, 0.0617, 0.0041, 1e-4), learnable=True),
        lambda: pse.KeyBias(nn.Parameter(10 * torch.randn(4, 4096))),
        lambda: pse.T5Relative(4, bidirectional=False, table=5 * torch.randn(32, 4)),
    ],
)
def test_in_bfloat16_channels_cost_no_precision(bias: Any, own_errors: list[float]) -> None:
    torch.manual_seed(0)
    made = bias()
    for error, own in zip(low_errors(made), own_errors, strict=True):
        # a bias concentrates the weights on few keys, so roundings average out less
        assert error < 4 * own


def test_in_float32_slopes_are_rounded_with_positions() -> None:
    torch.manual_seed(1)
    leaves = [torch.randn(1, length, 4, 16) for length in (48, 4096, 4096)]
    bias = pse.ALiBi((0.5, 0.0617, 0.0041, 1e-4), learnable=True)
    meant = ak.attention(*[t.double() for t in leaves], mask=CAUSAL, pse=bias)
    found = ak.attention(
        *(t.requires_grad_() for t in leaves), mask=CAUSAL, pse=bias, backend="emulated"
    )
    assert (found - meant).abs().max() < 4 * 2**-24 * 0.5 * 4096


def test_raw_positions_in_bfloat16_would_lose_logits(own_errors: list[float]) -> None:
    bias = pse.ALiBi((0.5, 0.0617, 0.0041, 1e-4), learnable=True)
    leaves = [torch.empty(1, n, 4, 16, dtype=torch.bfloat16) for n in (48, 4096, 4096)]
    (good,) = plans_of(request_of(bias, leaves, CAUSAL))
    assert good.route is not None
    raw = replace(good.route.channels[0], pieces=1, digits=1)
    route = Route(replace(good.route.request, head_dim=16 + 2), (raw,))
    bad = replace(on_route(good.request, route, Search()), backend="emulated")
    assert low_errors(bias, bad)[0] > 50 * own_errors[0]


LOW = [torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("never", [-1e4, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("family", ["key", "key per head", "table", "level"])
def test_a_bias_that_says_never_is_not_nan(family: str, never: float, dtype: torch.dtype) -> None:
    """As some pad: what overflows a dtype, or is infinite, must not meet a 0."""
    torch.manual_seed(0)
    shapes = {"key": (48,), "key per head": (4, 48), "table": (8, 4), "level": (8, 4)}
    values = torch.randn(shapes[family])
    if family in ("key", "key per head"):
        values[..., 1:3] = never
    else:
        values[3 if family == "table" else 7] = never
    weight = nn.Parameter(values)
    table = family in ("table", "level")
    bias = pse.T5Relative(4, 8, 12, False, table=weight) if table else pse.KeyBias(weight)
    leaves = [torch.randn(1, 48, heads, 64, dtype=dtype) for heads in (4, 2, 2)]
    wide_leaves = [leaf.double() for leaf in leaves]
    meant = ak.attention(*wide_leaves, mask=CAUSAL, pse=bias, return_stats=True)
    for plan in plans_of(request_of(bias, leaves, CAUSAL)):
        result = run_plan(plan, Operands(*leaves, bias))
        assert (result.output - meant.output).abs().max() < 0.02
        assert (result.stats.lse - meant.stats.lse).abs().max() < 1e-3
        assert all(grad.isfinite().all() for grad in gradients(result, list(bias.tensors)))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_small_scale_makes_large_channels(dtype: torch.dtype) -> None:
    """As in width-independent parametrisations, ``scale = 1 / head_dim``: slopes over it."""
    torch.manual_seed(0)
    bias = pse.ALiBi((2.0, 0.5, 0.0617, 0.0041), learnable=True)
    leaves = [torch.randn(1, 600, 4, 16, dtype=dtype) for _ in range(3)]
    rest: dict[str, Any] = {"mask": masks.Full(), "pse": bias, "scale": 1 / 128}
    found = ak.attention(*leaves, **rest, backend="emulated")
    meant = ak.attention(*[leaf.double() for leaf in leaves], **rest, backend="reference")
    assert (found - meant).abs().max() < 0.02


SLOPES = (0.5, 0.0617, 0.0041, 1e-4)


def slope_errors(
    mask: masks.Mask, sizes: tuple[int, int], sink: Tensor | None, rest: pse.Pse | None
) -> tuple[Tensor, Tensor]:
    """Errors of the slopes' gradients in bfloat16, and the sum of all ``|dS_ij (j - i')|``."""
    torch.manual_seed(2)
    low = [torch.randn(1, length, 4, 16).bfloat16() for length in (sizes[0], sizes[1], sizes[1])]
    bias = pse.ALiBi(SLOPES, learnable=True)
    whole = bias if rest is None else bias + rest
    found = {}
    for dtype, backend in ((torch.float64, "reference"), (torch.bfloat16, "emulated")):
        leaves = [t.to(dtype) for t in low]
        result = ak.attention(
            *leaves, mask=mask, pse=whole, backend=backend, return_stats=True, sink=sink
        )
        found[backend] = gradients(result, list(bias.tensors))[-1].double()
    # what the gradient is the sum of: dS_ij * (j - i'), read off a bias per cell
    cells = whole.materialize(*sizes, dtype=torch.float64).detach().requires_grad_()
    leaves = [t.double() for t in low]
    dense = ak.attention(*leaves, mask=mask, pse=pse.Dense(cells), return_stats=True, sink=sink)
    each = gradients(dense, [cells])[-1] * bias.materialize(*sizes).detach()
    size = each.abs().sum((0, 2, 3)) / bias.tensors[0].detach().double()
    return (found["emulated"] - found["reference"]).abs(), size


ENDS = CAUSAL & (masks.SlidingWindow(64) | masks.Columns(0, 2))


@pytest.mark.parametrize(
    ("mask", "sizes", "sink", "rest"),
    [
        (CAUSAL, (48, 4096), None, None),
        (CAUSAL, (256, 2048), torch.zeros(4), None),
        (ENDS, (1024, 1024), None, None),
        (CAUSAL, (1024, 1024), None, pse.T5Relative(4, 8, 12, False, table=torch.zeros(8, 4))),
        (masks.Full(), (1024, 1024), None, None),
        (masks.Band(100, 100), (1024, 1024), None, None),
        (masks.BlockCausal(64), (1024, 1024), torch.zeros(4), None),
        (~CAUSAL, (1024, 1024), torch.zeros(4), None),
    ],
    ids=str,
)
def test_the_slope_gradient_in_bfloat16(
    mask: masks.Mask, sizes: tuple[int, int], sink: Tensor | None, rest: pse.Pse | None
) -> None:
    error, size = slope_errors(mask, sizes, sink, rest)
    # the kernel rounds each dS to 8 bits
    assert (error < 2**-8 * size).all(), (error / (2**-8 * size)).tolist()


def test_without_anchors_the_slope_gradient_of_two_sides_is_noise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Positions times sums that are not 0; few rows, so that it does not average out."""
    error, size = slope_errors(masks.Full(), (255, 4096), None, None)
    assert (error < 3 * 2**-8 * size).all()  # a query is up to half of 256 from its anchor
    monkeypatch.setattr("attnkit.planner.routes._anchored", lambda _request, one: one)
    error, size = slope_errors(masks.Full(), (254, 4096), None, None)  # no plan is known for it
    assert (error > 20 * 2**-8 * size).any()


# -- what no route takes has a pass --------------------------------------------------------


def passed(bias: pse.Pse, mask: masks.Mask, **rest: Any) -> Plan:
    """A plan that needs the pass; it computes what the reference does."""
    leaves = tensors()
    plan = ak.plan(*leaves, mask=mask, pse=bias, backend="emulated", **rest)
    plan.verify()
    assert plan.route is None
    assert plan.bias_pass is not None
    meant = run("reference", bias, leaves, mask=mask, **rest)
    agree(run("emulated", bias, leaves, mask=mask, **rest), meant)
    return plan


def test_both_sides_of_a_mask_of_unknown_cells_have_a_pass() -> None:
    plan = passed(alibi(), masks.Predicate(lambda b, h, i, j: (i * j) % 7 != 1))
    assert "not a region" in {r.code: r.reason for r in plan.refusals}["cut-region"]
    assert plan.calls[0].pse_type == 2


def test_a_scale_of_zero_leaves_no_channel() -> None:
    for scale in (0.0, 1e-320, -1e-300):
        plan = passed(alibi(), CAUSAL, scale=scale)
        assert "channels-scale" in {r.code for r in plan.refusals}
    for dtype, outside in ((torch.float16, 1e-4), (torch.float16, 1e4), (torch.float32, 1e-31)):
        x = torch.randn(1, 6, 2, 4, dtype=dtype, requires_grad=True)
        plan = ak.plan(x, x, x, pse=pse.ALiBi(2, learnable=True), scale=outside, backend="emulated")
        told = {r.code: r.reason for r in plan.refusals}["channels-scale"]
        assert "channels hold the bias over the scale" in told


def test_tables_that_count_from_different_ends_are_refused(planned: Callable[..., Plan]) -> None:
    both = pse.T5Relative(4) + pse.T5Relative(4, align="top_left")
    with pytest.raises(ak.BackendRefused, match="steps-twice"):
        planned(CAUSAL, 24, 48, pse=both)  # and no dtype of 16 bits holds their sum
    assert planned(CAUSAL, 2048, pse=both).route is not None  # there they are the same


def test_a_learnable_matrix_has_a_pass() -> None:
    plan = passed(pse.Dense(parameter(LENGTH, LENGTH)), CAUSAL)
    assert plan.calls[0].pse is not None
    assert not plan.refusals or "pse-gradient" not in {r.code for r in plan.refusals}


def test_positions_past_float32_are_no_channels(planned: Callable[..., Plan]) -> None:
    bias = pse.ALiBi(4, learnable=True)
    plan = planned(CAUSAL, 2**16 + 1, pse=bias)
    assert plan.calls[0].pse_type == 2
    assert plan.bias_pass is not None
    assert "channels-positions" in {r.code for r in plan.refusals}
    assert planned(CAUSAL, 2**16, pse=bias).calls[0].head_dim == 64 + 9
    assert planned(CAUSAL, 2**16, pse=bias, dtype=torch.float32).calls[0].head_dim == 64 + 2


def test_heads_that_are_too_wide_have_no_channels(planned: Callable[..., Plan]) -> None:
    plan = planned(CAUSAL, 512, dim=766, pse=pse.ALiBi(4, learnable=True))
    assert "channels-too-many" in {r.code for r in plan.refusals}
    assert plan.bias_pass is not None


def test_without_a_gradient_slopes_reach_the_kernel_as_slopes() -> None:
    bias, leaves = alibi(), tensors()
    with torch.no_grad():
        plan = ak.plan(*leaves, mask=CAUSAL, pse=bias, backend="emulated")
        assert plan.route is None
        assert plan.calls[0].pse_type == 2
        found, meant = (
            ak.attention(*leaves, mask=CAUSAL, pse=bias, backend=backend)
            for backend in ("emulated", "reference")
        )
        anywhere = ak.attention(*leaves, mask=CAUSAL, pse=bias)
    torch.testing.assert_close(found, meant)
    torch.testing.assert_close(anywhere, meant)


def test_a_bias_per_key_is_cheaper_than_its_matrix(planned: Callable[..., Plan]) -> None:
    plan = planned(CAUSAL, 2048, pse=pse.KeyBias(torch.zeros(2048)), dtype=torch.float32)
    assert plan.route is not None
    assert any("bias matrix" in other.label for other in plan.alternatives)


@pytest.mark.parametrize("mask", [CAUSAL, masks.Full(), masks.Band(30, 5)], ids=str)
@pytest.mark.parametrize("length", [36, 300])
def test_routes_that_are_given_up_early_are_dearer(mask: masks.Mask, length: int) -> None:
    """The bound only spares work: the cheapest of all routes is the one that is planned."""
    bias = pse.T5Relative(HEADS, 32, 128, bidirectional=True)
    request = request_of(bias, tensors(length, length), mask)
    lowering = lower(request)
    assert lowering.price is not None
    ways = [way for way in routes(request) if isinstance(way, Route)]
    prices = [
        option.price.nanoseconds
        for option in (on_route(request, way, Search()) for way in ways)
        if option.price is not None
    ]
    passed = [r for r in (lowering.solution, *lowering.alternatives) if r.bias_pass is not None]
    assert lowering.price.nanoseconds == min([*prices, *(p.price.nanoseconds for p in passed)])
    given_up = [reason for reason in lowering.refusals if reason.code == "dearer"]
    assert len(given_up) <= len(prices) + len(passed) - 1 - len(lowering.alternatives)
    assert given_up or passed or mask != masks.Full()


def test_a_wrong_route_is_found_out() -> None:
    bias, leaves = t5(), tensors(40, 40)
    request = request_of(bias, leaves, CAUSAL)
    (plan,) = [p for p in plans_of(request) if p.route and len(p.route.levels) == 1]
    first, *rest = plan.steps
    zone = rest[0].zone
    assert zone is not None
    moved = (replace(rest[0], zone=replace(zone, row=1)), *rest[1:])
    with pytest.raises(KernelContractError, match="another step"):
        replace(plan, steps=(first, *moved)).verify()
    (linear,) = plans_of(request_of(alibi(), tensors(), CAUSAL))
    assert linear.route is not None
    two_sided = replace(linear.request, mask=masks.Full())
    route = replace(linear.route, request=replace(linear.route.request, mask=masks.Full()))
    assert disprove_route(two_sided, route, []) is None  # no call has a wrong cell: there is none
    (step,) = linear.steps
    everything = replace(step.call, atten_mask=None, sparse_mode=0)
    found = disprove_route(two_sided, route, [replace(step, call=everything)])
    assert found is not None
    assert found.code == "other-sign"
    twice = replace(linear.route, channels=2 * linear.route.channels)
    wider = replace(twice, request=replace(linear.route.request, head_dim=DIM + 4))
    found = disprove_route(linear.request, wider, [])
    assert found is not None
    assert found.code == "other-request"
    forgotten = replace(linear.route, channels=())
    found = disprove_route(linear.request, forgotten, [])
    assert found is not None
    assert found.code == "other-request"


@pytest.mark.parametrize(
    ("mask", "calls"), [(CAUSAL, 1), (CAUSAL, 2), (masks.PrefixLM(6), 2)], ids=str
)
def test_the_device_is_given_no_bias(mask: masks.Mask, calls: int) -> None:
    torch.manual_seed(0)
    ops = Ops()
    backend = Ascend(ops, device="cpu")
    table = nn.Parameter(torch.randn(8, HEADS))
    bias = pse.ALiBi(HEADS, learnable=True) + pse.T5Relative(HEADS, 8, 12, False, table=table)
    leaves = [t.detach().float().requires_grad_() for t in tensors()]
    request = request_of(bias, leaves, mask)
    plan, *_ = [plan for plan in plans_of(request) if len(plan.steps) == calls]
    found = gradients(
        backend.run(replace(plan, backend="ascend"), Operands(*leaves, bias)),
        [*leaves, *bias.tensors],
    )
    assert len(ops.calls) >= calls
    assert all(given.get("pse") is None for _, given in ops.calls)
    meant = run("reference", bias, leaves, mask=mask)
    for one, other in zip(found, meant, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_a_module_learns_them() -> None:
    torch.manual_seed(0)
    bias = pse.ALiBi(2, learnable=True) + pse.T5Relative(2, 8, 12, bidirectional=False)
    layer = ak.Attention(2, 4, mask=CAUSAL, pse=bias, backend="emulated").double()
    twin = ak.Attention(2, 4, mask=CAUSAL, pse=deepcopy(bias), backend="reference").double()
    assert [name for name, _ in layer.named_parameters()] == ["pse_0_slopes", "pse_1_table"]
    x = torch.randn(1, 16, 2, 4, dtype=torch.float64)
    for module in (layer, twin):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(x, x, x).square().sum().backward()
            optimizer.step()
    for one, other in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=EXACT, rtol=0)
