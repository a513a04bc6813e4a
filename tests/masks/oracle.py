"""What every mask means, cell by cell: the formulas of the docstrings, written a second time.

A set of cells is an int, one bit for each cell, so that the algebra of masks can be compared
with the algebra of ints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, product
from typing import NamedTuple

import torch

from attnkit import masks
from attnkit.geometry import Region
from attnkit.masks import Mask

SIZES = list(product(range(7), range(7)))
ALIGNS = ("bottom_right", "top_left")


class Cell(NamedTuple):
    """One cell of one score matrix."""

    i: int
    j: int
    q_len: int
    kv_len: int
    b: int = 0
    h: int = 0

    def p(self, align: str) -> int:
        """The key position that the query stands at."""
        return self.i + (self.kv_len - self.q_len if align == "bottom_right" else 0)


Formula = Callable[[Cell], bool]


class Case(NamedTuple):
    """A mask, and what it should allow."""

    mask: Mask
    formula: Formula


def even_sum(b, h, i, j):
    return (i + j) % 2 == 0


def by_batch_and_head(b, h, i, j):
    return (i * 2 + j + b + 2 * h) % 3 != 0


def anchored_cases(align: str) -> Iterator[Case]:
    """Families that take `align`."""
    yield Case(masks.Causal(align), lambda c: c.j <= c.p(align))
    for size in (1, 2, 3, 9):
        yield Case(
            masks.SlidingWindow(size, align), lambda c, w=size: c.p(align) - w < c.j <= c.p(align)
        )
        yield Case(masks.Chunked(size, align), lambda c, s=size: c.j // s == c.p(align) // s)
        yield Case(masks.BlockCausal(size, align), lambda c, s=size: c.j // s <= c.p(align) // s)
        for f in (1, 2):
            yield Case(
                masks.Chunked(size, align, phase=f),
                lambda c, s=size, f=f: (c.j - f) // s == (c.p(align) - f) // s,
            )
            yield Case(
                masks.BlockCausal(size, align, f, before=f),
                lambda c, s=size, f=f: 0 <= (c.p(align) - f) // s - (c.j - f) // s <= f,
            )
        phases = (0, 1, 3)
        yield Case(
            masks.Chunked(size, align, phase=phases),
            lambda c, s=size, f=phases: (c.j - f[c.b]) // s == (c.p(align) - f[c.b]) // s,
        )
        yield Case(masks.Dilated(size, align), lambda c, s=size: (c.p(align) - c.j) % s == 0)
    ends = ((0, 0), (1, 2), (2, 0), (None, 1), (1, None), (None, None), (-1, 3), (3, -2))
    for left, right in ends:
        yield Case(
            masks.Band(left, right, align),
            lambda c, x=left, y=right: (
                (x is None or c.p(align) - x <= c.j) and (y is None or c.j <= c.p(align) + y)
            ),
        )
    yield Case(masks.PrefixLM(2, align), lambda c: c.j <= c.p(align) or c.j < 2)
    spans = ((0, 2), (3, 5)), ((1, 9),), ()
    yield Case(
        masks.Spans(spans, align),
        lambda c: any(a <= c.p(align) < z and a <= c.j < z for a, z in spans[c.b]),
    )


def free_cases() -> Iterator[Case]:
    """Families that fit any lengths and know no anchor."""
    yield Case(masks.Full(), lambda c: True)
    for start, stop in ((0, 1), (1, 3), (2, None), (0, None), (5, 9)):
        yield Case(
            masks.Columns(start, stop),
            lambda c, a=start, z=stop: a <= c.j < (99 if z is None else z),
        )
        yield Case(
            masks.Rows(start, stop), lambda c, a=start, z=stop: a <= c.i < (99 if z is None else z)
        )
    for runs in ((), ((0, 1), (3, None)), ((1, 2), (3, 5)), ((7, 9),)):
        yield Case(masks.Keys(runs), lambda c, runs=runs: among(c.j, runs))
    texts = ((0, 2), (4, None)), (), ((1, None),)
    yield Case(masks.Keys(texts), lambda c: among(c.j, texts[c.b]))
    for length in (0, 1, 4, 8):
        yield Case(masks.Prefix(length), lambda c, n=length: c.j < n)
    yield Case(masks.Prefix((0, 2, 5)), lambda c: c.j < (0, 2, 5)[c.b])
    yield Case(masks.Predicate(even_sum), lambda c: (c.i + c.j) % 2 == 0)
    yield Case(
        masks.Predicate(by_batch_and_head, batch=2, num_heads=3),
        lambda c: (c.i * 2 + c.j + c.b + 2 * c.h) % 3 != 0,
    )
    yield Case(
        masks.PerBatch([masks.Causal(), masks.PerHead([masks.Prefix(1), masks.Dilated(2)])]),
        lambda c: (
            c.j <= c.p("bottom_right") if c.b == 0
            else c.j < 1 if c.h == 0
            else (c.p("bottom_right") - c.j) % 2 == 0
        ),
    )  # fmt: skip
    yield Case(
        masks.PerHead([masks.Causal(), masks.Prefix(1), masks.Dilated(2)]),
        lambda c: (
            c.j <= c.p("bottom_right") if c.h == 0
            else c.j < 1 if c.h == 1
            else (c.p("bottom_right") - c.j) % 2 == 0
        ),
    )  # fmt: skip


def among(j: int, runs: tuple[tuple[int, int | None], ...]) -> bool:
    """Whether a key lies in a run."""
    return any(a <= j < (99 if z is None else z) for a, z in runs)


def splits(total: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `total` as an ordered sum of positive lengths."""
    if total == 0:
        yield ()
    for first in range(1, total + 1):
        for rest in splits(total - first):
            yield (first, *rest)


