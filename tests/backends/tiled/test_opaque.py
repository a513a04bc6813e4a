"""Masks that are no region are read block by block, inside of their bounds: cells and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks
from attnkit.masks import Mask, Rectangle
from attnkit.masks.dilated import Dilated
from attnkit.masks.predicate import Predicate
from tests.backends.memory import Allocated

ROWS, HEADS, WINDOW = 4096, 2, 64

Made = Callable[[int], Mask]


def scattered(rows: int) -> Mask:
    draw = torch.Generator().manual_seed(1)
    return masks.Dense.keep(torch.rand(rows, rows, generator=draw) < 0.5)


def window() -> Mask:
    return masks.Causal() & masks.SlidingWindow(WINDOW)


INSIDE: dict[str, Made] = {
    "dilated": lambda n: window() & masks.Dilated(2),
    "dilated by three": lambda n: masks.Dilated(3) & window(),
    "predicate": lambda n: window() & masks.Predicate(lambda b, h, i, j: (i * j) % 7 != 3),
    "dense": lambda n: window() & scattered(n),
    "sinks": lambda n: masks.Dilated(2) & (masks.Causal() & masks.Columns(0, 4) | window()),
    "documents": lambda n: (
        masks.Documents([n // 64] * 64) & masks.Predicate(lambda b, h, i, j: (i * j) % 5 != 1)
    ),
    "heads": lambda n: masks.PerHead([window() & masks.Dilated(step) for step in (2, 3)]),
    "batch and heads": lambda n: (
        window() & masks.Predicate(lambda b, h, i, j: (i * j + b + h) % 7 != 3, 1, HEADS)
    ),
    "cut": lambda n: (window() & masks.Dilated(2))[:, :],
    "the complement": lambda n: ~(~window() | masks.Dilated(2)),
}


@pytest.fixture
def cells_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The areas of the rectangles that masks without a region are asked for."""
    areas: list[int] = []
    for family in (Dilated, Predicate, masks.Dense):
        right = family._cells

        def counted(self: Mask, at: Rectangle, device: object, right: object = right) -> Tensor:
            areas.append(at.shape[0] * at.shape[1])
            return right(self, at, device)  # type: ignore[operator,no-any-return]

        monkeypatch.setattr(family, "_cells", counted)
    yield areas
    assert areas


def step(mask: Mask, rows: int, backend: str = "tiled", dim: int = 8) -> None:
    """One forward and backward pass."""
    x = torch.ones(1, HEADS, rows, dim, requires_grad=True)
    out = ak.attention(x, x, x, mask=mask, layout="BNSD", backend=backend)
    assert isinstance(out, Tensor)
    out.sum().backward()


@pytest.mark.parametrize("name", [name for name in INSIDE if name != "sinks"])
def test_cells_outside_of_the_bounds_are_not_read(name: str, cells_read: list[int]) -> None:
    mask = INSIDE[name](ROWS)
    bounds = sum(mask.outer(ROWS, ROWS, head=h).area for h in range(mask.heads or 1))
    areas = cells_read
    areas.clear()  # a dense mask was read when it was asked for its bounds
    step(mask, ROWS)
    assert sum(areas) < 64 * bounds
    assert max(areas) <= 1 << 20


@pytest.mark.parametrize("name", INSIDE)
def test_no_plane_is_made(name: str) -> None:
    mask = INSIDE[name](ROWS)
    with Allocated() as seen:
        step(mask, ROWS)
    assert seen.numbers <= 1 << 20
    assert seen.peak < 24 << 20


def test_a_plane_would_be_seen() -> None:
    with Allocated() as seen:
        masks.Dilated(2).materialize(ROWS, ROWS)
    assert seen.numbers >= ROWS * ROWS
