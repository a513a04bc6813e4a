"""A small campaign with a fixed seed, and faults that the judge has to find."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnkit.backends import BACKENDS, AttentionOutput, Backend, Operands, Stats, register
from attnkit.backends.compiled.backend import LIBRARY
from attnkit.errors import Refusal
from attnkit.planner import Plan, Request
from tests.campaign.case import Case
from tests.campaign.compiled import OPTIONS as COMPILED
from tests.campaign.compiled import judge_compiled
from tests.campaign.decode import draw_decoding, judge_decoding
from tests.campaign.draw import Options, draw
from tests.campaign.judge import judge
from tests.campaign.oracle import Problem, answer
from tests.campaign.run import Plan as Work
from tests.campaign.run import Tally, one


@pytest.mark.parametrize("backend", ["reference", "tiled", "emulated", "flex"])
def test_nothing_is_wrong(backend: str) -> None:
    tally = Tally()
    work = Work(11, (backend,), Options(largest=130), second=True, shrink=False)
    for index in range(50):
        one(work, index, tally)
    assert not tally.wrong, tally.report()
    # A backend that refuses everything would be right, too.
    assert tally.outcomes[f"{backend}: agrees"] > 15, tally.report()


def test_the_kernel_is_right_or_refuses() -> None:
    """It refuses biases and float64, which most cases have: so there are more of them."""
    if LIBRARY.missing():
        pytest.skip(str(LIBRARY.missing()))
    tally = Tally()
    work = Work(11, ("compiled",), Options(largest=200), shrink=False)
    for index in range(120):
        one(work, index, tally)
    assert not tally.wrong, tally.report()
    assert tally.outcomes["compiled: agrees"] > 15, tally.report()


def test_decoding_is_right_or_refused() -> None:
    outcomes = []
    for index in range(40):
        decoding = draw_decoding(11, index)
        if not decoding.steps:
            continue
        verdict = judge_decoding(decoding, "auto")
        assert not verdict.wrong, (index, verdict)
        outcomes.append(verdict.outcome)
    assert outcomes.count("agrees") > 8


def test_compiled_modules_compute_the_same() -> None:
    for index in range(2):
        problem = Problem.of(draw(11, index, COMPILED))
        verdict = judge_compiled(problem, "tiled")
        assert verdict.outcome == "agrees", (problem.case, verdict)


# -- a judge that can fail ---------------------------------------------------------------------

FAULTS = (
    "bias sign", "off by one", "scale dropped", "heads turned", "cap after bias",
    "lse of empty rows", "sink left out", "garbage let in", "max is lse",
)  # fmt: skip


class Planted(Backend):
    """Plain dense attention [b s n d], right but for one fault."""

    name = "planted"

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def refusals(self, request: Request) -> list[Refusal]:
        return []

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        request, wrong = plan.request, self.fault
        q, k, v = (t.transpose(1, 2) for t in (operands.query, operands.key, operands.value))
        sizes = request.q_len, request.kv_len
        cells = request.mask.materialize(*sizes, request.batch, request.num_heads)
        if wrong == "off by one":
            cells = cells.roll(1, -1)
        group = request.num_heads // request.num_kv_heads
        if wrong != "garbage let in":
            seen = cells.any(2).unflatten(1, (-1, group)).any(2)[..., None]
            k, v = (t.masked_fill(~seen, 0.0) for t in (k, v))
        if wrong == "heads turned":
            k, v = (t.repeat(1, group, 1, 1) for t in (k, v))
        else:
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * (1.0 if wrong == "scale dropped" else request.scale)
        if wrong != "cap after bias":
            scores = _capped(scores, request)
        if operands.pse is not None:
            term = operands.pse.term(*sizes, scale=request.scale, dtype=q.dtype)
            scores = scores - term if wrong == "bias sign" else scores + term
        if wrong == "cap after bias":
            scores = _capped(scores, request)
        scores = scores.masked_fill(~cells, -math.inf)
        sink = operands.sink if wrong != "sink left out" else None
        if sink is not None:
            scores = torch.cat([scores, sink[:, None, None].expand(*scores.shape[:-1], 1)], -1)
        peak = scores.detach().amax(-1, keepdim=True)
        powers = (scores - peak.masked_fill(peak == -math.inf, 0.0)).exp()
        total = powers.sum(-1, keepdim=True)
        weights = powers / total.masked_fill(total == 0, 1.0)
        output = (weights[..., : request.kv_len] @ v).transpose(1, 2)
        peak = peak[..., 0]
        lse = (peak + total[..., 0].log()).detach().masked_fill(peak == -math.inf, -math.inf)
        if wrong == "lse of empty rows":
            lse = lse.masked_fill(lse == -math.inf, 0.0)
        return AttentionOutput(output, Stats(lse, lse if wrong == "max is lse" else peak))


def _capped(scores: Tensor, request: Request) -> Tensor:
    if request.softcap is None:
        return scores
    return request.softcap * torch.tanh(scores / request.softcap)


def dense_cases() -> Iterator[Case]:
    """Cases that the planted backend is written for."""
    options = Options(
        largest=12, dtypes=("float64",), packed=False,
        skip=frozenset({"scale", "lse", "pairs", "lowest"}),
    )  # fmt: skip
    for index in range(70):
        case = draw(5, index, options)
        if case.batch and min(case.q_len, case.kv_len):
            yield replace(case, layout="BSND", softcap=case.softcap if index % 2 else 2.0)


@pytest.fixture(scope="module")
def judged() -> list[tuple[Problem, object]]:
    problems = [Problem.of(case) for case in dense_cases()]
    return [(problem, answer(problem)) for problem in problems]


@pytest.mark.parametrize("fault", ["none", *FAULTS])
def test_planted_faults_are_found(fault: str, judged: list) -> None:
    register(Planted(fault))
    try:
        verdicts = [judge(problem, meant, "planted") for problem, meant in judged]
    finally:
        BACKENDS.remove("planted")
    found = sum(verdict.outcome == "differs" for verdict in verdicts)
    others = {v.outcome for v in verdicts} - {"differs", "agrees"}
    assert not others, verdicts
    assert (found == 0) if fault == "none" else (found >= 3), (fault, found)
