"""What changes in every training step, and what its plan costs then: ``benchmarks/each_step.py``.

Packed lengths, paddings and documents, new in each step, 100 sequences a step; masks with windows
and sinks, slopes, T5 tables that train. The *first* plan is searched for. What follows is mostly
the kind of call that the last step took, filled in and proven anew, which no step should pay more
than 1 ms for. Processor time; medians of the steps after the first, and the best of them, for
other processes disturb it. Only plans are made: tensors are on the meta device. Writes
benchmarks/results/each_step.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import median

import torch
from attention import machine, written

import attnkit as ak
from attnkit import masks, pse

RESULTS = Path(__file__).parent / "results" / "each_step.md"
COUNT, MEAN = 100, 128
CAUSAL, WINDOW = masks.Causal(), masks.SlidingWindow(64)
Step = Callable[[], ak.Plan]


def lengths(rng: Random) -> list[int]:
    """Lengths of sequences about the mean; their sum differs from step to step."""
    return [rng.randint(3 * MEAN // 4, 5 * MEAN // 4) for _ in range(COUNT)]


def tokens(batch: int, length: int) -> torch.Tensor:
    """Tokens that train."""
    return torch.empty(batch, length, 8, 64, device="meta", requires_grad=True)


def packed(layer: ak.Attention, rng: Random) -> Step:
    """Sequences end to end, in layout TND."""
    lens = ak.SeqLens(lengths(rng))
    x = tokens(1, lens.total_q)[0]
    return lambda: layer.plan(x, x, x, seqlens=lens)


def padded(layer: ak.Attention, rng: Random) -> Step:
    """Rows of a batch with keys that do not exist."""
    x, some = tokens(COUNT, 4 * MEAN), [rng.randint(1, 4 * MEAN) for _ in range(COUNT)]
    return lambda: layer.plan(x, x, x, mask=masks.Padding(some))


def documents(layer: ak.Attention, rng: Random) -> Step:
    """Documents end to end in one row, always of the same length."""
    some = lengths(rng)
    x = tokens(1, 3 * COUNT * MEAN // 2)
    return lambda: layer.plan(x, x, x, mask=masks.Documents([*some, x.shape[1] - sum(some)]))


def ids(layer: ak.Attention, rng: Random) -> Step:
    """The same, told by the number of its document at each position."""
    some = lengths(rng)
    x = tokens(1, 3 * COUNT * MEAN // 2)
    of = torch.repeat_interleave(
        torch.arange(COUNT + 1), torch.tensor([*some, x.shape[1] - sum(some)])
    )
    return lambda: layer.plan(x, x, x, mask=masks.Documents.from_ids(of[None]))


def t5(bidirectional: bool) -> Callable[[], pse.Pse]:
    """A table of T5 that trains."""
    return lambda: pse.T5Relative(8, bidirectional=bidirectional)


def alibi() -> pse.Pse:
    """Slopes that do not train."""
    return pse.ALiBi(8)


Case = tuple[
    Callable[[ak.Attention, Random], Step], masks.Mask | None, Callable[[], pse.Pse] | None
]
CASES: dict[str, Case] = {
    "packed": (packed, None, None),
    "packed, causal": (packed, CAUSAL, None),
    "packed, window": (packed, WINDOW, None),
    "packed, window and sinks": (packed, CAUSAL & (WINDOW | masks.Prefix(4)), None),
    "packed, causal, ALiBi": (packed, CAUSAL, alibi),
    "packed, window, ALiBi": (packed, WINDOW, alibi),
    "packed, trained T5": (packed, None, t5(True)),
    "packed, causal, trained T5": (packed, CAUSAL, t5(False)),
    "packed, window, trained T5": (packed, WINDOW, t5(False)),
    "padding": (padded, None, None),
    "padding, causal": (padded, CAUSAL, None),
    "padding, causal, ALiBi": (padded, CAUSAL, alibi),
    "padding, trained T5": (padded, None, t5(True)),
    "padding, causal, trained T5": (padded, CAUSAL, t5(False)),
    "documents": (documents, None, None),
    "documents, causal": (documents, CAUSAL, None),
    "documents, window": (documents, CAUSAL & WINDOW, None),
    "documents by ids, causal": (ids, CAUSAL, None),
    "documents, causal, ALiBi": (documents, CAUSAL, alibi),
    "documents, causal, trained T5": (documents, CAUSAL, t5(False)),
}


def times(case: Case, backend: str, steps: int) -> list[float]:
    """Return what the plan of each step took, in milliseconds."""
    draw, mask, bias = case
    layer = ak.Attention(
        8,
        64,
        mask=mask if mask is not None else masks.Full(),
        pse=None if bias is None else bias(),
        layout="TND" if draw is packed else "BSND",
        backend=backend,
    )
    rng, found = Random(0), []
    for _ in range(steps + 1):
        plan = draw(layer, rng)
        start = time.process_time()
        plan()
        found.append(1e3 * (time.process_time() - start))
    return found


def rows(steps: int) -> Iterator[str]:
    """Yield the rows of the table."""
    for name, case in CASES.items():
        cells = []
        for backend in ("emulated", "tiled"):
            first, *rest = times(case, backend, steps)
            cells += [f"{first:.1f}", f"{median(rest):.1f}", f"{min(rest):.1f}"]
        row = f"| {name} | {' | '.join(cells)} |"
        print(row, flush=True)
        yield row


def main() -> None:
    """Measure, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = shlex.join(["benchmarks/each_step.py", *sys.argv[1:]])
    lines = [
        "# What changes in every training step",
        "",
        f"Made by `python {command}`. {machine(1)}.",
        "",
        f"{COUNT} sequences a step, about {MEAN} tokens each (paddings: rows of {4 * MEAN}), 8 "
        f"heads of 64, training. Milliseconds to plan; {options.steps} steps after the first.",
        "",
        "| what changes | fused: first | median | best | tiled: first | median | best |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *rows(options.steps),
        "",
    ]
    written(RESULTS, lines)


if __name__ == "__main__":
    main()
