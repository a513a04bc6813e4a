"""Attention in the shapes of models, beside the best call of torch: ``benchmarks/models.py``.

Every row is raced against each form that a good user would write by hand; the fastest of them is
the one that counts, and the table names it. Lengths that change in life change with every call,
and both sides make their masks of them within their time. One process, in turns, medians of the
ratios of turns. Outputs and gradients are compared first. ``--rows decode`` runs the rows that
have the word in their names, ``--add`` keeps the others of the last run. Writes
benchmarks/results/models.md, and the rows as data beside it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from _decode_rows import DECODING
from _model_rows import ROWS, Row, Sides, Way
from attention import DTYPES, machine
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "models.md"
# Of the norm of what is compared; 16 bits round each of some hundred addends.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
PASSES = ("forward", "forward + backward")
Timed = Callable[[Any], object]


def passes(sides: Sides, way: Way, what: str, slope: Tensor | None) -> Timed:
    """Return a way as it is timed."""
    if what == "forward":
        return torch.no_grad()(way)
    return lambda drawn: torch.autograd.grad(way(drawn), sides.tensors, slope)


def results(sides: Sides, way: Way, what: str, drawn: Any) -> list[Tensor]:
    """Return the output and, with the backward pass, the gradients of what counts of it."""
    if what == "forward":
        with torch.no_grad():
            output = way(drawn)
    else:
        output = way(drawn)
    counts = torch.ones_like(output) if sides.counts is None else sides.counts(drawn).to(output)
    found = [torch.where(counts.bool(), output, 0).detach()]
    if what != "forward":
        slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        found += torch.autograd.grad(output, sides.tensors, slope.to(output) * counts)
    return found


def agreeing(row: Row, sides: Sides, what: str, dtype: str) -> dict[str, Way]:
    """Return the ways by hand that run here; `SystemExit` if one computes something else."""
    drawn = sides.draw(Random(1))
    ours = results(sides, sides.ours, what, drawn)
    fine = {}
    for name, way in sides.by_hand.items():
        try:
            theirs = results(sides, way, what, drawn)
        except (NotImplementedError, RuntimeError) as error:
            print(f"  {row.name}: {name} does not run: {str(error).splitlines()[0][:120]}")
            continue
        for a, b in zip(ours, theirs, strict=True):
            apart = float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-12))
            if not apart <= TOLERANCE[dtype]:
                raise SystemExit(f"{row.name}, {what}: ours and {name!r} are {apart:.1e} apart")
        fine[name] = way
    return fine


def turns(
    ways: dict[str, Timed], draw: Callable[[Random], Any], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return what each way took, turn by turn, in an order that is drawn anew.

    The first turn does not count.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    order, rng = list(ways), Random(rounds)
    for turn in range(rounds + 1):
        drawn = draw(rng)
        rng.shuffle(order)
        for name in order:
            start = clock()
            ways[name](drawn)
            if turn:
                times[name].append(clock() - start)
    return times


def rounds_for(seconds: float, rounds: int) -> int:
    """Return how many turns a call of some length gets: short ones more, long ones fewer."""
    return max(rounds // 3, min(8 * rounds, int(rounds * 0.2 / seconds), 200))


def measure(row: Row, dtype: str, what: str, options: argparse.Namespace) -> dict[str, Any]:
    """Race a row: first the ways by hand among themselves, then the fastest against ours."""
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    torch.manual_seed(0)
    sides = row.make(DTYPES[dtype])
    fine = agreeing(row, sides, what, dtype)
    if not fine:
        raise SystemExit(f"{row.name}: no way by hand runs here")
    shape = sides.ours(sides.draw(Random(1))) if what != "forward" else None
    slope = None if shape is None else torch.randn(shape.shape).to(shape)
    timed = {name: passes(sides, way, what, slope) for name, way in fine.items()}
    heats = turns(timed, sides.draw, 3, clock)
    best = min(heats, key=lambda name: median(heats[name]))
    pair = {"ours": passes(sides, sides.ours, what, slope), "theirs": timed[best]}
    rounds = rounds_for(min(heats[best]), options.rounds)
    taken = turns(pair, sides.draw, rounds, clock)
    ratios = [b / a for a, b in zip(taken["ours"], taken["theirs"], strict=True)]
    ours = median(taken["ours"]) / sides.steps
    found = {
        "row": row.name,
        "dtype": dtype,
        "pass": what if row.trains else "step",
        "ms": ours * 1e3,
        "best": best,
        "ratio": median(ratios),
        "low": sorted(ratios)[len(ratios) // 4],
        "high": sorted(ratios)[-1 - len(ratios) // 4],
        "others": {name: median(each) / sides.steps * 1e3 for name, each in heats.items()},
    }
    if sides.reads:
        read = turns(dict(sides.reads), sides.draw, max(5, options.rounds), clock)
        found["read"] = min(median(each) for each in read.values()) * 1e3
    return found


def table_row(found: dict[str, Any]) -> str:
    """Return a row as text."""
    read = f"{found['read']:.3f} | {found['ms'] / found['read']:.2f}" if "read" in found else " | "
    return (
        f"| {found['row']} | {found['pass']} | {found['ms']:.3g} | {found['best']} "
        f"| {found['ratio']:.2f} | {found['low']:.2f} to {found['high']:.2f} | {read} |"
    )


def page(data: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables."""
    yield from ("# Attention in the shapes of models", "", data["machine"] + ".", "")
    yield from (f"    {command}" for command in data["commands"])
    yield from ("", _EXPLAINED)
    for dtype in DTYPES:
        chosen = [found for found in data["rows"] if found["dtype"] == dtype]
        if chosen:
            yield from ("", f"## {dtype}", "", _HEAD, "|---|---|---:|---|---:|---|---:|---:|")
            yield from (table_row(found) for found in chosen)


