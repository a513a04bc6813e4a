"""A picture of a parallel plan: the score matrix, a colour per rank, paler by stages."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from attnkit.arguments import check_int
from attnkit.display import COLOURS, Drawing, Layer, colour
from attnkit.fields import GRID
from attnkit.geometry import Region
from attnkit.masks import picture
from attnkit.parallel.choose import label
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.plane import layers
from attnkit.planner.sequences import Block

if TYPE_CHECKING:
    from attnkit.display.figure import Figure

__all__ = ["drawing", "plot"]

_MOST_SHADES = 4


def plot(plan: ParallelPlan, batch: int, head: int) -> Figure:
    """Return the figure that `ParallelPlan.plot` documents."""
    return picture.figure(drawing(plan, batch, head), columns=4)


def drawing(plan: ParallelPlan, batch: int = 0, head: int = 0, grid: int = GRID) -> Drawing:
    """Return the picture of one score matrix, in at most `grid` x `grid` fields.

    >>> import torch
    >>> from attnkit import masks, parallel
    >>> x = torch.empty(1, 64, 4, 16, device="meta")
    >>> plan = parallel.plan(x, x, x, ranks=2, mask=masks.Causal())
    >>> [label for _, label in drawing(plan).legend]
    ['rank 0', 'rank 1']
    """
    request = plan.request
    check_int("batch", batch, 0, max(0, plan.copies - 1))
    check_int("head", head, 0, request.num_heads - 1)
    sizes = request.q_len, request.kv_len, grid, grid
    turns = min(len(COLOURS), plan.size)
    every = "" if plan.size <= turns else f" and each {turns}th after it"
    labels = [f"rank {rank}{every}" for rank in range(turns)]
    # Colours of ranks without a cell here have their place in the legend as well.
    blank = picture.shares(Region.empty(), *sizes)
    drawn = [Layer(blank.tolist(), colour(rank), labels[rank]) for rank in range(turns)]
    for (rank, shade), cells in sorted(_parts(plan, layers(request, head)[batch], head).items()):
        share = picture.shares(cells, *sizes) * (1 - shade / (_MOST_SHADES + 1))
        drawn.append(Layer(share.tolist(), colour(rank), labels[rank]))
    note = f"{plan.size} ranks: {label(plan)}"
    return Drawing(request.q_len, request.kv_len, tuple(drawn), f"{request.mask!r}", note)


def _parts(plan: ParallelPlan, region: Region, head: int) -> dict[tuple[int, int], Region]:
    """Return the cells that share a colour and a shade."""
    found: dict[tuple[int, int], list[Region]] = defaultdict(list)
    for rank in range(plan.size):
        if head not in plan.heads(rank):
            continue
        rows = plan.rows(rank)
        for stage in plan.stages(rank):
            if rows and stage.keys:
                own = Block(0, rows, stage.keys).image(region.take(rows, stage.keys))
                found[rank % len(COLOURS), min(stage.number, _MOST_SHADES - 1)].append(own)
    return {key: Region.union(parts) for key, parts in found.items()}
