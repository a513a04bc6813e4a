"""Draw the pictures of "How it works" from the code: ``python docs/make/diagrams.py``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from pathlib import Path

import torch

import attnkit as ak
from attnkit import masks
from attnkit.display import COLOURS, Drawing, Layer, colour, svg
from attnkit.fields import shares
from attnkit.geometry import Region, Slice, Strip
from attnkit.planner import picture
from attnkit.planner.price import Price, chip
from attnkit.progress import progress

DOCS = Path(__file__).parents[1]
CODE = DOCS.parent / "attnkit"
FOLDER = DOCS / "images" / "how"


def strips() -> str:
    """Return the strips of a small region, a colour each."""
    mask = masks.Causal() & (masks.SlidingWindow(6) | masks.Prefix(3))
    region = mask.region(24, 24)
    layers = tuple(
        Layer(_cells(Region((strip,)), 24), colour(k), _told(strip))
        for k, strip in enumerate(region.strips)
    )
    return svg.document(Drawing(24, 24, layers, repr(mask)))


def _told(strip: Strip) -> str:
    runs = f"{len(strip.runs)} run" + "s" * (len(strip.runs) > 1)
    return f"rows {strip.i0} to {strip.i1 - 1}: {runs}"


def tiles() -> str:
    """Return the tiles of a region by what is done with them."""
    mask, length, side = masks.Causal() & (masks.SlidingWindow(512) | masks.Prefix(64)), 2048, 64
    region, count = mask.region(length, length), length // side
    full, partial = ([[0.0] * count for _ in range(count)] for _ in range(2))
    for row in range(count):
        for column in range(count):
            at = row * side, (row + 1) * side, column * side, (column + 1) * side
            area = (region & Region.of(Slice(*at))).area
            full[row][column] = float(area == side * side)
            partial[row][column] = float(0 < area < side * side)
    known = region.tiles(side, side, length, length)
    layers = (
        Layer(full, colour(0), f"{known.full} full: no mask is read"),
        Layer(partial, colour(1), f"{known.partial} partial"),
    )
    note = f"{known.empty} of {count * count} tiles are skipped"
    return svg.document(Drawing(length, length, layers, repr(mask), note))


def proof() -> str:
    """Return the sequences of a plan's one call."""
    mask = masks.Causal() & (masks.SlidingWindow(256) | masks.Prefix(4))
    x = torch.empty(1, 4096, 8, 64, dtype=torch.bfloat16, device="meta")
    drawn = picture.drawing(ak.plan(x, x, x, mask=mask, backend="emulated"), 0, 0)
    return svg.document(replace(drawn, title=repr(mask), note=""))


def price() -> str:
    """Return the prices of a plan and of what else would be right, in their parts."""
    mask = masks.Causal() & (masks.SlidingWindow(256) | masks.Prefix(4))
    x = torch.empty(1, 8192, 8, 64, device="meta")
    plan = ak.plan(x, x, x, mask=mask, backend="emulated")
    ways = [plan.solution, *plan.alternatives[:4]]
    scale = 400 / max(way.price.nanoseconds for way in ways)
    names = list(_parts(ways[0].price))
    drawn = []
    for row, way in enumerate(ways):
        at, y = 150.0, 40 + 26 * row
        drawn.append(_text(16, y + 13, way.label))
        for k, nanoseconds in enumerate(_parts(way.price).values()):
            width = nanoseconds * scale
            drawn.append(_box(at, y, width, 18, COLOURS[k]))
            at += width
        drawn.append(_text(at + 8, y + 13, f"{way.price.nanoseconds / 1e3:.0f} us"))
    below = 40 + 26 * len(ways) + 10
    for k, name in enumerate(names):
        drawn.append(_box(150 + 110 * k, below, 12, 12, COLOURS[k]))
        drawn.append(_text(168 + 110 * k, below + 11, name))
    head = _text(16, 24, repr(mask), bold=True)
    return svg.file(640, below + 30, head + "".join(drawn))


def _parts(found: Price) -> dict[str, float]:
    weights = chip()
    return {
        "computing": found.flops / weights.flops_per_ns,
        "copies": found.copy_bytes / weights.bytes_per_ns,
        "mask, bias": (found.mask_traffic + found.bias_bytes) / weights.bytes_per_ns,
        "launches": weights.nanoseconds(0, 0, found.launches, found.small_launches),
    }


def layers() -> str:
    """Return the layers of the package, and for each a dot under every other that it imports."""
    rows = rooms()
    needs = _needs({room: k for k, row in enumerate(rows) for room in row})
    drawn = [
        _text(16, 24, "A dot: the layer of this row imports from that of the column", bold=True)
    ]
    side, left, top = 26, 300, 44
    for k, row in enumerate(rows):
        y = top + side * k
        title = " ".join(row) if len(" ".join(row)) < 44 else f"{' '.join(row[:3])} ... {row[-1]}"
        drawn.append(_box(left + side * k, y, side - 2, side - 2, COLOURS[k % len(COLOURS)]))
        drawn.append(_text(16, y + 17, title))
        for other in sorted(needs[k] - {k}):
            x = left + side * other + side / 2 - 1
            drawn.append(f'<circle cx="{x}" cy="{y + 12}" r="5" fill="currentColor"/>')
    return svg.file(left + side * len(rows) + 16, top + side * len(rows) + 12, "".join(drawn))


def rooms() -> list[list[str]]:
    """Return the layers as the page's table lists them."""
    page = (DOCS / "how-it-works" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("## Layers\n")[2].partition("\n## ")[0]
    lines = [row for row in table.splitlines() if row.startswith("| `")]
    return [re.findall(r"`(\w+)`", line.split("|")[1]) for line in lines]


def _needs(numbers: dict[str, int]) -> dict[int, set[int]]:
    """Return which layers each layer imports from."""
    needs: dict[int, set[int]] = {row: set() for row in numbers.values()}
    for room, other in imports():
        if room != "__init__" and other in numbers:
            needs[numbers[room]].add(numbers[other])
    return needs


def imports() -> Iterator[tuple[str, str]]:
    """Yield a folder or file of the package, and what it imports when it is imported."""
    for file in sorted(CODE.rglob("*.py")):
        room = file.relative_to(CODE).parts[0].removesuffix(".py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if module == "attnkit":
                yield from ((room, alias.name) for alias in node.names)  # type: ignore[union-attr]
            elif module.startswith("attnkit."):
                yield room, module.split(".")[1]


def _cells(region: Region, length: int) -> list[list[float]]:
    return shares(region.strips, length, length, length, length).tolist()


def _box(x: float, y: float, width: float, height: float, tint: str) -> str:
    return f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" fill="{tint}"/>'


def _text(x: float, y: float, words: str, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y}" fill="currentColor"{weight}>{escape(words)}</text>'


PICTURES = {
    "layers": layers,
    "strips": strips,
    "proof": proof,
    "price": price,
    "tiles": tiles,
}


def main() -> None:
    """Write every picture."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with progress("drawing", len(PICTURES)) as bar:
        for name, draw in PICTURES.items():
            (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8")
            bar.step(name)


if __name__ == "__main__":
    main()
