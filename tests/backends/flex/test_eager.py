"""Random compositions through FlexAttention's eager code: equal to the reference, gradients too.

What is shown is that the mask and score functions say what the author said. The compiled
kernel is compared in test_compiled.py, on fewer cases.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings

import attnkit as ak
from attnkit import masks, pse
from tests.agreement import agreement
from tests.backends.flex.eager import EagerFlex
from tests.properties.compositions import Case
from tests.properties.strategies import cases

# A bias has float32 constants: the kernels compute in float32 at most.
SINGLE = torch.float32


def compare(case: Case) -> None:
    tensors, how = case.tensors(torch.float64), {"skip": ("max", "sum")}
    precision = None if case.pse is None else SINGLE
    how |= case.arguments(tensors) | {"precision": precision}
    agreement(tensors[:3], EagerFlex.name, **how)


def sweep(examples: int) -> None:
    seen, codes = Counter(), set()

    @settings(max_examples=examples)
    @given(cases())
    def go(case: Case) -> None:
        plan, refusals = case.try_plan(EagerFlex.name)
        seen[plan is not None] += 1
        codes.update(r.code for r in refusals)
        if plan is not None:
            compare(case)

    go()
    assert seen[True] > 0.9 * seen.total(), (seen, codes)
    assert codes <= {"flex-empty", "flex-packed-bias"}


def test_random_compositions() -> None:
    sweep(80)


@pytest.mark.sweep
def test_many_random_compositions() -> None:
    sweep(500)


def make(*shape: int, grad: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    found = torch.randn(shape, generator=generator, dtype=torch.float64)
    return found.requires_grad_(grad)


BIASES = {
    "alibi": lambda q, kv: pse.ALiBi(4),
    "alibi from the corner": lambda q, kv: pse.ALiBi(4, align="top_left"),
    "learnable": lambda q, kv: pse.ALiBi(4, learnable=True),
    "learnable from the corner": lambda q, kv: pse.ALiBi(4, align="top_left", learnable=True),
    "square root": lambda q, kv: pse.SqrtALiBi(4),
    "t5": lambda q, kv: pse.T5Relative(4, 8, 16, table=make(8, 4)),
    "t5 decoder": lambda q, kv: pse.T5Relative(
        4, 8, 16, bidirectional=False, align="top_left", table=make(8, 4)
    ),
    "key bias": lambda q, kv: pse.KeyBias(make(kv)),
    "key bias per head": lambda q, kv: pse.KeyBias(make(2, 4, kv)),
    "dense": lambda q, kv: pse.Dense(make(q, kv)),
    "dense before the scale": lambda q, kv: pse.Dense(make(2, 4, q, kv), before_scale=True),
    "dense per batch": lambda q, kv: pse.Dense(make(2, 1, q, kv)),
    "a cut": lambda q, kv: pse.ALiBi(4).cut((3, 3 + q), (1, 1 + kv), q_len=q + 9, kv_len=kv + 2),
    "a cut of t5": lambda q, kv: pse.T5Relative(4, 8, 16, table=make(8, 4)).cut(
        (3, 3 + q), (1, 1 + kv), q_len=q + 9, kv_len=kv + 2
    ),
    "a sum": lambda q, kv: pse.ALiBi(4) + pse.KeyBias(make(kv)) + pse.Dense(make(4, q, kv), True),
}


@pytest.mark.parametrize("lengths", [(5, 5), (3, 7), (7, 3), (1, 4)], ids=str)
@pytest.mark.parametrize("name", BIASES)
def test_biases_and_their_gradients(name: str, lengths: tuple[int, int]) -> None:
    q_len, kv_len = lengths
    tensors = make(2, q_len, 4, 3), make(2, kv_len, 2, 3), make(2, kv_len, 2, 5)
    how = {"pse": BIASES[name](q_len, kv_len), "mask": masks.Causal() | masks.Prefix(2)}
    agreement(tensors, EagerFlex.name, precision=SINGLE, softcap=3.0, **how)


@pytest.mark.parametrize("name", ["alibi", "learnable", "t5", "t5 decoder"])
def test_biases_of_distances_in_a_packed_batch(name: str) -> None:
    bias, lens = BIASES[name](0, 0), ak.SeqLens([3, 0, 5, 1], [4, 2, 5, 3])
    tensors = make(9, 4, 3), make(14, 2, 3), make(14, 2, 5)
    how = {"mask": masks.Causal(), "pse": bias, "layout": "TND", "seqlens": lens}
    agreement(tensors, EagerFlex.name, precision=SINGLE, **how)


def test_statistics_follow_the_rules_of_all_backends() -> None:
    x = make(1, 4, 2, 3)
    mask = masks.Causal() - masks.Rows(1, 2)
    stats = ak.attention(x, x, x, mask=mask, backend=EagerFlex.name, return_stats=True).stats
    meant = ak.attention(x, x, x, mask=mask, backend="reference", return_stats=True).stats
    for look in ("lse", "max", "sum"):
        torch.testing.assert_close(getattr(stats, look), getattr(meant, look))
    seen = stats.lse > -torch.inf
    slopes = (torch.autograd.grad(one.lse[seen].square().sum(), x)[0] for one in (stats, meant))
    torch.testing.assert_close(*slopes)
