"""Small score matrices whose masks differ share a lane; each keeps its own mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit as ak
from attnkit import masks, pse
from attnkit.backends.tiled import TiledPlan, stacks, whole
from attnkit.backends.tiled.schedule import RowBlock, Whole
from tests.agreement import agreement

SIDE = 12
KINDS = [masks.Full(), masks.Chunked(4), masks.Causal() | masks.Columns(11, 12), masks.Chunked(6)]


def windows(batch: int, period: int) -> masks.Mask:
    """Every third one is masked, and all begin again after a period."""
    return masks.PerBatch([KINDS[(k % period) % 4] for k in range(batch)])


def operands(batch: int, layout: str = "BSND", kv_heads: int = 4) -> list[Tensor]:
    generator, out = torch.Generator().manual_seed(0), []
    for heads in (4, kv_heads, kv_heads):
        x = torch.randn(batch, SIDE, heads, 8, generator=generator)
        out.append(x.transpose(1, 2).contiguous() if layout == "BNSD" else x)
    return out


def bias(name: str, batch: int) -> pse.Pse | None:
    table = torch.randn(4, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    found: dict[str, pse.Pse | None] = {
        "none": None,
        "frozen": pse.Dense(table),
        "trained": pse.Dense(torch.nn.Parameter(table)),
        "of each": pse.Dense(torch.nn.Parameter(table.repeat(batch, 1, 1, 1))),
        "keys": pse.KeyBias(torch.randn(batch, 1, SIDE)),
    }
    return found[name]


def planned(batch: int, period: int, name: str = "none", **how: Any) -> TiledPlan:
    mask = windows(batch, period)
    plan = ak.plan(*operands(batch), mask=mask, pse=bias(name, batch), **how)
    assert isinstance(plan, TiledPlan)
    return plan


@pytest.mark.parametrize("layout", ["BSND", "BNSD"])
@pytest.mark.parametrize("name", ["none", "frozen", "trained", "of each", "keys"])
@pytest.mark.parametrize(("batch", "period"), [(12, 4), (12, 12), (10, 5), (7, 7)], ids=str)
def test_each_has_its_own_mask(batch: int, period: int, name: str, layout: str) -> None:
    how = {"mask": windows(batch, period), "pse": bias(name, batch), "layout": layout}
    agreement(operands(batch, layout), "tiled", **how)


@pytest.mark.parametrize(
    "how",
    [{"softcap": 1.0}, {"sink": torch.linspace(-1, 1, 4)}, {"scale": -0.5}, {"scale": 2000.0}],
    ids=str,
)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_what_else_is_asked(how: dict[str, Any], kv_heads: int) -> None:
    for name in ("none", "trained"):
        added = bias(name, 12)
        agreement(
            operands(12, "BNSD", kv_heads),
            "tiled",
            mask=windows(12, 4),
            pse=added,
            layout="BNSD",
            **how,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["none", "trained"])
def test_other_dtypes(dtype: torch.dtype, name: str) -> None:
    given = [t.to(dtype) for t in operands(12)]
    skip = ("lse",) if name == "none" else ()  # torch's kernel rounds them in 16 bits
    agreement(given, "tiled", mask=windows(12, 4), pse=bias(name, 12), skip=skip)


def test_one_lane_and_lanes_of_a_period() -> None:
    (lane,) = planned(12, 4).schedule.lanes
    assert isinstance(lane.items[0], Whole)
    assert planned(12, 4, "frozen").job.sole is not None
    lanes = planned(12, 4, softcap=1.0).schedule.lanes
    assert [lane.batches for lane in lanes] == [(0, 4), (4, 8), (8, 12)]
    assert all(isinstance(lane.items[0], RowBlock) for lane in lanes)


def test_where_lanes_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    padding = masks.Padding([12, 3, 7, 12, 1])
    assert len(ak.plan(*operands(5), mask=padding).schedule.lanes) > 1  # type: ignore[attr-defined]
    monkeypatch.setattr(stacks, "STEP_CELLS", 0)  # steps that cost nothing
    assert len(planned(8, 8).schedule.lanes) == 8
    monkeypatch.undo()
    monkeypatch.setattr(stacks, "MOST_CELLS", 100)
    assert len(planned(9, 9).schedule.lanes) == 9


@pytest.mark.parametrize("layout", ["BSND", "BNSD"])
def test_masks_in_another_order_are_seen(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = whole._in_periods

    def turned(run: Any, tensors: Any, mask: Tensor | None) -> tuple[Tensor, ...]:
        return right(run, tensors, None if mask is None else mask.roll(1, 0))

    monkeypatch.setattr(whole, "_in_periods", turned)
    with pytest.raises(AssertionError, match="out"):
        test_each_has_its_own_mask(12, 4, "frozen", layout)
