"""A picture of a parallel plan: the score matrix, a colour per rank, paler by stages."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from attnkit.arguments import check_int
from attnkit.geometry import Region
from attnkit.masks import picture
from attnkit.parallel.choose import label
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.plane import layers
from attnkit.planner.picture import GRID, colour, colours
from attnkit.planner.sequences import Block

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot"]

_MOST_SHADES = 4


def plot(plan: ParallelPlan, batch: int, head: int) -> Figure:
    """Return the figure that `ParallelPlan.plot` documents."""
    request = plan.request
    check_int("batch", batch, 0, max(0, plan.copies - 1))
    check_int("head", head, 0, request.num_heads - 1)
    region = layers(request, head)[batch]
    sizes = request.q_len, request.kv_len, GRID, GRID
    cells = np.ones((*picture.shares(Region.empty(), *sizes).shape, 3))
    for (rank, shade), part in sorted(_parts(plan, region, head).items()):
        share = picture.shares(part, *sizes)[..., None]
        tint = 1 - (1 - np.array(colour(rank))) * (1 - shade / (_MOST_SHADES + 1))
        cells = cells * (1 - share) + tint * share
    title = f"{request.mask!r}\n{plan.size} ranks: {label(plan)}"
    figure = picture.figure(cells, request.q_len, request.kv_len, title)
    from matplotlib.patches import Patch  # is there, or the figure would not be

    turns = min(colours(), plan.size)
    every = "" if plan.size <= turns else f" and each {turns}th after it"
    legend = [Patch(color=colour(rank), label=f"rank {rank}{every}") for rank in range(turns)]
    figure.legend(handles=legend, loc="outside lower center", ncols=4, fontsize=8)
    return figure


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
                found[rank % colours(), min(stage.number, _MOST_SHADES - 1)].append(own)
    return {key: Region.union(parts) for key, parts in found.items()}
