"""Sparse masks as people use them, small: every plan is proven, and equal to the reference.

With grouped heads, an odd number of tokens and rows without a key. Plans without a mask of one
entry per cell are looked at, as for longer texts; tiles may have masks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from attnkit import masks
from attnkit.backends import run_plan
from attnkit.backends.base import Operands
from attnkit.geometry import Region
from attnkit.planner import Composition, Plan, Request, read_request
from attnkit.planner.calls import Block
from attnkit.planner.lower import search_for
from attnkit.planner.search import Search
from benchmarks._sparse_masks import SMALL, SPARSE
from tests.agreement import Results, definition, near, slopes

HEADS, KV_HEADS, DIM = 4, 2, 8
NAMES = [one.label(SMALL) for one in SPARSE]


@pytest.fixture(autouse=True)
def masks_of_tiles(no_full_masks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weigh masks that are as large as some tiles, and smaller than all but two of the masks."""
    monkeypatch.setattr(sys.modules["attnkit.planner.lower"], "MOST_MASK_CELLS", 6000)


@cache
def odd(name: str) -> tuple[masks.Mask, int, int]:
    """Return a mask of odd sizes, some rows of which see no key, and its lengths."""
    return SPARSE[NAMES.index(name)].odd()


def request_for(name: str, dtype: torch.dtype = torch.float64) -> Request:
    mask, *_ = odd(name)
    return read_request(Composition(mask=mask), *tensors_for(name, dtype))


def tensors_for(name: str, dtype: torch.dtype) -> list[Tensor]:
    _, q_len, kv_len = odd(name)
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, q_len, HEADS, DIM), (1, kv_len, KV_HEADS, DIM), (1, kv_len, KV_HEADS, DIM))
    made = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [tensor.to(dtype).requires_grad_() for tensor in made]


@cache
def plan_for(name: str, dtype: torch.dtype = torch.float64, *, gathers: bool = True) -> Plan:
    found = search_for(request_for(name, dtype), Search(gathers=gathers))
    return replace(found, backend="emulated")


def computed(plan: Plan, tensors: list[Tensor]) -> Results:
    found = run_plan(plan, Operands(*tensors, None, None))
    names, stats = ("dq", "dk", "dv"), found.stats
    grads = torch.autograd.grad(found.output, tensors, slopes(found.output))
    out = {"out": found.output, "lse": stats.lse, "max": stats.max, "sum": stats.sum}
    return {n: t.detach() for n, t in {**out, **dict(zip(names, grads, strict=True))}.items()}


def ways(plan: Plan) -> Iterator[Plan]:
    """The plan, and what would be chosen at other prices."""
    for way in (plan.solution, *plan.alternatives):
        yield replace(plan, steps=way.launches, alternatives=())


def cut(block: Block, target: Region) -> bool:
    """Whether a window or a mask leaves out cells of a sequence."""
    return target != Region.full(*block.sizes)


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_reference(name: str) -> None:
    """Whatever is chosen, and one way of each other kind; all others are proven at least."""
    plan, tensors = plan_for(name), tensors_for(name, torch.float64)
    meant, _ = definition(tensors, mask=plan.request.mask)
    kinds = set()
    for way in ways(plan):
        way.verify()
        if way.solution.label not in kinds:
            near(computed(way, tensors), meant, 1e-10, 1e-10)
        kinds.add(way.solution.label)


def test_calls_of_every_kind_gather() -> None:
    """A search that finds none, or a proof that refuses them, would pass all other tests."""
    found = {
        step.label
        for name in NAMES
        for way in ways(plan_for(name))
        for step in way.steps
        for block, target in zip(step.blocks, step.targets, strict=True)
        if not block.is_rectangle and cut(block, target) == (step.call.atten_mask is not None)
    }
    tiles = {"mode 1, one mask for all tiles", "mode 1, a mask for each tile"}
    assert found >= {"no mask", "mode 3", "mode 4", "mode 6", *tiles}


def error(name: str, plan: Plan) -> float:
    """Return the error of a bfloat16 output against float64, relative to its size."""
    tensors = tensors_for(name, torch.bfloat16)
    exact, _ = definition([t.double() for t in tensors], mask=plan.request.mask)
    found = run_plan(plan, Operands(*tensors, None, None)).output
    return float((found.detach().double() - exact["out"]).norm() / exact["out"].norm())


@pytest.mark.parametrize("name", NAMES)
def test_gathered_rows_are_rounded_once(name: str) -> None:
    """Partial outputs are rounded before they are merged, and whole rows are not.

    A tenth is for parts of a single key, which are exact.
    """
    now, old = (plan_for(name, torch.bfloat16, gathers=gathers) for gathers in (True, False))
    assert now == old or error(name, now) <= 1.1 * error(name, old)
