"""Draw the gallery: ``python docs/make/variants.py`` writes docs/variants.md and its pictures."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import attnkit as ak
from attnkit import masks
from attnkit.geometry import Region, Slice
from attnkit.planner.calls import Launch
from attnkit.planner.lower import MOST_MASK_CELLS, search_for
from attnkit.planner.search import Search

DOCS = Path(__file__).parents[1]
LENGTH = 2048


@dataclass(frozen=True, repr=False)
class BlockDiffusion(masks.Mask):
    """The training mask of block diffusion (Arriola et al., BD3-LM, ICLR 2025).

    The sequence is a noisy half and a clean half, both in blocks of `size`. A noisy block sees
    itself and the clean blocks before it; a clean block sees itself and the clean ones before.
    """

    size: int

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        half = q_len // 2
        parts = []
        for a in range(0, half, self.size):
            b = min(a + self.size, half)
            parts.append(Slice(a, b, a, b))
            parts.append(Slice(a, b, half, half + a))
            parts.append(Slice(half + a, half + b, half, half + b))
        return Region.of(*parts)


def document_prefixes(length: int, every: int, count: int) -> masks.Mask:
    """Return the first `length` keys of each of `count` documents of `every` tokens."""
    starts = range(0, every * count, every)
    out: masks.Mask = masks.Columns(0, length)
    for start in starts[1:]:
        out = out | masks.Columns(start, start + length)
    return out


def some_blocks(blocks: int, share: float) -> torch.Tensor:
    """Return a table of blocks at random, each with its own one."""
    drawn = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0))
    return (drawn < share) | torch.eye(blocks, dtype=torch.bool)


def neighbours(blocks: int) -> torch.Tensor:
    """Return the table of blocks that see themselves and those next to them."""
    return torch.ones(blocks, blocks, dtype=torch.bool).tril(1).triu(-1)


CAUSAL = masks.Causal()
DOCUMENTS = masks.Documents([128] * 16)

GALLERY: dict[str, masks.Mask] = {
    "Causal": CAUSAL,
    "Sliding window": masks.SlidingWindow(256),
    "Sink and window": CAUSAL & (masks.SlidingWindow(256) | masks.Prefix(4)),
    "Prefix LM": masks.PrefixLM(512),
    "Packed documents, causal": DOCUMENTS & CAUSAL,
    "Packed documents, windowed": DOCUMENTS & masks.SlidingWindow(64),
    "Packed documents, prefix LM": DOCUMENTS & (CAUSAL | document_prefixes(32, 128, 16)),
    "Chunked": masks.Chunked(256) & CAUSAL,
    "Block causal": masks.BlockCausal(128),
    "Longformer": masks.Band(128, 128) | masks.Columns(0, 16) | masks.Rows(0, 16),
    "Block diffusion": BlockDiffusion(64),
    "Shared prefix": CAUSAL & (masks.Columns(0, 256) | masks.Documents([256] * 8)),
    "Bidirectional spans": CAUSAL
    | masks.Spans([(100, 300), (500, 600), (900, 1300), (1700, 1800)]),
    "Keys with holes": CAUSAL & masks.Keys([(0, 700), (900, 1500), (1600, None)]),
    "Numbers that return": CAUSAL
    & masks.SameId([(0, 500), (1, 400), (0, 600), (None, 148), (1, 400)]),
    "Dilated window": masks.SlidingWindow(256) & masks.Dilated(2),
    "Neighborhood": masks.Neighborhood((32, 64), 7),
    "Neighborhood of a video": masks.Neighborhood((8, 16, 16), (3, 5, 5)),
    "Sliding tiles": masks.SlidingTiles((8, 16, 16), tile=(2, 4, 4), window=3),
    "Shifted windows": masks.ShiftedWindows((32, 64), window=8, shift=4),
    "Sparse blocks, causal": masks.Blocks(some_blocks(16, 0.25).tril(), 128, 128, causal=True),
    "BigBird": masks.Blocks(some_blocks(32, 0.1) | neighbours(32), 64, 64)
    | masks.Columns(0, 64)
    | masks.Rows(0, 64),
    "Sparse Transformer, fixed": CAUSAL
    & (masks.Chunked(128) | masks.Keys([(k + 112, k + 128) for k in range(0, LENGTH, 128)])),
    "Tree of drafts": masks.Tree([(i + 1) // 2 - 1 for i in range(64)], prefix=LENGTH - 64),
}

COMPOSED = {
    "BigBird (Zaheer et al., 2020)": "Blocks(random | near, b, b) | Columns(0, g) | Rows(0, g)",
    "Longformer (Beltagy et al., 2020)": "Band(w, w) | Columns(0, g) | Rows(0, g)",
    "Sparse Transformer, strided": "Causal() & (SlidingWindow(l) | Dilated(l))",
    "Sparse Transformer, fixed": "Causal() & (Chunked(l) | Keys(the last c of each chunk))",
    "StreamingLLM (Xiao et al., 2024)": "Causal() & (SlidingWindow(w) | Prefix(sinks))",
    "registers before an image": "Placed(grid, before=r) | Columns(0, r) | Rows(0, r)",
    "text behind a video of n tokens": "Placed(tiles, after=t) | Columns(n) | Rows(n)",
}


def plan_of(mask: masks.Mask) -> ak.Plan:
    """Return the plan of a mask for a training step in bfloat16."""
    x = torch.empty(1, LENGTH, 8, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    return ak.plan(x[:, : queries(mask)], x, x, mask=mask, backend="emulated")


def queries(mask: masks.Mask) -> int:
    """Return how many queries there are: those of the mask, or one for each key."""
    return mask.extent[0] or LENGTH


def without_mask(plan: ak.Plan) -> ak.Plan | None:
    """Return the cheapest way of a plan that reads no mask of one entry per cell."""
    ways = [plan.solution, *plan.alternatives]
    spared = [way for way in ways if not any(map(reads_all, way.launches))]
    best = min(spared, key=lambda way: way.price.nanoseconds, default=None)
    return None if best is None else replace(plan, steps=best.launches, alternatives=())


def reads_all(launch: Launch) -> bool:
    """Whether a call reads a mask with an entry for each cell of the score matrices."""
    mask = launch.call.atten_mask
    return mask is not None and mask.kind == "full" and not launch.partial


def told(plan: ak.Plan | None) -> str:
    """Return the calls of a plan, their sequences, whether rows are merged, and the price."""
    if plan is None or plan.price is None:
        return "none"
    calls = " + ".join(step.label for step in plan.steps)
    sequences = sum(len(step.blocks) for step in plan.steps if step.call.is_packed)
    counted = f", {sequences:,} sequences" if sequences else ""
    merged = plan.steps[0].partial and not all(parts.once for parts in plan.by_heads)
    return f"{calls}{counted}{', merged' * merged}: {plan.price.nanoseconds / 1e3:,.0f} us"


def section(name: str, mask: masks.Mask) -> str:
    """Return the page's section on one mask."""
    plan = plan_of(mask)
    file = name.lower().replace(",", "").replace(" ", "-")
    return "\n".join(
        [
            f"## {name}",
            "",
            f"![{name}](images/variants/{file}.png)",
            "",
            "```text",
            plan.explain(),
            "```",
            "",
        ]
    )