_HEAD = "| model | pass | ours, ms | best by hand | ratio | quarters | read, ms | ours / read |"
_EXPLAINED = """\
The ratio says how many times as long as ours the best form by hand took, in the same turn: the
median, and the middle half of turns. Where lengths change from call to call, both sides make \
their masks anew.
Decoding rows are a step of a loop; "read" is what it takes to read the keys and values once, in
the fastest of several ways, and the last column how many times as long our step takes."""


def wanted(options: argparse.Namespace) -> Iterator[tuple[Row, str, str]]:
    """Yield rows, dtypes and passes."""
    for dtype in options.dtypes:
        for row in (*ROWS, *DECODING):
            if (row.sixteen or dtype == "float32") and re.search(options.rows, row.name, re.I):
                for what in PASSES[: 1 + row.trains]:
                    yield row, dtype, what


def main() -> None:
    """Race the rows, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="", help="a pattern that the names of rows match")
    parser.add_argument("--rounds", type=int, default=15, help="turns; more where calls are short")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--add", action="store_true", help="keep the rows of earlier runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    store = RESULTS.with_suffix(".json")
    data: dict[str, Any] = {"commands": [], "rows": []}
    if options.add and store.exists():
        data = json.loads(store.read_text(encoding="utf-8"))
    data["machine"] = machine(options.threads)
    data["commands"].append(f"python {shlex.join(['benchmarks/models.py', *sys.argv[1:]])}")
    known = {(found["row"], found["dtype"], found["pass"]): found for found in data["rows"]}
    names = [row.name for row in (*ROWS, *DECODING)]
    RESULTS.parent.mkdir(exist_ok=True)
    for row, dtype, what in wanted(options):
        found = measure(row, dtype, what, options)
        known[found["row"], found["dtype"], found["pass"]] = found
        print(table_row(found), flush=True)
        # Written row by row: it takes long, and what was measured is not lost.
        data["rows"] = sorted(known.values(), key=lambda found: names.index(found["row"]))
        store.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        RESULTS.write_text("\n".join([*page(data), ""]), encoding="utf-8")
    print(f"written: {RESULTS.name}")


if __name__ == "__main__":
    main()