def number_of(index: int, lengths: tuple[int, ...]) -> int:
    """The document that a token belongs to."""
    return sum(end <= index for end in accumulate(lengths))


def sized_cases(q_len: int, kv_len: int) -> Iterator[Case]:
    """Families that are built for lengths of their own."""
    for lengths in splits(q_len) if q_len == kv_len else ():
        if lengths:
            yield Case(
                masks.Documents(lengths),
                lambda c, n=lengths: number_of(c.i, n) == number_of(c.j, n),
            )
    if q_len and kv_len:
        rows, keys = (q_len - 1, 0, 1), (kv_len // 2, 0, kv_len - kv_len // 2)
        yield Case(
            masks.Documents(rows, keys),
            lambda c: number_of(c.i, rows) == number_of(c.j, keys),
        )
        two_rows, two_keys = ((1, q_len - 1), (q_len, 0)), ((0, kv_len), (kv_len - 1, 1))
        yield Case(
            masks.Documents(two_rows, two_keys),
            lambda c: number_of(c.i, two_rows[c.b]) == number_of(c.j, two_keys[c.b]),
        )
    if q_len > 1 and kv_len > 1:
        pieces = ((0, q_len, 0, kv_len, 1 - q_len, 0), (1, 2, 0, kv_len, None, None))
        one = masks.Slices(pieces, q_len, kv_len)
        yield Case(one, lambda c: c.j <= c.i or c.i == 1)
        two = masks.Slices((pieces, ()), q_len, kv_len)
        yield Case(two, lambda c: c.b == 0 and (c.j <= c.i or c.i == 1))
    yield from numbered_cases(q_len, kv_len)
    yield from placed_cases(q_len, kv_len)
    yield from table_cases(q_len, kv_len)
    yield from tree_cases(q_len, kv_len)
    yield from grid_cases(q_len) if q_len == kv_len else ()
    lengths = (kv_len, kv_len // 2, 0)
    yield Case(masks.Padding(lengths), lambda c: c.j < lengths[c.b])
    yield Case(masks.Padding(lengths, "left"), lambda c: c.j >= c.kv_len - lengths[c.b])
    generator = torch.Generator().manual_seed(q_len * 7 + kv_len)
    cells = torch.rand(2, 3, q_len, kv_len, generator=generator) < 0.6
    yield Case(masks.Dense.keep(cells), lambda c: bool(cells[c.b, c.h, c.i, c.j]))
    yield Case(masks.Dense.drop(cells[0]), lambda c: not cells[0, c.h, c.i, c.j])
    yield Case(masks.Dense.keep(cells[1, 2]), lambda c: bool(cells[1, 2, c.i, c.j]))


def numbered_cases(q_len: int, kv_len: int) -> Iterator[Case]:
    """Tokens by number, some of which come back, and some of which have none."""
    if not (q_len and kv_len):
        return
    rows, keys = ([(3 * i // 2) % 3 - 1 for i in range(n)] for n in (q_len, kv_len))
    if q_len == kv_len:
        yield Case(masks.SameId.of(rows), lambda c: rows[c.i] == rows[c.j] >= 0)
        yield Case(masks.SameId.of(rows, none=None), lambda c: rows[c.i] == rows[c.j])
    yield Case(masks.SameId.of(rows, keys), lambda c: rows[c.i] == keys[c.j] >= 0)
    each = [rows, [1] * q_len], [keys, keys[::-1]]
    yield Case(
        masks.SameId.of(*each, none=0), lambda c: each[0][c.b][c.i] == each[1][c.b][c.j] != 0
    )
    yield Case(masks.SameId.of(rows, each[1]), lambda c: rows[c.i] == each[1][c.b][c.j] >= 0)


def placed_cases(q_len: int, kv_len: int) -> Iterator[Case]:
    """Masks between other tokens, where there is room for these."""
    if q_len < 3 or kv_len < 4:
        return

    def within(c: Cell) -> Cell | None:
        i, j, rows, keys = c.i - 1, c.j - 2, c.q_len - 3, c.kv_len - 4
        return Cell(i, j, rows, keys, c.b, c.h) if 0 <= i < rows and 0 <= j < keys else None

    for mask, formula in (
        (masks.Causal(), lambda c: c.j <= c.p("bottom_right")),
        (masks.Dilated(2), lambda c: (c.p("bottom_right") - c.j) % 2 == 0),
        (masks.Prefix((0, 1, 2)), lambda c: c.j < c.b),
    ):
        yield Case(
            masks.Placed(mask, (1, 2), (2, 2)),
            lambda c, f=formula: (at := within(c)) is not None and f(at),
        )


def table_cases(q_len: int, kv_len: int) -> Iterator[Case]:
    """Blocks of two by three: for each batch element and head, and with a causal edge."""
    rows, keys = -(-q_len // 2), -(-kv_len // 3)
    if not (q_len and kv_len):
        return
    generator = torch.Generator().manual_seed(q_len + 7 * kv_len)
    table = torch.rand(3, 2, rows, keys, generator=generator) < 0.6
    sizes = {"q_len": q_len, "kv_len": kv_len}
    yield Case(
        masks.Blocks(table, 2, 3, **sizes), lambda c: bool(table[c.b, c.h, c.i // 2, c.j // 3])
    )
    for align in ALIGNS:
        yield Case(
            masks.Blocks(table[0, 0], 2, 3, causal=True, align=align, **sizes),
            lambda c, a=align: bool(table[0, 0, c.i // 2, c.j // 3]) and c.j <= c.p(a),
        )


def on_the_way(token: int, parents: list[int]) -> set[int]:
    """A token of a tree, and all above it."""
    return {token} | (on_the_way(parents[token], parents) if parents[token] >= 0 else set())


def tree_cases(q_len: int, kv_len: int) -> Iterator[Case]:
    """Trees behind all keys that there are; one whose parents come last."""
    if not 0 < q_len <= kv_len:
        return
    before = kv_len - q_len
    binary = [(i + 1) // 2 - 1 for i in range(q_len)]
    upwards = [*range(1, q_len), -1]
    yield Case(
        masks.Tree(binary),
        lambda c: c.j < before or c.j - before in on_the_way(c.i, binary),
    )
    yield Case(
        masks.Tree([upwards, binary, [-1] * q_len], before),
        lambda c: (
            c.j < before or c.j - before in on_the_way(c.i, (upwards, binary, [-1] * q_len)[c.b])
        ),
    )


def grid_cases(size: int) -> Iterator[Case]:
    """Tokens of a grid of two rows, and of a line (all grids: tests/masks/test_grids.py)."""
    if size < 4:
        return
    yield Case(masks.Neighborhood(size, 3), lambda c: -1 <= c.j - min(max(c.i, 1), size - 2) <= 1)
    yield Case(masks.Neighborhood(size, 2, dilation=2, causal=True), lambda c: c.i - c.j in (0, 2))
    if size % 2 == 0:
        wide = size // 2
        yield Case(
            masks.SlidingTiles(size, 2, 1 + size % 4),
            lambda c: size % 4 == 2 or c.i // 2 == c.j // 2,
        )
        yield Case(
            masks.ShiftedWindows((2, wide), (2, 1)),
            lambda c: c.i % wide == c.j % wide,
        )
        yield Case(
            masks.Neighborhood((2, wide), (1, 2), causal=(False, True)),
            lambda c: c.i // wide == c.j // wide and c.i % wide - c.j % wide in (0, 1),
        )


def cases(q_len: int, kv_len: int) -> list[Case]:
    """Every family, for one size."""
    anchored = [case for align in ALIGNS for case in anchored_cases(align)]
    return [*anchored, *free_cases(), *sized_cases(q_len, kv_len)]


def formula_bits(formula: Formula, q_len: int, kv_len: int, b: int = 0, h: int = 0) -> int:
    cells = (Cell(i, j, q_len, kv_len, b, h) for i in range(q_len) for j in range(kv_len))
    return sum(bool(formula(cell)) << k for k, cell in enumerate(cells))


def region_bits(region: Region, q_len: int, kv_len: int) -> int:
    assert region.fits(q_len, kv_len)
    bits = 0
    for i in range(q_len):
        for a, b in region.row(i):
            bits |= ((1 << (b - a)) - 1) << (i * kv_len + a)
    return bits


def tensor_bits(cells: torch.Tensor) -> int:
    return sum(allowed << k for k, allowed in enumerate(cells.flatten().tolist()))


def first_difference(case: Case, q_len: int, kv_len: int) -> Cell | None:
    """Return a cell at which the mask, as region or as tensor, is not its formula."""
    mask, formula = case
    batch, heads = mask.batches or 1, mask.heads or 1
    drawn = mask.materialize(q_len, kv_len, batch, heads)
    assert drawn.dtype == torch.bool
    assert drawn.shape == (batch, heads, q_len, kv_len)
    for b, h in product(range(batch), range(heads)):
        right = formula_bits(formula, q_len, kv_len, b, h)
        inner, outer = mask.enclosure(q_len, kv_len, b, h)
        low, high = region_bits(inner, q_len, kv_len), region_bits(outer, q_len, kv_len)
        wrong = right ^ tensor_bits(drawn[b, h])
        wrong |= low & ~right | right & ~high
        if inner == outer:
            wrong |= region_bits(mask.region(q_len, kv_len, b, h), q_len, kv_len) ^ right
        if wrong:
            i, j = divmod(wrong.bit_length() - 1, kv_len)
            return Cell(i, j, q_len, kv_len, b, h)
    return None
