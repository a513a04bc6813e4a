"""Plans whose pages are looked at, and how."""

from __future__ import annotations

from pathlib import Path

import torch
from playwright.sync_api import Page

import attnkit as ak
from attnkit import masks
from attnkit.masks import Mask
from attnkit.parallel import ParallelPlan
from attnkit.planner import Plan

__all__ = ["CAUSAL", "PIXEL", "SPOT", "packed", "planned", "shown"]

CAUSAL = masks.Causal()
# What is drawn in a cell, beside the lines through its middle.
PIXEL = """([i, j]) => {
    const {plot} = explorer, many = plot.canvas.width / plot.canvas.clientWidth;
    plot.draw();
    const [x, y] = plot.placeOf(i, j);
    const context = plot.canvas.getContext("2d"), at = [x + plot.sx * 0.3, y + plot.sy * 0.3];
    return [...context.getImageData(at[0] * many, at[1] * many, 1, 1).data].slice(0, 3);
}"""
SPOT = "([i, j]) => explorer.plot.placeOf(i, j)"


def planned(mask: Mask, batch: int = 1, length: int = 20, backend: str = "emulated") -> Plan:
    x = torch.empty(batch, length, 4, 16, device="meta")
    return ak.plan(x, x, x, mask=mask, backend=backend)


def packed(mask: Mask = CAUSAL) -> Plan:
    x = torch.empty(22, 4, 16, device="meta")
    lengths = ak.SeqLens([9, 1, 0, 12])
    return ak.plan(x, x, x, mask=mask, layout="TND", seqlens=lengths, backend="emulated")


def shown(page: Page, plan: Plan | ParallelPlan, tmp_path: Path) -> Page:
    page.goto(plan.to_html(tmp_path / "plan.html").as_uri())
    return page
