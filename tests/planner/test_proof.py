"""The certificate catches wrong plans, and the proof is what keeps them from being made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.backends import make_plan
from attnkit.kernel import AttenMask
from attnkit.planner import lower

Planned = Callable[..., ak.Plan]


def tampered(plan: ak.Plan, other: dict[str, Any] | None = None, **call: Any) -> ak.Plan:
    """The plan with other call arguments, or another form."""
    (step,) = plan.steps
    step = replace(step, call=replace(step.call, **call), **(other or {}))
    return replace(plan, steps=(step,))


def caught(plan: ak.Plan) -> str:
    with pytest.raises(ak.KernelContractError, match="does not compute") as error:
        plan.verify()
    (code,) = error.value.codes
    return code


@pytest.mark.parametrize(
    "fault",
    [
        {"pre_tokens": 6},
        {"pre_tokens": 8},
        {"next_tokens": 1},
        {"sparse_mode": 3},
        {"sparse_mode": 2},
        {"atten_mask": None, "sparse_mode": 0},
    ],
    ids=str,
)
def test_wrong_windows_are_caught(planned: Planned, fault: dict[str, Any]) -> None:
    plan = planned(masks.SlidingWindow(8), 64)
    plan.verify()
    assert caught(tampered(plan, **fault)) == "cover"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"scale": 1.0}, "other-numbers"),
        ({"keep_prob": 0.5}, "other-numbers"),
        ({"head_num": 2}, "misplaced"),
    ],
)
def test_arguments_of_another_request_are_caught(
    planned: Planned, fault: dict[str, Any], code: str
) -> None:
    assert caught(tampered(planned(masks.Causal(), 64), **fault)) == code


def test_a_dropped_bias_is_caught(planned: Planned) -> None:
    plan = planned(masks.Causal(), 64, pse=ak.pse.ALiBi(4))
    assert caught(tampered(plan, pse=None, pse_type=1)) == "other-bias"


def test_a_dropped_inner_precise_is_caught(planned: Planned) -> None:
    plan = planned(masks.Causal(), 8)
    strict = masks.Band(None, -1)  # row 0 sees nothing
    region = strict.region(8, 8)
    plan = replace(plan, request=replace(plan.request, mask=strict))
    full = {"atten_mask": AttenMask.full((8, 8), (region,)), "sparse_mode": 1}
    plan = tampered(plan, {"targets": (region,)}, **full, inner_precise=2)
    plan.verify()
    assert caught(tampered(plan, inner_precise=0)) == "mean-of-values"


def test_a_mask_of_unknown_cells_needs_its_empty_rows_handled(planned: Planned) -> None:
    plan = planned(masks.Predicate(lambda b, h, i, j: i != j), 8)
    plan.verify()
    assert caught(tampered(plan, inner_precise=0)) == "mean-of-values"
    assert caught(tampered(plan, sparse_mode=2)) == "mean-of-values"
    assert caught(tampered(plan, sparse_mode=0, pre_tokens=1)) == "wrong-cells"
    assert caught(tampered(plan, sparse_mode=5, prefix=(0,))) == "wrong-cells"


def test_tiles_around_a_mask_of_unknown_cells_are_skipped(planned: Planned) -> None:
    odd = masks.Predicate(lambda b, h, i, j: (i + j) % 2 == 1)
    plan = planned(odd & masks.SlidingWindow(9), 64)
    (call,) = plan.calls
    assert (call.sparse_mode, call.pre_tokens, call.next_tokens) == (0, 8, 0)
    assert caught(tampered(plan, pre_tokens=7)) == "wrong-cells"


@pytest.mark.usefixtures("no_full_masks")
def test_blocks_that_are_missing_swapped_or_overlap_are_caught(planned: Planned) -> None:
    plan = planned(masks.Documents([16, 16, 32]), 64)
    (step,) = plan.steps
    first, second, third = step.blocks
    for blocks in (
        (first, second),
        (second, first, third),
        (first, first, third),
        (first, replace(second, keys=(range(16),)), third),
        (replace(first, batch=1), second, third),
    ):
        assert caught(tampered(plan, {"blocks": blocks})) in ("other-sequences", "misplaced")
    cu = (16, 32)
    short = {"actual_seq_qlen": cu, "actual_seq_kvlen": cu}
    assert caught(tampered(plan, {"blocks": (first, second)}, **short)) == "cover"


@pytest.mark.usefixtures("no_full_masks", "side_by_side")
def test_parts_that_overlap_or_leave_a_gap_are_caught(planned: Planned) -> None:
    plan = planned(masks.Causal() & (masks.SlidingWindow(64) | masks.Columns(0, 4)), 512)
    plan.verify()
    assert len(plan.steps) > 1
    assert caught(replace(plan, steps=plan.steps[:-1])) == "cover"
    assert caught(replace(plan, steps=(*plan.steps, plan.steps[0]))) == "cover"


def test_without_the_proof_the_planner_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests have teeth: with the proof switched off, outputs differ from the reference."""
    lowering = sys.modules["attnkit.planner.lower"]  # the package's own `lower` is the function
    x = torch.randn(1, 16, 2, 4, dtype=torch.float64)
    meant = ak.attention(x, x, x, mask=masks.SlidingWindow(3), backend="reference")
    right = ak.attention(x, x, x, mask=masks.SlidingWindow(3), backend="emulated")
    assert (right - meant).abs().max() < 1e-10
    caches = (make_plan, lower)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(lowering, "reasons_against", lambda *given: [])
    try:
        with pytest.raises(ak.KernelContractError, match="does not compute"):
            ak.attention(x, x, x, mask=masks.SlidingWindow(3), backend="emulated")
        monkeypatch.setattr(ak.Plan, "verify", lambda self: None)
        wrong = ak.attention(x, x, x, mask=masks.SlidingWindow(3), backend="emulated")
    finally:
        for cache in caches:
            cache.cache_clear()
    assert (wrong - meant).abs().max() > 0.1
