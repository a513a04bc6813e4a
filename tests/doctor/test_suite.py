"""The suite passes on the emulator, covers what the kernel can do, and sees planted faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from attnkit.backends import emulated
from attnkit.doctor import CASES, DTYPES, Case, Check, run_case, run_suite
from attnkit.doctor.compare import compare
from attnkit.doctor.suite import make_case_plan
from attnkit.kernel import Gradients, emulate, emulate_grad
from attnkit.masks import Causal

ONE_MODE = next(case for case in CASES if case.name == "mode-3")
MERGED = next(case for case in CASES if case.name == "merge-two-calls")


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def test_names_are_unique_and_need_no_quotes():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() for name in names)


def test_cases_are_frozen_data():
    with pytest.raises(FrozenInstanceError):
        ONE_MODE.name = "other"  # type: ignore[misc]
    assert hash(ONE_MODE) == hash(by_name("mode-3"))


def test_every_mode_bias_layout_and_way_to_merge_is_covered():
    plans = [make_case_plan(case, case.inputs(torch.float32), "emulated", "cpu") for case in CASES]
    calls = [call for plan in plans for call in plan.calls]
    assert {call.sparse_mode for call in calls} == set(range(9))
    assert {call.layout for call in calls} == {"BSH", "SBH", "BNSD", "BSND", "TND"}
    assert {call.pse_type for call in calls if call.pse is not None} == {0, 1, 2, 3}
    assert {call.inner_precise for call in calls} == {0, 2}
    assert any(call.sink is not None for call in calls)
    assert any(call.num_kv_heads < call.num_heads for call in calls)
    assert any(call.value_dim < call.head_dim for call in calls)
    merged = [plan for plan in plans if len(plan.steps) > 1]
    assert any(plan.steps[0].heads is None for plan in merged)
    assert any(plan.steps[0].heads is not None for plan in merged)
    gathered = [plan for plan, case in zip(plans, CASES, strict=True) if case.gathers]
    assert {k.is_rectangle for plan in gathered for s in plan.steps for k in s.blocks} >= {False}
    assert all(some.once for plan in gathered for some in plan.by_heads)
    assert any(plan.in_order is not None for plan in gathered)
    assert any(plan.request.dropout for plan in merged)


def test_forced_calls_are_ones_that_the_kernel_takes():
    for case in (case for case in CASES if case.call):
        (call,) = make_case_plan(case, case.inputs(torch.float32), "emulated", "cpu").calls
        assert call.violations(training=True) == (), case.name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_cases_pass_in_every_dtype(dtype: torch.dtype):
    names = ("mode-4-window", "mode-5", "mode-7", "matrix", "sink", "dropout-heads", "merge-packed")
    results = run_suite([by_name(name) for name in names], dtypes=[dtype])
    assert {r.name: r.failures for r in results if r.status != "passed"} == {}
    told = {check.name for result in results for check in result.checks}
    assert {"output, mean error", "gradient of key, largest error", "max, mean error"} <= told
    assert {"keep rate, distance", "two calls draw the same"} <= told


@pytest.mark.sweep
def test_all_cases_pass_in_every_dtype():
    results = run_suite(dtypes=DTYPES)
    assert [r.name for r in results if r.status in ("failed", "error")] == []
    # A float32 slope matrix cannot be handed over in half precision, and that is told.
    assert {r.case for r in results if r.status == "refused"} <= {"alibi-chunk"}


def plant(monkeypatch: pytest.MonkeyPatch, name: str, fault: Callable[[Any], Any]) -> None:
    right = getattr(emulated, name)
    monkeypatch.setattr(emulated, name, lambda *a, **k: fault(right(*a, **k)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", [ONE_MODE, MERGED], ids=lambda case: case.name)
def test_an_output_off_by_one_per_cent_fails(
    case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    plant(monkeypatch, "emulate", lambda found: (found[0] * 1.01, *found[1:]))
    result = run_case(case, dtype=dtype)
    assert result.status == "failed"
    assert "output, mean error" in {check.name for check in result.failures}


def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch):
    def fault(found: Gradients) -> Gradients:
        return found._replace(key=found.key * 1.01)

    plant(monkeypatch, "emulate_grad", fault)
    result = run_case(MERGED)
    assert {check.name.partition(",")[0] for check in result.failures} == {"gradient of key"}


def test_statistics_off_by_a_hundredth_fail(monkeypatch: pytest.MonkeyPatch):
    plant(monkeypatch, "emulate", lambda found: (found[0], found[1] + 0.01, found[2]))
    assert {c.name.partition(",")[0] for c in run_case(ONE_MODE).failures} >= {"max"}


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda call: {"keep_prob": 0.65}, "keep rate, distance"),
        (lambda call: {"seed": 3}, "two calls draw the same"),
    ],
)
def test_dropout_that_is_wrong_fails(
    fault: Callable[[Any], dict[str, Any]], told: str, monkeypatch: pytest.MonkeyPatch
):
    from dataclasses import replace

    def wrong(call: Any, *rest: Any, **more: Any) -> Any:
        return emulate(replace(call, **fault(call)), *rest, **more)

    monkeypatch.setattr(emulated, "emulate", wrong)
    assert told in {c.name for c in run_case(by_name("dropout-causal")).failures}


def test_a_backward_with_other_decisions_than_the_forward_fails(monkeypatch: pytest.MonkeyPatch):
    from dataclasses import replace

    def wrong(call: Any, *rest: Any, **more: Any) -> Gradients:
        return emulate_grad(replace(call, seed=call.seed + 1), *rest, **more)

    monkeypatch.setattr(emulated, "emulate_grad", wrong)
    failures = {c.name for c in run_case(by_name("dropout-merge")).failures}
    assert failures
    assert all(name.startswith("gradient") for name in failures)


def test_a_device_that_raises_is_a_result(monkeypatch: pytest.MonkeyPatch):
    def broken(*given: Any, **more: Any) -> None:
        raise RuntimeError("EZ9999: Inner Error!")

    monkeypatch.setattr(emulated, "emulate", broken)
    result = run_case(ONE_MODE)
    assert result.status == "error"
    assert result.reasons == ("RuntimeError: EZ9999: Inner Error!",)


def test_a_backend_that_refuses_is_a_result_with_its_reasons():
    result = run_case(ONE_MODE, backend="ascend")
    assert result.status == "refused"
    assert "not on an NPU" in result.reasons[0]


def test_a_backend_without_kernel_calls_can_be_tested_too():
    names = ("mode-0-mask", "mode-8", "alibi-chunk", "merge-heads", "dropout-packed")
    results = run_suite([by_name(name) for name in names], backend="reference")
    assert {result.status for result in results} == {"passed"}
    assert all(result.calls == () for result in results)


def test_a_nan_is_no_pass():
    zeros = torch.zeros(3, dtype=torch.float64)
    largest, mean = compare("x", zeros * torch.nan, zeros, zeros, torch.float32)
    assert not largest.passed
    assert not mean.passed
    assert not Check("x", float("nan"), 1.0).passed


def test_results_are_plain_data_and_are_told_one_by_one():
    told: list[str] = []
    results = run_suite(
        [Case("mine", Causal())],
        dtypes=DTYPES[:2],
        on_result=lambda result: told.append(result.name),
    )
    assert told == ["mine@float32", "mine@float16"]
    data = json.loads(json.dumps(results[0].to_dict()))
    assert data["name"] == "mine@float32"
    assert data["checks"][0]["passed"] is True
