"""Running a composition on a device, and the comparison with the definition."""

from __future__ import annotations

import torch

import attnkit as ak
from tests.agreement import Results, agree
from tests.npu.compositions import Case

__all__ = ["check", "run"]


def run(case: Case, backend: str, device: str, dtype: torch.dtype) -> Results:
    """Return output, statistics and gradients on the CPU."""
    given = {n: t.to(dtype).to(device) for n, t in case.tensors().items()}
    grad = given.pop("grad")
    leaves = {name: tensor.requires_grad_() for name, tensor in given.items()}
    sink = leaves.get("sink")
    inputs = [leaves[name] for name in ("query", "key", "value")]
    arguments = case.arguments(device, dtype)
    result = ak.attention(*inputs, **arguments, sink=sink, backend=backend, return_stats=True)
    result.output.backward(grad)
    found = {"output": result.output, "max": result.stats.max, "sum": result.stats.sum}
    bias = arguments["pse"]
    trained = [] if bias is None else [tensor for tensor in bias.tensors if tensor.requires_grad]
    leaves |= {f"bias {k}": tensor for k, tensor in enumerate(trained)}
    found |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: tensor.detach().cpu() for name, tensor in found.items()}


def check(case: Case) -> None:
    """Compare the ascend backend on an NPU tensor with the definition in float64."""
    exact = run(case, "reference", "cpu", torch.float64)
    single = run(case, "reference", "cpu", torch.float32)
    found = run(case, "ascend", "npu", torch.float32)
    assert found.keys() == exact.keys()
    agree(found, exact, single)
