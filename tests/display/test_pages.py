"""What notebooks show of each kind of object: well-formed, short, soon there, never an error."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attnkit as ak
from attnkit import masks, parallel, pse
from attnkit.display import COLOURS, html
from attnkit.geometry import Region
from attnkit.masks import dense, predicate, shown
from attnkit.masks.base import Enclosure, Mask, Rectangle
from attnkit.planner import shown as plan_shown
from tests.display.looked import SVG, painted, size, svgs, tree

NAME = "<script>alert('a & b')</script>"


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta", dtype=torch.bfloat16)


def plan(mask: masks.Mask, length: int = 64, heads: int = 2, **named: Any) -> ak.Plan:
    x = meta(1, length, heads, 16)
    return ak.plan(x, x, x, mask=mask, **{"backend": "emulated"} | named)


def packed(count: int, backend: str) -> ak.Plan:
    lengths = [20 + k % 7 for k in range(count)]
    x = meta(sum(lengths), 2, 16)
    seqlens = ak.SeqLens(lengths, lengths)
    return ak.plan(x, x, x, mask=masks.Causal(), layout="TND", seqlens=seqlens, backend=backend)


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


OBJECTS: dict[str, Callable[[], object]] = {
    "mask": masks.Causal,
    "composition": lambda: masks.Causal() & masks.SlidingWindow(64) | masks.Columns(0, 4),
    "documents": lambda: masks.Documents([3, 5, 9]),
    "many documents": lambda: masks.Documents([16] * 8_000),
    "too many documents": lambda: masks.Documents([16] * 100_000),
    "padding": lambda: masks.Padding([3, 5, 8]),
    "per head": lambda: masks.PerHead([masks.Causal(), masks.SlidingWindow(3)] * 8),
    "noise": lambda: masks.Dense.keep(noise(200, 200) > 0.5),
    "noise per head": lambda: masks.Dense.keep(noise(2, 8, 128, 128) > 0.5),
    "function": lambda: masks.Predicate(lambda b, h, i, j: (i * j) % 3 == 0),
    "million": lambda: masks.SlidingWindow(1 << 19),
    "million cells wide": lambda: masks.Documents([1 << 19, 1 << 19]) & masks.Causal(),
    "short and long": lambda: masks.Chunked(2) & masks.SlidingWindow(1 << 30),
    "selected": lambda: masks.SelectedBlocks(torch.zeros(1, 1, 4, 1).long(), 2, 2, causal=True),
    "no cells": lambda: masks.Dense.keep(torch.ones(0, 4).bool()),
    "region": lambda: masks.SlidingWindow(4).region(30, 40),
    "empty region": Region.empty,
    "recovered": lambda: masks.recover(torch.ones(20, 20).tril().bool()),
    "lifted": lambda: masks.Lifted(masks.Causal(), "a flag", (NAME,)),
    "stack": lambda: masks.lint_stack([masks.SlidingWindow(4)] * 3, 64),
    "alibi": lambda: pse.ALiBi(8),
    "t5": lambda: pse.T5Relative(4, table=noise(32, 4) - 0.5),
    "noise bias": lambda: pse.Dense(noise(8, 300, 300) - 0.5),
    "long bias": lambda: pse.Dense(torch.zeros(1, 1, 1, 1).expand(1, 2, 4096, 4096)),
    "sum of biases": lambda: pse.ALiBi(2) + pse.SqrtALiBi(2),
    "plan": lambda: plan(masks.Causal() & (masks.Columns(0, 4) | masks.SlidingWindow(8)), 512),
    "tiled plan": lambda: plan(masks.Causal(), backend="tiled"),
    "opaque plan": lambda: plan(masks.Dilated(3) & masks.Causal()),
    "plan of heads": lambda: plan(masks.PerHead([masks.Causal(), masks.Full()])),
    "plan with a bias": lambda: ak.plan(*[meta(1, 8, 2, 16)] * 3, pse=pse.ALiBi(2)),
    "plan of nothing": lambda: ak.plan(*[meta(0, 8, 2, 16)] * 3),
    "packed plan": lambda: packed(3, "emulated"),
    "large packed plan": lambda: packed(1_500, "emulated"),
    "large tiled plan": lambda: packed(1_500, "tiled"),
    "long plan": lambda: plan(masks.SlidingWindow(1 << 18), 1 << 20, backend="tiled"),
    "parallel plan": lambda: parallel.plan(*[meta(1, 64, 2, 16)] * 3, ranks=4, mask=masks.Causal()),
    "plan of many ranks": lambda: parallel.plan(*[meta(1, 4096, 2, 16)] * 3, ranks=256),
    "sharding": lambda: parallel.Sharding.zigzag(100, 4),
    "many ranks": lambda: parallel.Sharding.contiguous(100_000, 5_000),
    "no tokens": lambda: parallel.Sharding.contiguous(0, 2),
    "layer": lambda: ak.Attention(8, 64, mask=masks.Causal(), pse=pse.ALiBi(8), softcap=30.0),
    "projected layer": lambda: ak.MultiHeadAttention(64, 8, mask=masks.Causal(), rotary=True),
    "configuration": lambda: ak.AttentionConfig(num_heads=2, head_dim=8, mask="Causal()"),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_every_object_has_a_page(name: str) -> None:
    shown_one = OBJECTS[name]()
    page: str = shown_one._repr_html_()  # type: ignore[attr-defined]
    found = tree(page if not page.startswith("<div") else f"<div>{page}</div>")
    assert "".join(found.itertext()).strip()
    why = [text for one in found.iter("p") if (text := one.text or "").startswith("no picture")]
    without = {"too many documents", "plan of nothing", "plan of many ranks"}
    assert bool(why) is (name in without), why


# -- what is on them -------------------------------------------------------------------------


def words(page: str) -> str:
    """Return what is written on a page, beside its pictures."""
    found = tree(page)
    for one in found.iter():
        for svg in one.findall(f"{SVG}svg"):
            svg.clear()
    return " ".join(" ".join(found.itertext()).split())


def test_a_mask_says_its_lengths_density_and_slices() -> None:
    said = words(masks.SlidingWindow(4)._repr_html_())
    assert "SlidingWindow(4)" in said
    assert "16 queries (down) x 16 keys (it fits other lengths): 58 of 256 cells (22.7 %)" in said
    said = words(masks.Documents([3, 5])._repr_html_())
    assert "8 queries (down) x 8 keys: 34 of 64 cells (53.1 %), 2 slices" in said
    said = words(masks.Predicate(lambda b, h, i, j: i > j)._repr_html_())
    assert "120 of 256 cells (46.9 %), no union of slices" in said


def test_lengths_show_what_a_mask_is_written_with() -> None:
    for mask in (
        masks.SlidingWindow(100),
        masks.Chunked(7),
        masks.Prefix(40),
        masks.Causal() & (masks.Band(300, 20) | masks.Columns(0, 4)),
    ):
        q_len, kv_len = shown.lengths(mask)
        region = mask.region(q_len, kv_len)
        assert region not in (masks.Causal().region(q_len, kv_len), Region.full(q_len, kv_len))
        assert 16 <= q_len == kv_len <= 1000
    assert shown.lengths(masks.Dense.keep(torch.ones(3, 5).bool())) == (3, 5)
    assert shown.lengths(masks.Predicate(lambda b, h, i, j: i > j, batch=500)) == (16, 16)


def test_a_mask_per_head_shows_several_and_counts_the_others() -> None:
    each = [masks.Causal(), masks.SlidingWindow(3), masks.Full(), masks.Causal(), masks.Full()]
    page = masks.PerHead(each)._repr_html_()
    drawn = svgs(page)
    assert len(drawn) == 4
    for svg, mask in zip(drawn, each[:4], strict=True):
        assert set(painted(svg)) == {
            (i, j) for i, j in mask.materialize(*size(svg))[0, 0].nonzero().tolist()
        }
    assert "head 0 head 1 head 2 head 3 1 more" in words(page)
    assert "1 more like these" in words(page)


def test_a_plan_has_a_row_for_each_call_with_its_colour_price_and_arguments() -> None:
    mask = masks.PerHead([masks.Causal(), masks.SlidingWindow(8)])
    found = plan(mask, 4096)
    page = found._repr_html_()
    rows = [
        row for row in tree(page).iter("tr") if "npu_fusion_attention" in "".join(row.itertext())
    ]
    assert len(rows) == len(found.steps) >= 2
    for k, (row, launch) in enumerate(zip(rows, found.steps, strict=True)):
        said = "".join(row.itertext())
        assert launch.label in said
        assert f"sparse_mode={launch.call.sparse_mode}" in said or launch.call.sparse_mode == 0
        assert f"background:{COLOURS[k % len(COLOURS)]}" in page
        assert "us" in said
    assert "price" in words(page)
    assert "proof the calls' sets are disjoint" in words(page)


def test_a_plan_folds_what_was_not_taken() -> None:
    found = plan(masks.Causal() & masks.SlidingWindow(8), backend="auto")
    page = found._repr_html_()
    folded = {one.findtext("summary"): one for one in tree(page).iter("details")}
    passed = {refusal.code for refusal in found.passed_over}
    (name,) = [name for name in folded if name and name.startswith("backends passed over")]
    said = "".join(folded[name].itertext())
    assert passed
    assert all(code in said for code in passed)
    assert any(name and name.startswith("on Ascend") for name in folded)


def test_the_picture_of_an_opaque_plan_is_of_its_cells() -> None:
    mask = masks.Dilated(3) & masks.Causal()
    (svg,) = svgs(plan(mask, 24)._repr_html_())
    cells = mask.materialize(24, 24)[0, 0].nonzero().tolist()
    assert set(painted(svg)) == {(i, j) for i, j in cells}


def test_a_sharding_has_a_row_and_a_colour_for_each_rank() -> None:
    sharding = parallel.Sharding.zigzag(16, 4)
    (svg,) = svgs(sharding._repr_html_())
    assert painted(svg) == {
        (rank, token): {COLOURS[rank]: 1.0}
        for rank in range(4)
        for token in sharding.positions(rank).tolist()
    }


def test_a_parallel_plan_paints_every_cell_in_the_colour_of_its_rank() -> None:
    x = meta(1, 32, 2, 16)
    found = parallel.plan(x, x, x, ranks=4, mask=masks.Causal(), balance="zigzag")
    page = found._repr_html_()
    cells = painted(svgs(page)[0])
    assert set(cells) == {(i, j) for i in range(32) for j in range(i + 1)}
    for (i, _), tints in cells.items():
        assert list(tints) == [COLOURS[found.queries.owner(i)]]
    for rank in range(4):
        assert f"{found.cells[rank]:,}" in words(page)


def test_a_bias_is_orange_above_0_and_blue_below() -> None:
    values = torch.tensor([[1.0, 0.0], [-0.5, 0.25]])
    (svg,) = svgs(pse.Dense(values)._repr_html_())
    blue, orange = COLOURS[:2]
    assert painted(svg) == {(0, 0): {orange: 1.0}, (1, 0): {blue: 0.5}, (1, 1): {orange: 0.25}}
    said = words((pse.ALiBi([0.5, 0.25]))._repr_html_())
    assert "head 0: from -15.5 (blue) to 0" in said
    assert "head 1: from -7.75 (blue) to 0" in said


def test_a_layer_keeps_its_repr_and_shows_its_composition() -> None:
    layer = ak.Attention(4, 16, mask=masks.Causal(), pse=pse.ALiBi(4), softcap=30.0, sink=True)
    assert repr(layer) == (
        "Attention(num_heads=4, head_dim=16, mask=Causal(), pse=ALiBi(4), layout='BSND', "
        "softcap=30.0, sink=True, backend='auto')"
    )
    page = layer._repr_html_()
    assert len(svgs(page)) == 1 + 4
    assert "softcap 30.0" in " ".join(
        one for row in tree(page).iter("tr") for one in row.itertext()
    )
    around = ak.MultiHeadAttention(64, 4, kv_dim=8, mask=masks.Causal(), rotary=True)
    assert around.extra_repr().startswith("dim=64, kv_dim=8, rotary=Rotary(")
    said = " ".join(one for row in tree(around._repr_html_()).iter("tr") for one in row.itertext())
    assert "dim 64 kv_dim 8 rotary Rotary(" in said
    assert "head_dim 16" in said


def test_a_configuration_is_its_yaml() -> None:
    config = ak.AttentionConfig(num_heads=2, head_dim=8, mask="Causal()")
    assert tree(config._repr_html_()).findtext("pre") == config.to_yaml().rstrip()


# -- whatever happens ------------------------------------------------------------------------


def named_function() -> masks.Mask:
    def allowed(b: Any, h: Any, i: Any, j: Any) -> Any:
        return i >= j

    allowed.__qualname__ = NAME
    return masks.Predicate(allowed)


def test_text_is_never_markup() -> None:
    mask = named_function()
    layer = ak.Attention(2, 8, mask=mask, backend="reference")
    for one in (mask, layer, plan(mask), masks.Lifted(mask, NAME, (NAME,))):
        page = one._repr_html_()
        assert "<script" not in page
        assert "alert('a & b')" in words(page)
    figure = html.picture(replace(shown.drawing(mask, 4, 4).drawing, title=NAME, note=NAME))
    assert "<script" not in figure


@dataclass(frozen=True, repr=False, eq=False)
class Broken(Mask):
    """A family of somebody's, with a mistake in it."""

    fails: str = "_region"

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        raise ZeroDivisionError("a mistake of mine")

    def _text(self, show: Any) -> str:
        if self.fails == "_text":
            raise ZeroDivisionError("a mistake of mine")
        return "Broken()"


