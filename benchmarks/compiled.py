"""Training in one compiled graph while lengths and masks change: ``benchmarks/compiled.py``.

Two layers as a user writes them, under ``torch.compile(fullgraph=True)``, for 1,000 steps, each
with lengths that are new. Every step's loss and gradients are compared with those of the same model
without a compiler. Told are the graphs, the largest difference, the share of the time that
planning takes, and how memory grew after the first hundred steps. Writes
benchmarks/results/compiled.md.

    python benchmarks/compiled.py [steps] [backend of torch.compile]
"""

from __future__ import annotations

import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends import graph

RESULTS = Path(__file__).parent / "results" / "compiled.md"
DIM, HEADS = 128, 4
WARM = 100  # steps after which memory is flat
Step = tuple[Tensor, dict[str, Any]]


class Model(nn.Module):
    """Two blocks; `compose` makes the mask of the call, inside of the compiled function."""

    def __init__(self, compose: Callable[[Any], Any] | None = None, **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ak.MultiHeadAttention(DIM, HEADS, **layer) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.compose = compose

    def forward(self, x: Tensor, mask: Any = None, seqlens: Any = None) -> Tensor:
        if self.compose is not None:
            mask = self.compose(mask)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), mask=mask, seqlens=seqlens)
        return x


def packed(draw: random.Random) -> Step:
    """Another number of documents, of other lengths, and so another number of tokens."""
    lengths = [draw.randint(1, 64) for _ in range(draw.randint(4, 16))]
    return torch.randn(sum(lengths), DIM), {"seqlens": ak.SeqLens(lengths)}


def padded(draw: random.Random) -> Step:
    """Another batch, of another length, whose texts have others."""
    batch, length = draw.randint(2, 8), draw.randint(32, 128)
    lengths = [draw.randint(1, length) for _ in range(batch)]
    return torch.randn(batch, length, DIM), {"mask": masks.Padding(lengths)}


def documents(draw: random.Random) -> Step:
    """Documents in rows of one length."""
    ends = sorted(draw.sample(range(1, 256), 7))
    lengths = [stop - start for start, stop in zip([0, *ends], [*ends, 256], strict=True)]
    return torch.randn(2, 256, DIM), {"mask": masks.Documents(lengths)}


def images(draw: random.Random) -> Step:
    """Images in causal text, in other places of each text."""
    spans = []
    for _ in range(2):
        start, next_start = draw.randint(0, 60), draw.randint(100, 160)
        spans.append([(start, start + 32), (next_start, next_start + 32)])
    return torch.randn(2, 200, DIM), {"mask": masks.Causal() | masks.Spans(spans)}


def lengths_alone(draw: random.Random) -> Step:
    """Another batch, of another length."""
    return torch.randn(draw.randint(2, 8), draw.randint(32, 128), DIM), {}


CASES: dict[str, tuple[Callable[[], Model], Callable[[random.Random], Step]]] = {
    "packed, rotary": (
        lambda: Model(mask=masks.Causal(), rotary=True, layout="TND"),
        packed,
    ),
    "padding": (Model, padded),
    "documents": (lambda: Model(mask=masks.Causal(), pse=pse.ALiBi(HEADS)), documents),
    "images": (lambda: Model(rotary=True), images),
    "T5, lengths": (lambda: Model(pse=pse.T5Relative(HEADS)), lengths_alone),
    "composed inside": (
        lambda: Model(lambda mask: masks.Causal() & mask & masks.SlidingWindow(48)),
        padded,
    ),
}


def gradients(form: Callable[..., Tensor], model: Model, step: Step) -> list[Tensor]:
    """Return the loss and the gradients of all weights."""
    x, how = step
    loss = form(x, **how).square().mean()
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def apart(found: list[Tensor], meant: list[Tensor]) -> float:
    """Return the largest difference, beside the largest number of its tensor."""
    pairs = zip(found, meant, strict=True)
    return max(((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item() for a, b in pairs)


class Planning:
    """The time that operators of graphs spend on plans."""

    def __init__(self) -> None:
        self.seconds, self._made = 0.0, graph._planned

    def __call__(self, *given: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._made(*given)
        finally:
            self.seconds += time.perf_counter() - start


def run(name: str, steps: int, backend: str, planning: Planning) -> str:
    """Take the steps of one case; return its row."""
    torch.compiler.reset()
    torch.manual_seed(0)
    make, draw_step = CASES[name]
    model, draw, counter = make(), random.Random(0), CompileCounterWithBackend(backend)
    form = torch.compile(model, fullgraph=True, backend=counter)
    forms = {"compiled": form, "eager": model}
    worst, shares, ratios, warm = 0.0, [], [], 0
    for k in range(steps):
        step, made, times, before = draw_step(draw), {}, {}, planning.seconds
        # In turns: the second one finds the plan of the first.
        for which in ("compiled", "eager")[:: 1 if k % 2 else -1]:
            start = time.perf_counter()
            made[which] = gradients(forms[which], model, step)
            times[which] = time.perf_counter() - start
        worst = max(worst, apart(made["compiled"], made["eager"]))
        shares += [(planning.seconds - before) / times["compiled"]] if k % 2 else []
        ratios.append(times["eager"] / times["compiled"])
        warm = warm or (k >= WARM and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - warm) / 1024
    row = [name, counter.frame_count, f"{worst:.1e}", f"{statistics.median(shares):.1%}"]
    row += [f"{statistics.median(ratios):.2f}", f"{grown:.0f}"]
    return "| " + " | ".join(map(str, row)) + " |"


def main(steps: int, backend: str) -> None:
    """Run every case, print the table and write it."""
    torch.set_num_threads(1)
    planning = graph._planned = Planning()
    lines = [
        "# Steps that are all different, in one compiled graph",
        "",
        f"Made by `python benchmarks/compiled.py {steps} {backend}`: two layers of {DIM} "
        f"dimensions, forward and backward, {steps:,} steps with new lengths or masks in each. One "
        f"thread, {platform.processor() or platform.machine()}, torch {torch.__version__}. "
        "Differences are relative to the largest number of each tensor, time and planning are "
        "medians over the steps, memory is the growth of the process's peak.",
        "",
        "| steps | graphs | largest difference from eager | planning | eager / compiled | MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in CASES:
        lines.append(run(name, steps, backend, planning))
        print(lines[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"written to {RESULTS.name}")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]) if given else 1000, given[1] if len(given) > 1 else "inductor")
