"""Masks that are no region, beside the regions that they lie in: time, first call, memory.

    python benchmarks/opaque.py [--lengths 4096 16384] [--repeats 15]

Each mask takes turns with its bound as a mask: both compute the same tiles, and the one has to
know its cells besides. `first` is a call with a mask that no plan was made for, its planning and
its reading included. Memory is what a forward and a backward pass add to the resident size of a
process of their own, beyond operands, output and gradients. Writes benchmarks/results/opaque.md.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch
from attention import HEADS, alternate, forward_only, machine, resident_peak, with_backward
from torch import Tensor

import attnkit as ak
from attnkit import masks
from attnkit.masks import Mask

RESULT = Path(__file__).parent / "results" / "opaque.md"
DIM = 64
LONGEST_PLANE = 4096  # of masks that see a part of everything


class Case(NamedTuple):
    """A mask that is no region, what it lies in, and the backend."""

    name: str
    mask: Callable[[int], Mask]
    bound: Callable[[int], Mask]
    backend: str = "tiled"


def window(length: int) -> Mask:
    return masks.Causal() & masks.SlidingWindow(64)


def full(length: int) -> Mask:
    return masks.Full()


def documents(length: int) -> Mask:
    return masks.Causal() & masks.Documents([length // 16] * 16)


def scattered(length: int) -> Mask:
    draw = torch.Generator().manual_seed(0)
    cells = torch.zeros(length, length, dtype=torch.bool)
    for rows in cells.split(256):
        rows.copy_(torch.rand(rows.shape, generator=draw) < 0.5)
    return masks.Dense.keep(cells)


def function(batch: int | None = None, heads: int | None = None) -> Mask:
    """A new function each time, so that nothing of it is known."""
    if heads is None:
        return masks.Predicate(lambda b, h, i, j: (i * i + 3 * j) % 5 != 0)
    return masks.Predicate(lambda b, h, i, j: (i * i + 3 * j + b + h) % 5 != 0, batch, heads)


CASES = [
    Case("Dilated(2), window 64", lambda n: window(n) & masks.Dilated(2), window),
    Case("Dilated(3), window 64", lambda n: window(n) & masks.Dilated(3), window),
    Case("Predicate, window 64", lambda n: window(n) & function(), window),
    Case(
        "Predicate of batch and head, window 64", lambda n: window(n) & function(1, HEADS), window
    ),
    Case(
        "a Dilated per head, window 64",
        lambda n: window(n) & masks.PerHead([masks.Dilated(2 + h % 3) for h in range(HEADS)]),
        window,
    ),
    Case("Dense, window 64", lambda n: window(n) & scattered(n), window),
    Case("Predicate, 16 documents", lambda n: documents(n) & function(), documents),
    Case("Dilated(2)", lambda n: masks.Dilated(2), full),
    Case("Predicate", lambda n: function(), full),
    Case("Dense", scattered, full),
    Case("Dilated(2), window 64", lambda n: window(n) & masks.Dilated(2), window, "reference"),
    Case("Predicate, window 64", lambda n: window(n) & function(), window, "reference"),
]


def operands(length: int) -> tuple[list[Tensor], Tensor]:
    shape = (1, HEADS, length, DIM)
    return [torch.randn(shape, requires_grad=True) for _ in range(3)], torch.randn(shape)


def run(mask: Mask, tensors: list[Tensor], backend: str) -> Callable[[], Tensor]:
    def call() -> Tensor:
        return cast(Tensor, ak.attention(*tensors, mask=mask, layout="BNSD", backend=backend))

    return call


def first_call(case: Case, length: int, clock: Callable[[], float]) -> float:
    """Seconds of a forward pass with a mask that is new."""
    tensors, _ = operands(length)
    forward_only(run(case.bound(length), tensors, case.backend))()
    mask = case.mask(length)
    ak.backends.make_plan.cache_clear()
    start = clock()
    forward_only(run(mask, tensors, case.backend))()
    return clock() - start


def measure(number: int, length: int, options: argparse.Namespace) -> str:
    """Return the row of a case."""
    case = CASES[number]
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    first = first_call(case, length, clock)
    tensors, slope = operands(length)
    ways = {
        name: run(made(length), tensors, case.backend)
        for name, made in (("mask", case.mask), ("bound", case.bound))
    }
    seconds, ratios = [], []
    for timed in (
        {name: forward_only(way) for name, way in ways.items()},
        {name: with_backward(way, tensors, slope) for name, way in ways.items()},
    ):
        taken = alternate(timed, options.repeats, clock)
        seconds.append(taken["mask"])
        ratios.append(taken["mask"] / taken["bound"])
    added = [peak_of(number, what, length) for what in ("mask", "bound")]
    ms = [f"{value * 1e3:.0f}" for value in (first, *seconds)]
    cells = [case.name, str(length), case.backend, ms[0], ms[1], f"{ratios[0]:.2f}", ms[2]]
    return f"| {' | '.join(cells)} | {ratios[1]:.2f} | {added[0]:.0f} | {added[1]:.0f} |"


def peak_of(number: int, what: str, length: int) -> float:
    """Measure peak memory in a process of its own, in MB."""
    command = [sys.executable, __file__, "--peak", str(number), what, str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return max(0.0, float(done.stdout))


def peak_memory(number: int, what: str, length: int) -> None:
    """Print what a forward and a backward pass add to the resident size, in MB."""
    case = CASES[number]
    made = case.mask if what == "mask" else case.bound
    small, slope = operands(512)
    torch.autograd.grad(run(made(512), small, case.backend)(), small, slope)
    mask, (tensors, slope) = made(length), operands(length)
    results = [torch.ones_like(t) for t in (*tensors, slope)]
    before = resident_peak()
    del results
    gc.collect()
    torch.autograd.grad(run(mask, tensors, case.backend)(), tensors, slope)
    print((resident_peak() - before) / 1024)


def rows(options: argparse.Namespace) -> Iterator[str]:
    for number, case in enumerate(CASES):
        for length in options.lengths:
            if case.bound is full and length > LONGEST_PLANE:
                continue
            row = measure(number, length, options)
            print(row, flush=True)
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        number, what, length = options.peak
        peak_memory(int(number), what, int(length))
        return
    torch.set_num_threads(options.threads)
    head = [
        "# Masks that are no region",
        "",
        f"{machine(options.threads)}.",
        "",
        f"Made by `python benchmarks/{' '.join(['opaque.py', *sys.argv[1:]])}`. Batch 1, {HEADS} "
        f"heads of {DIM}, float32, layout BNSD; medians of {options.repeats} turns, in "
        "milliseconds. Each mask beside the region that it lies in, which computes the same tiles: "
        "`times` says how many times longer the mask takes. `first` is the forward pass of a mask "
        "that is new, planned and read. MB: what forward and backward add to the process beyond "
        "operands, output and gradients, and what the region adds.",
        "",
        "| mask | length | backend | first | forward | times | forward + backward | times "
        "| MB | region, MB |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(head))
    table = [*head, *rows(options)]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
