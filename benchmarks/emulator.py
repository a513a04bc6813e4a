"""Processor time and peak memory of the kernel's emulator against naive dense attention.

    python benchmarks/emulator.py [tokens ...]

Each measurement runs in a process of its own, so that peak memory is its own, on one thread, and
counts the processor's time, which other programs at work disturb least; the better of two runs.
Causal attention, batch 1, 8 heads of 64, float32; the naive one builds the whole score matrix, and
is skipped where that would take more than 6 GiB. Prints a table, and writes it to
benchmarks/results/emulator.md.
"""

from __future__ import annotations

import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from attnkit.kernel import AttenMask, KernelCall, TensorSpec, emulate, emulate_grad

RESULTS = Path(__file__).parent / "results" / "emulator.md"
HEADS, DIM = 8, 64
RUNS = 2
NAIVE_LIMIT = 6 * 2**30


def causal(*tensors: torch.Tensor) -> KernelCall:
    """Return the call that is measured."""
    return KernelCall(
        *(TensorSpec.of(tensor) for tensor in tensors),
        head_num=HEADS,
        input_layout="BNSD",
        sparse_mode=3,
        atten_mask=AttenMask.causal(),
        scale=DIM**-0.5,
    )


def emulated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> object:
    return emulate(causal(q, k, v), q, k, v)


def emulated_and_grad(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> object:
    call = causal(q, k, v)
    out, peaks, sums = emulate(call, q, k, v)
    stats = {"softmax_max": peaks, "softmax_sum": sums}
    return emulate_grad(call, q, k, v, torch.ones_like(out), **stats, attention_in=out)


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> object:
    scores = q @ k.transpose(-1, -2) * DIM**-0.5
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


METHODS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]] = {
    "emulated": emulated,
    "emulated, and its grad call": emulated_and_grad,
    "naive": naive,
}


def peak() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, tokens: int) -> None:
    """Run one method, warm; print seconds and the memory it added, in MiB."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    run = METHODS[name]
    run(*torch.randn(3, 1, HEADS, 256, DIM))
    q, k, v = torch.randn(3, 1, HEADS, tokens, DIM)
    before, seconds = peak(), []
    for _ in range(RUNS):
        start = time.process_time()
        run(q, k, v)
        seconds.append(time.process_time() - start)
    print(min(seconds), peak() - before, peak())


def rows(sizes: list[int]) -> list[str]:
    """Measure every method at every size; table rows, printed as they come."""
    out = []
    for tokens in sizes:
        for name in METHODS:
            row = f"| {tokens:,} | {name} | too large | | |"
            if name != "naive" or 3 * HEADS * tokens**2 * 4 <= NAIVE_LIMIT:
                command = [sys.executable, __file__, "--one", name, str(tokens)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                seconds, added, total = map(float, done.stdout.split())
                row = f"| {tokens:,} | {name} | {seconds:.2f} | {added:,.0f} | {total:,.0f} |"
            print(row, flush=True)
            out.append(row)
    return out


def main(sizes: list[int]) -> None:
    """Print the table and write it."""
    given = "".join(f" {size}" for size in sizes)
    head = [
        "# The emulator against naive attention",
        "",
        f"Made by `python benchmarks/emulator.py{given}`. Causal, batch 1, {HEADS} heads of {DIM}, "
        f"float32, one thread, torch {torch.__version__}. Seconds are the processor's, the better "
        f"of {RUNS} runs. Memory in MiB: what the call added to the process, and the whole "
        "process.",
        "",
        "| tokens | method | seconds | added | process |",
        "|---:|---|---:|---:|---:|",
    ]
    print("\n".join(head))
    table = [*head, *rows(sizes or [1024, 4096, 16384])]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(table) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2], int(sys.argv[3]))
    else:
        main([int(size) for size in sys.argv[1:]])
