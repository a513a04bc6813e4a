"""Compositions under `torch.compile`: one graph, moved or cast after building, equal to the oracle.

python -m tests.campaign.compiled --count 300 --seed 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

import attnkit as ak
from tests.campaign.case import Case
from tests.campaign.draw import Options, draw
from tests.campaign.judge import Built, Verdict, code, judge, use
from tests.campaign.oracle import Problem, answer
from tests.campaign.run import Tally, kind_of

OPTIONS = Options(
    largest=40, dtypes=("float64", "float32", "float32"), skip=frozenset({"garbage", "lowest"})
)


def compiled(layer: ak.Attention) -> Callable[..., Any]:
    """The layer as one graph."""
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


def cast(layer: ak.Attention) -> Callable[..., Any]:
    """The layer cast after it was built, and then compiled before it ran."""
    return compiled(layer.double())


def judge_compiled(problem: Problem, backend: str, skip: frozenset[str] = frozenset()) -> Verdict:
    """Compare a compiled module with the oracle; a float64 one is cast after it was built."""
    torch.compiler.reset()
    wrap = cast if problem.case.dtype == "float64" else compiled
    return judge(problem, answer(problem), backend, skip, wrap)


def judge_compiled_second(problem: Problem, backend: str) -> Verdict:
    """Second derivatives of a compiled module are right, or refused: by us, or by torch."""
    torch.compiler.reset()
    built = Built.of(problem)
    try:
        layer = compiled(built.layer(use(backend)))
        tensors = [built.leaves[name] for name in ("dq", "dk", "dv")]
        weight = torch.ones((), dtype=tensors[0].dtype, requires_grad=True)
        found = layer(*(t * weight for t in tensors), return_stats=True)
        loss = (found.output * built.dy).sum()
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        (second,) = torch.autograd.grad(first, weight)
    except ak.AttnkitError as error:
        return Verdict("refused", codes=(f"second:{type(error).__name__}",))
    except Exception as error:
        known = "BackendRefused" in str(error)
        known |= "double backward" in str(error) or "does not require grad" in str(error)
        return Verdict("refused" if known else "crash", str(error)[:200], ("torch",))
    leaves = problem.leaves()
    scaled = torch.ones((), dtype=torch.float64, requires_grad=True)
    moved = {n: t * scaled if n in ("dq", "dk", "dv") else t for n, t in leaves.items()}
    (meant,) = torch.autograd.grad(problem.loss(problem.run(moved)), scaled, create_graph=True)
    (truth,) = torch.autograd.grad(meant, scaled)
    off = abs(float(second) - float(truth))
    if off <= 1e4 * torch.finfo(tensors[0].dtype).eps * max(1.0, abs(float(truth))):
        return Verdict("agrees")
    return Verdict("second-differs", f"{float(second):.6g} for {float(truth):.6g}")


def simple(case: Case) -> Case:
    """The composition as a module alone, whose mask and bias are its own."""
    return replace(case, mask=case.mask if case.mask[0] != "&" else ("|", *case.mask[1:]),
                   bias=case.bias[:1], module=True, lse=False)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; 0 where nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.compiled", description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--backends", default="tiled,reference,emulated")
    parser.add_argument("--skip", default="", help="as for the campaign")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tally, skip = Tally(), frozenset(given.skip.split(",")) if given.skip else frozenset()
    options = replace(OPTIONS, skip=OPTIONS.skip | skip)
    try:
        for index in range(given.start, given.start + given.count):
            case = draw(given.seed, index, options)
            tally.cases += 1
            for backend in given.backends.split(","):
                problem = Problem.of(case)
                keep(tally, problem.case, index, backend, judge_compiled(problem, backend, skip))
                if index % 4 == 0 and case.batch and not case.packed:
                    problem = Problem.of(simple(case))
                    verdict = judge_compiled_second(problem, backend)
                    keep(tally, problem.case, index, backend, verdict, True)
    except KeyboardInterrupt:
        print("interrupted")
    for entry in tally.wrong:
        print(f"--- {entry['kind']} (index {entry['index']})\n{entry['detail']}\n{entry['code']}\n")
    print(tally.report())
    return 1 if tally.wrong else 0


def keep(
    tally: Tally, case: Case, index: int, backend: str, verdict: Verdict, second: bool = False
) -> None:
    """Count a verdict, and keep the case where it is wrong."""
    tally.note(backend, verdict, second)
    if verdict.wrong:
        kind = kind_of(backend, verdict)
        tally.kinds[kind] += 1
        if tally.kinds[kind] <= 3:
            how = "judge_compiled_second" if second else "judge_compiled"
            script = "from tests.campaign.compiled import *\n"
            script += f"print({how}(Problem.of({case!r}), {backend!r}))"
            told = f"{code(case, backend)}\n{script}"
            tally.wrong.append(
                {"kind": kind, "index": index, "detail": verdict.detail, "code": told}
            )


if __name__ == "__main__":
    sys.exit(main())
