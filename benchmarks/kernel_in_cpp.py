"""The kernel in C++ beside tiles of torch's operators: ``benchmarks/kernel_in_cpp.py``.

Windows, documents, block diffusion and causal masks, forward and with the backward pass, in one
process and in turns. Writes benchmarks/results/kernel_in_cpp.md.

    python benchmarks/kernel_in_cpp.py [--length N] [--rounds N] [--threads N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks
from attnkit.backends.compiled.backend import LIBRARY

RESULTS = Path(__file__).parent / "results" / "kernel_in_cpp.md"
HEADS, DIM = 8, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cases(length: int) -> dict[str, masks.Mask]:
    """Return the masks by their names in the table."""
    return {
        **{f"window {size:,}": masks.SlidingWindow(size) for size in (128, 256, 512, 1024)},
        "8 documents, causal": masks.Documents([length // 8] * 8, inside=masks.Causal()),
        "block diffusion, 64": masks.BlockCausal(64),
        "causal": masks.Causal(),
    }


def seconds(layer: ak.Attention, tensors: list[Tensor], slope: Tensor) -> tuple[float, float]:
    """Return what a forward pass takes, and one with its backward pass."""
    start = time.perf_counter()
    with torch.no_grad():
        layer(*tensors)
    middle = time.perf_counter()
    torch.autograd.grad(layer(*tensors), tensors, slope)
    return middle - start, time.perf_counter() - middle


def rows(length: int, rounds: int) -> Iterator[str]:
    """Yield the rows of the table."""
    for name, dtype in DTYPES.items():
        shape = (1, length, HEADS, DIM)
        tensors = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
        slope = torch.randn(shape).to(dtype)
        for said, mask in cases(length).items():
            layers = [
                ak.Attention(HEADS, DIM, mask=mask, backend=backend)
                for backend in ("tiled", "compiled")
            ]
            turns = [[seconds(one, tensors, slope) for one in layers] for _ in range(rounds + 1)]
            times = [[median(t[k][p] for t in turns[1:]) for p in (0, 1)] for k in (0, 1)]
            tiled, compiled = (" / ".join(f"{1e3 * t:.1f}" for t in each) for each in times)
            gains = " / ".join(f"{a / b:.2f}" for a, b in zip(*times, strict=True))
            yield f"| {said} | {name} | {tiled} | {compiled} | {gains} |"


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if LIBRARY.missing() is not None:
        print(f"not run: {LIBRARY.missing()}")
        return
    lines = [
        "# The kernel in C++ beside tiles of torch's operators",
        "",
        f"Made by `python benchmarks/kernel_in_cpp.py --length {options.length} --rounds "
        f"{options.rounds} --threads {options.threads}`: {options.length:,} tokens, {HEADS} heads "
        f"of {DIM}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}. "
        "Milliseconds forward / with the backward pass, medians of turns in one process.",
        "",
        "| mask | dtype | tiled | compiled | times as fast |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows(options.length, options.rounds):
        print(row, flush=True)
        lines.append(row)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"written to {RESULTS.name}")


if __name__ == "__main__":
    main()
