"""The campaign: many random compositions, every backend, counts and reproducing code.

python -m tests.campaign --count 100000 --seed 1 --backends reference,tiled,emulated,flex
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

import torch

from tests.campaign.case import Case
from tests.campaign.draw import Options, draw
from tests.campaign.judge import Verdict, code, judge, judge_second, meant_second, shrunk
from tests.campaign.oracle import Answer, Problem, answer

SECOND_CELLS = 4_000


@dataclass
class Tally:
    """What came of the cases so far."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.cases += other.cases
        for name in ("outcomes", "codes", "messages", "kinds"):
            getattr(self, name).update(getattr(other, name))
        self.wrong += other.wrong

    def note(self, backend: str, verdict: Verdict, second: bool) -> None:
        what = "second " if second else ""
        self.outcomes[f"{backend}: {what}{verdict.outcome}"] += 1
        self.codes.update(f"{backend}: {code}" for code in verdict.codes)
        if verdict.outcome == "refused" and verdict.detail:
            self.messages[f"{backend}: {verdict.detail[:120]}"] += 1

    def report(self) -> str:
        lines = [f"{self.cases} cases"]
        lines += [f"  {n:8}  {name}" for name, n in sorted(self.outcomes.items())]
        lines += ["refusals by code"]
        lines += [f"  {n:8}  {name}" for name, n in self.codes.most_common(60)]
        if self.messages:
            lines += ["composition errors"]
            lines += [f"  {n:8}  {name}" for name, n in self.messages.most_common(12)]
        if self.kinds:
            lines += ["what is wrong, by kind"]
            lines += [f"  {n:8}  {name}" for name, n in self.kinds.most_common(40)]
        return "\n".join(lines)


def kind_of(backend: str, verdict: Verdict) -> str:
    """Mismatches that look alike are reported a few times only."""
    if verdict.outcome == "crash":
        return f"{backend}: crash {verdict.detail.split(': ')[0]}"
    names = sorted({part.split(":")[0].strip("0123456789 ") for part in verdict.detail.split(";")})
    nan = " nan" if "nan for" in verdict.detail else ""
    return f"{backend}: {verdict.outcome} {','.join(names)}{nan}"


@dataclass(frozen=True)
class Plan:
    """What a process does with its cases."""

    seed: int
    backends: tuple[str, ...]
    options: Options = field(default_factory=Options)
    second: bool = False
    shrink: bool = True
    every: int = 1000


def one(plan: Plan, index: int, tally: Tally) -> None:
    """Judge one case on every backend."""
    case = draw(plan.seed, index, plan.options)
    problem = Problem.of(case)
    meant = answer(problem)
    tally.cases += 1
    without = None
    for backend in plan.backends:
        verdict = judge(problem, meant, backend, plan.options.skip)
        tally.note(backend, verdict, False)
        if verdict.wrong:
            _keep(tally, case, index, backend, verdict, plan)
        if case.lse and verdict.outcome in ("lse-detached", "refused"):
            # What is refused for the sake of the statistics is judged without them.
            without = without or _without_lse(case)
            verdict = judge(*without, backend, plan.options.skip)
            tally.note(backend, verdict, False)
            if verdict.wrong:
                _keep(tally, without[0].case, index, backend, verdict, plan)
    if plan.second and _small(case):
        again = meant_second(problem)
        # The eager code that stands in for FlexAttention's kernel has no second derivatives.
        for backend in (name for name in plan.backends if name != "flex"):
            verdict = judge_second(problem, again, backend)
            tally.note(backend, verdict, True)
            if verdict.wrong:
                _keep(tally, case, index, backend, verdict, plan)


def _without_lse(case: Case) -> tuple[Problem, Answer]:
    problem = Problem.of(replace(case, lse=False))
    return problem, answer(problem)


def _small(case: Case) -> bool:
    q = max((q for q, _ in case.sequences), default=0)
    kv = max((kv for _, kv in case.sequences), default=0)
    reasonable = case.scale is None or abs(case.scale) <= 3
    reasonable &= case.dtype in ("float64", "float32") and not case.garbage
    reasonable &= all("16" not in repr(spec) for spec in case.bias)  # a bias of half precision
    # A cut of a matrix is a view: the factor of its tensor would come after the cut.
    views = any(s[0] == "Cut" and s[1][0] in ("Dense", "KeyBias") for s in case.bias)
    return reasonable and not views and len(case.sequences) * case.heads * q * kv <= SECOND_CELLS


