"""Decoding step by step through `MultiHeadAttention` with a `KVCache`, against the whole text.

    python -m tests.campaign.decode --count 3000 --seed 1

The oracle projects and attends once, over the whole text, in float64. A step that cannot equal it
must raise one of our errors; one that answers must be right.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

import attnkit as ak
from tests.campaign.case import Case, bias_text, numbers, text
from tests.campaign.draw import Options, draw
from tests.campaign.judge import Verdict, _told, made, shrunk
from tests.campaign.oracle import Problem, attend
from tests.campaign.run import Tally

OPTIONS = Options(
    largest=16, dtypes=("float64", "float64", "float32"), packed=False, square=True,
    skip=frozenset({"garbage", "lse", "lowest"}),
)  # fmt: skip
DIM = 6
REASONS = (
    "lengths count the keys that exist", "see keys that came after", "see keys that come later",
    "moves as the text grows", "q_len is not known", "kv_len is not known", "is built for",
)  # fmt: skip


@dataclass(frozen=True)
class Decoding:
    """A composition, and how its text comes: the sizes of the steps, what is taken back."""

    case: Case
    steps: tuple[int, ...]
    crosses: bool = False
    capacity: bool = False
    back: int = 0
    split: bool = False


def draw_decoding(seed: int, index: int, skip: frozenset[str] = frozenset()) -> Decoding:
    """Return one decoding, the same for the same arguments."""
    random = Random(f"decode:{seed}:{index}")
    crosses = random.random() < 0.2
    case = draw(seed, index, replace(OPTIONS, square=not crosses, skip=OPTIONS.skip | skip))
    case = replace(case, value_dim=case.dim, dim=case.dim, layout="BSND", strided=False)
    if case.value_dim != case.dim or (case.scale is not None and abs(case.scale) > 3):
        case = replace(case, scale=None)
    if not crosses and random.random() < 0.6:  # else most masks see ahead, and are refused
        align = random.choice(("bottom_right", "top_left"))
        case = replace(case, mask=("&", case.mask, ("Causal", align)))
    left, steps = case.q_len, []
    while left:
        step = random.randint(1, left) if random.random() < 0.3 else 1
        steps.append(step)
        left -= step
    return Decoding(
        case,
        tuple(steps),
        crosses,
        random.random() < 0.3,
        random.randint(1, 3) if random.random() < 0.2 and not crosses else 0,
        case.mask[0] == "&" and random.random() < 0.5,
    )


def weights(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The projections, rounded to the case's dtype."""
    width, kv_width = case.heads * case.dim, case.kv_heads * case.dim
    sizes = {"q_proj": (width, DIM), "k_proj": (kv_width, DIM), "v_proj": (kv_width, DIM)}
    sizes["out_proj"] = (DIM, width)
    made = {}
    for n, (name, shape) in enumerate(sizes.items()):
        rounded = (numbers(case.seed + 20 + n, shape) / math.sqrt(shape[1])).to(case.torch_dtype)
        made[name] = rounded.to(dtype)
    return made


