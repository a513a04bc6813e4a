"""Masks of grids against the definitions of those who named them, at every small grid."""

from __future__ import annotations

from functools import cache
from itertools import combinations_with_replacement, product
from math import prod

import numpy as np
import pytest
import torch

from attnkit import masks
from attnkit.masks import Rectangle, grid
from attnkit.masks.trace import count_slices, paint

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
    found = list(combinations_with_replacement(each, axes))  # every choice, in one order
    found += [both[::-1] for both in found if axes == 2 and prod(n for n, *_ in both) <= 9]
    for lengths in found:
        mask = masks.Neighborhood(*zip(*lengths, strict=True))
        assert_is(mask, product_of([natten(*line) for line in lengths]))


# -- SlidingTiles ----------------------------------------------------------------------------


@cache
def sta(size: int, tile: int, window: int) -> np.ndarray:
    """FastVideo's mask along one axis: a centre that is clamped, and half a window on each side."""
    tiles, half = size // tile, window // 2
    cells = np.zeros((size, size), np.bool_)
    for q, k in product(range(size), repeat=2):
        centre = min(max(q // tile, half), max(tiles - 1 - half, 0))
        cells[q, k] = abs(centre - k // tile) <= half
    return cells


def tile_lines(size: int) -> list[tuple[int, int, int]]:
    """Every tile and window that an axis can have."""
    return [
        (size, tile, window)
        for tile in range(1, size + 1)
        for window in range(1, size // tile + 1)
        if size % tile == 0 and (window % 2 or window == size // tile)
    ]


@pytest.mark.parametrize(("axes", "largest"), [(1, 12), (2, 6), (3, 4)])
def test_sliding_tiles_are_those_of_fastvideo(axes, largest):
    each = [line for size in range(1, largest + 1) for line in tile_lines(size)]
    for lengths in combinations_with_replacement(each, axes):
        if prod(line[0] for line in lengths) > 64:
            continue
        mask = masks.SlidingTiles(*zip(*lengths, strict=True))
        assert_is(mask, product_of([sta(*line) for line in lengths]))


def test_tiles_in_their_own_order_are_a_table_of_blocks():
    mask = masks.SlidingTiles((4, 6, 9), (2, 3, 3), (1, 1, 3))
    table = masks.SlidingTiles((2, 2, 3), 1, (1, 1, 3)).materialize(12, 12)[0, 0]
    tokens = torch.arange(216).view(2, 2, 2, 3, 3, 3).permute(0, 2, 4, 1, 3, 5).reshape(-1)
    by_tile = masks.Blocks(table, 18, 18).materialize(216, 216)[0, 0]
    assert mask.materialize(216, 216)[0, 0][tokens][:, tokens].equal(by_tile)


# -- ShiftedWindows --------------------------------------------------------------------------


def swin(shape: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> torch.Tensor:
    """Swin's attention, as the model computes it: roll, cut into windows, mask by region."""
    tokens = torch.arange(prod(shape)).view(shape)
    regions = torch.zeros(shape, dtype=torch.long)
    for axis, (w, s) in enumerate(zip(window, shift, strict=True)):
        label = torch.zeros(shape[axis], dtype=torch.long)
        if s:
            label[-w:-s], label[-s:] = 1, 2
        regions = 3 * regions + label.view([-1 if k == axis else 1 for k in range(len(shape))])
    rolled = tokens.roll([-s for s in shift], dims=list(range(len(shape))))
    cells = torch.zeros(prod(shape), prod(shape), dtype=torch.bool)
    for corner in product(*(range(0, n, w) for n, w in zip(shape, window, strict=True))):
        cut = tuple(slice(a, a + w) for a, w in zip(corner, window, strict=True))
        inside, label = rolled[cut].reshape(-1), regions[cut].reshape(-1)
        cells[inside[:, None], inside] = label[:, None] == label
    return cells


def window_lines(size: int) -> list[tuple[int, int, int]]:
    """Every window and shift that an axis can have."""
    return [
        (size, window, shift)
        for window in range(1, size + 1)
        for shift in range(window if window < size else 1)
        if size % window == 0
    ]


@pytest.mark.parametrize(("axes", "largest"), [(1, 12), (2, 6), (3, 4)])
def test_shifted_windows_are_those_of_swin(axes, largest):
    each = [line for size in range(1, largest + 1) for line in window_lines(size)]
    for lengths in combinations_with_replacement(each, axes):
        sizes = tuple(zip(*lengths, strict=True))
        if prod(sizes[0]) <= 48:
            assert_is(masks.ShiftedWindows(*sizes), swin(*sizes))


# -- what they share -------------------------------------------------------------------------


def test_products_of_any_sets():
    """Runs that end at a border join with the next block, in all rows, in the first or the last."""
    bands = [
        masks.Band(a, b).region(4, 4) for a, b in product(range(-2, 4), repeat=2) if a + b >= 0
    ]
    loose = [
        masks.Dense.keep(torch.rand(4, 4, generator=RANDOM) < 0.7).region(4, 4) for _ in range(12)
    ]
    ends = [masks.Keys([(0, 1), (3, 4)]).region(4, 4), ~masks.Band(1, 0), ~masks.Band(0, 1)]
    sets = [*bands, *loose, ends[0], *(mask.region(4, 4) for mask in ends[1:])]
    for outer, inner in product(sets, repeat=2):
        found = grid.grid_product((outer, inner), (4, 4))
        right = torch.kron(paint(outer, 4, 4).int(), paint(inner, 4, 4).int()).bool()
        assert found == masks.Dense.keep(right).region(16, 16), (outer, inner)


def test_one_value_for_all_axes_is_that_value_for_each():
    one = masks.Neighborhood((6, 6), (3, 3), (2, 2), (False, False))
    assert one == masks.Neighborhood((6, 6), 3, 2)
    assert str(one) == "Neighborhood((6, 6), 3, 2)"
    assert masks.Neighborhood([5], [3]) == masks.Neighborhood(5, 3)
    assert str(masks.Neighborhood(5, 3, causal=True)) == "Neighborhood((5,), 3, causal=True)"
    assert masks.SlidingTiles(torch.Size([4, 4]), [2, 2], 1) == masks.SlidingTiles((4, 4), 2, 1)
    assert (
        str(masks.ShiftedWindows((4, 8), (2, 4), (1, 2)))
        == "ShiftedWindows((4, 8), (2, 4), (1, 2))"
    )


@pytest.mark.parametrize(
    "mask",
    [
        masks.Neighborhood((6, 5, 4), (3, 1, 2), (2, 1, 1), (False, False, True)),
        masks.SlidingTiles((6, 5, 4), (2, 1, 2), (1, 3, 1)),
        masks.ShiftedWindows((6, 5, 4), (3, 5, 2), (1, 0, 1)),
    ],
)
@pytest.mark.parametrize("most", [1, 20, 40])
def test_a_set_of_too_many_runs_is_known_by_its_cells_and_a_bound(mask, most, monkeypatch):
    right = mask.region(120, 120)
    cells = mask.materialize(120, 120)[0, 0]
    monkeypatch.setattr(grid, "MOST_RUNS", most)
    other = masks.parse(str(mask))
    assert not other.is_region(120, 120)
    assert right <= other.outer(120, 120)
    assert (most == 1) == (other.outer(120, 120).area == 120 * 120)
    assert other.materialize(120, 120)[0, 0].equal(cells)
    part = masks.Dense.keep(other[20:70, 3:].materialize(50, 117)[0, 0])
    assert part.region(50, 117) == right.cut((20, 70), (3, 120))


def test_what_stands_beside_a_grid_is_another_part():
    near = masks.Neighborhood((4, 4), 3)
    few = (near & masks.Padding([16, 12])).region(16, 16, batch=1)
    assert few == near.region(16, 16) & masks.Columns(0, 12).region(16, 16)
    placed = masks.Placed(near, before=2, after=1)
    text = masks.Columns(0, 2) | masks.Rows(0, 2)
    cells = (placed | text).materialize(19, 19)[0, 0]
    assert cells[2:18, 2:18].equal(near.materialize(16, 16)[0, 0])
    assert cells[:2].all()
    assert cells[:, :2].all()
    assert not cells[2:, 18].any()
    assert not cells[18, 2:].any()
    assert placed[2:18, 2:18].region(16, 16) == near.region(16, 16)
    cut = near[4:8, :]
    assert cut.region(4, 16) == near.region(16, 16).cut((4, 8), (0, 16))


def test_large_grids_are_sets_of_few_runs():
    image = masks.Neighborhood((128, 128), 13).region(16384, 16384)
    assert (image.area, count_slices(image)) == (16384 * 169, 4992)
    video = masks.Neighborhood((16, 32, 32), (5, 7, 7)).region(16384, 16384)
    assert (video.area, count_slices(video)) == (16384 * 245, 53760)
    windows = masks.ShiftedWindows((128, 128), 8, 4).region(16384, 16384)
    assert windows.row_counts()[0].first == 16
    line = masks.Neighborhood(1 << 20, 9)
    rows = line._read(Rectangle((1000, 1003), (995, 1007), 1 << 20, 1 << 20))
    assert rows.int().tolist() == [[0] * (k + 1) + [1] * 9 + [0] * (2 - k) for k in range(3)]
    tiles = masks.SlidingTiles((30, 48, 80), (6, 8, 8), 3)
    assert not tiles.is_region(115200, 115200)
    assert tiles.materialize(115200, 115200, device="meta").shape == (1, 1, 115200, 115200)
