"""bfloat16 beside float32 on the tiled backend: ``python benchmarks/sixteen_bits.py``.

The same masks and sizes in one process, dtypes in turns, medians: how many times as long bfloat16
takes. Writes benchmarks/results/sixteen_bits.md.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch
from attention import CASES, HEADS, Case, machine

import attnkit as ak
from attnkit import pse

RESULTS = Path(__file__).parent / "results" / "sixteen_bits.md"
LENGTH, DIM = 4096, 64


def ratios(case: Case, rounds: int) -> tuple[float, float]:
    """Return the ratios of a case, forward and forward with backward."""
    times: dict[torch.dtype, list[tuple[float, float]]] = {}
    runs = {}
    for dtype in (torch.float32, torch.bfloat16):
        shape = (1, HEADS, LENGTH, DIM)
        tensors = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
        bias = pse.ALiBi(HEADS) if case.alibi else None
        mask, drop = case.mask(LENGTH), case.dropout
        runs[dtype] = (
            tensors,
            ak.Attention(
                HEADS, DIM, mask=mask, pse=bias, dropout=drop, layout="BNSD", backend="tiled"
            ),
        )
        times[dtype] = []
    for turn in range(rounds + 1):
        for dtype, (tensors, layer) in runs.items():
            start = time.perf_counter()
            output = layer(*tensors)
            middle = time.perf_counter()
            torch.autograd.grad(output, tensors, torch.ones_like(output))
            if turn:
                times[dtype].append((middle - start, time.perf_counter() - start))
    single, half = (
        [statistics.median(each) for each in zip(*times[dtype], strict=True)] for dtype in runs
    )
    return half[0] / single[0], half[1] / single[1]


def main(rounds: int) -> None:
    """Time every case, print the table and write it."""
    lines = [
        "# bfloat16 beside float32",
        "",
        f"Made by `python benchmarks/sixteen_bits.py {rounds}`. How many times as long bfloat16 "
        f"takes on tiled, medians of {rounds} rounds in turns; {LENGTH:,} tokens, {HEADS} heads of "
        f"{DIM}.",
        "",
        machine(torch.get_num_threads()) + ".",
        "",
        "| mask | forward | forward + backward |",
        "|---|---:|---:|",
    ]
    for case in CASES:
        forward, both = ratios(case, rounds)
        lines.append(f"| {case.name} | {forward:.2f} | {both:.2f} |")
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"written to {RESULTS.name}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
