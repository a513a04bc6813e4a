"""Tiles of rows that see the same keys and lie apart: tokens are sorted, and put back."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.backends.tiled import classes
from attnkit.geometry import Region

MASKS: dict[str, tuple[masks.Mask, int]] = {
    "windows of a grid": (masks.ShiftedWindows((8, 12), 4, 2), 96),
    "tiles of a grid": (masks.SlidingTiles((4, 4, 6), (2, 2, 2), (1, 1, 3)), 96),
    "documents in turns": (masks.SameId([(k * 5 % 3, 7) for k in range(9)]), 63),
    "rows and keys of nobody": (
        masks.SameId([(k % 2, 5) for k in range(8)]) & masks.Rows(3, 31) & masks.Columns(6, 33),
        40,
    ),
}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes are taken wherever there are any."""
    monkeypatch.setattr(classes, "_FEWEST_CELLS", 0)
    monkeypatch.setattr(classes, "_FEWEST_ROWS", 1)
    monkeypatch.setattr(classes, "_SHARE", 0.0)


def tensors(length: int, kv_heads: int, layout: str) -> list[torch.Tensor]:
    form = ak.layouts.get(layout)
    shapes = (form.shape(ak.layouts.Sizes(2, length, n, 4)) for n in (4, kv_heads, kv_heads))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("layout", ["BSND", "SBH", "BNSD"])
@pytest.mark.parametrize("name", MASKS)
def test_sorted_rows_have_the_answers_and_gradients_of_the_definition(
    name: str, layout: str
) -> None:
    mask, length = MASKS[name]
    given = tensors(length, 2, layout)
    sink = torch.randn(4, dtype=torch.float64, requires_grad=True)
    of_heads = {"num_heads": 4, "num_kv_heads": 2} if layout == "SBH" else {}
    answers = []
    for backend in ("tiled", "reference"):
        asked: dict[str, Any] = {"mask": mask, "layout": layout, "backend": backend, **of_heads}
        plan = ak.plan(*given, sink=sink, **asked)
        assert (plan.in_order is not None) == (backend == "tiled")
        found = ak.attention(*given, sink=sink, return_stats=True, **asked)
        ends = (found.output.square().sum() + found.stats.lse[found.stats.lse > -30].sum(),)
        slopes = torch.autograd.grad(ends, [*given, sink])
        answers.append([found.output, found.stats.lse, found.stats.max, *slopes])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@pytest.mark.usefixtures("always")
def test_every_mask_of_a_few_classes_is_the_same_set_in_order() -> None:
    draw = random.Random(0)
    for _ in range(60):
        q_len, kv_len, count = draw.randint(1, 9), draw.randint(1, 9), draw.randint(1, 3)
        kinds = [[draw.random() < 0.5 for _ in range(kv_len)] for _ in range(count)]
        cells = torch.tensor([draw.choice(kinds) for _ in range(q_len)])
        order = classes.Classes(masks.Dense.keep(cells)).in_order(q_len, kv_len)
        assert order is not None
        assert order.fits(q_len, kv_len)
        rows = [i for part in order.rows for i in part]
        keys = [j for part in order.keys for j in part]
        there = {(u, v) for u in range(q_len) for v in range(kv_len) if (u, v) in order.region}
        assert there == {
            (u, v) for u, i in enumerate(rows) for v, j in enumerate(keys) if cells[i, j]
        }


def test_diagonals_and_rows_that_all_differ_have_no_classes() -> None:
    for mask in (masks.Causal(), masks.SlidingWindow(3), masks.Neighborhood((8, 8), 3)):
        assert classes.Classes(mask).in_order(64, 64) is None
    assert classes._classes(Region.empty(), 3) == {(): [range(3)]}


def test_only_what_saves_cells_is_sorted() -> None:
    x = torch.empty(1, 2048, 8, 64)
    few = {"ShiftedWindows": masks.ShiftedWindows((32, 64), 8, 4)}
    few["SlidingTiles"] = masks.SlidingTiles((8, 16, 16), (4, 4, 4), (1, 3, 3))
    for mask in few.values():
        plan = ak.plan(x, x, x, mask=mask, backend="tiled")
        assert plan.in_order is not None
    for mask in (masks.Causal(), masks.BlockCausal(128), masks.SameId([(0, 1024), (1, 1024)])):
        assert ak.plan(x, x, x, mask=mask, backend="tiled").in_order is None
    asked = {"mask": few["ShiftedWindows"], "backend": "tiled"}
    assert ak.plan(x, x, x, pse=ak.pse.ALiBi(8), **asked).in_order is None


@pytest.mark.usefixtures("always")
def test_derivatives_of_derivatives_and_compiled_graphs_pass_through_the_order() -> None:
    mask, length = MASKS["windows of a grid"]
    given = [one[:1].detach().requires_grad_() for one in tensors(length, 4, "BSND")]
    found = {}
    for backend in ("tiled", "reference"):
        layer = ak.Attention(4, 4, mask=mask, backend=backend)
        (first,) = torch.autograd.grad(layer(*given).square().sum(), given[:1], create_graph=True)
        found[backend] = torch.autograd.grad(first.square().sum(), given)
    for one, other in zip(found["tiled"], found["reference"], strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    layer = ak.Attention(4, 4, mask=mask, backend="tiled")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    slopes = [torch.autograd.grad(way(*given).square().sum(), given) for way in (layer, compiled)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)