@pytest.mark.parametrize("fails", ["_region", "_text"])
def test_a_mistake_in_a_mask_does_not_break_the_display(fails: str) -> None:
    page = Broken(fails)._repr_html_()
    assert "no picture: ZeroDivisionError: a mistake of mine" in words(page)


def test_a_function_that_fails_does_not_break_the_display() -> None:
    page = masks.Predicate(lambda b, h, i, j: 1 / 0)._repr_html_()
    assert "no picture" in words(page)
    assert "division by zero" in words(page)


def test_a_broken_plan_is_shown_somehow() -> None:
    found = copy.copy(plan(masks.Causal()))
    object.__setattr__(found, "request", SimpleNamespace())
    assert "no picture: AttributeError" in words(found._repr_html_())


def test_few_cells_of_a_function_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = predicate.Predicate._cells

    def counting(self: masks.Predicate, at: Rectangle, device: Any) -> torch.Tensor:
        looked.append(at.shape[0] * at.shape[1])
        return real(self, at, device)

    monkeypatch.setattr(predicate.Predicate, "_cells", counting)
    function = masks.Predicate(lambda b, h, i, j: (i + j) % 2 == 0, num_heads=64)
    wide = function & masks.Documents([1 << 19, 1 << 19])
    page = wide._repr_html_()
    assert 0 < sum(looked) <= 4 * 128 * 128
    assert "the first 128 queries (down) and 128 keys of 1,048,576 queries" in words(page)
    assert len(svgs(page)) == 4


def test_a_large_tensor_is_not_read_for_a_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "_MOST_READ", 100)

    def never(*_: Any, **__: Any) -> Enclosure:
        raise AssertionError("it was read")

    given = masks.Dense.keep(noise(11, 11) > 0.5)
    with monkeypatch.context() as patched:
        patched.setattr(dense, "enclosed", never)
        for mask in (given, given & masks.Causal()):
            assert "121 cells are not read for a display" in words(mask._repr_html_())
    given.enclosure(11, 11)
    assert "121 cells (" in words(given._repr_html_())  # somebody has read it by now


def test_a_page_that_is_too_long_says_so() -> None:
    page = html.safely(lambda: "x" * (html.LONGEST + 1), lambda: "a mask")
    assert "it would have 180,001 characters" in words(page)


def test_no_search_and_no_proof_over_thousands_is_made_for_a_display(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("that takes too long")

    large = packed(300, "emulated")
    monkeypatch.setattr(plan_shown, "proven", never)
    assert "plan.verify() checks it" in words(large._repr_html_())
    tiled = packed(600, "tiled")
    monkeypatch.setattr(plan_shown, "lower", never)
    assert "plan.explain() finds the calls that Ascend would get" in words(tiled._repr_html_())
