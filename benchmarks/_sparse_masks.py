"""Sparse masks that models and papers use, at the sizes of a test, a text and a long text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import torch

from attnkit import masks
from attnkit.masks import Mask

sys.path.insert(0, str(Path(__file__).parents[1]))
from docs.make.variants import block_diffusion

__all__ = ["LONG", "SHORT", "SMALL", "SPARSE", "Sparse"]

SMALL, SHORT, LONG = range(3)
"""Which sizes: some 100 to 300 tokens, 2,048, or 16,384."""

Lengths = tuple[int, int]
Made = tuple[Mask, Lengths]
CAUSAL = masks.Causal()


@dataclass(frozen=True)
class Sparse:
    """A mask by name; what makes it is given other arguments at each size."""

    name: str
    make: Callable[..., Made]
    arguments: tuple[tuple[Any, ...] | None, ...]
    """For `SMALL`, `SHORT` and `LONG`; None where there is none of that size."""

    def label(self, size: int) -> str:
        """The name with the arguments of a size."""
        return self.name.format(*self.arguments[size] or ())

    def at(self, size: int) -> Made:
        """Return the mask and its lengths."""
        return self.make(*self.arguments[size] or ())

    def odd(self) -> tuple[Mask, int, int]:
        """Return a small one of odd sizes, some rows of which see no key, and its lengths."""
        mask, (q_len, kv_len) = self.at(SMALL)
        some = mask - masks.Rows(11, 14)
        few = some.cut((1, q_len), (0, kv_len - 1), q_len=q_len, kv_len=kv_len)
        return few, q_len - 1, kv_len - 1


# -- blocks ----------------------------------------------------------------------------------


def _blocks(chosen: Sequence[Iterable[int]], size: int, kv: int, causal: bool = False) -> Made:
    """The blocks of `kv` keys that each block of `size` rows sees; causal, also its own."""
    length = len(chosen) * size
    table = torch.zeros(len(chosen), length // kv, dtype=torch.bool)
    for k, some in enumerate(chosen):
        table[k, [*some, *([k * size // kv] if causal else [])]] = True
    return masks.Blocks(table, size, kv, causal=causal), (length, length)


def random_blocks(length: int, size: int, count: int) -> Made:
    """Each block of rows sees its own block of keys, and others at random."""
    draw, n = Random(0), length // size
    return _blocks(
        [{k, *draw.sample([*range(k), *range(k + 1, n)], count - 1)} for k in range(n)], size, size
    )


def selected(length: int, size: int, chunk: int, top: int) -> Made:
    """Blocks of queries see their own chunk, causally, and some before it (MoBA, NSA)."""
    draw = Random(1)
    before = [k * size // chunk for k in range(length // size)]
    chosen = [sorted(draw.sample(range(own), min(own, top - 1))) for own in before]
    return _blocks(chosen, size, chunk, causal=True)


def top_p(length: int, size: int, share: float) -> Made:
    """As many blocks before the own one as it takes (XAttention)."""
    draw = Random(2)
    chosen = [[j for j in range(k) if draw.random() < share] for k in range(length // size)]
    return _blocks(chosen, size, size, causal=True)


def big_bird(length: int, size: int) -> Made:
    """Global first and last blocks, a window of three, three at random (Zaheer et al., 2020)."""
    draw, n = Random(3), length // size
    chosen: list[Iterable[int]] = [range(n)]
    for k in range(1, n - 1):
        near = {0, n - 1, k - 1, k, k + 1}
        chosen.append(near | set(draw.sample(sorted(set(range(n)) - near), 3)))
    return _blocks([*chosen, range(n)], size, size)


def sink_block(length: int, size: int, window: int) -> Made:
    """The first block and a window of blocks, causally."""
    chosen = [sorted({0, *range(max(0, k - window + 1), k)} - {k}) for k in range(length // size)]
    return _blocks(chosen, size, size, causal=True)


def diffusion(length: int, size: int) -> Made:
    """The training mask of block diffusion (BD3-LM)."""
    return block_diffusion(length, size), (length, length)


# -- grids -----------------------------------------------------------------------------------


def neighborhood(shape: tuple[int, ...], kernel: tuple[int, ...]) -> Made:
    """The nearest tokens (NATTEN)."""
    return masks.Neighborhood(shape, kernel), (prod(shape), prod(shape))


def sliding_tiles(shape: tuple[int, ...], tile: tuple[int, ...], window: tuple[int, ...]) -> Made:
    """The window of tiles around the own one (STA)."""
    return masks.SlidingTiles(shape, tile, window), (prod(shape), prod(shape))


def shifted_windows(shape: tuple[int, ...], window: int, shift: int) -> Made:
    """Windows that begin at `shift` (Swin)."""
    return masks.ShiftedWindows(shape, window, shift), (prod(shape), prod(shape))


# -- texts -----------------------------------------------------------------------------------


def strided(length: int, stride: int) -> Made:
    """A window, and every key at a multiple of the stride (Child et al., 2019)."""
    return CAUSAL & (masks.SlidingWindow(stride) | masks.Dilated(stride)), (length, length)


def fixed(length: int, size: int, last: int) -> Made:
    """The own block, and the last keys of each block before it (Child et al., 2019)."""
    ends = masks.Keys([(j - last, j) for j in range(size, length + 1, size)])
    return CAUSAL & (masks.Chunked(size) | ends), (length, length)


def longformer(length: int, window: int, count: int) -> Made:
    """A window, and tokens that see and are seen by all (Beltagy et al., 2020)."""
    band = masks.Band(window // 2, window // 2)
    return band | masks.Columns(0, count) | masks.Rows(0, count), (length, length)


def sink_window(length: int, count: int, window: int) -> Made:
    """The first tokens and a window (StreamingLLM)."""
    return CAUSAL & (masks.SlidingWindow(window) | masks.Prefix(count)), (length, length)


def responses(length: int, prefix: int) -> Made:
    """Answers that share one prefix and do not see each other."""
    documents = masks.Documents([prefix] * (length // prefix))
    return CAUSAL & (masks.Columns(0, prefix) | documents), (length, length)


def tree(nodes: int, length: int) -> Made:
    """A draft that branches, over a cache: a token sees its ancestors and itself."""
    draw = Random(4)
    parents = [draw.randrange(max(0, k - 8), k) if k else -1 for k in range(nodes)]
    return masks.Tree(parents), (nodes, length)


def image_spans(length: int, count: int, longest: int) -> Made:
    """Causal text in which the tokens of an image see each other."""
    draw, step, spans = Random(5), length // count, []
    for k in range(count):
        size = draw.randint(longest // 2, longest)
        start = k * step + draw.randint(0, step - size)
        spans.append((start, start + size))
    return CAUSAL | masks.Spans(spans), (length, length)


def interleaved(length: int, size: int, causal: bool) -> Made:
    """Eight documents whose pieces of `size` tokens come in any order."""
    draw = Random(6)
    order = [k % 8 for k in range(length // size)]
    draw.shuffle(order)
    same = masks.SameId([(k, size) for k in order])
    return same & CAUSAL if causal else same, (length, length)


def random_cells(length: int) -> Made:
    """One cell of ten."""
    generator = torch.Generator().manual_seed(7)
    cells = torch.rand(length, length, generator=generator) < 0.1
    return masks.Dense.keep(cells), (length, length)


SPARSE = (
    Sparse("random blocks {1}", random_blocks, ((128, 16, 3), (2048, 128, 5), (16384, 128, 17))),
    Sparse(
        "MoBA, chunks of {2}, top {3}",
        selected,
        ((192, 16, 32, 3), (2048, 128, 256, 3), (16384, 128, 512, 4)),
    ),
    Sparse(
        "NSA selection, {3} of {1}",
        selected,
        ((160, 8, 8, 4), (2048, 64, 64, 8), (16384, 64, 64, 16)),
    ),
    Sparse("BigBird, blocks of {1}", big_bird, ((128, 8), (2048, 64), (16384, 64))),
    Sparse(
        "sliding tile attention (3-D), window {2}",
        sliding_tiles,
        (
            ((4, 4, 10), (2, 2, 2), (1, 1, 3)),
            ((8, 16, 16), (4, 4, 4), (1, 3, 3)),
            ((16, 32, 32), (4, 8, 8), (3, 3, 3)),
        ),
    ),
    Sparse(
        "NATTEN 2-D {1}",
        neighborhood,
        (((9, 13), (3, 3)), ((32, 64), (7, 7)), ((128, 128), (7, 7))),
    ),
    Sparse(
        "NATTEN 2-D {1}",
        neighborhood,
        (((9, 13), (5, 5)), ((32, 64), (13, 13)), ((128, 128), (13, 13))),
    ),
    Sparse(
        "NATTEN 3-D {1}",
        neighborhood,
        (((3, 4, 7), (3, 3, 3)), ((8, 16, 16), (5, 7, 7)), ((16, 32, 32), (5, 7, 7))),
    ),
    Sparse("Sparse Transformer, strided {1}", strided, ((135, 16), (2048, 64), (16384, 128))),
    Sparse(
        "Sparse Transformer, fixed {1}/{2}",
        fixed,
        ((144, 16, 3), (2048, 128, 16), (16384, 128, 16)),
    ),
    Sparse(
        "Longformer {1}, {2} global",
        longformer,
        ((151, 17, 3), (2048, 257, 16), (16384, 1025, 32)),
    ),
    Sparse("sink {1} + window {2}", sink_window, ((147, 3, 16), (2048, 4, 256), (16384, 4, 1024))),
    Sparse(
        "sink block + window of {2}, blocks of {1}",
        sink_block,
        ((160, 16, 2), (2048, 128, 2), (16384, 128, 8)),
    ),
    Sparse("block diffusion {1}", diffusion, ((128, 8), (2048, 64), (16384, 64))),
    Sparse("shared prefix + 7 responses", responses, ((136, 17), (2048, 256), (16384, 2048))),
    Sparse("tree of {0} over a prefix", tree, ((33, 97), (64, 2048), (64, 16384))),
    Sparse(
        "causal + {1} image spans", image_spans, ((143, 4, 20), (2048, 4, 200), (16384, 41, 200))
    ),
    Sparse(
        "8 documents interleaved by {1}",
        interleaved,
        ((192, 8, False), (2048, 64, False), (16384, 64, False)),
    ),
    Sparse(
        "8 documents interleaved by {1}, causal",
        interleaved,
        ((192, 8, True), (2048, 64, True), (16384, 64, True)),
    ),
    Sparse(
        "Swin, windows of {1}, shifted",
        shifted_windows,
        (((8, 12), 4, 2), ((32, 64), 8, 4), ((128, 128), 8, 4)),
    ),
    Sparse(
        "top-p blocks {1}, causal", top_p, ((160, 16, 0.25), (2048, 128, 0.25), (16384, 128, 0.23))
    ),
    Sparse("10 % of cells at random", random_cells, ((61,), (2048,), None)),
)
"""The masks of the table, in its order."""
