"""Pictures as SVG: their fields are the cells, in few characters, on light and on dark."""

from __future__ import annotations

import random
from itertools import product
from xml.etree import ElementTree

import pytest
import torch

import attnkit as ak
from attnkit import masks
from attnkit.display import COLOURS, Drawing, Layer, svg
from attnkit.fields import shares
from attnkit.geometry import Region, Slice
from attnkit.masks.shown import drawing
from attnkit.planner import picture
from tests.display.looked import SVG, painted, size, svgs, tree

MASKS = [
    masks.Causal(),
    masks.SlidingWindow(2) | masks.Columns(0, 1),
    ~masks.Band(1, 0),
    masks.Dilated(2) & masks.Causal(),
    masks.Predicate(lambda b, h, i, j: (3 * i + j) % 4 < 2),
    masks.Full(),
    ~masks.Full(),
]


def element(drawn: Drawing) -> ElementTree.Element:
    return ElementTree.fromstring(svg.inline(drawn))


@pytest.mark.parametrize("mask", MASKS, ids=repr)
def test_the_fields_of_a_small_mask_are_its_cells(mask: masks.Mask) -> None:
    for q_len, kv_len in product(range(1, 7), repeat=2):
        drawn = drawing(mask, q_len, kv_len).drawing
        cells = mask.materialize(q_len, kv_len)[0, 0].nonzero().tolist()
        assert painted(element(drawn)) == {(i, j): {COLOURS[0]: 1.0} for i, j in cells}
        assert size(element(drawn)) == (q_len, kv_len)


@pytest.mark.parametrize("mask", MASKS[:4], ids=repr)
def test_the_fields_of_a_plan_are_the_cells_of_its_calls(mask: masks.Mask) -> None:
    for q_len, kv_len in ((1, 6), (5, 5), (4, 7)):
        query, key = (torch.empty(1, n, 2, 16, device="meta") for n in (q_len, kv_len))
        plan = ak.plan(query, key, key, mask=mask, backend="emulated")
        found = painted(element(picture.drawing(plan)))
        seen = picture.scene(plan)
        each = list(picture.layers(seen.launches, seen.batch, seen.head))
        for k, (region, _) in enumerate(each):
            own = {field for field, tints in found.items() if COLOURS[k] in tints}
            assert own == {
                (i, j) for i in range(q_len) for a, b in region.row(i) for j in range(a, b)
            }
        assert all(len(tints) == 1 for tints in found.values())


def test_shares_are_counted_as_cells_are() -> None:
    chance = random.Random(3)
    for _ in range(300):
        q_len, kv_len = chance.randint(1, 9), chance.randint(1, 9)
        parts = []
        for _ in range(chance.randint(0, 3)):
            (i0, i1), (j0, j1) = (
                sorted(chance.choices(range(n + 1), k=2)) for n in (q_len, kv_len)
            )
            lo, hi = (chance.choice([None, chance.randint(-8, 8)]) for _ in range(2))
            parts.append(Slice(i0, i1, j0, j1, lo, hi))
        region = Region.of(*(part for part in parts if part))
        rows, columns = chance.randint(1, 5), chance.randint(1, 5)
        found = shares(region.strips, q_len, kv_len, rows, columns)
        count, across = found.shape
        for r, c in product(range(count), range(across)):
            ends = (q_len * r // count, q_len * (r + 1) // count)
            keys = (kv_len * c // across, kv_len * (c + 1) // across)
            whole = (ends[1] - ends[0]) * (keys[1] - keys[0])
            assert found[r, c] == region.cut(ends, keys).area / whole


def test_rectangles_cover_each_field_once_and_are_few_where_much_is_alike() -> None:
    chance = random.Random(1)
    for rows, columns in product((1, 2, 5), repeat=2):
        for _ in range(30):
            levels = [[chance.choice((0, 1, 1, 2)) for _ in range(columns)] for _ in range(rows)]
            seen = [[0] * columns for _ in range(rows)]
            for level, (x, y, width, height) in svg.rectangles(levels):
                for r, c in product(range(y, y + height), range(x, x + width)):
                    assert seen[r][c] == 0
                    seen[r][c] = level
            assert seen == levels
    assert len(list(svg.rectangles([[1] * 128] * 128))) == 1


def test_a_picture_of_noise_is_drawn_coarser_and_stays_short() -> None:
    chance = random.Random(2)
    noise = [
        Layer([[chance.random() for _ in range(128)] for _ in range(128)], colour, "x")
        for colour in COLOURS
    ]
    drawn = Drawing(128, 128, tuple(noise))
    for text in (svg.inline(drawn), svg.document(drawn)):
        assert len(text) < 120_000
        ElementTree.fromstring(text)
    assert max(size(element(drawn))) < 128


def test_a_field_is_opaque_only_where_all_of_it_is_coloured() -> None:
    values = [0.0, 1e-9, 0.5, 1 - 1e-9, 1.0]
    found = painted(element(Drawing(1, 5, (Layer([values], COLOURS[0]),))))
    assert {column: tints[COLOURS[0]] for (_, column), tints in found.items()} == pytest.approx(
        {1: 1 / 16, 2: 0.5, 3: 15 / 16, 4: 1.0}, abs=1e-3
    )


def test_what_is_not_a_number_is_not_drawn() -> None:
    assert painted(element(Drawing(1, 1, (Layer([[float("nan")]], COLOURS[0]),)))) == {}


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("page", ["#ffffff", "#111111", "#1e2129"])
def test_colours_stand_out_from_light_and_dark_pages(colour: str, page: str) -> None:
    assert contrast(colour, page) >= 3  # what WCAG asks of graphics


def test_lines_and_words_have_the_colour_of_the_page() -> None:
    (found,) = svgs(masks.Causal()._repr_html_())
    grid = next(path for path in found.iter(f"{SVG}path") if path.get("class") == "grid")
    assert grid.get("stroke") == "currentColor"
    assert next(found.iter(f"{SVG}rect")).get("fill") == "currentColor"


def test_a_file_is_light_and_dark_and_has_title_axes_and_legend() -> None:
    x = torch.empty(1, 64, 2, 16, device="meta")
    plan = ak.plan(x, x, x, mask=masks.Causal() & masks.SlidingWindow(8), backend="emulated")
    text = svg.document(picture.drawing(plan))
    found = tree(text)
    words = [one.text or "" for one in found.iter(f"{SVG}text")]
    assert words[0] == "Causal() & SlidingWindow(8)"
    assert {"key j →", "query i →"} <= set(words)
    assert any(word.startswith("call 1") for word in words)
    style = found.findtext(f"{SVG}style") or ""
    assert "prefers-color-scheme:dark" in style
    assert found.find(f"{SVG}rect[@class='plate']") is not None
    assert {one.get("fill") for one in found.iter(f"{SVG}text")} == {"currentColor"}
    assert float(found.get("width", 0)) >= 7 * max(map(len, words))
