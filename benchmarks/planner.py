"""What planning costs, and what it finds: ``python benchmarks/planner.py``.

A *first plan* reads the shapes, walks the candidates, proves, prices and verifies; a *cached
call* is what every later call of a module pays before its backend runs. Medians; the
attention is timed in the same process. Then the plans of sparse masks, by a planner that gathers
keys and by one that cuts. Writes benchmarks/results/planner.md; ``--masks`` makes the second part
anew and keeps the first.
"""

from __future__ import annotations

import pickle
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import _gathered_rows
import torch

import attnkit as ak
from attnkit import masks, pse

sys.path.insert(0, str(Path(__file__).parents[1]))
from docs.make.variants import block_diffusion

RESULTS = Path(__file__).parent / "results" / "planner.md"
TABLES = "# What the planner makes of sparse masks"


@dataclass(frozen=True)
class Case:
    """One composition at sizes that grow by `k`, so that no two first plans are alike."""

    name: str
    make: Callable[[int], tuple[ak.Attention, torch.Tensor, ak.SeqLens | None]]


def dense(mask: masks.Mask, length: int, bias: pse.Pse | None = None) -> Case:
    """A BSND request with one batch element."""

    def make(k: int) -> tuple[ak.Attention, torch.Tensor, ak.SeqLens | None]:
        layer = ak.Attention(8, 64, mask=mask, pse=bias, backend="emulated")
        return layer, torch.empty(1, length + k, 8, 64, device="meta"), None

    return Case(f"{mask!r}{' with ALiBi' if bias else ''}, {length:,} tokens", make)


def packed(count: int, length: int, t5: bool = False) -> Case:
    """A packed batch with ALiBi, or a T5 table that trains: lengths never repeat."""

    def make(k: int) -> tuple[ak.Attention, torch.Tensor, ak.SeqLens | None]:
        lengths = [length + (i * 7) % 31 for i in range(count - 1)] + [length + k]
        bias = pse.T5Relative(8, bidirectional=False) if t5 else pse.ALiBi(8)
        layer = ak.Attention(8, 64, mask=masks.Causal(), pse=bias, layout="TND", backend="emulated")
        tokens = torch.empty(sum(lengths), 8, 64, device="meta")
        return layer, tokens, ak.SeqLens(lengths)

    told = "a trained T5 table" if t5 else "ALiBi"
    return Case(f"{count:,} packed sequences of about {length}, causal with {told}", make)


CASES = (
    dense(masks.Causal(), 2048),
    dense(masks.SlidingWindow(1024), 16384),
    dense(masks.Causal() & (masks.SlidingWindow(256) | masks.Prefix(4)), 2048),
    packed(16, 128),
    packed(64, 128),
    packed(1000, 128),
    packed(64, 128, t5=True),
)


def at_a_million() -> list[str]:
    """Return table rows for one million tokens, training: time, size and mask of first plans."""
    length = 1_000_000
    named = {
        "StreamingLLM: 4 sinks and a window of 4,096": masks.Causal()
        & (masks.SlidingWindow(4096) | masks.Prefix(4)),
        "1,000 packed documents, causal": masks.Causal() & masks.Documents([1000] * 1000),
        "block diffusion, blocks of 5,000": block_diffusion(length, 5000),
    }
    rows = []
    for name, mask in named.items():
        x = torch.empty(1, length, 8, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        start = time.perf_counter_ns()
        plan = ak.plan(x, x, x, mask=mask, backend="emulated")
        took = (time.perf_counter_ns() - start) / 1e6
        size = len(pickle.dumps(plan.steps)) / 1e3
        calls = " + ".join(step.label for step in plan.steps)
        mask_bytes = plan.price.mask_bytes if plan.price is not None else 0
        rows.append(
            f"| {name} | {took:,.0f} | {size:,.0f} | {calls} | {mask_bytes / 1e6:.1f} MB "
            f"| {length**2 / 1e12:.0f} TB |"
        )
    return rows


def microseconds(run: Callable[[], object], repeat: int) -> float:
    """Return the median time of one call."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter_ns()
        run()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1000


def first_plan(case: Case) -> float:
    """Return the median time of plans that nobody has made before."""
    times = []
    for k in range(7):
        layer, x, lens = case.make(k)
        start = time.perf_counter_ns()
        layer.plan(x, x, x, seqlens=lens)
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1000


def cached_call(case: Case) -> float:
    """Return the median time of finding the plan again."""
    layer, x, lens = case.make(100)
    layer.plan(x, x, x, seqlens=lens)
    return microseconds(lambda: layer.plan(x, x, x, seqlens=lens), 2000)


def attention_itself() -> float:
    """Return the time of torch's fused causal attention at 2,048 tokens, 8 heads of 64."""
    x = torch.randn(1, 8, 2048, 64)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return microseconds(lambda: sdpa(x, x, x, is_causal=True), 11)


def costs() -> list[str]:
    """Time every case, and return the page's first part."""
    rows = [(case.name, first_plan(case), cached_call(case)) for case in CASES]
    return [
        "# What planning costs",
        "",
        "Made by `python benchmarks/planner.py`. Microseconds, medians.",
        "",
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}",
        "",
        "| request | first plan | cached call |",
        "|---|---:|---:|",
        *(f"| {name} | {first:,.0f} | {cached:.1f} |" for name, first, cached in rows),
        "",
        f"For comparison, torch's fused causal attention itself, 2,048 tokens, 8 heads of 64, "
        f"float32, forward: {attention_itself():,.0f}",
        "",
        "## One million tokens, training, the first plan",
        "",
        "| mask | ms | plan, kB | calls | mask bytes | a dense mask |",
        "|---|---:|---:|---|---:|---:|",
        *at_a_million(),
        "",
    ]


def main() -> None:
    """Print the page and write it; with ``--masks`` its first part stays as it is."""
    if "--masks" in sys.argv:
        first = RESULTS.read_text(encoding="utf-8").partition(TABLES)[0].split("\n")[:-1]
    else:
        first = costs()
    lines = [*first, TABLES, "", *_gathered_rows.ABOUT, "", *_gathered_rows.tables()]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
