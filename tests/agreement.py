"""Agreement: a backend returns what the definition does, and how far off it may be.

One harness for every test that compares: `results` are all that a call returns and all gradients
of it, by name; `agreement` asks backends for them and holds them against the definition in
float64, within what the definition's own rounding explains; `near` takes stated bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import attnkit as ak

Results = dict[str, Tensor]

WORSE, LAST = 4, 8
"""Two computations of one formula err alike; a worse order of sums costs a few times as much.

The second is for a definition that happens to be exact. A fault of one per cent is thousands of
times larger in float32.
"""

_INPUTS = ("dq", "dk", "dv")


def slopes(output: Tensor) -> Tensor:
    """A gradient that arrives at an output: the same for every backend and dtype."""
    count = torch.arange(output.numel(), dtype=torch.float64)
    return count.mul(0.7).sin().view(output.shape).to(output.dtype)


def results(
    backend: str,
    tensors: Iterable[Tensor],
    *,
    sink: Tensor | None = None,
    pse: ak.pse.Pse | None = None,
    statistics: tuple[str, ...] = ("lse", "max", "sum"),
    **how: Any,
) -> Results:
    """Output, statistics, and the gradients of all inputs, the sink and what the bias trains."""
    leaves = {
        name: tensor.detach().clone().requires_grad_()
        for name, tensor in zip(_INPUTS, tensors, strict=True)
    }
    inputs = list(leaves.values())
    if sink is not None:
        leaves["dsink"] = sink.detach().clone().requires_grad_()
    trained = [t for t in (pse.tensors if pse is not None else ()) if t.requires_grad]
    leaves |= {f"dbias {i}": tensor for i, tensor in enumerate(trained)}
    found = ak.attention(
        *inputs, sink=leaves.get("dsink"), pse=pse, backend=backend, return_stats=True, **how
    )
    assert isinstance(found, ak.AttentionOutput)
    # A query that sees nothing but itself leaves no trace in some gradients.
    grads = torch.autograd.grad(
        found.output, list(leaves.values()), slopes(found.output), materialize_grads=True
    )
    stats = {name: getattr(found.stats, name).detach() for name in statistics}
    return {"out": found.output.detach(), **stats, **dict(zip(leaves, grads, strict=True))}


def definition(
    tensors: Iterable[Tensor], *, sink: Tensor | None = None, **how: Any
) -> tuple[Results, Results]:
    """What the reference returns in float64, and in the tensors' dtype (float32 for float64)."""
    given = [t.detach() for t in tensors]
    low = torch.float32 if given[0].dtype == torch.float64 else given[0].dtype

    def run(dtype: torch.dtype) -> Results:
        logits = None if sink is None else sink.to(torch.promote_types(dtype, torch.float32))
        return results("reference", [t.to(dtype) for t in given], sink=logits, **how)

    return run(torch.float64), run(low)


def agreement(
    tensors: Iterable[Tensor],
    *backends: str,
    skip: tuple[str, ...] = (),
    precision: torch.dtype | None = None,
    **how: Any,
) -> None:
    """Assert that backends return what the definition does: output, statistics, all gradients.

    `precision` is what a backend computes with where that is less than the tensors' dtype;
    results whose names are in `skip` are not looked at.
    """
    given = list(tensors)
    exact, rounded = definition(given, **how)
    for backend in backends:
        found = results(backend, given, **how)
        assert found.keys() == exact.keys()
        assert found["out"].dtype == given[0].dtype
        seen = {name: value for name, value in found.items() if name not in skip}
        agree(seen, exact, rounded, precision)


def agree(
    found: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
    precision: torch.dtype | None = None,
) -> None:
    """Assert that results are as near to the exact ones as their dtype allows.

    `exact` is the definition in float64, `rounded` the definition in a lower precision. Its
    error, in units of its own epsilon, says what rounding costs here. `found` may err by `WORSE`
    as many of its epsilons (of `precision`), and by `LAST` of the largest result: a gradient that
    cancels is known as well as what cancels, which is as large as other results. What should be
    infinite or NaN must be it, and nothing else.
    """
    assert found
    size = max(_largest(tensor) for tensor in exact.values())
    # A definition that is wrong in a low precision would explain everything.
    sane = size * min(1 / 4, 2**12 * max(torch.finfo(low.dtype).eps for low in rounded.values()))
    for name, got in found.items():
        meant, low = exact[name], rounded[name]
        rounding, low_unit = distance(low, meant), _unit(low, rounded)
        assert rounding <= sane, f"{name}: the definition in low precision is no measure"
        cost = rounding / low_unit
        unit = max(_unit(got, found), torch.finfo(precision or got.dtype).eps)
        limit = unit * (WORSE * cost + LAST * size)
        error = distance(got, meant)
        assert error <= limit, f"{name} is off by {error:.3g}; rounding explains {limit:.3g}"


def near(
    found: Mapping[str, Tensor],
    meant: Mapping[str, Tensor],
    rtol: float,
    atol: float,
    names: Iterable[str] | None = None,
) -> None:
    """Assert that results agree within stated bounds; NaN equals nothing."""
    for name in meant if names is None else names:
        torch.testing.assert_close(
            found[name].to(meant[name].dtype),
            meant[name],
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def slope_error(loss: Callable[[], Tensor], leaf: Tensor) -> float:
    """How far the gradient of `leaf` is from a difference of `loss`, relative to the difference.

    Along one random step. A loss that draws has to draw the same numbers each time.
    """
    (slope,) = torch.autograd.grad(loss(), [leaf])
    step, found = torch.randn_like(leaf), []
    for sign in (1, -1):
        leaf.data += sign * 1e-5 * step
        found.append(loss().item())
        leaf.data -= sign * 1e-5 * step
    meant = (slope * step).sum().item()
    return abs((found[0] - found[1]) / 2e-5 - meant) / abs(meant)


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference; equal infinities differ by 0, NaN by infinity."""
    assert one.shape == other.shape, (one.shape, other.shape)
    if not one.numel():
        return 0.0
    one, other = one.detach().double(), other.detach().double()
    apart = (one - other).abs().masked_fill(one == other, 0.0)
    return float(apart.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def _unit(tensor: Tensor, among: Mapping[str, Tensor]) -> float:
    """The epsilon that a result was computed with: its own, or float32 where others are lower."""
    wide = all(other.dtype == torch.float64 for other in among.values())
    computed = torch.finfo(torch.float64 if wide else torch.float32).eps
    return max(torch.finfo(tensor.dtype).eps, computed)


def _largest(tensor: Tensor) -> float:
    numbers = tensor[tensor.isfinite()]
    return float(numbers.abs().max()) if numbers.numel() else 0.0
