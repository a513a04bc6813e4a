"""A bias that score matrices share is made once; torch's kernel takes it where it can."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends.tiled import TiledPlan, bias, terms, whole
from attnkit.backends.tiled.schedule import Whole
from attnkit.backends.tiled.tiles import Workspace
from tests.agreement import agreement

HEADS = 2
Made = Callable[[int, int, int], pse.Pse]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameter(*shape: int) -> Tensor:
    return torch.nn.Parameter(noise(*shape))


def operands(batch: int, rows: int, keys: int, kv_heads: int = HEADS) -> list[Tensor]:
    sizes = ((rows, HEADS), (keys, kv_heads), (keys, kv_heads))
    return [noise(batch, n, heads, 8, seed=k) for k, (n, heads) in enumerate(sizes)]


def t5(trains: bool = True) -> pse.Pse:
    table = noise(8, HEADS)
    return pse.T5Relative(HEADS, 8, 20, table=torch.nn.Parameter(table) if trains else table)


BIASES: dict[str, Made] = {
    "t5": lambda b, i, j: t5(),
    "frozen t5": lambda b, i, j: t5(trains=False),
    "alibi": lambda b, i, j: pse.ALiBi(HEADS),
    "root": lambda b, i, j: pse.SqrtALiBi(HEADS, align="top_left"),
    "dense": lambda b, i, j: pse.Dense(noise(HEADS, i, j)),
    "trained": lambda b, i, j: pse.Dense(parameter(i, j), before_scale=True),
    "of each": lambda b, i, j: pse.Dense(noise(b, 1, i, j)),
    "keys": lambda b, i, j: pse.KeyBias(noise(b, HEADS, j)),
    "trained keys": lambda b, i, j: pse.KeyBias(parameter(HEADS, j)),
    "sum": lambda b, i, j: pse.ALiBi(HEADS) + t5() + pse.Dense(parameter(1, 1, i, j)),
    "sum of each": lambda b, i, j: t5() + pse.Dense(noise(b, HEADS, i, j)),
}
MASKS = {
    "full": lambda b, i, j: masks.Full(),
    "causal": lambda b, i, j: masks.Causal(),
    "window": lambda b, i, j: masks.SlidingWindow(3),
    "padding": lambda b, i, j: masks.Padding([(j + k) % (j + 1) for k in range(b)]),
    "columns": lambda b, i, j: masks.Columns(0, 1) | masks.Causal(align="top_left"),
    "no region": lambda b, i, j: masks.Dilated(2),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("made", BIASES)
def test_small_sizes(made: str, name: str) -> None:
    sizes = [*product((3,), (1, 2, 3), (1, 2, 3)), (1, 3, 2), (1, 40, 33), (3, 33, 40)]
    for size in sizes:
        agreement(operands(*size), "tiled", pse=BIASES[made](*size), mask=MASKS[name](*size))


@pytest.mark.parametrize("made", ["t5", "frozen t5", "of each", "sum"])
@pytest.mark.parametrize("how", [{"dropout": 0.0, "softcap": 2.0}, {"sink": noise(HEADS)}], ids=str)
def test_what_else_is_asked_of_a_biased_call(how: dict[str, Any], made: str) -> None:
    for size in ((2, 40, 40), (1, 300, 40)):
        agreement(operands(*size, 1), "tiled", pse=BIASES[made](*size), **how)


@pytest.mark.parametrize("made", ["frozen t5", "t5", "dense", "of each", "keys"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype, made: str) -> None:
    size = (3, 50, 40)
    agreement([t.to(dtype) for t in operands(*size)], "tiled", pse=BIASES[made](*size))


@pytest.mark.parametrize("made", ["dense", "trained", "t5", "keys"])
def test_equal_documents_differ_in_their_biases(made: str) -> None:
    mask = masks.Documents([20, 20, 20])
    agreement(operands(1, 60, 60), "tiled", pse=BIASES[made](1, 60, 60), mask=mask)
    lens = ak.SeqLens([20, 20, 20])
    packed = [t[0] for t in operands(1, 60, 60)]
    agreement(packed, "tiled", pse=BIASES[made](3, 20, 20), layout="TND", seqlens=lens)


@pytest.mark.parametrize("made", BIASES)
def test_gradients_through_the_statistics(made: str) -> None:
    size, grads = (2, 30, 20), []
    for backend in ("tiled", "reference"):
        given = [t.double().requires_grad_() for t in operands(*size)]
        added = BIASES[made](*size)
        out, stats = ak.attention(*given, pse=added, backend=backend, return_stats=True)
        leaves = [*given, *(t for t in added.tensors if t.requires_grad)]
        grads.append(torch.autograd.grad(out.sum() + stats.lse.sin().sum(), leaves))
    for found, exact in zip(*grads, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


# -- numbers that are no numbers ---------------------------------------------------------------


LOW, INF = torch.finfo(torch.float32).min, float("inf")


@pytest.mark.parametrize("value", [-INF, INF, float("nan"), LOW, -LOW, 1e4, -1e4], ids=str)
@pytest.mark.parametrize("where", ["a cell", "a row", "a key"])
def test_wild_biases_are_what_they_were(where: str, value: float) -> None:
    place = {"a cell": (0, 3, 2), "a row": (1, 3), "a key": (slice(None), slice(None), 2)}[where]
    cells = noise(HEADS, 20, 30)
    cells[place] = value
    each = pse.Dense(cells[None].repeat(2, 1, 1, 1), validate=False)
    for added in (pse.Dense(cells, validate=False), each):
        like_the_definition(added)


def like_the_definition(added: pse.Pse) -> None:
    found = []
    for backend in ("tiled", "reference"):
        given = [t.requires_grad_() for t in operands(2, 20, 30)]
        out, stats = ak.attention(*given, pse=added, backend=backend, return_stats=True)
        grads = torch.autograd.grad(out.square().sum(), given)
        found.append((out.detach(), stats.lse.detach(), *grads))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("shape", [(2, 1, 30), (HEADS, 30)], ids=str)
def test_keys_that_are_all_excluded_by_their_bias(shape: tuple[int, ...]) -> None:
    like_the_definition(pse.KeyBias(torch.full(shape, -INF)))


# -- how ---------------------------------------------------------------------------------------


def planned(made: str, mask: masks.Mask | None = None, **how: Any) -> TiledPlan:
    size = (4, 64, 64)
    plan = ak.plan(*operands(*size), mask=mask, pse=BIASES[made](*size), **how)
    assert isinstance(plan, TiledPlan)
    return plan


@pytest.mark.parametrize("made", BIASES)
def test_torchs_kernel_takes_one_bias(made: str) -> None:
    items = [item for lane in planned(made).schedule.lanes for item in lane.items]
    assert isinstance(items[0], Whole) == (made != "sum of each")
    assert planned(made, dropout=0.1, mask=masks.Dilated(2)).schedule.fused == 0


@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal()], ids=str)
def test_a_shared_bias_is_made_once(mask: masks.Mask, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("put", "add"):
        right = getattr(terms.Diagonals, name)

        def counted(*given: Any, _name: str = name, _right: Any = right, **named: Any) -> None:
            calls.append(_name)
            _right(*given, **named)

        monkeypatch.setattr(terms.Diagonals, name, counted)
    given = [t.requires_grad_() for t in operands(16, 300, 300)]
    out = ak.attention(*given, pse=t5(), mask=mask)
    assert isinstance(out, Tensor)
    out.sum().backward()  # once for the scores, and once more where they are made again
    assert calls == ["put", "put", "add"]


def test_large_biases_are_read_tile_by_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned("t5").job.one_bias == (64, 64)
    monkeypatch.setattr("attnkit.backends.tiled.job.MADE_CELLS", HEADS * 64 * 63)
    assert planned("root").job.one_bias is None
    size = (2, 64, 64)
    for made in BIASES:
        agreement(operands(*size), "tiled", pse=BIASES[made](*size))


# -- planted faults ----------------------------------------------------------------------------


def test_a_window_of_other_heads_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bias._window
    monkeypatch.setattr(bias, "_window", lambda *given: right(*given).flip(0))
    with pytest.raises(AssertionError, match="out"):
        agreement(operands(2, 20, 20), "tiled", pse=t5())


def test_statistics_that_are_not_looked_at_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnkit.backends.tiled.passes.is_sound", lambda lse: True)
    with pytest.raises(AssertionError):
        test_keys_that_are_all_excluded_by_their_bias((2, 1, 30))
    assert not whole.is_sound(torch.tensor([1.0, float("nan")]))


def test_buffers_that_are_given_back_are_no_longer_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may have them at once, and write to them."""
    give_back = Workspace.give_back

    def spoil(self: Workspace) -> None:
        for flat in self._flat.values():
            flat.fill_(float("nan") if flat.is_floating_point() else True)
        give_back(self)

    monkeypatch.setattr(Workspace, "give_back", spoil)
    made = torch.randn(2, 9, 9, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 9, 2, 4, dtype=torch.float64)
    out = ak.attention(x, x, x, pse=ak.pse.Dense(made), mask=ak.masks.Causal(), backend="tiled")
    assert torch.autograd.grad(out.sum(), made)[0].isfinite().all()
