"""Random compositions: what the fused kernel's emulator computes is what the author asked for.

Every output, statistic and gradient in float64; in low precision within a bound that an
independent low-precision computation of the same case gives (see `_plain_low`).
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from attnkit import layouts
from tests.agreement import agree, agreement, slopes
from tests.properties.compositions import Case
from tests.properties.strategies import cases


def compare_exactly(case: Case) -> None:
    tensors = case.tensors(torch.float64)
    agreement(tensors[:3], "emulated", **case.arguments(tensors))


class Tally:
    """How many random cases ran, and why the others did not."""

    def __init__(self) -> None:
        self.ran = 0
        self.codes: Counter[str] = Counter()

    def run(self, case: Case) -> bool:
        plan, refusals = case.try_plan("emulated")
        if plan is None:
            assert refusals, case
            assert all(r.code and r.reason for r in refusals), case
            self.codes.update({r.code for r in refusals})
            return False
        plan.verify()
        assert "backend 'emulated'" in plan.explain()
        compare_exactly(case)
        self.ran += 1
        return True


def _sweep(examples: int) -> Tally:
    tally, seen = Tally(), Counter()

    @settings(max_examples=examples)
    @given(cases())
    def go(case: Case) -> None:
        seen[tally.run(case)] += 1

    go()
    # A suite that refuses everything would be green: most compositions have to run.
    assert seen[True] > 0.7 * (seen[True] + seen[False]), (seen, tally.codes)
    return tally


def test_random_compositions_run_as_defined_or_are_refused_with_reasons() -> None:
    _sweep(75)


@pytest.mark.usefixtures("no_full_masks")
def test_random_compositions_of_several_calls_run_as_defined() -> None:
    _sweep(75)


@pytest.mark.sweep
def test_many_random_compositions() -> None:
    tally = _sweep(2000)
    # Among so many the kernel has gaps, and they are told: by code, with reasons (`Tally.run`).
    # (Rarer codes are left to chance: mask-shape came once in 2,000.)
    assert {"wrong-cells", "cut-region"} <= set(tally.codes)


# -- low precision ------------------------------------------------------------------------


def _plain_low(case: Case, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Attention in the dtype of its tensors throughout, as a model author would write it.

    Scores, softmax and both products are rounded to the low precision after every operation,
    while the kernel keeps scores and sums in float32 and rounds only weights and results. So
    its error is the yardstick: a kernel that is worse than plain low-precision code is wrong.
    """
    form = layouts.get(case.layout)
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    q, k, v = (form.to_bnsd(t, n) for t, n in zip(leaves, _counts(case), strict=True))
    k, v = (t.repeat_interleave(case.group, 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (case.scale or case.dim**-0.5)
    if case.pse is not None:
        bias = case.pse.term(
            case.q_len, case.kv_len, scale=case.scale or case.dim**-0.5, dtype=torch.float64
        )
        scores = scores + bias.to(scores.dtype)
    allowed = case.mask.materialize(case.q_len, case.kv_len, case.batch, case.heads)
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1) * allowed.any(-1, keepdim=True)
    output = form.from_bnsd(weights @ v)
    grads = torch.autograd.grad(output, leaves, slopes(output))
    return {"out": output.detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def _counts(case: Case) -> tuple[int, int, int]:
    return case.heads, case.kv_heads, case.kv_heads


def _compare_low(case: Case, dtype: torch.dtype) -> None:
    """The error against float64 on the same rounded numbers is that of plain low-precision code.

    `agree` leaves room for one more rounding than the plain code makes (weights are rounded
    before they are divided by their sum, instead of after) in each of the two products.
    """
    low = case.tensors(dtype)
    exact = case.run("reference", tuple(t.double() for t in low))
    plain = _plain_low(case, low)
    for backend in ("reference", "emulated"):
        found = case.run(backend, low)
        agree({name: found[name] for name in plain}, exact, plain)


@settings(max_examples=40)
@given(cases().filter(lambda case: case.seqlens is None and not case.sink))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_no_worse_than_plain_code(dtype: torch.dtype, case: Case) -> None:
    plan, refusals = case.try_plan("emulated", dtype)
    assert plan or refusals
    if plan is not None:
        _compare_low(case, dtype)
