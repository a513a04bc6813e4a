"""Price weights are found again from times that they made."""

from __future__ import annotations

import pytest
import torch

from attnkit.doctor.findings import Machine
from attnkit.doctor.suite import make_case_plan
from attnkit.doctor.timing import fit_weights, make_timing_cases, samples_of
from attnkit.planner.calls import Solution
from attnkit.planner.price import chip

WEIGHTS = {
    "flops_per_ns": 90_000.0,
    "bytes_per_ns": 700.0,
    "launch_ns": 31_000.0,
    "small_launch_ns": 4_000.0,
}


def counts(flops: float, traffic: float, launches: float, small: float) -> dict[str, float]:
    return {
        "flops": flops,
        "mask_traffic": traffic,
        "bias_bytes": 0.0,
        "copy_bytes": 0.0,
        "launches": launches,
        "small_launches": small,
    }


def taken(count: dict[str, float]) -> float:
    return (
        count["flops"] / WEIGHTS["flops_per_ns"]
        + (count["mask_traffic"] + count["copy_bytes"]) / WEIGHTS["bytes_per_ns"]
        + count["launches"] * WEIGHTS["launch_ns"]
        + count["small_launches"] * WEIGHTS["small_launch_ns"]
    )


def test_weights_are_recovered():
    rows = [
        counts(flops, traffic, launches, small)
        for flops in (1e8, 1e10, 1e12)
        for traffic, launches, small in ((0.0, 1, 0), (1e8, 1, 0), (1e7, 2, 18))
    ]
    fit = fit_weights([(row, taken(row)) for row in rows])
    assert fit is not None
    assert fit.weights == pytest.approx(WEIGHTS, rel=1e-6)
    assert fit.kept == ()
    assert fit.worst_error < 1e-6


def test_what_the_times_do_not_tell_stays():
    rows = [counts(flops, 0.0, 1, 0) for flops in (1e8, 1e9, 1e10, 1e11, 1e12)]
    fit = fit_weights([(row, taken(row)) for row in rows])
    assert fit is not None
    assert set(fit.kept) == {"bytes_per_ns", "small_launch_ns"}
    assert fit.weights["bytes_per_ns"] == pytest.approx(chip().bytes_per_ns)
    assert fit.weights["launch_ns"] == pytest.approx(WEIGHTS["launch_ns"])


def test_a_weight_that_would_be_negative_stays():
    rows = [counts(1e9 * k, 1e6 * k * k, 1, 0) for k in range(1, 8)]
    times = [row["flops"] / 1e5 - row["mask_traffic"] / 1e5 + 1e3 for row in rows]
    fit = fit_weights(list(zip(rows, times, strict=True)))
    assert fit is not None
    assert "bytes_per_ns" in fit.kept
    assert all(value > 0 for value in fit.weights.values())


def test_too_few_times_give_no_weights():
    assert fit_weights([(counts(1e9, 0, 1, 0), 1.0)] * 3) is None
    assert samples_of([]) == []


def test_the_timing_cases_of_a_device_tell_every_weight():
    device = Machine(("ascend",), "npu:0", "npu:0, a name")
    samples = []
    for case in make_timing_cases(device, quick=False):
        if case.q_len > 1024:
            continue
        plan = make_case_plan(case, case.inputs(torch.float32), "emulated", "cpu")
        row = Solution(plan.steps).price.to_dict()
        samples.append((row, taken(row)))
    fit = fit_weights(samples)
    assert fit is not None
    assert fit.weights == pytest.approx(WEIGHTS, rel=1e-3)
