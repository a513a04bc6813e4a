"""Running conformance cases on a backend, against the reference in float64 on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from attnkit.backends import Operands, make_plan, run_plan
from attnkit.doctor.cases import CASES, Case, Inputs, Regions
from attnkit.errors import BackendRefused
from attnkit.kernel import KernelCall
from attnkit.planner import Composition, Launch, Plan, read_request
from attnkit.planner.blocks import tile_whole
from attnkit.planner.candidates import Form

__all__ = ["DTYPES", "Check", "Result", "compare", "make_case_plan", "run_case", "run_suite"]

Status = Literal["passed", "failed", "refused", "error"]
Results = dict[str, Tensor]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that the kernel computes in."""

# Two computations of one formula in one precision differ from the exact value by errors of one
# size, but one may round in more places. Sums are kept in float32 in any case: where that is
# the precision of the result as well, their order and the device's own exp() show in it.
_WORSE = {torch.float32: 32.0, torch.float16: 8.0, torch.bfloat16: 8.0}


@dataclass(frozen=True)
class Check:
    """One figure of a case and the limit that it has to keep."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the figure keeps the limit; a NaN does not."""
        return self.value <= self.limit

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.3g}, allowed {self.limit:.3g}"


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
    from attnkit.doctor.dropout import check_dropout

    started = time.perf_counter()
    result = Result(
        case.name, case.group, str(dtype).removeprefix("torch."), case.composition, "passed"
    )
    try:
        plan = make_case_plan(case, case.inputs(dtype), backend, device)
        result = replace(result, calls=tuple(map(_describe, plan.steps)))
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


def make_case_plan(case: Case, inputs: Inputs, backend: str, device: str) -> Plan:
    """Return the plan of a case on a backend, with the call that it forces, if it does."""
    composed = Composition(case.mask, inputs.pse, case.layout, case.scale, case.dropout)
    leaves = (
        t.detach().to("meta").requires_grad_() for t in (inputs.query, inputs.key, inputs.value)
    )
    request = read_request(
        composed,
        *leaves,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        seqlens=case.seqlens,
        sink=inputs.sink,
        training=True,
    )
    request = replace(request, device=torch.device(device).type)
    plan = make_plan(request, backend)
    if case.merges:
        plan = _in_parts(plan)
    if not case.call:
        return plan
    call = replace(plan.calls[0] if plan.calls else _bare_call(plan), **dict(case.call))
    parts = call.regions()
    mask = Regions(parts if len(set(parts)) > 1 else parts[:1])
    request = replace(request, mask=mask)
    if not plan.calls:
        return replace(plan, request=request)
    blocks = tile_whole(request.batch, request.sequences)
    form = Form(request.layout, blocks, parts, packs=False)
    mode = f"mode {call.sparse_mode}, forced"
    forced = replace(plan, request=request, steps=(Launch(mode, call, form),), alternatives=())
    forced.verify()
    return forced


def _in_parts(plan: Plan) -> Plan:
    """Return the plan of several calls that merge, where a cheaper one was taken."""
    options = (plan.steps, *(other.launches for other in plan.alternatives))
    parts = next((some for some in options if some and some[0].form.partial), plan.steps)
    merged = replace(plan, steps=parts, alternatives=())
    merged.verify()
    return merged


def _bare_call(plan: Plan) -> KernelCall:
    """Return the call without a mask that the kernel would make for a plan without calls."""
    return make_plan(plan.request, "emulated").calls[0]


def _describe(step: Launch) -> str:
    given = step.call.non_default_arguments()
    told = (f"{name}={value}" for name, value in given.items() if name not in _SHAPES)
    return f"{step.label}: {', '.join(told)}"


_SHAPES = ("query", "key", "value", "head_num", "scale")


# -- values and gradients ------------------------------------------------------------------


def check_values(case: Case, plan: Plan, device: str, dtype: torch.dtype) -> list[Check]:
    """Compare output, statistics and gradients with the reference in float64."""
    given = case.inputs(dtype)
    definition = Plan("reference", replace(plan.request, device="cpu"))
    exact = _evaluate(definition, given, "cpu", torch.float64)
    same = _evaluate(definition, given, "cpu", dtype)
    found = _evaluate(plan, given, device, dtype)
    checks: list[Check] = []
    for name, tensor in found.items():
        checks += compare(name, tensor, exact[name], same[name], dtype)
    return checks


def _evaluate(plan: Plan, given: Inputs, device: str, dtype: torch.dtype) -> Results:
    """Return output, statistics and gradients as float64 on the CPU."""

    def moved(tensor: Tensor) -> Tensor:
        # A copy in any case: two runs that shared a leaf would add up their gradients.
        return tensor.detach().to(dtype).to(device, copy=True)

    named = {"query": given.query, "key": given.key, "value": given.value}
    named |= {"sink": given.sink} if given.sink is not None else {}
    leaves = {name: moved(tensor).requires_grad_() for name, tensor in named.items()}
    bias = given.pse
    if bias is not None and bias.tensors:
        from attnkit.backends.rebind import rebound

        bias = rebound(bias, [moved(tensor) for tensor in bias.tensors])
    operands = Operands(leaves["query"], leaves["key"], leaves["value"], bias, leaves.get("sink"))
    output, stats = run_plan(plan, operands)
    torch.autograd.backward(output, moved(given.grad))
    found = {"output": output, "max": stats.max, "sum": stats.sum}
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            found[f"gradient of {name}"] = leaf.grad
    return {name: tensor.detach().cpu().double() for name, tensor in found.items()}


def compare(
    name: str, found: Tensor, exact: Tensor, same: Tensor, dtype: torch.dtype
) -> tuple[Check, Check]:
    """Return the largest error and the root mean square one, with their limits.

    The limits are a few times what rounding to `dtype` costs: the error of the reference in
    that dtype (`same`), or of one rounding, whichever is larger. The second figure averages
    over roundings, and so shows a small factor that the first one cannot tell from them.
    """
    eps, worse = torch.finfo(dtype).eps, _WORSE[dtype]
    rounding = max(eps / 4, torch.finfo(torch.float32).eps)  # of one number, root mean square
    size, mean = _largest(exact.nan_to_num(0.0, 0.0, 0.0)), _mean(exact.nan_to_num(0.0, 0.0, 0.0))
    gap, own = _gap(found, exact), _gap(same, exact)
    return (
        Check(f"{name}, largest error", _largest(gap), worse * max(_largest(own), eps * size)),
        Check(f"{name}, mean error", _mean(gap), worse * max(_mean(own), rounding * mean)),
    )


def _gap(one: Tensor, other: Tensor) -> Tensor:
    """Return the differences; equal infinities do not differ, a NaN always does."""
    if one.shape != other.shape:
        return torch.full((1,), torch.inf, dtype=torch.float64)
    return torch.where(one == other, 0.0, (one - other).abs()).nan_to_num(torch.inf)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _mean(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt()) if tensor.numel() else 0.0
