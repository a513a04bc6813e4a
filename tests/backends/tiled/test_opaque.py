"""Masks that are no region are read block by block, inside of their bounds: cells and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks
from attnkit.backends.matrix import CELLS
from attnkit.backends.tiled import cells
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


@pytest.mark.parametrize("name", INSIDE)
def test_cells_outside_of_the_bounds_are_not_read(name: str, cells_read: list[int]) -> None:
    mask = INSIDE[name](ROWS)
    bounds = sum(mask.outer(ROWS, ROWS, head=h).area for h in range(mask.heads or 1))
    areas = cells_read
    areas.clear()  # a dense mask was read when it was asked for its bounds
    step(mask, ROWS)
    assert sum(areas) < 4 * bounds
    assert max(areas) <= 1 << 20


@pytest.mark.parametrize("name", INSIDE)
def test_no_plane_is_made(name: str) -> None:
    mask = INSIDE[name](ROWS)
    with Allocated() as seen:
        step(mask, ROWS)
    assert seen.numbers <= 1 << 20
    assert seen.peak < 24 << 20


@pytest.mark.parametrize("name", ["dilated", "predicate", "batch and heads"])
def test_gradients_of_gradients_make_no_plane(name: str) -> None:
    mask, rows = INSIDE[name](ROWS), ROWS
    with Allocated() as seen:
        x = torch.ones(1, HEADS, rows, 4, requires_grad=True)
        out = ak.attention(x, x, x, mask=mask, layout="BNSD", backend="tiled")
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        slope.sum().backward()
    assert seen.numbers <= 1 << 22


@pytest.mark.parametrize("name", INSIDE)
def test_the_definition_makes_no_plane(name: str) -> None:
    mask = INSIDE[name](2048)
    with Allocated() as seen:
        step(mask, 2048, "reference")
    assert seen.numbers <= CELLS
    assert seen.peak < 64 << 20


def test_a_plane_would_be_seen() -> None:
    with Allocated() as seen:
        masks.Dilated(2).materialize(ROWS, ROWS)
    assert seen.numbers >= ROWS * ROWS


# -- what is kept ------------------------------------------------------------------------------


def gradients(
    mask: Mask, backend: str, rows: int, batch: int, layout: str = "BNSD"
) -> list[Tensor]:
    """The output, its statistics and the gradients; query heads share keys two by two."""
    torch.manual_seed(3)
    heads, packed = (4, 2, 2), layout == "TND"
    shapes = [(batch * rows, n, 8) if packed else (batch, n, rows, 8) for n in heads]
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    lens = ak.SeqLens([rows] * batch) if packed else None
    how = {"mask": mask, "layout": layout, "seqlens": lens, "return_stats": True}
    out, stats = ak.attention(*leaves, backend=backend, **how)
    slopes = [out.detach().cos(), stats.lse.detach().clamp(min=-1.0)]
    made = torch.autograd.grad([out, stats.lse], leaves, slopes)
    return [out, stats.lse, *made]


def agree(mask: Mask, rows: int, batch: int, layout: str = "BNSD") -> None:
    found = gradients(mask, "tiled", rows, batch, layout)
    expected = gradients(mask, "reference", rows, batch, layout)
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-10)


TOLD_APART: dict[str, Mask] = {
    "nothing": masks.SlidingWindow(40) & masks.Dilated(2),
    "repetitions": masks.SlidingWindow(70) & masks.Dilated(3),
    "rows": masks.SlidingWindow(40) & masks.Predicate(lambda b, h, i, j: (i * i + j) % 7 != 3),
    "heads": masks.SlidingWindow(40)
    & masks.PerHead([masks.Dilated(2), masks.Dilated(3), masks.Full(), masks.Dilated(2)]),
    "batch": masks.SlidingWindow(40) & masks.PerBatch([masks.Dilated(3), masks.Dilated(2)]),
    "both": masks.SlidingWindow(90)
    & masks.Predicate(lambda b, h, i, j: (i * j + 3 * b + h) % 5 != 1, 2, 4),
}


@pytest.mark.parametrize("layout", ["BNSD", "TND"])
@pytest.mark.parametrize("apart", TOLD_APART)
def test_each_place_has_its_own_cells(apart: str, layout: str) -> None:
    agree(TOLD_APART[apart], 700, 2, layout)


@pytest.mark.parametrize("room", [0, 100, 400])
@pytest.mark.parametrize("apart", ["repetitions", "rows", "both"])
def test_what_has_no_room_is_read_again(
    apart: str, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "ROOM", room)
    agree(TOLD_APART[apart], 401 + room, 2)  # a plan of its own


def test_equal_cells_are_kept_once() -> None:
    """A window has three kinds of tiles: at the top, one with none above, and the last."""
    mask = window() & masks.Dilated(2)
    x = torch.zeros(1, HEADS, ROWS, 8)
    plan = ak.plan(x, x, x, mask=mask, layout="BNSD", backend="tiled")
    ak.attention(x, x, x, mask=mask, layout="BNSD", backend="tiled")
    assert cells.ROOM - plan.job.cells.room < 8192  # type: ignore[attr-defined]


def test_equal_bits_of_other_sizes_are_other_cells() -> None:
    """One row, and the first of four rows, over one key: a byte says both."""
    first = masks.Predicate(lambda b, h, i, j: i + j == 0)
    mask = masks.PerHead([first & masks.Rows(0, 1), first])
    query, key = torch.ones(1, 2, 4, 8), torch.ones(1, 2, 1, 8)
    found = ak.attention(query, key, key, mask=mask, layout="BNSD", backend="tiled")
    assert isinstance(found, Tensor)
    assert found[0, :, :, 0].tolist() == [[1.0, 0.0, 0.0, 0.0]] * 2


def test_a_fault_in_what_is_kept_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cells._rectangles
    monkeypatch.setattr(
        cells, "_rectangles", lambda step, chunk, b, m, h: right(step, chunk, b, 0, h)
    )
    with pytest.raises(AssertionError):
        agree(TOLD_APART["rows"], 700, 2)
