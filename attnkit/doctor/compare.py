"""What a plan computes beside what the reference does: figures, and the limits they keep."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnkit.backends import Operands, run_plan
from attnkit.doctor.cases import Case, Inputs
from attnkit.planner import Plan

__all__ = ["Check", "check_values", "compare", "evaluate"]

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


def check_values(case: Case, plan: Plan, device: str, dtype: torch.dtype) -> list[Check]:
    """Compare output, statistics and gradients with the reference in float64."""
    given = case.inputs(dtype)
    definition = Plan("reference", replace(plan.request, device="cpu"))
    exact = evaluate(definition, given, "cpu", torch.float64)
    same = evaluate(definition, given, "cpu", dtype)
    found = evaluate(plan, given, device, dtype)
    checks: list[Check] = []
    for name, tensor in found.items():
        checks += compare(name, tensor, exact[name], same[name], dtype)
    return checks


def evaluate(plan: Plan, given: Inputs, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return output, statistics and gradients as float64 on the CPU."""

    def moved(tensor: Tensor) -> Tensor:
        # A copy in any case: two runs that shared a leaf would add up their gradients.
        return tensor.detach().to(dtype).to(device, copy=True)

    leaves = [tensor if tensor is None else moved(tensor) for tensor in given.leaves]
    named = dict(zip(("query", "key", "value", "sink"), leaves, strict=False))
    for leaf in filter(torch.is_tensor, named.values()):
        leaf.requires_grad_()
    output, stats = run_plan(plan, Operands.of(given.pse, leaves))
    torch.autograd.backward(output, moved(given.grad))
    found = {"output": output, "max": stats.max, "sum": stats.sum}
    for name, leaf in named.items():
        if leaf is not None and leaf.grad is not None:
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
