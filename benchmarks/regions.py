"""What exact sets of cells cost at a million tokens, by number of packed documents.

    python benchmarks/regions.py [rounds]

Each round runs every operation at every document count once, so that a slow moment of the
machine falls on all of them; the table shows medians. Prints it, and writes it to
benchmarks/results/regions.md.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from attnkit import masks

TOKENS = 1 << 20
COUNTS = (1, 10, 100, 1000)
WINDOW = 4096
RESULTS = Path(__file__).parent / "results" / "regions.md"


def lengths(count: int) -> list[int]:
    """`count` document lengths that sum to TOKENS, uneven on purpose."""
    weights = [1 + 7 * k % 5 for k in range(count)]
    ends = [TOKENS * sum(weights[:k]) // sum(weights) for k in range(count + 1)]
    return [b - a for a, b in pairwise(ends)]


def operations(count: int) -> dict[str, Callable[[], object]]:
    given = lengths(count)
    mask = masks.Documents(given) & masks.Causal()
    documents = masks.Documents(given).region(TOKENS, TOKENS)
    causal = masks.Causal().region(TOKENS, TOKENS)
    window = masks.SlidingWindow(WINDOW).region(TOKENS, TOKENS)
    packed, again = documents & causal, documents & causal
    hash(mask)
    return {
        "build: Documents(lengths).region(n, n)": lambda: masks.Documents(given).region(
            TOKENS, TOKENS
        ),
        "intersect with Causal()": lambda: documents & causal,
        f"intersect with SlidingWindow({WINDOW})": lambda: documents & window,
        "compare with an equal region": lambda: packed == again,
        "compare with another region": lambda: packed == documents,
        "area": lambda: packed.area,
        "tiles(128, 128), full / partial / empty": lambda: packed.tiles(128, 128, TOKENS, TOKENS),
        "hash of the mask, as a plan cache asks": lambda: hash(mask),
    }


def measure(rounds: int) -> dict[str, dict[int, float]]:
    """Median microseconds, by operation and document count."""
    every = {count: operations(count) for count in COUNTS}
    times: dict[str, dict[int, list[float]]] = {
        name: {count: [] for count in COUNTS} for name in every[1]
    }
    for _ in range(rounds):
        for count, known in every.items():
            for name, run in known.items():
                start = time.perf_counter()
                run()
                times[name][count].append(time.perf_counter() - start)
    return {
        name: {count: statistics.median(seen) * 1e6 for count, seen in row.items()}
        for name, row in times.items()
    }


def table(medians: dict[str, dict[int, float]]) -> str:
    rows = [["microseconds", *(f"{n:,} docs" for n in COUNTS), "per doc at 1,000"]]
    for name, row in medians.items():
        rows.append([name, *(f"{row[n]:,.1f}" for n in COUNTS), f"{row[1000] / 1000:,.2f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = (
        [
            cell.ljust(w) if k == 0 else cell.rjust(w)
            for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def processor() -> str:
    """The processor's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def report(rounds: int) -> str:
    dense = TOKENS * TOKENS / 2**40
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return "\n".join(
        [
            "# Regions at 1,048,576 x 1,048,576 tokens",
            "",
            f"Medians of {rounds} alternating rounds, one thread. A dense boolean mask of this "
            f"size would take {dense:.0f} TiB.",
            "",
            table(measure(rounds)),
            "",
            f"- machine: {processor()}, {os.cpu_count()} cores, load {load} when done; "
            f"{platform.system()}",
            f"- Python {platform.python_version()}, torch {torch.__version__}",
            f"- command: `python benchmarks/regions.py {rounds}`",
            "",
        ]
    )


def main(rounds: int) -> None:
    text = report(rounds)
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(text)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 25)
