"""Masks of grids against the definitions of those who named them, at every small grid."""

from __future__ import annotations

from functools import cache
from itertools import combinations_with_replacement, product
from math import prod

import numpy as np
import pytest
import torch

from attnkit import masks
from attnkit.masks import Rectangle

RANDOM = torch.Generator().manual_seed(0)


def product_of(tables: list[np.ndarray]) -> torch.Tensor:
    """The cells of a grid, read cell by cell through the coordinates of query and key."""
    shape = [len(table) for table in tables]
    tokens = np.unravel_index(np.arange(prod(shape)), shape)
    seen = [table[at[:, None], at] for table, at in zip(tables, tokens, strict=True)]
    return torch.from_numpy(np.logical_and.reduce(seen))


def assert_is(mask: masks.Mask, cells: torch.Tensor) -> None:
    """The region, the materialised cells and those of a rectangle are all the same."""
    size = len(cells)
    assert mask.region(size, size) == masks.Dense.keep(cells).region(size, size), mask
    assert mask.materialize(size, size)[0, 0].equal(cells), mask
    (i0, i1), (j0, j1) = torch.randint(size + 1, (2, 2), generator=RANDOM).sort().values.tolist()
    read = mask._read(Rectangle((i0, i1), (j0, j1), size, size))
    assert read.equal(cells[i0:i1, j0:j1]), mask


# -- Neighborhood ----------------------------------------------------------------------------


@cache
def natten(size: int, kernel: int, dilation: int, causal: bool) -> np.ndarray:
    """NATTEN's mask along one axis, cell by cell.

    As its FlexAttention backend says it: coordinates inside of a dilation group, whose length
    depends on the group, and a window around a centre that is kept away from both ends.
    """
    cells = np.zeros((size, size), np.bool_)
    left, right = kernel // 2, kernel // 2 + kernel % 2 - 1
    for q, k in product(range(size), repeat=2):
        length = -(-(size - q % dilation) // dilation)
        here, there = q // dilation, k // dilation
        centre = min(max(here, left), length - 1 - right)
        seen = 0 <= here - there < kernel if causal else -left <= there - centre <= right
        cells[q, k] = seen and q % dilation == k % dilation
    return cells


def lines(size: int) -> list[tuple[int, int, int, bool]]:
    """Every kernel, dilation and causality that an axis can have."""
    return [
        (size, kernel, dilation, causal)
        for dilation in range(1, size + 1)
        for kernel in range(1, size // dilation + 1)
        for causal in (False, True)
    ]


@pytest.mark.parametrize(("axes", "largest"), [(1, 8), (2, 5), (3, 3)])
def test_a_neighborhood_is_the_one_of_natten(axes, largest):
    each = [line for size in range(1, largest + 1) for line in lines(size)]
    # Of three axes, every choice in one order: two axes tell what an order could change.
    grids = product(each, repeat=axes) if axes < 3 else combinations_with_replacement(each, 3)
    for grid in grids:
        mask = masks.Neighborhood(*zip(*grid, strict=True))
        assert_is(mask, product_of([natten(*line) for line in grid]))
