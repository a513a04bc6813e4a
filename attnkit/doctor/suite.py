"""Running conformance cases on a backend, against the reference in float64 on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from attnkit import layouts
from attnkit.backends import make_plan
from attnkit.doctor.cases import CASES, Case, Inputs, Regions
from attnkit.doctor.compare import Check, check_dropout, check_values
from attnkit.errors import BackendRefused
from attnkit.layouts import SeqLens, Sizes
from attnkit.planner import Composition, Launch, Plan, Request, read_request
from attnkit.planner.calls import tile_whole
from attnkit.planner.lower import search_for
from attnkit.planner.search import Search

__all__ = ["DTYPES", "Result", "make_case_plan", "make_request", "run_case", "run_suite"]

Status = Literal["passed", "failed", "refused", "error"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that the kernel computes in."""


@dataclass(frozen=True)
class Result:
    """What became of one case in one dtype."""

    case: str
    group: str
    dtype: str
    composition: str
    status: Status
    checks: tuple[Check, ...] = ()
    calls: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    seconds: float = 0.0
    backend: str = ""

    @property
    def name(self) -> str:
        """The name that reruns just this."""
        return f"{self.case}@{self.dtype}"

    @property
    def failures(self) -> tuple[Check, ...]:
        """The figures beyond their limits."""
        return tuple(check for check in self.checks if not check.passed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        return {"name": self.name} | asdict(self) | {"checks": checks}


def run_suite(
    cases: Iterable[Case] = CASES,
    *,
    backend: str = "emulated",
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run cases in every one of `dtypes`, and return their results, in order.

    `on_result` is told each result as soon as it is known. A case that raises is a result,
    too; `KeyboardInterrupt` is not caught.
    """
    results = []
    for case in cases:
        for dtype in dtypes:
            results.append(run_case(case, backend=backend, device=device, dtype=dtype))
            if on_result is not None:
                on_result(results[-1])
    return results


def run_case(
    case: Case,
    *,
    backend: str = "emulated",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Result:
    """Run one case and compare it with the reference in float64."""
    started = time.perf_counter()
    result = Result(
        case.name,
        case.group,
        str(dtype).removeprefix("torch."),
        case.composition,
        "passed",
        backend=backend,
    )
    try:
        plan = make_case_plan(case, case.inputs(dtype), backend, device)
        result = replace(result, calls=tuple(f"{step.label}: {step.call}" for step in plan.steps))
        check = check_dropout if case.dropout else check_values
        checks = tuple(check(case, plan, device, dtype))
        status: Status = "passed" if all(c.passed for c in checks) else "failed"
        result = replace(result, checks=checks, status=status)
    except BackendRefused as error:
        reasons = tuple(map(str, error.refusals)) or (str(error),)
        result = replace(result, status="refused", reasons=reasons)
    except Exception as error:  # a device has many ways to fail, and each of them is a finding
        reason = f"{type(error).__name__}: {error}"
        result = replace(result, status="error", reasons=(reason,))
    return replace(result, seconds=round(time.perf_counter() - started, 4))


def make_request(
    composed: Composition,
    sizes: Sequence[Sizes],
    dtype: torch.dtype,
    device: str,
    seqlens: SeqLens | None = None,
    sink: torch.Tensor | None = None,
    training: bool = True,
) -> Request:
    """Return the request for query, key and value of these sizes, without making tensors."""
    shape = layouts.get(composed.layout).shape
    tensors = (
        torch.empty(shape(of), dtype=dtype, device="meta", requires_grad=training) for of in sizes
    )
    with torch.set_grad_enabled(training):
        request = read_request(
            composed,
            *tensors,
            num_heads=sizes[0].heads,
            num_kv_heads=sizes[1].heads,
            seqlens=seqlens,
            sink=sink,
            training=training,
        )
    return replace(request, device=torch.device(device).type)


def make_case_plan(case: Case, inputs: Inputs, backend: str, device: str) -> Plan:
    """Return the plan of a case on a backend, with the call that it forces, if it does."""
    composed = Composition(
        case.mask,
        inputs.pse,
        case.layout,
        case.scale,
        case.dropout,
        case.softcap,
        case.score_fn,
    )
    dtype = inputs.query.dtype
    request = make_request(composed, case.sizes, dtype, device, case.seqlens, inputs.sink)
    plan = make_plan(request, backend)
    if (case.merges or case.gathers) and plan.calls:
        plan = _in_parts(plan, case.gathers)
    if not case.call:
        return plan
    # A plan without calls is compared with the call that the kernel would make without a mask.
    bare = plan if plan.calls else make_plan(request, "emulated")
    call = replace(bare.calls[0], **dict(case.call))
    parts = call.regions()
    mask = Regions(parts if len(set(parts)) > 1 else parts[:1])
    request = replace(request, mask=mask)
    if not plan.calls:
        return make_plan(request, backend)
    blocks = tile_whole(request.batch, request.sequences)
    step = Launch(f"mode {call.sparse_mode}, forced", call, blocks, parts, request.token_starts)
    forced = replace(plan, request=request, steps=(step,), alternatives=())
    forced.verify()
    return forced


def _in_parts(plan: Plan, gathers: bool) -> Plan:
    """Return the plan of calls that gather, or that merge, where a cheaper one was taken."""
    found = search_for(plan.request, Search(gathers=gathers))
    options = (found.steps, *(other.launches for other in found.alternatives))
    fits = [some for some in options if some and some[0].partial]
    if gathers:
        fits = [some for some in fits if not all(k.is_rectangle for k in some[0].blocks)]
    parts = fits[0] if fits else found.steps
    taken = replace(found, backend=plan.backend, steps=parts, alternatives=(), back=())
    taken.verify()
    return taken
