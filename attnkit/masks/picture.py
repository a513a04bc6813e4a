"""Pictures of masks: for the terminal, and as a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from attnkit.errors import CompositionError
from attnkit.geometry import Region, Slice
from attnkit.masks.base import Mask, check_int

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot", "show"]

_ROWS = 32


def densities(
    mask: Mask, q_len: int, kv_len: int, batch: int, head: int, rows: int, columns: int
) -> list[list[float]]:
    """Return the share of allowed cells in each block of a grid of about `rows` x `columns`."""
    known = mask._checked_enclosure(q_len, kv_len, batch, head)
    if not (q_len and kv_len):
        return [[] for _ in range(min(q_len, rows))]
    block_q, block_kv = max(1, -(-q_len // rows)), max(1, -(-kv_len // columns))
    tops, lefts = range(0, q_len, block_q), range(0, kv_len, block_kv)
    if known.exact:
        return [
            [
                _share(band, Slice(i, min(i + block_q, q_len), j, min(j + block_kv, kv_len)))
                for j in lefts
            ]
            for i in tops
            for band in [known.inner & Region.of(Slice(i, min(i + block_q, q_len), 0, kv_len))]
        ]
    cells = mask._plane(q_len, kv_len, batch, head, "cpu").float()
    return [[float(cells[i : i + block_q, j : j + block_kv].mean()) for j in lefts] for i in tops]


def _share(region: Region, block: Slice) -> float:
    return (region & Region.of(block)).area / block.area


def show(mask: Mask, q_len: int, kv_len: int, batch: int, head: int, width: int) -> str:
    """Return the terminal picture that `Mask.show` documents."""
    check_int("show width", width, 1)
    mask.check(q_len, kv_len)
    rows = q_len if q_len <= width else _ROWS
    grid = densities(mask, q_len, kv_len, batch, head, rows, width)
    return "\n".join(
        "".join("#" if share == 1 else "+" if share else "." for share in row) for row in grid
    )


def plot(mask: Mask, q_len: int, kv_len: int, batch: int, head: int) -> Figure:
    """Return the figure that `Mask.plot` documents."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CompositionError("plot() draws with matplotlib: pip install attnkit[plot]") from None
    grid = np.array(densities(mask, q_len, kv_len, batch, head, 128, 128))
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if grid.size:
        place = (0, kv_len, q_len, 0)
        axes.imshow(grid, cmap="Blues", vmin=0, vmax=1, extent=place, aspect="auto")
    axes.set(xlabel="key j", ylabel="query i", title=repr(mask))
    return figure
