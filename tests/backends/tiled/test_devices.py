"""Tiles on other devices than the CPU: torch's operators alone, no look at a number, no S x S."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import BACKENDS, Operands, make_plan, reference
from attnkit.backends.base import Kept
from attnkit.backends.tiled import TiledPlan, retraced, walk
from tests.agreement import agree, definition, slopes
from tests.backends.tiled.devices import CASES, bent

ROOT = Path(__file__).parents[3]
TILED = BACKENDS["tiled"]


def test_no_case_looks_at_a_number() -> None:
    """In a process of its own: see `devices`."""
    command = [sys.executable, "-m", "tests.backends.tiled.devices"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n") == [*CASES, ""]


def moved(plan: ak.Plan, device: str = "npu") -> TiledPlan:
    """The plan that these tensors would have on a device."""
    return TiledPlan("tiled", replace(plan.request, device=device))


def operands(how: dict[str, Any], length: int = 400, device: str = "cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    shape = (length, 4, 16) if "seqlens" in how else (2, length, 4, 16)
    return tuple(torch.randn(shape, generator=generator).to(device) for _ in range(3))


def results(plan: ak.Plan, given: Operands, seed: Tensor | None = None) -> dict[str, Tensor]:
    """Output, log-sum-exp and gradients, by the calls that graphs make."""
    with torch.no_grad():
        output, stats = TILED.compute(plan, given, seed)
        slope = torch.ones_like(output) if output.is_meta else slopes(output)
        kept = Kept(seed, output, stats.lse, slope, None)
        wanted = tuple(leaf is not None for leaf in given.leaves)
        grads = TILED.gradients(plan, given, kept, wanted)
    names = ("dq", "dk", "dv", "dsink", *(f"dbias {i}" for i in range(len(grads) - 4)))
    found = {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}
    return {"out": output, "lse": stats.lse, **found}


@pytest.mark.parametrize("name", CASES)
def test_what_a_device_computes_is_the_definition(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of a device on tensors of the CPU, which are as little looked at."""
    seed = torch.tensor([17]) if name == "dropout" else None
    monkeypatch.setattr(reference, "drawn_seed", lambda request, device: seed)
    monkeypatch.setattr(walk, "_is_tame", lambda tensor, wide: False)
    monkeypatch.setattr(retraced, "_swallows", lambda lse: True)
    how = dict(CASES[name])
    tensors, bias = operands(how), how.pop("pse", None)
    sink = torch.linspace(-1, 1, 4) if how.pop("sink", False) else None
    plan = ak.plan(*tensors, sink=sink, pse=bias, backend="tiled", **how)
    there = moved(plan)
    assert there.schedule.fused == 0  # torch's kernel of the CPU runs nothing
    found = results(there, Operands(*tensors, bias, sink), seed)
    exact, rounded = definition(tensors, sink=sink, pse=bias, **how)
    seen = {name: found[name] for name in found if name in exact}
    assert len(seen) >= 5
    agree(seen, exact, rounded)


class Largest(TorchDispatchMode):
    """Sees the bytes of the largest memory that an operator returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize(
    "how", [{"softcap": 5.0}, {"score_fn": bent}], ids=["soft-cap", "function"]
)
def test_no_tensor_is_of_all_scores(how: dict[str, Any]) -> None:
    length = 4096
    x = torch.empty(1, length, 2, 16, device="meta")
    plan = ak.plan(x, x, x, mask=masks.Causal(), backend="tiled", **how)
    with Largest() as seen:
        found = results(moved(plan), Operands(x, x, x))
    assert found["dq"].shape == x.shape
    assert seen.bytes <= 16 * 2**20 < length**2 * 4 / 3  # a tile, and not one head's scores


def test_auto_goes_there_where_kernels_lack_a_term() -> None:
    x = torch.empty(2, 4096, 8, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)

    def on(device: str, **how: Any) -> ak.Plan:
        found = ak.plan(x, x, x, mask=masks.Causal(), **how).request
        return make_plan(replace(found, device=device))

    for how, code in (({"softcap": 30.0}, "softcap"), ({"score_fn": bent}, "score-function")):
        plan = on("npu", **how)
        assert plan.backend == "tiled"
        assert code in {reason.code for reason in plan.passed_over if reason.subject == "ascend"}
        assert on("cuda", **how).backend == "cuda"  # FlexAttention has both
    # Which has no dropout: a bias and dropout go to tiles.
    plan = on("cuda", pse=pse.ALiBi(8), dropout=0.1)
    assert plan.backend == "tiled"
    assert {"flex-dropout", "cuda-unfused"} <= {reason.code for reason in plan.passed_over}
    assert on("xpu").backend == "tiled"


def test_a_small_matrix_is_computed_whole() -> None:
    x = torch.empty(16, 36, 2, 16, device="meta")
    lengths = masks.Padding(range(4, 36, 2))  # each batch element has tiles of its own
    asked = ak.plan(x, x, x, mask=lengths, softcap=5.0).request
    plan = make_plan(replace(asked, device="npu"))
    assert plan.backend == "reference"
    assert "dearer" in {reason.code for reason in plan.passed_over if reason.subject == "tiled"}
    assert make_plan(replace(asked, device="npu"), "tiled").backend == "tiled"
    assert make_plan(replace(asked, device="cpu")).backend == "tiled"
