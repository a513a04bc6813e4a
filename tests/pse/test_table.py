"""pse.Table: entries of a table by an index, on every backend, and what cannot be one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from attnkit.errors import CompositionError, CompositionTypeError
from tests.agreement import agreement
from tests.backends.flex.eager import EagerFlex, registered
from tests.backends.memory import Allocated

HEADS, SIDE = 4, 5
LENGTH = SIDE * SIDE


def window_index(side: int) -> Tensor:
    """Swin's index of a window: how far apart two cells are, in rows and in columns."""
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    down = rows[:, None] - rows + side - 1
    return down * (2 * side - 1) + columns[:, None] - columns + side - 1


def swin(dtype: torch.dtype = torch.float64, heads: int = HEADS) -> pse.Table:
    table = torch.randn((2 * SIDE - 1) ** 2, heads, generator=torch.Generator().manual_seed(2))
    return pse.Table(nn.Parameter(table.to(dtype)), window_index(SIDE))


def trained(entries: int, heads: int, batch: tuple[int, ...] = ()) -> pse.Table:
    table = nn.Parameter(torch.randn(entries, heads, dtype=torch.float64))
    return pse.Table(table, torch.randint(entries, (*batch, LENGTH, LENGTH)).int())


def inputs(dtype: torch.dtype = torch.float64, batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(batch, LENGTH, n, 8, generator=generator, dtype=torch.float64).to(dtype)
        for n in (HEADS, 2, 2)
    ]


def test_it_is_the_bias_of_a_window() -> None:
    """As torchvision and transformers write it: a gather, a view, a permutation."""
    bias = swin()
    rows = bias.table[bias.index.view(-1)].view(LENGTH, LENGTH, -1)
    assert torch.equal(
        bias.materialize(LENGTH, LENGTH, dtype=torch.float64)[0], rows.permute(2, 0, 1)
    )


SHIFTED = masks.Documents.from_ids(torch.arange(LENGTH) // 10)


@pytest.mark.parametrize("mask", [masks.Full(), masks.Causal(), SHIFTED], ids=str)
@pytest.mark.parametrize("backend", ["tiled", "emulated", EagerFlex.name])
def test_every_backend_is_the_reference(backend: str, mask: masks.Mask) -> None:
    per_batch = pse.Table(
        nn.Parameter(torch.randn(9, HEADS).double()), torch.randint(9, (3, 25, 25))
    )
    one_column = pse.Table(
        nn.Parameter(torch.randn(9, 1).double()), torch.randint(9, (25, 25)).int()
    )
    precision = torch.float32 if backend == EagerFlex.name else None
    with registered():
        for bias in (swin(), per_batch, one_column, swin() + per_batch):
            agreement(inputs(), backend, mask=mask, pse=bias, precision=precision)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["tiled", "emulated"])
def test_lower_precision(backend: str, dtype: torch.dtype) -> None:
    agreement(inputs(dtype), backend, pse=swin(dtype))


def test_tiles_that_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is read and added to tile by tile where no matrix is made, as of long sequences."""
    monkeypatch.setattr("attnkit.backends.tiled.job.MADE_CELLS", 0)
    monkeypatch.setattr("attnkit.backends.tiled.job.TILE_CELLS", 200)
    for mask in (masks.Causal(), masks.SlidingWindow(7)):
        agreement(inputs(), "tiled", mask=mask, pse=swin())


@pytest.mark.parametrize("lengths", [[25, 25], [25]])
def test_packed_sequences(lengths: list[int]) -> None:
    lens = ak.SeqLens(lengths)
    given = [torch.randn(lens.total_q, n, 8, dtype=torch.float64) for n in (HEADS, 2, 2)]
    for bias in (swin(), trained(9, HEADS, (len(lengths),))):
        for backend in ("tiled", "emulated"):
            agreement(given, backend, pse=bias, layout="TND", seqlens=lens)


def test_no_matrix_is_made_of_it() -> None:
    length, entries = 1536, 64
    index = torch.randint(entries, (length, length), dtype=torch.int32)
    bias = pse.Table(nn.Parameter(torch.randn(entries, 8)), index)
    x = torch.randn(1, length, 8, 8, requires_grad=True)
    ak.attention(x, x, x, pse=bias, backend="tiled").sum().backward()
    with Allocated() as seen:
        ak.attention(x, x, x, pse=bias, backend="tiled").sum().backward()
    assert seen.numbers <= length * length, "the index itself; a matrix has 8 heads"


def test_a_layer_owns_both() -> None:
    layer = ak.Attention(HEADS, 8, pse=swin(torch.float32), backend="emulated")
    assert [name for name, _ in layer.named_parameters()] == ["pse_table"]
    assert [name for name, _ in layer.named_buffers()] == ["pse_index"]
    wide = layer.double()
    assert wide.pse_index.dtype == torch.int64
    x = torch.randn(2, LENGTH, HEADS, 8, dtype=torch.float64)
    wide(x, x, x).square().sum().backward()
    assert wide.pse_table.grad is not None
    assert wide.pse_table.grad.abs().min() > 0


def test_a_compiled_layer() -> None:
    layer = ak.Attention(HEADS, 8, num_kv_heads=2, pse=swin()).double()
    given = [t.requires_grad_() for t in inputs()]
    every = [*given, *layer.parameters()]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    found, meant = (torch.autograd.grad(f(*given).sin().sum(), every) for f in (compiled, layer))
    for one, other in zip(found, meant, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


def test_a_slope_of_the_wrong_entry_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a tile adds to the entries of the tile before it."""
    from attnkit.backends.tiled.terms import LookedUp

    plain = LookedUp.add

    def faulty(self: LookedUp, grad: Tensor, *rest: Any) -> None:
        plain(self, grad.roll(1, -1), *rest)

    monkeypatch.setattr(LookedUp, "add", faulty)
    with pytest.raises(AssertionError):
        agreement(inputs(), "tiled", pse=swin())


T = torch.zeros(3, 2)
I = torch.zeros(4, 5, dtype=torch.int64)  # noqa: E741
TWO = I.expand(2, -1, -1)


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: pse.Table([[0.0]], I), CompositionTypeError, "give a torch tensor"),
        (lambda: pse.Table(T, [[0]]), CompositionTypeError, "pse.Table: index"),
        (lambda: pse.Table(I, I), CompositionTypeError, "floating dtype"),
        (lambda: pse.Table(T, T), CompositionTypeError, "int64 or int32"),
        (lambda: pse.Table(T[0], I), CompositionError, "[entries, n]"),
        (lambda: pse.Table(T, I[0]), CompositionError, "[1 or b, q_len, kv_len]"),
        (lambda: pse.Table(T, I + 3), CompositionError, "entries 3 to 3, and its table has 0 to 2"),
        (lambda: pse.Table(T, I - 1), CompositionError, "entries -1 to -1"),
        (lambda: pse.Table(T, I).check(4, 6), CompositionError, "4 x 5"),
        (lambda: pse.Table(T, I).check(4, 5, heads=3), CompositionError, "2 heads"),
        (
            lambda: pse.Table(T, I[None].expand(2, -1, -1)).check(4, 5, batch=3),
            CompositionError,
            "2",
        ),
    ],
)
def test_what_cannot_be_one_says_why(make: Any, error: type[Exception], told: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert told in str(caught.value)


def test_an_index_need_not_be_read() -> None:
    pse.Table(T, I + 3, validate=False)
    pse.Table(torch.zeros(3, 2, device="meta"), I.to("meta"))
    pse.Table(T, torch.zeros(0, 5, dtype=torch.int32))
