"""Masks of long texts, other ways to deal their tokens to ranks, and what keys then travel."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from random import Random

from attnkit.geometry import Region
from attnkit.masks import Causal, Columns, Documents, Full, Mask, Rows, SlidingWindow
from attnkit.parallel.load import Load
from attnkit.parallel.sharding import Sharding
from attnkit.ranges import total, without

sys.path.insert(0, str(Path(__file__).parents[1]))
from docs.make.variants import block_diffusion

WINDOW = 4096


def lengths(tokens: int, count: int, spread: float, seed: int) -> list[int]:
    """Log-normal lengths of documents that sum to some tokens."""
    draw = Random(seed)
    weights = [draw.lognormvariate(0, spread) for _ in range(count)]
    ends = [round(tokens * sum(weights[:k]) / sum(weights)) for k in range(count + 1)]
    return [b - a for a, b in pairwise(ends)]


def masks_of(tokens: int) -> dict[str, Mask]:
    """Return the masks of the table, by name."""
    window = SlidingWindow(WINDOW)
    many = Documents(lengths(tokens, 1000, 1.3, 0))
    return {
        "causal": Causal(),
        "window of 4,096": window,
        "64 sinks and the window": Causal() & (Columns(0, 64) | window),
        "1,000 documents, causal": many & Causal(),
        "1,000 documents, full": many & Full(),
        "64 documents, heavy tail": Documents(lengths(tokens, 64, 2.0, 1)) & Causal(),
        "prefix-LM, a quarter": Causal() | Columns(0, tokens // 4),
        "block diffusion, blocks of 4,096": block_diffusion(tokens, WINDOW),
        "1,000 documents and the window": many & window,
        "window and 256 global rows": window | Rows(0, 256),
    }


def heap(load: Load, ranks: int, each: int = 8) -> Sharding:
    """Deal chunks of equal length, those with the most cells first, to the rank with the least.

    The rule of MagiAttention's dispatch (SandAI-org/MagiAttention, `MinHeapDispatchAlg`): each
    rank gets as many chunks.
    """
    count = each * ranks
    ends = [load.length * k // count for k in range(count + 1)]
    chunks = [(-load.cells((range(a, b),)), a, b) for a, b in pairwise(ends)]
    waiting, spans = [(0, rank) for rank in range(ranks)], [[] for _ in range(ranks)]
    for less, start, stop in sorted(chunks):
        held, rank = heappop(waiting)
        spans[rank].append((start, stop))
        if len(spans[rank]) < each:
            heappush(waiting, (held - less, rank))
    return Sharding.of(load.length, spans)


@dataclass(frozen=True)
class Travel:
    """How many keys ranks receive: in the mean, and the one with the most."""

    mean: float
    worst: int

    @classmethod
    def of(cls, region: Region, sharding: Sharding) -> Travel:
        """Return it for a region whose queries and keys are sharded alike."""
        counts = [total(without(region.seen(own), own)) for own in sharding.ranks]
        return cls(sum(counts) / len(counts), max(counts))
