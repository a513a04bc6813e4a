"""Lengths that change in every step: what planning takes, and what is kept: ``changing.py``.

First a model of six layers (forward and backward) whose packed lengths, paddings or images differ
in each step: the share of the step that goes into making masks and finding plans. A plan that one
layer has made serves the others. Then many steps of a tiny model, each with lengths of its own:
resident memory, and the sizes of all that is kept between calls, must stay where they are.
Writes benchmarks/results/changing.md.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from attention import machine, written
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from attnkit.backends.choose import make_plan
from attnkit.constants import KEPT

RESULTS = Path(__file__).parent / "results" / "changing.md"
Asked = dict[str, Any]
"""What a call of a layer is told besides its tokens."""


class Model(nn.Module):
    """Layers of attention and a perceptron, each around a residual."""

    def __init__(self, layers: int, dim: int, heads: int, mask: masks.Mask | None) -> None:
        super().__init__()
        self.attend = nn.ModuleList(
            ak.MultiHeadAttention(dim, heads, mask=mask) for _ in range(layers)
        )
        self.think = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor, **asked: Any) -> Tensor:
        for attend, think in zip(self.attend, self.think, strict=True):
            x = x + attend(x, **asked)
            x = x + think(x)
        return x


def lengths(rng: Random, total: int, parts: int) -> list[int]:
    """Cut `total` at random."""
    ends = sorted(rng.sample(range(1, total), parts - 1))
    return [b - a for a, b in zip([0, *ends], [*ends, total], strict=True)]


def packed(rng: Random, batch: int, length: int) -> Asked:
    """Texts end to end."""
    return {"seqlens": ak.SeqLens(lengths(rng, batch * length, 3 * batch))}


def padded(rng: Random, batch: int, length: int) -> Asked:
    """Texts of a batch, padded to the longest."""
    return {"mask": masks.Padding([length, *(rng.randint(1, length) for _ in range(batch - 1))])}


def documents(rng: Random, batch: int, length: int) -> Asked:
    """Documents end to end in every row."""
    return {"mask": masks.Documents([lengths(rng, length, 4) for _ in range(batch)])}


def images(rng: Random, batch: int, length: int) -> Asked:
    """Text with images, within which attention is bidirectional."""
    each = []
    for _ in range(batch):
        ends = sorted(rng.sample(range(length), 4))
        each.append(masks.Causal() | masks.Spans([(ends[0], ends[1]), (ends[2], ends[3])]))
    return {"mask": masks.PerBatch(each)}


KINDS: dict[str, tuple[Callable[[Random, int, int], Asked], masks.Mask | None]] = {
    "packed, causal": (packed, masks.Causal()),
    "padded": (padded, None),
    "documents in rows, causal": (documents, masks.Causal()),
    "images in causal text": (images, None),
}


def inputs(kind: str, batch: int, length: int, dim: int) -> Tensor:
    """Return tokens, packed or in rows."""
    shape = (batch * length, dim) if kind.startswith("packed") else (batch, length, dim)
    return torch.randn(shape)


class Clock:
    """Adds up the time that modules spend on finding and making plans."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.spent = now, 0.0
        self._plan = ak.Attention._plan

    def __enter__(self) -> Clock:
        clock, plan = self, self._plan

        def timed(self: ak.Attention, *given: Any) -> ak.Plan:
            start = clock.now()
            found = plan(self, *given)
            clock.spent += clock.now() - start
            return found

        ak.Attention._plan = timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        ak.Attention._plan = self._plan  # type: ignore[method-assign]


def shares(options: argparse.Namespace) -> Iterator[str]:
    """Yield table rows: the share of planning in a step of a model."""
    now = time.thread_time if options.threads == 1 else time.perf_counter
    for kind, (draw, mask) in KINDS.items():
        model = Model(options.layers, options.dim, options.dim // 64, mask)
        x, rng = inputs(kind, 8, 256, options.dim), Random(0)
        steps, plans, made = [], [], []
        for _ in range(options.rounds + 1):
            with Clock(now) as clock:
                start = now()
                asked = draw(rng, 8, 256)
                made.append(now() - start)
                model(x, **asked).square().mean().backward()
                steps.append(now() - start)
                plans.append(clock.spent + made[-1])
        step, plan = (median(each[1:]) for each in (steps, plans))
        row = f"| {kind} | {step * 1e3:.0f} | {plan * 1e3:.2f} | {100 * plan / step:.2f} % |"
        print(row, flush=True)
        yield row


def resident() -> float:
    """Return resident memory in MB (Linux)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def growth(steps: int) -> Iterator[str]:
    """Yield table rows: memory and the sizes of what is kept, along the way."""
    models = {kind: Model(2, 8, 2, mask) for kind, (_, mask) in KINDS.items()}
    rng = Random(1)
    for step in range(steps + 1):
        if step and step % (steps // 10) == 0:
            gc.collect()
            plans = sum(len(a.attention._plans) for m in models.values() for a in m.attend)  # type: ignore[union-attr, misc, arg-type]
            row = (
                f"| {step:,} | {resident():.0f} | {plans} | {make_plan.cache_info().currsize} "
                f"| {len(KEPT.values)} | {KEPT.held / 2**20:.2f} |"
            )
            print(row, flush=True)
            yield row
        kind = list(KINDS)[step % len(KINDS)]
        length = 4 * rng.randint(4, 24)
        asked = KINDS[kind][0](rng, 2, length)
        models[kind](inputs(kind, 2, length, 8), **asked).square().mean().backward()
        models[kind].zero_grad()


def main() -> None:
    """Measure both, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20_000, help="of the tiny models")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    command = shlex.join(["benchmarks/changing.py", *sys.argv[1:]])
    lines = [
        "# Lengths that change in every step",
        "",
        f"Made by `python {command}`. {machine(options.threads)}.",
        "",
        f"{options.layers} layers of width {options.dim}, 2,048 tokens (8 x 256), float32, forward "
        f"and backward; medians of {options.rounds} steps, each with lengths that no step had. "
        "Planning counts the making of the mask, and what every layer takes to find its plan.",
        "",
        "| lengths | step, ms | planning, ms | share |",
        "|---|---:|---:|---:|",
        *shares(options),
        "",
        f"## {options.steps:,} steps of tiny models, lengths new in each",
        "",
        "In turns of the four kinds above, two layers each, forward and backward.",
        "",
        "| steps | resident, MB | plans of modules | plans of the planner | tensors | MB of them |",
        "|---:|---:|---:|---:|---:|---:|",
        *growth(options.steps),
        "",
    ]
    written(RESULTS, lines)


if __name__ == "__main__":
    main()
