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
from attnkit.doctor.suite import Check, compare
from attnkit.planner import Plan

__all__ = ["check_dropout"]

# A keep rate this many standard deviations off its mean is one in two million.
_SIGMAS = 5.0
_SEED = 7


def check_dropout(case: Case, plan: Plan, device: str, dtype: torch.dtype) -> list[Check]:
    """Return the keep rate, the scaling, the gradients, and whether draws differ and repeat."""
    given = _with_unit_values(case, case.inputs(dtype), dtype)
    request = replace(plan.request, dropout=0.0, device="cpu")
    definition = Plan("reference", request)
    weights, exact_grads = _weights(case, definition, given, torch.float64)
    found, found_grads = _run(case, plan, given, device)
    decided = [w > 0 for w in weights]
    kept = [(f != 0) & d for f, d in zip(found, decided, strict=True)]
    cells, survivors = (sum(int(t.sum()) for t in ts) for ts in (decided, kept))
    rate, sigma = survivors / cells, (case.dropout * (1 - case.dropout) / cells) ** 0.5
    checks = [Check("keep rate, distance", abs(rate - 1 + case.dropout), _SIGMAS * sigma)]
    factor = 1 / (1 - case.dropout)
    wanted = [w.detach() * k * factor for w, k in zip(weights, kept, strict=True)]
    rounded = [w.to(dtype).double() for w in wanted]
    checks += compare("survivors", _flat(found), _flat(wanted), _flat(rounded), dtype)
    gradients = exact_grads([k * factor for k in kept])
    for name, tensor in found_grads.items():
        exact = gradients[name]
        checks += compare(name, tensor, exact, exact.to(dtype).double(), dtype)
    return [*checks, *_draws(plan, given, device)]


def _draws(plan: Plan, given: Inputs, device: str) -> list[Check]:
    """Check that the next call draws anew and that a seed repeats its draw."""
    operands = Operands(given.query.to(device), given.key.to(device), given.value.to(device))
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
    layout = layouts.get(case.layout)
    if case.seqlens is not None:
        local = torch.cat([torch.arange(n) for n in case.seqlens.kv])
        unit = torch.eye(case.value_dim, dtype=dtype)[local]
        value = unit[:, None].expand(-1, case.kv_heads, -1).contiguous()
    else:
        unit = torch.eye(case.kv_len, case.value_dim, dtype=dtype)
        shape = (case.batch, case.kv_heads, -1, -1)
        value = layout.from_bnsd(unit.expand(*shape).contiguous())
    return replace(given, value=value.contiguous())


def _rows(case: Case, tensor: Tensor, heads: int, keys: bool = False) -> list[Tensor]:
    """Return a tensor as [b n s d] parts, one per packed sequence."""
    layout, lens = layouts.get(case.layout), case.seqlens
    if lens is None:
        return [layout.to_bnsd(tensor, heads)]
    return list(layout.split(tensor, lens.kv if keys else lens.q, heads))


def _flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def _run(
    case: Case, plan: Plan, given: Inputs, device: str
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the device's output in rows, and its gradients, in float64 on the CPU."""
    named = {"query": given.query, "key": given.key, "value": given.value}
    leaves = {n: t.detach().to(device, copy=True).requires_grad_() for n, t in named.items()}
    output = run_plan(plan, Operands(leaves["query"], leaves["key"], leaves["value"])).output
    torch.autograd.backward(output, given.grad.to(device))
    gradients = {
        f"gradient of {name}": leaf.grad.cpu().double()
        for name, leaf in leaves.items()
        if leaf.grad is not None
    }
    return _rows(case, output.detach().cpu().double(), case.heads), gradients


class _Gradients:
    """The exact gradients of attention whose weights are multiplied by given factors."""

    def __init__(
        self, case: Case, weights: list[Tensor], leaves: dict[str, Tensor], grad: Tensor
    ) -> None:
        self.case, self.weights, self.leaves, self.grad = case, weights, leaves, grad

    def __call__(self, factors: list[Tensor]) -> dict[str, Tensor]:
        case, group = self.case, self.case.heads // self.case.kv_heads
        values = _rows(case, self.leaves["value"], case.kv_heads, keys=True)
        grads = _rows(case, self.grad.double(), case.heads)
        total = torch.zeros((), dtype=torch.float64)
        for weight, factor, value, grad in zip(self.weights, factors, values, grads, strict=True):
            wide = value.repeat_interleave(group, dim=1)
            used = (weight * factor)[..., : wide.shape[2]]
            total = total + (einsum(used, wide, "b n i j, b n j d -> b n i d") * grad).sum()
        found = torch.autograd.grad(total, list(self.leaves.values()))
        return {f"gradient of {n}": g for n, g in zip(self.leaves, found, strict=True)}


def _weights(
    case: Case, definition: Plan, given: Inputs, dtype: torch.dtype
) -> tuple[list[Tensor], _Gradients]:
    """Return the softmax weights without dropout, and how gradients follow from them."""
    named = {"query": given.query, "key": given.key, "value": given.value}
    leaves = {n: t.detach().to(dtype, copy=True).requires_grad_() for n, t in named.items()}
    unit = given.value.to(dtype)  # not the leaf: its gradient comes from the survivors alone
    output = run_plan(definition, Operands(leaves["query"], leaves["key"], unit)).output
    weights = _rows(case, output, case.heads)
    return weights, _Gradients(case, weights, leaves, given.grad)
