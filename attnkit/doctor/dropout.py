"""Cases about dropout: what share is kept, how survivors are scaled, and the backward.

With the unit matrix for values an output row is the row of weights itself, so the decisions
of a device can be read off its output, whatever generator it draws them from.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from einops import einsum
from torch import Tensor

from attnkit import layouts
from attnkit.backends import Operands, run_plan
from attnkit.doctor.cases import Case, Inputs
from attnkit.doctor.compare import Check, compare, evaluate
from attnkit.planner import Plan

__all__ = ["check_dropout"]

# A keep rate this many standard deviations off its mean is one in two million.
_SIGMAS = 5.0
_SEED = 7


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
