"""What ranks say of a plan is equal where plans are, and says where they differ."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from attnkit import masks, pse
from attnkit.layouts import SeqLens
from attnkit.parallel.guard import Statement
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.sharding import Sharding
from attnkit.parallel.stages import Exchanged, Stages
from attnkit.parallel.statements import statement_of
from attnkit.planner import Composition, read_request
from tests.parallel.processes import Pool

HALVES, TURNED = Sharding.of(8, [[(0, 4)], [(4, 8)]]), Sharding.of(8, [[(4, 8)], [(0, 4)]])


def even(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i + j) % 2 == 0


def plan_of(
    mask: Any = None,
    bias: Any = None,
    heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float32,
    sharding: Sharding = HALVES,
    method: Exchanged = "needed",
    seqlens: SeqLens | None = None,
    grad: bool = False,
    drops: str = "global",
    **composed: Any,
) -> ParallelPlan:
    form = (1, sharding.length) if seqlens is None else (sharding.length,)
    query, key = (
        torch.empty(*form, n, 8, dtype=dtype, device="meta", requires_grad=grad) for n in heads
    )
    layout = "BSND" if seqlens is None else "TND"
    composition = Composition(masks.Causal() if mask is None else mask, bias, layout, **composed)
    request = read_request(composition, query, key, key, seqlens=seqlens, training=True)
    exchange = Stages(method, sharding, ((),) * sharding.size)
    return ParallelPlan(request, bias, sharding, sharding, exchange, dropout=drops)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "mask": ({"mask": masks.SlidingWindow(4)}, "mask SlidingWindow(4)"),
    "cells": ({"mask": masks.Dense.keep(torch.ones(8, 8).tril().bool())}, "mask Dense("),
    "bias": ({"bias": pse.ALiBi(4)}, "bias ALiBi(4)"),
    "heads": ({"heads": (4, 4)}, "heads 4 and 4 of keys"),
    "dtype": ({"dtype": torch.float64}, "dtype float64"),
    "method": ({"method": "ring"}, "method ring"),
    "gradients": ({"grad": True}, "gradients yes"),
    "dropout": ({"dropout": 0.5}, "dropout 0.5"),
    "local dropout": ({"drops": "local"}, "dropout 0, of each rank its own"),
    "scale": ({"scale": 1.0}, "scale 1"),
    "cap": ({"softcap": 3.0}, "soft-cap 3.0"),
    "lengths": ({"seqlens": SeqLens([3, 5])}, "tokens 8 in texts of 3, 5"),
    "sharding": ({"sharding": TURNED}, "ranks with 4, 4 tokens"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_plan_that_differs_in_anything_is_another_statement(case: str) -> None:
    asked, told = OTHERS[case]
    one, other = statement_of(plan_of(), "forward"), statement_of(plan_of(**asked), "forward")
    assert one.digest != other.digest
    assert told in other.told


def test_equal_plans_say_the_same_and_only_once() -> None:
    for asked, _ in OTHERS.values():
        one, other = plan_of(**asked), plan_of(**asked)
        assert statement_of(one, "forward") == statement_of(other, "forward")
        assert statement_of(one, "forward") is statement_of(one, "forward")
        assert statement_of(one, "forward").digest != statement_of(one, "backward").digest
        again = pickle.loads(pickle.dumps(one))
        assert statement_of(again, "forward") == statement_of(one, "forward")


def digests(group: object = None) -> list[str]:
    asked = [*(one for one, _ in OTHERS.values()), {"mask": masks.Predicate(even)}]
    return [statement_of(plan_of(**one), "forward").digest.hex() for one in asked]


def test_other_processes_write_the_same_digest(processes: Pool) -> None:
    """Nothing of it follows from addresses, or from how a process hashes strings."""
    assert processes.run(digests, ranks=2) == [digests()] * 2


def test_words_are_in_the_digest() -> None:
    told = [Statement.of("x", (), words).digest for words in ([], [("a", "b")], [("a", "c")])]
    assert len(set(told)) == 3
