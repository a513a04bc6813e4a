"""FlexAttention's block masks, from regions and by evaluation: ``python benchmarks/flex.py``.

`create_block_mask` calls a function of indices on every cell; `block_mask` reads the runs of a
mask's region. Both make the same tensors, which is checked here before anything is timed. A
block mask from a region is timed from the mask's own definition, nothing kept. Medians of
alternating rounds. Writes benchmarks/results/flex.md.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import attnkit as ak
from attnkit import masks
from attnkit.backends.flex import block_mask
from attnkit.masks import Mask

RESULTS = Path(__file__).parent / "results" / "flex.md"
LISTS = [
    f"{full}{side}_{what}"
    for full in ("", "full_")
    for side in ("kv", "q")
    for what in ("num_blocks", "indices")
]


@dataclass(frozen=True)
class Case:
    """A mask, and the function of indices that says the same by hand."""

    name: str
    make: Callable[[int], Mask]
    by_hand: Callable[[int], Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]


def documents(length: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    ids = torch.arange(64).repeat_interleave(length // 64)
    return lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j)


CASES = (
    Case("causal", lambda n: masks.Causal(), lambda n: lambda b, h, i, j: i >= j),
    Case(
        "window of 1,024",
        lambda n: masks.SlidingWindow(1024),
        lambda n: lambda b, h, i, j: (i >= j) & (i - j < 1024),
    ),
    Case(
        "window of 256 and 4 sinks",
        lambda n: masks.Causal() & (masks.SlidingWindow(256) | masks.Prefix(4)),
        lambda n: lambda b, h, i, j: (i >= j) & ((i - j < 256) | (j < 4)),
    ),
    Case(
        "64 documents, causal",
        lambda n: masks.Causal() & masks.Documents([n // 64] * 64),
        documents,
    ),
)


def check(one: BlockMask, other: BlockMask) -> None:
    """Stop unless both hold the same tensors."""
    wrong = [name for name in LISTS if not torch.equal(getattr(one, name), getattr(other, name))]
    if wrong:
        raise SystemExit(f"the two block masks differ in {', '.join(wrong)}")


def row(case: Case, length: int, rounds: int) -> str:
    """Time one mask at one length."""
    fn = case.by_hand(length)
    ways: dict[str, Callable[[], object]] = {
        "region": lambda: block_mask(case.make(length), length, length),
        "cells": lambda: create_block_mask(fn, None, None, length, length, "cpu"),
    }
    check(ways["region"](), ways["cells"]())  # type: ignore[arg-type]
    x = torch.randn(1, length, 8, 64)
    layer = ak.Attention(8, 64, mask=case.make(length), backend="flex")
    layer(x, x, x)  # compiles
    ways["attention"] = lambda: layer(x, x, x)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    region, cells, attention = (statistics.median(seen) for seen in times.values())
    return (
        f"| {case.name}, {length:,} | {region:.2f} | {cells:,.0f} | {cells / region:,.0f} "
        f"| {attention:,.0f} |"
    )


def main(rounds: int) -> None:
    """Time every case, print the table and write it."""
    lines = [
        "# What a block mask costs",
        "",
        f"Made by `python benchmarks/flex.py {rounds}`. Milliseconds, medians of {rounds} rounds. "
        "The last column is FlexAttention itself on that block mask, compiled, float32, forward, "
        "8 heads of 64.",
        "",
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}",
        "",
        "| mask, tokens | from its region | create_block_mask | ratio | the attention |",
        "|---|---:|---:|---:|---:|",
    ]
    for length in (8192, 16384):
        for case in CASES:
            lines.append(row(case, length, rounds))
            print(lines[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"written to {RESULTS.name}")


if __name__ == "__main__":
    with torch.no_grad():
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
