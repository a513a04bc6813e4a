"""A function of indices read as a set: called once, with indices that note what it does to them.

Most mask functions compare a number that follows from the row with one that follows from the key:
``i >= j``, ``i - j < 256``, ``ids[i] == ids[j]``. Called with `Side`s for i and j, such a function
returns the set of its cells itself, from as many numbers as there are rows and keys. Whatever else
it does is not understood (None), and its cells are read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnkit.geometry import Region
from attnkit.masks.predicate import MaskFunction, evaluate
from attnkit.masks.symbols import Extent, Side, region_of

__all__ = ["symbolic"]

_SAMPLES = 6


def symbolic(
    fn: MaskFunction,
    window: Extent,
    batch: int = 0,
    head: int = 0,
    device: torch.device | str | None = None,
) -> Region | None:
    """Return the cells of ``fn(b, h, i, j)`` as a region, or None where it is not understood.

    A few rows are evaluated cell by cell and compared.

    >>> symbolic(lambda b, h, i, j: (i >= j) & (i - j < 4), Extent(8, 8)).area
    26
    """
    b, h = (torch.full((), one, dtype=torch.int64, device=device) for one in (batch, head))
    sides = [Side(window, axis, window.indices(axis, device)) for axis in (0, 1)]
    try:
        with torch.no_grad():
            given: Any = fn(b, h, *sides)  # type: ignore[arg-type]
            region = region_of(given, window)
    except Exception:  # whatever it does, its cells are read then, and errors are told there
        return None
    return region if _agrees(region, fn, window, b, h, device) else None


def _agrees(
    region: Region, fn: MaskFunction, window: Extent, b: Tensor, h: Tensor, device: Any
) -> bool:
    """Whether a few rows are what the function says when it is asked for each cell."""
    if not (window.q_len and window.kv_len):
        return True
    picked = np.unique(np.linspace(0, window.q_len - 1, _SAMPLES).astype(int))
    rows = window.indices(0, device)[torch.from_numpy(picked)]
    cells = evaluate(fn, b, h, rows, window.indices(1, device)).cpu().numpy()
    for i, row in zip(picked.tolist(), cells, strict=True):
        mine = np.zeros(window.kv_len, dtype=np.bool_)
        for start, stop in region.row(i):
            mine[start:stop] = True
        if not np.array_equal(mine, row):
            return False
    return True