MOST_OF_A_KIND = 6


def _keep(tally: Tally, case: Case, index: int, backend: str, verdict: Verdict, plan: Plan) -> None:
    kind = kind_of(backend, verdict)
    tally.kinds[kind] += 1
    if tally.kinds[kind] > MOST_OF_A_KIND:
        return
    small = case
    if plan.shrink and tally.kinds[kind] <= 3 and max(case.q_len, case.kv_len) <= 700:
        second = verdict.outcome.startswith("second") or (
            verdict.outcome == "crash" and "double" in verdict.detail
        )
        small = shrunk(case, lambda one: _kind(one, backend, second, plan) == kind)
    entry = {"kind": kind, "index": index, "detail": verdict.detail, "code": code(small, backend)}
    tally.wrong.append(entry)


def _kind(case: Case, backend: str, second: bool, plan: Plan) -> str:
    problem = Problem.of(case)
    if second:
        return kind_of(backend, judge_second(problem, meant_second(problem), backend))
    return kind_of(backend, judge(problem, answer(problem), backend, plan.options.skip))


def share(number: int, plan: Plan, indices: range, stop: Any, told: Any) -> None:
    """Run some of the cases in this process, and tell what came of them until it is to stop."""
    torch.set_num_threads(1)
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, signal.SIG_IGN)  # the parent says when
    tally = Tally()
    for n, index in enumerate(indices):
        if stop.is_set():
            break
        try:
            one(plan, index, tally)
        except Exception as error:  # the judge itself: say which case, and go on
            tally.outcomes[f"judge: {type(error).__name__}"] += 1
            tally.wrong.append({"kind": "judge", "index": index, "detail": repr(error), "code": ""})
        if n % 200 == 199:
            gc.collect()
        if n % plan.every == plan.every - 1:
            told.put((number, tally, False))
    told.put((number, tally, True))


def campaign(plan: Plan, indices: range, processes: int, out: Path | None) -> Tally:
    """Share the cases among processes; an interrupt ends them all, with their counts."""
    context = get_context("spawn")
    stop, told = context.Event(), context.Queue()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: stop.set())
    parts = [indices[n::processes] for n in range(processes)]
    workers = [
        context.Process(target=share, args=(n, plan, part, stop, told), daemon=True)
        for n, part in enumerate(parts)
    ]
    for worker in workers:
        worker.start()
    started, latest, left = time.perf_counter(), dict[int, Tally](), set(range(processes))
    whole = Tally()
    while left:
        try:
            number, tally, done = told.get(timeout=5)
        except Empty:
            left = {n for n in left if workers[n].is_alive()}
            continue
        latest[number] = tally
        if done:
            left.discard(number)
        whole = Tally()
        for part in latest.values():
            whole.add(part)
        spent = 1e3 * (time.perf_counter() - started) / max(whole.cases, 1)
        wrong = sum(whole.kinds.values())
        print(f"{whole.cases} cases, {spent:.1f} ms each, {wrong} wrong", file=sys.stderr)
        if out is not None:
            out.write_text(json.dumps(vars(whole), indent=1))
    if whole.cases < len(indices):
        print(f"{len(indices) - whole.cases} cases were not run")
    return whole


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign that the arguments ask for; 0 where nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, help="the first index: resumes a campaign")
    parser.add_argument("--backends", default="reference,tiled,emulated,flex")
    parser.add_argument("--second", action="store_true", help="second derivatives of small cases")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("--largest", type=int, default=3000, help="the longest sequence")
    parser.add_argument(
        "--skip", default="", help="features left out: garbage,softcap,scale,lse,lowest,pairs,max"
    )
    parser.add_argument("--every", type=int, default=500, help="how often progress is told")
    parser.add_argument("--out", type=Path, help="a JSON file for the counts and mismatches")
    given = parser.parse_args(arguments)
    skip = frozenset(given.skip.split(",")) if given.skip else frozenset()
    plan = Plan(
        given.seed,
        tuple(given.backends.split(",")),
        Options(largest=given.largest, skip=skip),
        given.second,
        not given.no_shrink,
        given.every,
    )
    indices = range(given.start, given.start + given.count)
    tally = campaign(plan, indices, given.processes, given.out)
    for entry in tally.wrong:
        print(
            f"--- {entry['kind']}  (index {entry['index']})\n{entry['detail']}\n{entry['code']}\n"
        )
    print(tally.report())
    return 1 if tally.wrong else 0
