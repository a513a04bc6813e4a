"""What can be done to the page of a plan in a browser: by mouse, keys, fingers and text."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, Page
from torch import Tensor

from attnkit import masks, parallel
from attnkit.__main__ import main
from attnkit.display import COLOURS
from attnkit.parallel import ParallelPlan
from attnkit.planner import Plan
from tests.site.plans import CAUSAL, PIXEL, SPOT, packed, planned, shown

pytestmark = pytest.mark.browser


def test_a_mouse_points_at_cells_and_zooms_to_single_ones(page: Page, tmp_path: Path) -> None:
    shown(page, planned(CAUSAL, length=900), tmp_path)
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    x, y = page.evaluate(SPOT, [600, 200])
    page.mouse.move(box["x"] + x, box["y"] + y)
    title = page.inner_text("#cell-title")
    row, key = map(int, re.findall(r"\d+", title))
    assert abs(row - 600) <= 1
    assert abs(key - 200) <= 1
    assert "allowed" in page.inner_text("#cell-facts")
    for _ in range(40):
        page.mouse.wheel(0, -200)
    page.wait_for_function("explorer.plot.sx === 56 && explorer.plot.sy === 56")
    assert page.evaluate("explorer.plot.cellAt(...explorer.plot.placeOf(600, 201))") == [600, 201]
    for cell in ([row, key], [row, key + 1], [row + 1, key]):  # each has its own place now
        x, y = page.evaluate(SPOT, cell)
        page.mouse.move(box["x"] + x, box["y"] + y)
        assert page.inner_text("#cell-title") == f"Query {cell[0]}, key {cell[1]}"
    before = page.evaluate("[explorer.plot.i0, explorer.plot.j0]")
    page.mouse.down()
    page.mouse.move(box["x"] + x + 112, box["y"] + y + 56, steps=4)
    page.mouse.up()
    after = page.evaluate("[explorer.plot.i0, explorer.plot.j0]")
    assert [round(b - a) for a, b in zip(after, before, strict=True)] == [1, 2]
    page.click("#fit")
    assert page.evaluate("explorer.plot.isWhole")


def test_the_keyboard_reaches_everything(page: Page, tmp_path: Path) -> None:
    mask = CAUSAL & (masks.Columns(0, 4) | masks.SlidingWindow(64))
    shown(page, planned(mask, length=512), tmp_path)
    reached = []
    for _ in range(30):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or reached[-1] == "BODY"
    assert {"tab-0", "out", "in", "fit", "cells", "canvas", "text", "command", "copy"} <= {*reached}
    page.focus("#canvas")
    for key in ("ArrowDown", "ArrowDown", "Shift+ArrowDown", "ArrowRight", "End", "ArrowLeft"):
        page.keyboard.press(key)
    assert page.inner_text("#cell-title") == "Query 11, key 510"
    assert page.inner_text("#said").startswith("Query 11, key 510. mask: masked")
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    assert page.evaluate("[explorer.plot.sx, explorer.plot.sy]") == [56, 56]
    assert page.evaluate("explorer.plot.window.slice(0, 2)[0] <= 11")
    page.keyboard.press("0")
    assert page.evaluate("explorer.plot.isWhole")
    page.keyboard.press("+")
    assert not page.evaluate("explorer.plot.isWhole")
    page.focus("#tab-0")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-1"
    assert page.get_attribute("#tab-1", "aria-selected") == "true"
    assert page.evaluate("explorer.state.view") == 1


def test_colours_are_those_of_calls_sequences_and_stages(page: Page, tmp_path: Path) -> None:
    shown(page, planned(CAUSAL | masks.Columns(3, 5)), tmp_path)
    ground = page.evaluate("explorer.plot.colours().ground")
    for i, j in ((2, 12), (8, 2), (19, 19), (0, 3)):
        cell = page.evaluate(f"explorer.plot.matrix.at({i}, {j})")
        meant = ground
        if cell["hits"]:
            (hit,) = cell["hits"]
            meant = page.evaluate(
                "([call, number]) => explorer.plot.matrix.colour(call, number)",
                [hit["call"], hit["sequence"]],
            )
        assert page.evaluate(PIXEL, [i, j]) == meant
    first_call = page.evaluate("explorer.plot.matrix.colour(0, 0)")
    assert first_call == [*bytes.fromhex(COLOURS[0].removeprefix("#"))]  # as in every picture
    page.goto(packed().to_html(tmp_path / "packed.html").as_uri())
    first, last = (page.evaluate(PIXEL, [n, n]) for n in (3, 20))
    assert first != last


def test_the_palette_is_that_of_all_pictures(page: Page, tmp_path: Path) -> None:
    shown(page, planned(CAUSAL), tmp_path)
    drawn = page.evaluate(PIXEL, [19, 0])
    assert "#" + "".join(f"{part:02x}" for part in drawn) == COLOURS[0]


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """The ratio of WCAG 2.2, of colours of 0 to 255."""
    lights = []
    for colour in (one, other):
        parts = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
            for c in (p / 255 for p in colour)
        )
        lights.append(
            sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))
        )
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_numbers_are_read_on_every_colour(page: Page, tmp_path: Path) -> None:
    shown(page, planned(CAUSAL), tmp_path)
    every = "COLOURS.flatMap((c) => [0, 0.2, 0.3, 0.4, 0.6].map((part) => shade(c, part)))"
    pairs = page.evaluate(f"{every}.map((colour) => [colour, inkOn(colour)])")
    assert len(pairs) == 5 * len(COLOURS)
    inks = {"#000": (0, 0, 0), "#fff": (255, 255, 255)}
    assert min(contrast(colour, inks[ink]) for colour, ink in pairs) >= 4.5


def test_a_narrow_line_is_not_lost_in_a_coarse_picture(page: Page, tmp_path: Path) -> None:
    far = masks.Columns(40_000, 40_001) | masks.Rows(70_001, 70_002) | masks.SlidingWindow(3)
    shown(page, planned(far, length=100_000), tmp_path)
    ground = page.evaluate("explorer.plot.colours().ground")
    wide = page.evaluate("explorer.plot.canvas.width")
    lines = page.evaluate(
        """([i, wide]) => {
            const {plot} = explorer, many = wide / plot.canvas.clientWidth;
            plot.draw();
            const y = plot.placeOf(i, 0)[1], context = plot.canvas.getContext("2d");
            const data = context.getImageData(0, (y - 2) * many, wide, 5).data;
            return [...data];
        }""",
        [70_001, wide],
    )
    rows = [lines[k : k + 4 * wide] for k in range(0, len(lines), 4 * wide)]
    x = 4 * int(page.evaluate(SPOT, [0, 20_000])[0])
    assert any(row[x : x + 3] != ground for row in rows)  # the one row
    x = int(page.evaluate(SPOT, [0, 40_000])[0])
    assert any(rows[0][4 * k : 4 * k + 3] != ground for k in range(x - 2, x + 3))  # the one column


def test_a_million_tokens_open_and_zoom(page: Page, tmp_path: Path) -> None:
    mask = CAUSAL & (masks.Columns(0, 4) | masks.SlidingWindow(4096))
    shown(page, planned(mask, length=2**20), tmp_path)
    page.evaluate("explorer.plot.choose(1000000, 3)")
    assert "4,100" in page.inner_text("#cell-facts")
    page.click("#cells")
    assert page.evaluate(PIXEL, [1_000_000, 3]) != page.evaluate("explorer.plot.colours().ground")
    assert page.evaluate(PIXEL, [1_000_000, 4]) == page.evaluate("explorer.plot.colours().ground")


def test_tabs_show_the_cells_of_rivals(page: Page, tmp_path: Path) -> None:
    mask = CAUSAL & (masks.Columns(0, 4) | masks.SlidingWindow(64))
    plan = planned(mask, length=512)
    shown(page, plan, tmp_path)
    tabs = page.locator("#tabs [role=tab]")
    assert tabs.nth(0).inner_text().startswith("This plan")
    for n, other in enumerate(plan.alternatives, 1):
        tabs.nth(n).click()
        assert page.inner_text("#headline") == other.label
        assert "%" in tabs.nth(n).inner_text() or "same price" in tabs.nth(n).inner_text()
        titles = page.locator("#calls summary b").all_inner_texts()
        assert len(titles) == len(other.launches)
        assert other.launches[0].label in titles[0]


def test_transfers_and_stages_of_ranks(page: Page, tmp_path: Path) -> None:
    x = torch.empty(1, 1024, 4, 16, device="meta")
    plan = parallel.plan(x, x, x, ranks=4, mask=masks.SlidingWindow(64), method="needed")
    shown(page, plan, tmp_path)
    fields = page.locator("#transfers tbody td").all_inner_texts()
    moved = plan.transfers.forward.flatten().tolist()
    assert [text == "0" for text in fields] == [count == 0 for count in moved]
    page.click("#backward")
    assert page.get_attribute("#backward", "aria-pressed") == "true"
    assert page.locator("#transfers tbody td").all_inner_texts() != fields
    page.select_option("#rank", "2")
    stage = plan.stages(2)[1]
    told = page.inner_text("#stages tbody tr:nth-child(2)")
    for message in stage.receives:
        assert f"{sum(map(len, message.keys))} keys: rank {message.rank}" in told


def test_heads_and_batch_elements_are_chosen_where_they_differ(page: Page, tmp_path: Path) -> None:
    shown(page, planned(masks.PerHead([CAUSAL, masks.Full(), CAUSAL, CAUSAL])), tmp_path)
    assert page.is_hidden("#batch-label")
    assert page.locator("#head option").all_inner_texts() == ["heads 0, 2 to 3", "head 1"]
    page.evaluate("explorer.plot.choose(2, 9)")
    assert "masked" in page.inner_text("#cell-facts")
    page.select_option("#head", "1")
    assert "allowed" in page.inner_text("#cell-facts")


@pytest.mark.parametrize(
    "given",
    [
        ["--mask", "Causal()", "--q-len", "64", "--backend", "emulated"],
        ["--mask", "Causal()", "--q-len", "64", "--ranks", "2", "--method", "ring"],
        ["--mask", "Causal()", "--lengths", "30,2", "--train"],
    ],
    ids=["calls", "ranks", "packed"],
)
def test_the_editor_gives_the_command_of_another_page(
    given: list[str], page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["view", *given]) == 0
    page.goto((tmp_path / "attnkit-plan.html").as_uri())
    edited = "SlidingWindow(5) |\nColumns(0, 2)"
    page.fill("#text", edited)
    command = shlex.split(page.inner_text("#command"))
    assert command[:2] == ["attnkit", "view"]
    assert command[-2:] == ["--mask", edited.replace("\n", " ")]
    assert main([*command[1:], "-o", "edited.html"]) == 0
    page.goto((tmp_path / "edited.html").as_uri())
    found = page.evaluate("explorer.data")
    assert masks.parse(found["mask"]) == masks.parse(command[-1])
    wanted = [command[-1] if word == "Causal()" else word for word in given]
    assert main(["view", *wanted, "-o", "meant.html"]) == 0
    page.goto((tmp_path / "meant.html").as_uri())
    meant = page.evaluate("explorer.data")
    assert [found[k] for k in ("views", "allowed", "regions", "facts")] == [
        meant[k] for k in ("views", "allowed", "regions", "facts")
    ]
    page.click("#copy")
    page.wait_for_function("document.getElementById('copied').textContent.includes('cop')")


def test_text_from_a_plan_is_never_markup(page: Page, tmp_path: Path) -> None:
    def sly(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    sly.__name__ = sly.__qualname__ = "</script><img src=x onerror=document.title=1><script>"
    shown(page, planned(masks.Predicate(sly)), tmp_path)
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    assert "onerror" in page.inner_text("#title")
    assert page.title() != "1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_room_for_all_of_it(browser: Browser, scheme: Any, tmp_path: Path) -> None:
    mask = CAUSAL & (masks.Columns(0, 4) | masks.SlidingWindow(64))
    x = torch.empty(1, 512, 4, 16, device="meta")
    plans: list[Plan | ParallelPlan] = [planned(mask, length=512)]
    plans.append(parallel.plan(x, x, x, ranks=16, mask=mask))
    screen = {"width": 390, "height": 844}
    context = browser.new_context(
        viewport=screen, has_touch=True, is_mobile=True, offline=True, color_scheme=scheme
    )  # type: ignore[arg-type]
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    for plan in plans:
        shown(page, plan, tmp_path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for control in page.locator("button:visible, select:visible, summary:visible").all():
            box = control.bounding_box()
            assert box is not None
            assert box["height"] >= 40
            assert box["width"] >= 40
        page.locator("#canvas").scroll_into_view_if_needed()
        box = page.locator("#canvas").bounding_box()
        assert box is not None
        x, y = page.evaluate(SPOT, [300, 290])
        page.touchscreen.tap(box["x"] + x, box["y"] + y)
        row, key = map(int, re.findall(r"\d+", page.inner_text("#cell-title")))
        assert abs(row - 300) <= 2
        assert abs(key - 290) <= 2
        page.tap("#cells")
        assert page.evaluate("explorer.plot.sx") == 56
        colours = page.evaluate("explorer.plot.colours()")
        assert (sum(colours["ground"]) < 300) == (scheme == "dark")
    context.close()
    assert not errors


def test_two_fingers_zoom(browser: Browser, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    page = context.new_page()
    shown(page, planned(CAUSAL, length=512), tmp_path)
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    touch = context.new_cdp_session(page)

    def fingers(kind: str, apart: int) -> None:
        x, y = box["x"] + 200, box["y"] + 150  # type: ignore[index]
        points = [{"x": x - apart, "y": y, "id": 0}, {"x": x + apart, "y": y, "id": 1}]
        points = [] if kind == "touchEnd" else points
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    before = page.evaluate("explorer.plot.sx")
    fingers("touchStart", 20)
    for apart in range(25, 100, 5):
        fingers("touchMove", apart)
    fingers("touchEnd", 0)
    assert page.evaluate("explorer.plot.sx") > 2 * before
    context.close()


def test_the_data_is_what_the_page_has(page: Page, tmp_path: Path) -> None:
    plan = planned(CAUSAL)
    text = plan.to_html(tmp_path / "plan.html").read_text(encoding="utf-8")
    shown(page, plan, tmp_path)
    (data,) = re.findall(r'type="application/json" id="data">(.*?)</script>', text)
    assert page.evaluate("explorer.data") == json.loads(data)
