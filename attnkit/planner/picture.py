"""A picture of a plan: the score matrix, with the cells of each call in its own colour."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

from attnkit.errors import CompositionError, shown
from attnkit.geometry import Region, Slice
from attnkit.planner.lower import lower
from attnkit.planner.matrices import matrices
from attnkit.planner.plan import Launch, Plan
from attnkit.planner.price import chip

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot"]

_GRID = 128
_COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#9f3a8f", "#b7791f", "#4a5568", "#c53030", "#319795")


def plot(plan: Plan, batch: int, head: int) -> Figure:
    """Return the figure that `Plan.plot` documents."""
    try:
        from matplotlib.colors import to_rgb
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise CompositionError("plot() draws with matplotlib: pip install attnkit[plot]") from None
    request = plan.request
    _check_index("batch", batch, request.batch)
    _check_index("head", head, request.num_heads)
    q_len, kv_len = request.sequences[batch]
    launches = plan.steps
    if not launches:
        best = lower(request).best
        launches = () if best is None else best.launches
    known = matrices(request).regions(head)[batch]
    layers = [(_launch_region(launch, batch, head), launch.label) for launch in launches]
    layers = [(r, label) for r, label in layers if r] or [(known, "the mask")]
    picture = [[[1.0, 1.0, 1.0] for _ in range(_GRID)] for _ in range(_GRID)]
    legend = []
    for k, (region, label) in enumerate(layers):
        colour = to_rgb(_COLOURS[k % len(_COLOURS)])
        legend.append(Patch(color=colour, label=f"call {k + 1}: {label}"))
        for i, row in enumerate(_shares(region, q_len, kv_len)):
            for j, share in enumerate(row):
                picture[i][j] = [
                    a * (1 - share) + b * share for a, b in zip(picture[i][j], colour, strict=True)
                ]
    figure = Figure(figsize=(5, 5.4), layout="constrained")
    axes = figure.add_subplot()
    # An axis of no length cannot be drawn: an empty score matrix is a blank field.
    extent = (0, max(kv_len, 1), max(q_len, 1), 0)
    axes.imshow(picture, extent=extent, aspect="auto", interpolation="nearest")
    axes.set_title(f"{request.mask!r}\n{_measured(known, q_len, kv_len)}", fontsize=9)
    axes.set(xlabel="key j", ylabel="query i")
    figure.legend(handles=legend, loc="outside lower center", ncols=2, fontsize=8)
    return figure


def _check_index(name: str, index: object, count: int) -> None:
    if isinstance(index, bool) or not isinstance(index, int) or index not in range(count):
        raise CompositionError(
            f"plot() got {name}={shown(index)[:80]}; the plan has {count}, so it is an int from 0 "
            f"to {count - 1}"
        )


def _measured(known: Region, q_len: int, kv_len: int) -> str:
    if not q_len or not kv_len:
        return f"no cells: {q_len} queries x {kv_len} keys"
    tiles = known.tiles(chip().tile_q, chip().tile_kv, q_len, kv_len)
    return (
        f"{100 * known.area / (q_len * kv_len):.1f} % of the cells; tiles: {tiles.full} full, "
        f"{tiles.partial} partial, {tiles.empty} skipped"
    )


def _launch_region(launch: Launch, batch: int, head: int) -> Region:
    """Return the cells that a call computes in one score matrix."""
    if launch.form.heads is not None and head not in launch.form.heads:
        return Region.empty()
    mask = launch.call.atten_mask
    if mask is not None and mask.is_opaque:
        return Region.empty()
    per_head = mask is not None and len(mask.shape) == 4 and mask.shape[1] > 1
    regions = launch.call.regions(head if per_head else None)
    return Region.union(
        region.shift(block.i0, block.j0)
        for block, region in zip(launch.form.blocks, regions, strict=True)
        if block.batch == batch
    )


def _shares(region: Region, q_len: int, kv_len: int) -> list[list[float]]:
    """Return the share of the region's cells in each field of a grid over the score matrix."""
    rows = [q_len * k // _GRID for k in range(_GRID + 1)]
    keys = [kv_len * k // _GRID for k in range(_GRID + 1)]
    out = []
    for i0, i1 in pairwise(rows):
        i1 = max(i1, i0 + 1)
        band = region & Region.of(Slice(i0, i1, 0, kv_len))
        out.append(
            [
                (band & Region.of(Slice(i0, i1, j0, max(j1, j0 + 1)))).area
                / ((i1 - i0) * max(j1 - j0, 1))
                if band
                else 0.0
                for j0, j1 in pairwise(keys)
            ]
        )
    return out
