"""What a plan computes beside what the reference does: figures, and the limits they keep.

Dropout has more figures: what share is kept, how survivors are scaled, and the
backward. With the unit matrix for values an output row is the row of weights itself, so the
decisions of a device can be read off its output, whatever generator it draws them from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import einsum
from torch import Tensor

from attnkit import layouts
from attnkit.backends import Operands, run_plan
from attnkit.doctor.cases import Case, Inputs
from attnkit.planner import Plan

__all__ = ["Check", "check_dropout", "check_values", "compare", "evaluate"]

# Two computations of one formula in one precision differ from the exact value by errors of one
# size, but one may round in more places. Sums are kept in float32 in any case: where that is
# the precision of the result as well, their order and the device's own exp() show in it.
_WORSE = {torch.float32: 32.0, torch.float16: 8.0, torch.bfloat16: 8.0}

# A keep rate this many standard deviations off its mean is one in two million.
_SIGMAS = 5.0
_SEED = 7


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
    bias = (f"bias tensor {k}" if t.requires_grad else "" for k, t in enumerate(given.leaves[4:]))
    named = dict(zip(("query", "key", "value", "sink", *bias), leaves, strict=True))
    named.pop("", None)  # a bias that is given and not learned
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


# -- dropout ------------------------------------------------------------------------------


def check_dropout(case: Case, plan: Plan, device: str, dtype: torch.dtype) -> list[Check]:
    """Return the keep rate, the scaling, the gradients, and whether draws differ and repeat."""
    given = _with_unit_values(case, case.inputs(dtype), dtype)
    found = evaluate(plan, given, device, dtype)
    output = _rows(case, found["output"], case.heads)
    leaves = {
        name: tensor.detach().double().requires_grad_()
        for name, tensor in (("query", given.query), ("key", given.key), ("value", given.value))
    }
    # Not the leaf for values: its gradient comes from the survivors alone.
    operands = Operands(leaves["query"], leaves["key"], given.value.double())
    definition = Plan("reference", replace(plan.request, dropout=0.0, device="cpu"))
    weights = _rows(case, run_plan(definition, operands).output, case.heads)
    decided = [weight > 0 for weight in weights]
    kept = [(row != 0) & known for row, known in zip(output, decided, strict=True)]
    cells, survivors = (sum(int(t.sum()) for t in some) for some in (decided, kept))
    rate, sigma = survivors / cells, (case.dropout * (1 - case.dropout) / cells) ** 0.5
    checks = [Check("keep rate, distance", abs(rate - 1 + case.dropout), _SIGMAS * sigma)]
    used = [w * k / (1 - case.dropout) for w, k in zip(weights, kept, strict=True)]
    values = _rows(case, leaves["value"], case.kv_heads, keys=True)
    product = _summed_product(used, values, _rows(case, given.grad.double(), case.heads))
    gradients = torch.autograd.grad(product, list(leaves.values()))
    exact = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    exact["survivors"], found["survivors"] = _flat(used).detach(), _flat(output)
    for name, wanted in exact.items():
        checks += compare(name, found[name], wanted, wanted.to(dtype).double(), dtype)
    return [*checks, *_draws(plan, given, device)]


def _summed_product(weights: list[Tensor], values: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Return the number whose gradients are those of the output with these weights."""
    total = torch.zeros((), dtype=torch.float64)
    for weight, value, grad in zip(weights, values, grads, strict=True):
        wide = value.repeat_interleave(weight.shape[1] // value.shape[1], dim=1)
        product = einsum(weight[..., : wide.shape[2]], wide, "b n i j, b n j d -> b n i d")
        total = total + (product * grad).sum()
    return total


def _draws(plan: Plan, given: Inputs, device: str) -> list[Check]:
    """Check that the next call draws anew and that a seed repeats its draw."""
    operands = Operands(*(tensor.to(device) for tensor in given.leaves[:3]))
    torch.manual_seed(_SEED)
    first, second = (run_plan(plan, operands).output.cpu() for _ in range(2))
    torch.manual_seed(_SEED)
    again = run_plan(plan, operands).output.cpu()
    return [
        Check("two calls draw the same", float(torch.equal(first, second)), 0.0),
        Check("a seed does not repeat its draw", float(not torch.equal(first, again)), 0.0),
    ]


def _with_unit_values(case: Case, given: Inputs, dtype: torch.dtype) -> Inputs:
    """Put the unit matrix in the place of every sequence's values."""
    layout, lens = layouts.get(case.layout), case.seqlens
    lengths = (case.kv_len,) * case.batch if lens is None else lens.kv
    units = [
        torch.eye(n, case.value_dim, dtype=dtype).expand(1, case.kv_heads, -1, -1) for n in lengths
    ]
    value = layout.from_bnsd(torch.cat(units)) if lens is None else layout.join(units)
    return replace(given, value=value.contiguous())


def _rows(case: Case, tensor: Tensor, heads: int, keys: bool = False) -> list[Tensor]:
    """Return a tensor as [b n s d] parts, one per packed sequence."""
    layout, lens = layouts.get(case.layout), case.seqlens
    if lens is None:
        return [layout.to_bnsd(tensor, heads)]
    return list(layout.split(tensor, lens.kv if keys else lens.q, heads))


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
