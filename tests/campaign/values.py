"""Thousands of masks and lengths that are new in each step, in one graph: memory stays flat.

python -m tests.campaign.values --count 20000
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from pathlib import Path

import torch
from torch._dynamo.testing import CompileCounterWithBackend

import attnkit as ak
from attnkit import masks
from attnkit.handles import _VALUES


def megabytes() -> float:
    """Return the memory that the process has now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


def main(arguments: list[str] | None = None) -> int:
    """Take the steps; 0 if the second half took no memory and no graph."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000)
    count = parser.parse_args(arguments).count
    draw, counter = random.Random(0), CompileCounterWithBackend("aot_eager")
    causal, layer = masks.Causal(), ak.Attention(2, 8, layout="TND", mask=masks.Full())

    def step(x: torch.Tensor, mask: masks.Mask, lengths: ak.SeqLens) -> torch.Tensor:
        return layer(x, x, x, mask=causal & mask, seqlens=lengths)

    form = torch.compile(step, fullgraph=True, backend=counter)
    half: list[float] = []
    for k in range(count):
        lengths = ak.SeqLens([draw.randint(1, 24) for _ in range(draw.randint(2, 6))])
        x = torch.randn(lengths.total_q, 2, 8, requires_grad=True)
        form(x, masks.SlidingWindow(1 + k), lengths).sum().backward()
        if (k + 1) % max(1, count // 8) == 0:
            gc.collect()
            half.append(megabytes())
            values = len(_VALUES.held)
            print(
                f"{k + 1} steps: {half[-1]:.0f} MB, {values} values, {counter.frame_count} graphs"
            )
    grown = half[-1] - half[len(half) // 2 - 1]
    print(f"the second half took {grown:.1f} MB")
    return int(grown > 8 or counter.frame_count > 2)


if __name__ == "__main__":
    sys.exit(main())
