"""Sparse masks on the CPU: tiles beside a dense mask and beside gathering: ``sparse_on_cpu.py``.

Attention forward, and forward and backward, of the masks of `_sparse_masks` on the `tiled` backend;
on torch's fused attention with a dense mask; and on the same with keys gathered *by hand*: rows
that see the same keys (or, where rows all differ, 128 rows that follow each other) are one product
over the keys that they see. Then what `tiled` takes to plan the same masks at 16,384 tokens.
Float32, 8 heads of 64, one thread, processor time, best of the rounds, in turns. Writes
benchmarks/results/sparse_on_cpu.md.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _sparse_masks import LONG, SHORT, SPARSE, Sparse
from attention import machine, written
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import attnkit as ak
from attnkit.masks import Mask

RESULTS = Path(__file__).parent / "results" / "sparse_on_cpu.md"
HEADS, DIM, ROWS = 8, 64, 128
LONGER = {
    "random blocks {1}": (4096, 128, 5),
    "MoBA, chunks of {2}, top {3}": (4096, 128, 256, 3),
    "NSA selection, {3} of {1}": (4096, 64, 64, 8),
    "BigBird, blocks of {1}": (4096, 64),
    "NATTEN 2-D {1}": ((64, 64), (13, 13)),
    "Sparse Transformer, strided {1}": (4096, 64),
    "8 documents interleaved by {1}, causal": (4096, 64, True),
}
"""What masks are given at 4,096 tokens."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_tiles(mask: Mask) -> Attend:
    """The backend."""
    layer = ak.Attention(HEADS, DIM, mask=mask, layout="BNSD", backend="tiled")
    return lambda q, k, v: layer(q, k, v)


def by_mask(cells: Tensor) -> Attend:
    """Torch's attention with one entry per cell."""
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=cells)


def gathered(cells: Tensor) -> Attend:
    """Torch's attention on gathered rows and keys: what a user could write."""
    parts = [
        (torch.from_numpy(rows), keys, None if part.all() else part)
        for rows in _together(cells.numpy())
        for keys in (cells[rows].any(0).nonzero()[:, 0],)
        for part in (cells[rows][:, keys],)
        if len(keys)
    ]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.zeros_like(q)
        for rows, keys, part in parts:
            some = (q.index_select(2, rows), k.index_select(2, keys), v.index_select(2, keys))
            found = scaled_dot_product_attention(*some, attn_mask=part)
            out = out.index_copy(2, rows, found) if q.requires_grad else _put(out, rows, found)
        return out

    return attend


def _put(out: Tensor, rows: Tensor, found: Tensor) -> Tensor:
    return out.index_copy_(2, rows, found)


def _together(cells: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each product: equal ones, or those that follow each other."""
    of = np.unique(cells, axis=0, return_inverse=True)[1].reshape(-1)
    classes = [np.flatnonzero(of == k) for k in range(of.max() + 1)]
    if len(classes) * 16 <= len(cells):
        return classes
    return [np.arange(i, min(i + ROWS, len(cells))) for i in range(0, len(cells), ROWS)]


def step(attend: Attend, tensors: list[Tensor], trains: bool) -> None:
    """Run once, forward or both ways."""
    with torch.set_grad_enabled(trains):
        found = attend(*tensors)
        if trains:
            torch.autograd.grad(found, tensors, found.detach())


def best(ways: list[Attend], tensors: list[Tensor], trains: bool, rounds: int) -> list[float]:
    """Return the best time of each way, in milliseconds, measured in turns."""
    tensors = [one.detach().requires_grad_(trains) for one in tensors]
    found = [float("inf")] * len(ways)
    for k in range(rounds + 1):
        for n, way in enumerate(ways):
            start = time.thread_time()
            step(way, tensors, trains)
            if k:
                found[n] = min(found[n], 1e3 * (time.thread_time() - start))
    return found


def planned(mask: Mask, q_len: int, kv_len: int) -> float:
    """Return what the first plan on tiles takes, in milliseconds."""
    x = torch.empty(1, HEADS, 1, DIM, device="meta", requires_grad=True)
    q, k = (x.expand(1, HEADS, n, DIM) for n in (q_len, kv_len))
    start = time.process_time()
    ak.plan(q, k, k, mask=mask, layout="BNSD", backend="tiled")
    return 1e3 * (time.process_time() - start)


def rows(rounds: int) -> Iterator[str]:
    """Yield the rows of the first table."""
    for one in SPARSE:
        for arguments in (one.arguments[SHORT], LONGER.get(one.name)):
            if arguments is not None:
                yield _row(one, arguments, rounds)


def _row(one: Sparse, arguments: tuple[object, ...], rounds: int) -> str:
    mask, (q_len, kv_len) = one.make(*arguments)
    cells = mask.materialize(q_len, kv_len)[0, 0]
    tensors = [torch.randn(1, HEADS, n, DIM) for n in (q_len, kv_len, kv_len)]
    ways = [by_tiles(mask), by_mask(cells), gathered(cells)]
    meant, *others = (way(*tensors) for way in ways)
    for other in others:
        torch.testing.assert_close(other.nan_to_num(), meant, atol=1e-4, rtol=1e-3)
    run = partial(best, ways, tensors, rounds=rounds)
    forward, both = run(trains=False), run(trains=True)
    share = 100 * float(cells.float().mean())
    told = [f"{n:.0f}" for n in forward] + [f"{forward[0] / forward[2]:.2f}"]
    told += [f"{n:.0f}" for n in both] + [f"{both[0] / both[2]:.2f}"]
    name = one.name.format(*arguments)
    first = f"| {name} | {kv_len:,} | {share:.1f} % | {planned(mask, q_len, kv_len):.0f}"
    row = f"{first} | {' | '.join(told)} |"
    print(row, flush=True)
    return row


def long_plans() -> Iterator[str]:
    """Yield the rows of the second table."""
    for one in SPARSE:
        if one.arguments[LONG] is not None:
            mask, lengths = one.at(LONG)
            row = f"| {one.label(LONG)} | {planned(mask, *lengths):,.0f} |"
            print(row, flush=True)
            yield row


def main() -> None:
    """Measure, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    command = shlex.join(["benchmarks/sparse_on_cpu.py", *sys.argv[1:]])
    lines = [
        "# Sparse masks on the CPU",
        "",
        f"Made by `python {command}`. {machine(1)}.",
        "",
        "Milliseconds. The ratios are tiles over gathered by hand: above 1, gathering is faster.",
        "",
        "| mask | keys | density | planned | tiles | dense mask | gathered | ratio "
        "| both: tiles | dense mask | gathered | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *rows(options.rounds),
        "",
        "## Planning on tiles, 16,384 tokens",
        "",
        "| mask | ms |",
        "|---|---:|",
        *long_plans(),
        "",
    ]
    written(RESULTS, lines)


if __name__ == "__main__":
    main()