def page() -> str:
    """Return the whole page."""
    rows = []
    for name, mask in GALLERY.items():
        plan = plan_of(mask)
        cut = replace(search_for(plan.request, Search(gathers=False)), backend="emulated")
        ways = told(without_mask(cut)), told(without_mask(plan))
        chosen = told(plan) + (", full mask" if reads_all(plan.steps[0]) else "")
        rows.append(f"| {name} | {' | '.join(ways)} | {chosen} |")
    head = [
        "# Gallery",
        "",
        f"What attnkit makes of the masks people ask for: {LENGTH:,} tokens, 8 heads of 64,",
        "bfloat16, training. Every plan is proven equal to its mask, cell for cell, by",
        "`Plan.verify()`. Made by `python docs/make/variants.py`.",
        "",
        "What is cheapest is for the price to say, whose weights nobody has measured yet. At this",
        f"length that may be one call with a full mask: up to {MOST_MASK_CELLS:,} entries (4,096 x",
        "4,096) it is built once, and weighed like any other plan; in longer texts it is the last",
        "resort. What else computes the mask stands under *also right*.",
        "",
        "The table compares the best plan without such a mask whose pieces have their keys side by",
        "side with the best one that may also gather keys from several places, and says what is",
        "chosen. See [gathered keys](how-it-works/gathered.md).",
        "",
        "| mask | keys side by side | keys gathered, too | chosen |",
        "|---|---|---|---|",
        *rows,
        "",
        "Masks of papers that say no more than what they are composed of have no name of their",
        "own (the patterns of the Sparse Transformer are those of Child et al., 2019):",
        "",
        "| mask | written |",
        "|---|---|",
        *(f"| {name} | `{text.replace('|', chr(92) + '|')}` |" for name, text in COMPOSED.items()),
        "",
    ]
    return "\n".join(head + [section(name, mask) for name, mask in GALLERY.items()])


def main() -> None:
    """Write the page, and the pictures unless told ``--text``."""
    (DOCS / "variants.md").write_text(page(), encoding="utf-8")
    if "--text" in sys.argv:
        return
    folder = DOCS / "images" / "variants"
    folder.mkdir(parents=True, exist_ok=True)
    for name, mask in GALLERY.items():
        file = name.lower().replace(",", "").replace(" ", "-")
        figure = plan_of(mask).plot()
        figure.savefig(folder / f"{file}.png", dpi=70, metadata={"Software": None})


if __name__ == "__main__":
    main()
