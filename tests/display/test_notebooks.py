"""What a real kernel is sent: one output for each object, with a page or a picture in it."""

from __future__ import annotations

import struct
from base64 import b64decode
from typing import Any

import pytest

from tests.display.looked import svgs, tree
from tests.display.notebooks import shown

BEGIN = """
import torch, attnkit as ak
torch.set_num_threads(1)
from attnkit import masks, parallel
x = torch.empty(1, 16, 2, 16, device="meta")
plan = ak.plan(x, x, x, mask=masks.Causal(), backend="emulated")
"""
PLOTS = ["masks.Causal().plot(8, 8)", "plan.plot()"]
Bundles = list[list[dict[str, Any]]]


def one_png(bundles: list[dict[str, Any]]) -> tuple[int, int]:
    """Return the size of the one picture that a cell shows."""
    (bundle,) = bundles
    assert set(bundle) == {"image/png", "text/plain"}
    width, height = struct.unpack(">II", b64decode(bundle["image/png"])[16:24])
    return width, height


# pyplot has its own figures, and shows them when a cell ends; ours is not one of them.
KEPT = [f"figure = {PLOTS[0]}\nfigure.savefig(__import__('io').BytesIO())", f"{PLOTS[0]};"]
OBJECTS = ["masks.Causal()", "plan", "plan.explain()"]
BESIDE = ["import matplotlib.pyplot as plt", *PLOTS, *KEPT]
CELLS = [BEGIN, *PLOTS, *KEPT, *OBJECTS, *BESIDE, "%matplotlib inline", *PLOTS, *KEPT]


@pytest.fixture(scope="module")
def outputs() -> Bundles:
    return shown(CELLS)


@pytest.mark.parametrize("begin", [1, 9, 14], ids=["alone", "beside pyplot", "inline"])
def test_a_figure_is_the_value_of_a_cell_and_nothing_else(outputs: Bundles, begin: int) -> None:
    assert CELLS[begin : begin + 4] == [*PLOTS, *KEPT]
    *values, kept, silent = outputs[begin : begin + 4]
    for bundles in values:
        width, height = one_png(bundles)
        assert min(width, height) >= 400
    assert kept == silent == []


def test_a_figure_has_twice_the_pixels_of_its_size(outputs: Bundles) -> None:
    assert one_png(outputs[1]) == (1000, 1080)


def test_objects_show_a_page_and_their_repr(outputs: Bundles) -> None:
    (mask,), (plan,), (text,) = outputs[5:8]
    assert mask["text/plain"] == "Causal()"
    assert len(svgs(mask["text/html"])) == len(svgs(plan["text/html"])) == 1
    assert text["text/plain"].startswith("attention on backend 'emulated': 1 fused call\n  mask")
    assert "<b>mask</b>" in text["text/html"]
    tree(text["text/html"])