def texts(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The text, and the context of a cross-attention."""
    x = numbers(case.seed + 30, (case.batch, case.q_len, DIM), case.torch_dtype)
    context = numbers(case.seed + 31, (case.batch, case.kv_len, DIM), case.torch_dtype)
    return x.to(dtype), context.to(dtype)


def whole(problem: Problem, crosses: bool, dtype: torch.dtype) -> Tensor:
    """The layer's output for the whole text, from the definition."""
    case = problem.case
    x, context = texts(case, dtype)
    source = context if crosses else x
    w = weights(case, dtype)

    def heads(t: Tensor, name: str) -> Tensor:
        projected = t @ w[name].T
        return projected.unflatten(-1, (w[name].shape[0] // case.dim, case.dim)).transpose(1, 2)

    sink = problem.given.sink
    found = attend(
        case, heads(x, "q_proj"), heads(source, "k_proj"), heads(source, "v_proj"),
        None if sink is None else sink.to(dtype),
        [None if p.tensor is None else p.tensor.detach().to(dtype) for p in problem.addends],
        problem.given.cells,
    )  # fmt: skip
    merged = found.output.transpose(1, 2).reshape(*x.shape[:2], case.heads * case.dim)
    return merged @ w["out_proj"].T


@torch.no_grad()
def judge_decoding(one: Decoding, backend: str) -> Verdict:
    """Compare every step's rows with those of the whole text."""
    case = one.case
    problem = Problem.of(case)
    exact, low = (
        whole(problem, one.crosses, torch.float64),
        whole(problem, one.crosses, torch.float32),
    )
    eps = torch.finfo(case.torch_dtype).eps
    apart = float((low.double() - exact).abs().max()) if exact.numel() else 0.0
    top = float(exact.abs().max()) if exact.numel() else 0.0
    bound = 32 * apart * eps / torch.finfo(torch.float32).eps + 256 * eps * max(top, 1.0)
    try:
        found = torch.cat(list(_steps(one, problem, backend)), 1)
    except ak.BackendRefused as refused:
        return Verdict("refused", codes=tuple(sorted({r.code for r in refused.refusals})))
    except ak.CompositionError as error:
        return Verdict("refused", codes=(_reason(error),))
    except Exception as error:
        return Verdict("crash", _told(error))
    difference = (found.double() - exact).abs()
    if not difference.numel() or bool((difference <= bound).all()):
        return Verdict("agrees")
    row = int(difference.nan_to_num(nan=math.inf).amax((0, 2)).argmax())
    worst = float(difference.max())
    return Verdict("differs", f"output: row {row} is off by {worst:.3g} (allowed {bound:.2g})")


def _reason(error: Exception) -> str:
    words = str(error)
    return next(
        (f"composition: ... {sign} ..." for sign in REASONS if sign in words),
        f"composition: {words[-80:]}",
    )


def _steps(one: Decoding, problem: Problem, backend: str):  # type: ignore[no-untyped-def]
    case = one.case
    mask, late = (case.mask[1], case.mask[2]) if one.split else (case.mask, None)
    biases = [made(bias_text(spec)) for spec in case.bias]
    layer = ak.MultiHeadAttention(
        DIM, case.heads, num_kv_heads=case.kv_heads, head_dim=case.dim, mask=made(text(mask)),
        pse=None if not biases else biases[0] if len(biases) == 1 else ak.pse.Sum(biases),
        scale=case.scale, softcap=case.softcap, sink=case.sink, backend=backend,
        dtype=case.torch_dtype,
    )  # fmt: skip
    for name, tensor in weights(case, case.torch_dtype).items():
        getattr(layer, name).weight.copy_(tensor)
    if problem.given.sink is not None:
        layer.attention.sink.data = problem.given.sink.clone()
    x, context = texts(case, case.torch_dtype)
    cache = ak.KVCache(capacity=max(case.q_len, case.kv_len, 1) if one.capacity else None)
    at, again = 0, one.back
    for n, step in enumerate(one.steps):
        how = {"mask": made(text(late))} if late is not None else {}
        if one.crosses:
            given = context if n == 0 or n % 3 == 0 else None
            yield layer(x[:, at : at + step], given, cache=cache, **how)
        else:
            made_rows = layer(x[:, at : at + step], cache=cache, **how)
            if again and n == len(one.steps) // 2:
                cache.truncate(at)  # a draft that was rejected, and comes once more
                made_rows = layer(x[:, at : at + step], cache=cache, **how)
            yield made_rows
        at += step


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; 0 where nothing is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.decode", description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--backends", default="auto,reference,emulated")
    parser.add_argument("--skip", default="", help="as for the campaign")
    given = parser.parse_args(arguments)
    skip = frozenset(given.skip.split(",")) if given.skip else frozenset()
    torch.set_num_threads(1)
    tally = Tally()
    try:
        for index in range(given.start, given.start + given.count):
            one = draw_decoding(given.seed, index, skip)
            if not one.case.batch or not one.case.q_len:
                continue
            tally.cases += 1
            for backend in given.backends.split(","):
                note(tally, one, backend, index)
    except KeyboardInterrupt:
        print("interrupted")
    for entry in tally.wrong:
        print(f"--- {entry['kind']} (index {entry['index']})\n{entry['detail']}\n{entry['code']}\n")
    print(tally.report())
    return 1 if tally.wrong else 0


def note(tally: Tally, one: Decoding, backend: str, index: int, most: int = 6) -> Verdict:
    """Judge one decoding and keep what came of it."""
    verdict = judge_decoding(one, backend)
    tally.note(backend, verdict, False)
    if verdict.wrong:
        parts = "+".join([one.case.mask[0], *(spec[0] for spec in one.case.bias)])
        kind = f"{backend}: {verdict.outcome} {parts}"
        tally.kinds[kind] += 1
        if tally.kinds[kind] <= 2 and len(tally.wrong) < 10 * most:
            small = _shrunk(one, backend, verdict.outcome)
            script = "from tests.campaign.decode import *\n"
            script += f"print(judge_decoding({small!r}, {backend!r}))"
            detail = judge_decoding(small, backend).detail
            tally.wrong.append({"kind": kind, "index": index, "detail": detail, "code": script})
    return verdict


def _shrunk(one: Decoding, backend: str, outcome: str) -> Decoding:
    for simpler in (
        replace(one, back=0), replace(one, capacity=False), replace(one, split=False),
        replace(one, back=0, capacity=False, split=False),
    ):  # fmt: skip
        if simpler != one and judge_decoding(simpler, backend).outcome == outcome:
            one = simpler

    def wrong(case: Case) -> bool:
        same = case.q_len == one.case.q_len and case.kv_len == one.case.kv_len
        return same and judge_decoding(replace(one, case=case), backend).outcome == outcome

    try:
        return replace(one, case=shrunk(one.case, wrong, 40))
    except Exception:
        return one


if __name__ == "__main__":
    sys.exit(main())
