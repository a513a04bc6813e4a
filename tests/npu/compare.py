"""Running a composition on a backend, and the comparison with the reference."""

from __future__ import annotations

import torch

import attnkit as ak
from tests.npu.compositions import Case

__all__ = ["check", "difference", "run"]

Results = dict[str, torch.Tensor]

# Two float32 computations of one formula differ from the exact value by errors of one size, but
# one may sum in a worse order. A fault of one per cent is ten thousand times larger.
WORSE = 8


def run(case: Case, backend: str, device: str, dtype: torch.dtype) -> Results:
    """Return output, statistics and gradients as float64 on the CPU."""
    given = {n: t.to(dtype).to(device) for n, t in case.tensors().items()}
    grad = given.pop("grad")
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
    sink = leaves.get("sink")
    inputs = [leaves[name] for name in ("query", "key", "value")]
    arguments = case.arguments(device, dtype)
    result = ak.attention(*inputs, **arguments, sink=sink, backend=backend, return_stats=True)
    result.output.backward(grad)
    found = {"output": result.output, "max": result.stats.max, "sum": result.stats.sum}
    found |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: tensor.detach().cpu().double() for name, tensor in found.items()}


def check(case: Case) -> None:
    """Compare the ascend backend on an NPU tensor with the reference in float64."""
    exact = run(case, "reference", "cpu", torch.float64)
    single = run(case, "reference", "cpu", torch.float32)
    found = run(case, "ascend", "npu", torch.float32)
    assert found.keys() == exact.keys()
    for name, tensor in found.items():
        limit = WORSE * max(
            difference(single[name], exact[name]),
            torch.finfo(torch.float32).eps * exact[name].nan_to_num(0, 0, 0).abs().max().item(),
        )
        error = difference(tensor, exact[name])
        assert error <= limit, f"{case}: {name} is off by {error:.3g}, allowed are {limit:.3g}"


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference; equal infinities do not differ, a NaN always does."""
    assert one.shape == other.shape
    gap = torch.where(one == other, 0.0, (one - other).abs())
    return float(gap.nan_to_num(torch.inf).max()) if gap.numel() else 0.0
