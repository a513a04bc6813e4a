"""What a call of `Attention` costs beside the operators that it runs: ``benchmarks/overhead.py``.

On tiny tensors, where nothing else shows: a call whose plan is known, and by hand the same
operators on the same views. Medians of alternating rounds, one thread. Writes
benchmarks/results/overhead.md.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks

RESULTS = Path(__file__).parent / "results" / "overhead.md"
CALLS = 1000

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def by_hand(x: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Run what a plan of one fused call runs, on a BSND tensor."""
    query, key, value = (x.permute(0, 2, 1, 3) for _ in range(3))
    output: Tensor = _fused(query, key, value, 0.0, False, attn_mask=mask, scale=scale)[0]
    return output.permute(0, 2, 1, 3)


def cases() -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return calls of a layer, and the same by hand."""
    x = torch.randn(1, 4, 2, 8)
    allowed = (masks.Causal() & masks.SlidingWindow(2)).materialize(4, 4)[0, 0]
    patch = torch.zeros(4, 4).masked_fill(~allowed, -torch.inf)
    full = ak.Attention(2, 8)
    window = ak.Attention(2, 8, mask=masks.Causal() & masks.SlidingWindow(2))
    scale = full.composition.scale or 1.0
    return {
        "full": (lambda: full(x, x, x), lambda: by_hand(x, None, scale)),
        "window of 2": (lambda: window(x, x, x), lambda: by_hand(x, patch, scale)),
    }


def microseconds(call: Callable[[], object]) -> float:
    """Time a batch of calls."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main(rounds: int) -> None:
    """Time every case, print the table and write it."""
    lines = [
        "# What a call costs beside its operators",
        "",
        f"Made by `python benchmarks/overhead.py {rounds}`. Microseconds, medians of {rounds} "
        f"rounds of {CALLS:,} calls; 4 tokens, 2 heads of 8, no gradients, one thread.",
        "",
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "",
        "| mask | layer | operators by hand | difference |",
        "|---|---:|---:|---:|",
    ]
    for name, (layer, hand) in cases().items():
        torch.testing.assert_close(layer(), hand())
        seen = [(microseconds(layer), microseconds(hand)) for _ in range(rounds)]
        ours, bare = (statistics.median(each) for each in zip(*seen, strict=True))
        lines.append(f"| {name} | {ours:.1f} | {bare:.1f} | {ours - bare:.1f} |")
        print(lines[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"written to {RESULTS.name}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
