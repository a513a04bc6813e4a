"""Hypothesis strategies for compositions: every mask family and bias, at small sizes."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from attnkit import SeqLens, layouts, masks, pse
from attnkit.masks import Mask
from attnkit.pse import Pse
from tests.properties.compositions import Case

LENGTH = st.integers(1, 7)
ALIGN = st.sampled_from(["bottom_right", "top_left"])
END = st.none() | st.integers(0, 3)


@st.composite
def dense_masks(draw: st.DrawFn, q_len: int, kv_len: int, heads: int) -> Mask:
    planes = draw(st.sampled_from([1, heads]))
    bits = draw(st.lists(st.booleans(), min_size=q_len * kv_len, max_size=q_len * kv_len))
    cells = torch.tensor(bits, dtype=torch.bool).view(1, q_len, kv_len).repeat(planes, 1, 1)
    cells = cells.logical_xor(torch.arange(planes)[:, None, None] % 2 == 1)
    return masks.Dense.keep(cells[None])


@st.composite
def block_tables(draw: st.DrawFn, q_len: int, kv_len: int, heads: int) -> Mask:
    q_block, kv_block = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    shape = (draw(st.sampled_from([1, heads])), -(-q_len // q_block), -(-kv_len // kv_block))
    table = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    causal, align = draw(st.booleans()), draw(ALIGN)
    return masks.Blocks(table < 0.5, q_block, kv_block, causal, align, q_len=q_len, kv_len=kv_len)


@st.composite
def forests(draw: st.DrawFn, q_len: int) -> Mask:
    return masks.Tree([draw(st.integers(-1, token - 1)) for token in range(q_len)])


@st.composite
def atoms(
    draw: st.DrawFn, batch: int, heads: int, extent: tuple[int, int] | None, shortest: int
) -> Mask:
    """One mask of any family; `extent` is None for a packed batch, whose lengths differ."""
    size = st.integers(1, 5)
    some: list[st.SearchStrategy[Mask]] = [
        st.just(masks.Full()),
        st.builds(masks.Causal, ALIGN),
        st.builds(masks.SlidingWindow, size, ALIGN),
        st.builds(masks.Band, END, END, ALIGN),
        st.builds(masks.Columns, st.integers(0, 2)),
        st.builds(masks.Rows, st.integers(0, 2)),
        st.builds(masks.Prefix, st.integers(0, 5)),
        st.builds(masks.Chunked, size, ALIGN),
        st.builds(masks.BlockCausal, size, ALIGN),
        st.builds(masks.Dilated, st.integers(1, 3), ALIGN),
        st.just(masks.Predicate(lambda b, h, i, j: (i + 2 * j) % 3 != 0)),
        st.lists(st.builds(masks.SlidingWindow, size), min_size=heads, max_size=heads).map(
            lambda each: masks.PerHead(each)
        ),
        st.lists(st.integers(0, shortest), min_size=batch, max_size=batch).map(
            lambda lengths: masks.Padding(lengths)
        ),
        st.lists(st.integers(0, shortest), min_size=batch, max_size=batch).map(
            lambda lengths: masks.Prefix(tuple(lengths))
        ),
    ]
    if extent is not None:
        some += [dense_masks(*extent, heads), block_tables(*extent, heads)]
        some += [forests(extent[0])] if extent[0] <= extent[1] else []
        if extent[0] == extent[1]:
            kernel = st.integers(1, extent[0])
            some.append(kernel.map(lambda size: masks.Neighborhood(extent[0], size)))
        if extent[0] == extent[1] > 1:
            first = st.integers(1, extent[0] - 1)
            some.append(first.map(lambda n: masks.Documents((n, extent[0] - n))))
    return draw(st.one_of(some))


@st.composite
def composed(draw: st.DrawFn, atom: st.SearchStrategy[Mask]) -> Mask:
    mask = draw(atom)
    for _ in range(draw(st.integers(0, 2))):
        how = draw(st.sampled_from("&|-"))
        other = draw(atom)
        mask = mask & other if how == "&" else mask | other if how == "|" else mask - other
    return ~mask if draw(st.integers(0, 9)) == 9 else mask


@st.composite
def biases(draw: st.DrawFn, heads: int, extent: tuple[int, int] | None, before: bool) -> Pse:
    kind = draw(st.integers(0, 3 if extent is not None else 1))
    if kind == 0:
        return pse.ALiBi(heads, align=draw(ALIGN))
    if kind == 1:
        return pse.SqrtALiBi(heads, align=draw(ALIGN))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    assert extent is not None
    table = torch.randn(heads, *extent, dtype=torch.float64, generator=generator)
    bias = pse.Dense(table, before_scale=before)
    return bias if kind == 2 else bias + pse.ALiBi(heads)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, kv_heads, group = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
    )
    dim = draw(st.sampled_from([2, 4]))
    layout = draw(st.sampled_from(list(layouts.LAYOUTS)))
    seqlens = None
    extent: tuple[int, int] | None
    if layouts.get(layout).packed:
        length = st.integers(0, 6)
        q = draw(st.lists(length, min_size=batch, max_size=batch).filter(any))
        kv = draw(st.just(q) | st.lists(length, min_size=batch, max_size=batch).filter(any))
        seqlens, extent = SeqLens(q, kv), None
        sizes, shortest = (sum(q), sum(kv)), min(kv)
    else:
        q_len = draw(LENGTH)
        sizes = extent = (q_len, draw(st.just(q_len) | LENGTH))
        shortest = sizes[1]
    heads = kv_heads * group
    mask = draw(composed(atoms(batch, heads, extent, shortest)))
    bias = draw(st.none() | st.none() | biases(heads, extent, draw(st.booleans())))
    return Case(
        mask,
        layout,
        batch,
        *sizes,
        kv_heads,
        group,
        dim,
        draw(st.sampled_from([dim, 1])),
        bias,
        draw(st.integers(0, 3)) == 0,
        draw(st.sampled_from([None, 0.7, -1.5])),
        seqlens,
    )
