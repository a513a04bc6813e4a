"""Dropout of the tiled backend: its rate, its independence, and that the backward repeats it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnkit as ak
import attnkit.backends.tiled
from attnkit import masks, pse


def operands(rows: int = 300, heads: int = 4, dim: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, rows, heads, dim, dtype=torch.float64, generator=generator) for _ in range(3)
    ]


def attend(tensors: list[Tensor], p: float, mask: masks.Mask, **how: object) -> Tensor:
    out = ak.attention(*tensors, mask=mask, dropout=p, backend="tiled", **how)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    return out


def weights(p: float, mask: masks.Mask, rows: int = 256) -> Tensor:
    """The dropped weights themselves, [b n i j]: the values are an identity matrix."""
    query = torch.zeros(2, rows, 4, 8, dtype=torch.float64)
    value = torch.eye(rows, dtype=torch.float64)[None, :, None].expand(2, rows, 4, rows)
    return attend([query, query, value], p, mask).transpose(1, 2)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    found = weights(p, masks.Full()) * 256
    kept = found > 0
    assert abs(kept.double().mean().item() - (1 - p)) < 5e-3
    torch.testing.assert_close(
        found[kept], torch.full_like(found[kept], 1 / (1 - p)), rtol=1e-12, atol=0.0
    )


@pytest.mark.parametrize("p", [5e-6, 3e-5, 0.01, 0.3, 1 - 3e-5, 1 - 5e-6])
def test_rare_events_have_their_rate(p: float) -> None:
    """Counts of 16.8 million cells, five standard deviations wide: values of 1 count survivors."""
    torch.manual_seed(11)
    query, value = torch.zeros(1, 2048, 4, 1), torch.ones(1, 2048, 4, 1)
    out = attend([query, query, value], p, masks.Full()).double()
    cells = 2048 * out.numel()
    kept = (out * (2048 * (1 - p))).round().sum().item()
    spread = (cells * p * (1 - p)) ** 0.5
    assert abs(kept - cells * (1 - p)) < 5 * spread
    # What survives is scaled by the probability asked for, so that the mean is 1.
    assert abs(out.mean().item() - 1.0) < 5 * spread / (cells * (1 - p)) + 1e-6


def test_rare_events_are_spread_over_rows_and_heads() -> None:
    torch.manual_seed(12)
    query, value = torch.zeros(1, 2048, 4, 1), torch.ones(1, 2048, 4, 1)
    out = attend([query, query, value], 1e-5, masks.Full()).double()[0, :, :, 0]
    lost = 2048 - (out * (2048 * (1 - 1e-5))).round()
    # As many per row as independent cells lose, where a row's level alone would give it several.
    assert lost.max() <= 3
    by_head = lost.sum(0)
    assert (by_head - by_head.mean()).abs().max() < 5 * by_head.mean() ** 0.5


def test_cells_are_independent() -> None:
    kept = (weights(0.5, masks.Full()) > 0).double() - 0.5
    for axis in range(4):
        for shift in (1, 2, 3, 4, 8, 64):
            if shift < kept.shape[axis]:
                correlation = 4 * (kept * kept.roll(shift, axis)).mean().item()
                assert abs(correlation) < 1e-2, (axis, shift)
    by_lane = kept.unflatten(-1, (-1, 4)).mean((0, 1, 2, 3))
    assert by_lane.abs().max() < 1e-2


def test_reproducible_from_the_generator_alone() -> None:
    tensors, mask = operands(), masks.SlidingWindow(50)
    torch.manual_seed(7)
    one, two = attend(tensors, 0.2, mask), attend(tensors, 0.2, mask)
    torch.manual_seed(7)
    again = attend(tensors, 0.2, mask)
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    "mask",
    [masks.SlidingWindow(70), masks.Causal(), masks.Causal() & masks.Columns(0, 3)],
    ids=["window", "causal", "columns"],
)
def test_backward_drops_the_same_weights(mask: masks.Mask) -> None:
    """The directional derivative, by differences under one seed, is the gradient's."""
    tensors = [t.requires_grad_() for t in operands(150)]
    bias = pse.ALiBi(4)

    def value(step: float, along: list[Tensor]) -> Tensor:
        torch.manual_seed(3)
        moved = [t + step * d for t, d in zip(tensors, along, strict=True)]
        return attend(moved, 0.3, mask, pse=bias).sin().sum()

    along = [torch.randn_like(t) for t in tensors]
    grads = torch.autograd.grad(value(0.0, along), tensors)
    expected = sum((g * d).sum() for g, d in zip(grads, along, strict=True))
    with torch.no_grad():
        found = (value(1e-5, along) - value(-1e-5, along)) / 2e-5
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_statistics_exclude_dropout() -> None:
    tensors = operands()
    how = {"mask": masks.SlidingWindow(40), "backend": "tiled", "return_stats": True}
    plain, dropped = (ak.attention(*tensors, dropout=p, **how) for p in (0.0, 0.4))  # type: ignore[arg-type]
    torch.testing.assert_close(dropped.stats.lse, plain.stats.lse)  # type: ignore[union-attr]


def test_packed_sequences_of_one_length_drop_differently() -> None:
    row = torch.zeros(64, 1, 8, dtype=torch.float64)
    value = torch.eye(32, dtype=torch.float64).repeat(2, 1)[:, None]
    out = ak.attention(
        row, row, value, dropout=0.5, layout="TND", seqlens=ak.SeqLens([32, 32]), backend="tiled"
    )
    assert isinstance(out, Tensor)
    assert not torch.equal(out[:32], out[32:])
