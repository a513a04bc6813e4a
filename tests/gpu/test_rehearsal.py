"""The doctor on GPUs, as far as it shows without one: what it asks, what it sees, what it says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit.__main__ import main
from attnkit.backends import BACKENDS, AttentionOutput
from attnkit.doctor.cases import CASES, OTHER_CASES, cases_of
from attnkit.doctor.clock import Clock, alternate
from attnkit.doctor.findings import GPU_BACKENDS, find_machine
from attnkit.doctor.screen import NoDevice
from attnkit.doctor.suite import run_case
from tests.backends.flex import eager as eager_code
from tests.gpu import rehearsal
from tests.gpu.rehearsal import ARGUMENTS, rehearsed

# One of everything that kernels do differently: every group of cases has one here.
FEW = {
    "mode-6-per-batch": torch.float32,
    "mode-8": torch.float16,
    "dilated": torch.float32,
    "empty-sequences": torch.bfloat16,
    "merge-packed": torch.float32,
    "gather-blocks": torch.float32,
    "matrix-before-scale": torch.bfloat16,
    "sink-packed": torch.float32,
    "sbh": torch.bfloat16,
    "dropout-causal": torch.float16,
    "softcap-sink": torch.float32,
    "learned-matrix-shared": torch.float32,
    "odd-window": torch.float16,
}
BY_NAME = {case.name: case for case in (*CASES, *OTHER_CASES)}


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    with rehearsed():
        yield


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_backends_of_a_gpu_pass(backend: str) -> None:
    results = {
        name: run_case(BY_NAME[name], backend=backend, dtype=dtype) for name, dtype in FEW.items()
    }
    refused = {"dropout-causal"} if backend == "flex" else set()
    assert {name for name, result in results.items() if result.status == "refused"} == refused
    assert {n: r.failures or r.reasons for n, r in results.items() if r.status != "passed"} == {
        name: results[name].reasons for name in refused
    }
    assert {BY_NAME[name].group for name in FEW} == {case.group for case in cases_of(backend)}


@pytest.mark.sweep
@pytest.mark.parametrize("backend", ["cuda", "tiled"])  # what cuda does not fuse, flex runs
def test_all_cases_pass(backend: str) -> None:
    results = [run_case(case, backend=backend) for case in cases_of(backend)]
    assert [r.name for r in results if r.status in ("failed", "error")] == []


@pytest.mark.parametrize(
    ("fault", "case", "told"),
    [
        (lambda out, lse: (out * 1.01, lse), "odd-window", "output"),
        (lambda out, lse: (out, lse + 0.01), "softcap", "sum"),
        (lambda out, lse: (out.detach() + 0 * out, lse), "sink", "gradient of query"),
    ],
)
def test_a_wrong_kernel_is_seen(
    fault: Callable[..., Any], case: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "eager", lambda call: fault(*eager_code.eager(call)))
    with rehearsed():
        for backend in ("cuda", "flex"):
            failures = {check.name for check in run_case(BY_NAME[case], backend=backend).failures}
            assert told in {name.partition(",")[0] for name in failures}


def test_a_bias_that_gets_no_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["learned-matrix"]
    (name,) = {c.name for c in run_case(case, backend="tiled").checks if "bias" in c.name} - {
        "gradient of bias tensor 0, mean error"
    }
    assert name == "gradient of bias tensor 0, largest error"

    right = BACKENDS["reference"].run

    def doubled(self: object, plan: Any, operands: Any) -> AttentionOutput:
        output, stats = right(plan, operands)
        own = operands.pse.tensors[0]
        return AttentionOutput(output + (own - own.detach()).sum(), stats)

    monkeypatch.setattr("attnkit.backends.tiled.Tiled.run", doubled)
    failures = {check.name.partition(",")[0] for check in run_case(case, backend="tiled").failures}
    assert failures == {"gradient of bias tensor 0"}


# -- the command ---------------------------------------------------------------------------


def gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU at {device}")


def test_a_gpu_is_tested_with_its_own_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2, monkeypatch)
    machine = find_machine("cuda:1")
    assert (machine.backends, machine.device) == (GPU_BACKENDS, "cuda:1")
    assert machine.label == "cuda:1, a GPU at cuda:1"
    assert machine.is_hardware
    one = find_machine("cuda", ["flex"])
    assert (one.backends, one.label) == (("flex",), "flex on cuda:0, a GPU at cuda:0")
    emulator = find_machine("cuda", ["emulated"])
    assert emulator.label == "emulator, not hardware (on cuda)"
    assert not emulator.is_hardware
    with pytest.raises(NoDevice, match="this machine has cuda:0 to cuda:1"):
        find_machine("cuda:2")


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    gpus(0, monkeypatch)
    assert main(["doctor", "--device", "cuda"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: --device cuda: torch {torch.__version__} does not see a CUDA device\n"


def test_a_report_of_several_backends_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def wrong(call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output, lse = eager_code.eager(call)
        return output * 1.01, lse

    monkeypatch.setattr(rehearsal, "eager", wrong)
    out = tmp_path / "found.json"
    given = ["doctor", "--device", "cpu", *ARGUMENTS, "--only", "alibi@float32", "--out", str(out)]
    with rehearsed():
        assert main(given) == 1
    told = capsys.readouterr().out
    assert "attnkit doctor: cuda, flex, tiled, reference on this machine" in told
    assert "FAILED alibi@float32 on flex" in told
    line = "rerun: python -m attnkit doctor --device cpu --backend flex --only alibi@float32"
    assert line in told
    assert [line.split() for line in told.splitlines() if line.startswith("tiled, ")] == [
        ["tiled,", "biases", "1", "0", "0"]
    ]
    report = json.loads(out.read_text())
    assert report["backend"] == "cuda, flex, tiled, reference"
    assert [case["backend"] for case in report["cases"]] == list(GPU_BACKENDS)
    assert [case["status"] for case in report["cases"]] == ["failed", "failed", "passed", "passed"]


def test_plans_without_calls_are_timed(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    given = ["--device", "cpu", "--backend", "tiled", "--quick", "--out", str(out)]
    assert main(["doctor", *given]) == 0
    report = json.loads(out.read_text())
    assert report["summary"]["passed"] == report["summary"]["expected"] > len(OTHER_CASES)
    for row in report["timings"]["rows"]:
        assert row["plan"] > 0
        assert row["sdpa"] > 0
        assert row["dense"] is None
        assert row["notes"] == []


# -- clocks --------------------------------------------------------------------------------


def test_a_gpu_is_timed_by_events_around_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, queue: str) -> None:
            seen.append(f"event in {queue}")

        def elapsed_time(self, other: Event) -> float:
            seen.append("told")
            return 0.25 if other is not self else 0.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the queue of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(f"wait: {device}"))
    taken = Clock(torch.device("cuda:1")).nanoseconds(lambda: seen.append("run"))
    assert taken == 250_000.0
    wait, event = "wait: cuda:1", "event in the queue of cuda:1"
    assert seen == [wait, event, "run", event, wait, "told"]


def test_forms_take_turns_and_one_that_cannot_run_is_told() -> None:
    seen: list[str] = []

    def broken() -> None:
        raise RuntimeError("No available kernel.\nmore")

    forms = {"a": lambda: seen.append("a"), "broken": broken, "b": lambda: seen.append("b")}
    times, notes = alternate(forms, Clock(torch.device("cpu")), 2)
    assert seen == ["a", "b"] * 3
    assert set(times) == {"a", "b"}
    assert notes == ("broken did not run: No available kernel.",)


def test_a_fake_gpu_tensor_goes_to_fused_attention() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 32, 4, 64, device="cuda", dtype=torch.bfloat16)
        found = ak.attention(x, x, x)
        plan = ak.plan(x, x, x)
    assert (plan.backend, found.device.type, found.shape) == ("cuda", "cuda", x.shape)
