"""Plans are values: equal after a round trip, with equal hashes, in another process too."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnkit as ak
from attnkit import masks, pse
from attnkit.planner import Plan

ROOT = Path(__file__).parents[2]

# Reads a plan, makes the same one, and compares: strings hash differently in every process.
READ = """
import pickle, sys
from tests.planner.test_pickling import PLANS
for name, there in pickle.load(sys.stdin.buffer).items():
    here = PLANS[name]()
    assert there == here, f"{name}: not equal"
    assert hash(there) == hash(here), f"{name}: hashes differ"
    assert {here: 1}[there] == 1
    there.verify()
"""


def plan_of(mask: masks.Mask, bias: pse.Pse | None = None, length: int = 64) -> Plan:
    x = torch.empty(1, length, 2, 8, requires_grad=True)
    plan = ak.plan(x, x, x, mask=mask, pse=bias, backend="emulated")
    hash(plan)  # what is cached must not travel
    assert plan.price
    assert plan.savings is plan.savings  # neighbours are planned once
    assert all(step.queries.layers for step in plan.steps)
    return plan


SINK = masks.Causal() & (masks.SlidingWindow(8) | masks.Columns(0, 3))
PLANS = {
    "window": lambda: plan_of(masks.SlidingWindow(7)),
    "full mask": lambda: plan_of(SINK),
    "slopes": lambda: plan_of(masks.Causal() & masks.Documents([30, 34]), pse.ALiBi(2)),
    "route": lambda: plan_of(SINK, pse.T5Relative(2)),
    "gathered": lambda: plan_of(masks.SameId([(0, 2048), (1, 2048)] * 2), length=8192),
    "sorted": lambda: plan_of(masks.Dilated(2) & masks.SlidingWindow(9)),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_equal_to_its_copies(name: str) -> None:
    plan = PLANS[name]()
    for twin in (copy.deepcopy(plan), copy.copy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin == plan
        assert hash(twin) == hash(plan)
        assert "_hash" in vars(twin)
        for step in pickle.loads(pickle.dumps(plan)).steps:  # nor what a run has laid out
            assert vars(step) == step.__getstate__()
    assert "_hash" not in plan.__getstate__()


def test_plans_are_equal_to_those_of_another_process() -> None:
    found = subprocess.run(
        [sys.executable, "-c", READ],
        input=pickle.dumps({name: make() for name, make in PLANS.items()}),
        capture_output=True,
        cwd=ROOT,
        check=False,
    )
    assert found.returncode == 0, found.stderr.decode()
