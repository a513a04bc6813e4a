"""Time and peak memory of the kernel's emulator against naive dense attention.

    python benchmarks/emulator.py [tokens ...]

Each measurement runs in a process of its own, so that peak memory is its own. Causal
attention, batch 1, 8 heads of 64, float32, forward; the naive one builds the whole score
matrix, and is skipped where that would take more than 6 GiB.
"""

from __future__ import annotations

import math
import resource
import subprocess
import sys
import time

import torch

from attnkit.kernel import AttenMask, KernelCall, TensorSpec, emulate

HEADS, DIM = 8, 64
NAIVE_LIMIT = 6 * 2**30


def emulated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    specs = (TensorSpec.of(t) for t in (q, k, v))
    call = KernelCall(
        *specs,
        head_num=HEADS,
        input_layout="BNSD",
        sparse_mode=3,
        atten_mask=AttenMask.causal(),
        scale=DIM**-0.5,
    )
    return emulate(call, q, k, v)[0]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) * DIM**-0.5
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v


def peak() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, tokens: int) -> None:
    """Run one method once, warm; print seconds and the memory it added, in MiB."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    run = {"emulated": emulated, "naive": naive}[name]
    run(*torch.randn(3, 1, HEADS, 256, DIM))
    q, k, v = torch.randn(3, 1, HEADS, tokens, DIM)
    before, start = peak(), time.perf_counter()
    run(q, k, v)
    print(time.perf_counter() - start, peak() - before, peak())


def main(sizes: list[int]) -> None:
    print(f"{'tokens':>7} {'method':>9} {'seconds':>9} {'added MiB':>10} {'process MiB':>12}")
    for tokens in sizes:
        for name in ("emulated", "naive"):
            if name == "naive" and 3 * HEADS * tokens**2 * 4 > NAIVE_LIMIT:
                print(f"{tokens:>7} {name:>9} {'-':>9} {'-':>10} {'-':>12}  (skipped: too large)")
                continue
            command = [sys.executable, __file__, "--one", name, str(tokens)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, added, total = map(float, done.stdout.split())
            print(f"{tokens:>7} {name:>9} {seconds:>9.2f} {added:>10.0f} {total:>12.0f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        measure(sys.argv[2], int(sys.argv[3]))
    else:
        main([int(size) for size in sys.argv[1:]] or [1024, 4096, 16384])
