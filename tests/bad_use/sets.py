"""Wrong masks and biases: their arguments, their methods, and what combines them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from attnkit import masks, pse
from attnkit.textform import Families
from tests.bad_use.values import (
    HUGE,
    NEGATIVE,
    NOT_A_BIAS,
    NOT_A_COUNT,
    NOT_A_LENGTH,
    NOT_A_MASK,
    NOT_A_NAME,
    NOT_A_TENSOR,
    NOT_AN_INT,
    Case,
    Mute,
    Odd,
    Values,
    each,
    strange_tensors,
    without,
)

NOT_INTS: Values = {
    "none": lambda: None,
    "a string": lambda: "12",
    "bytes": lambda: b"12",
    "float": lambda: 1.5,
    "bool": lambda: True,
    "a mapping": dict,
    "a set": lambda: {1, 2},
    "an object": Odd,
    "an object without repr": Mute,
    "nothing": list,
    "floats": lambda: [1.0],
    "bools": lambda: [True, False],
    "strings": lambda: ["1"],
    "none inside": lambda: [None],
    "negative": lambda: [2, -1],
    "-10**5000": lambda: [-(10**5000)],
    "a float tensor": lambda: torch.ones(2),
    "a bool tensor": lambda: torch.ones(2, dtype=torch.bool),
    "a complex tensor": lambda: torch.ones(2, dtype=torch.complex64),
    "a cube": lambda: torch.ones(1, 1, 1, dtype=torch.int64),
    "meta": lambda: torch.ones(2, dtype=torch.int64, device="meta"),
    "sparse": lambda: torch.ones(2, dtype=torch.int64).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "an array of objects": lambda: np.array([None, 1], dtype=object),
    "an array of strings": lambda: np.array(["1"]),
}

NOT_AN_ALIGN: Values = {
    **without(NOT_A_NAME, "mistyped"),
    "left": lambda: "left",
    "upper case": lambda: "TOP_LEFT",
}

NOT_CELLS: Values = {
    **NOT_A_TENSOR,
    "float": lambda: torch.ones(4, 4),
    "int64": lambda: torch.ones(4, 4, dtype=torch.int64),
    "complex": lambda: torch.ones(4, 4, dtype=torch.complex64),
    "rank 1": lambda: torch.ones(4, dtype=torch.bool),
    "rank 0": lambda: torch.tensor(True),
    "rank 5": lambda: torch.ones(1, 1, 1, 4, 4, dtype=torch.bool),
    "meta": lambda: torch.ones(4, 4, dtype=torch.bool, device="meta"),
    "sparse": lambda: torch.ones(4, 4, dtype=torch.bool).to_sparse(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
}


def nest(levels: int, grow: Callable[[masks.Mask, int], masks.Mask]) -> masks.Mask:
    mask: masks.Mask = masks.Causal()
    for k in range(levels):
        mask = grow(mask, k)
    return mask


def alternating(mask: masks.Mask, k: int) -> masks.Mask:
    part = masks.SlidingWindow(k + 1)
    return mask & part if k % 2 else mask | part


def cases() -> Iterator[Case]:
    yield from families()
    yield from methods()
    yield from algebra()
    yield from searches()
    yield from biases()
    yield from bias_methods()


def families() -> Iterator[Case]:
    sized: dict[str, Callable[[Any], object]] = {
        "SlidingWindow size": masks.SlidingWindow,
        "Chunked size": masks.Chunked,
        "BlockCausal size": masks.BlockCausal,
        "Dilated step": masks.Dilated,
    }
    for name, make in sized.items():
        yield from each(name, make, NOT_A_COUNT)
    yield from grids()
    yield from tables_and_trees()
    ends: dict[str, Callable[[Any], object]] = {
        "Columns start": masks.Columns,
        "Rows start": masks.Rows,
        "Columns stop": lambda bad: masks.Columns(0, bad),
        "Rows stop": lambda bad: masks.Rows(0, bad),
    }
    for name, make in ends.items():
        wrong = without(NOT_A_LENGTH, "none") if "stop" in name else NOT_A_LENGTH
        yield from each(name, make, wrong)
    band = without(NOT_AN_INT, "none")
    yield from each("Band left", lambda bad: masks.Band(bad, 0), band)
    yield from each("Band right", lambda bad: masks.Band(0, bad), band)
    aligned: dict[str, Callable[[Any], object]] = {
        "Causal": lambda bad: masks.Causal(align=bad),
        "SlidingWindow": lambda bad: masks.SlidingWindow(2, align=bad),
        "Band": lambda bad: masks.Band(1, 1, align=bad),
        "Chunked": lambda bad: masks.Chunked(2, align=bad),
        "BlockCausal": lambda bad: masks.BlockCausal(2, align=bad),
        "Dilated": lambda bad: masks.Dilated(2, align=bad),
        "PrefixLM": lambda bad: masks.PrefixLM(2, align=bad),
    }
    for name, make in aligned.items():
        yield from each(f"{name} align", make, NOT_AN_ALIGN)
    listed: dict[str, Callable[[Any], object]] = {
        "Prefix": masks.Prefix,
        "PrefixLM": masks.PrefixLM,
        "Padding": masks.Padding,
        "Documents": masks.Documents,
        "Documents keys": lambda bad: masks.Documents([1, 2], bad),
        "Documents.from_ids": masks.Documents.from_ids,
        "Documents.from_cu_seqlens": masks.Documents.from_cu_seqlens,
    }
    for name, make in listed.items():
        free = {"none"} if name == "Documents keys" else set()
        # Ids are names of documents: any integers will do.
        free |= {"negative", "-10**5000"} if name == "Documents.from_ids" else set()
        yield from each(name, make, without(NOT_INTS, *free))
    yield from each("Padding side", lambda bad: masks.Padding([2], side=bad), NOT_A_NAME)
    yield Case("Documents of other numbers", lambda: masks.Documents([1, 2], [1, 2, 3]))
    yield Case("Documents from 1", lambda: masks.Documents.from_cu_seqlens([1, 3]))
    yield Case("Documents falling", lambda: masks.Documents.from_cu_seqlens([0, 3, 2]))
    yield from each("Dense.keep", masks.Dense.keep, NOT_CELLS)
    yield from each("Dense.drop", masks.Dense.drop, NOT_CELLS)
    packed: Values = {
        **without(NOT_A_NAME, "mistyped"),
        "no base64": lambda: "!!!!",
        "cut short": lambda: masks.Dense.keep(torch.ones(4, 4, dtype=torch.bool)).packed[:-4],
        "a tensor of cells": lambda: torch.ones(4, 4, dtype=torch.bool),
    }
    yield from each("Dense packed", masks.Dense, packed)
    yield Case("Dense bomb", lambda: masks.Dense(bomb()))
    functions = without(NOT_A_MASK, "a function", "a family")
    yield from each("Predicate fn", masks.Predicate, functions, {"none": lambda: None})
    fn = lambda b, h, i, j: i >= j  # noqa: E731
    yield from each(
        "Predicate batch", lambda bad: masks.Predicate(fn, batch=bad), without(NOT_A_COUNT, "none")
    )
    yield from each(
        "Predicate num_heads",
        lambda bad: masks.Predicate(fn, num_heads=bad),
        without(NOT_A_COUNT, "none"),
    )
    wrong_parts: Values = {
        **without(NOT_A_MASK, "a list of masks"),
        "none": lambda: None,
        "nothing": list,
        "strings": lambda: ["Causal()"],
        "families": lambda: [masks.Causal, masks.Full],
    }
    joined: dict[str, Callable[[Any], object]] = {
        "And": masks.And,
        "Or": masks.Or,
        "PerHead": masks.PerHead,
    }
    for name, make in joined.items():
        yield from each(name, make, wrong_parts)
    yield from each("Not", masks.Not, NOT_A_MASK, {"none": lambda: None})
    yield from each("Cut mask", lambda bad: masks.Cut(bad, (0, 2), (0, 2)), NOT_A_MASK)
    pieces: Values = {
        "none": lambda: None,
        "int": lambda: 3,
        "a string": lambda: "abc",
        "short": lambda: [(0, 4, 0, 4)],
        "strings": lambda: [tuple("012345")],
        "floats": lambda: [(0.0, 4, 0, 4, -3, 0)],
        "bools": lambda: [(False, True, 0, 4, -3, 0)],
        "outside": lambda: [(0, 9, 0, 4, -3, 0)],
        "a tensor": lambda: torch.zeros(1, 6),
        "an object": Odd,
    }
    yield from each("Slices", lambda bad: masks.Slices(bad, 4, 4), pieces)
    yield from each("Slices q_len", lambda bad: masks.Slices([], bad, 4), NOT_A_LENGTH)
    yield from each(
        "Slices.of",
        lambda bad: masks.Slices.of(bad, 4, 4),
        without(NOT_A_MASK, "a region"),
        {"none": lambda: None},
    )
    yield from each(
        "masks.register",
        Families("mask", masks.Mask, "masks", "Full()").register("bad"),
        without(NOT_A_MASK, "a family"),
    )
    yield from each(
        "masks.register name",
        lambda bad: masks.register(bad)(masks.Full),
        without(NOT_A_NAME, "empty", "mistyped", "a megabyte"),
        {"taken": lambda: "causal"},
    )


def grids() -> Iterator[Case]:
    counts, shifts = without(NOT_A_COUNT, "a list"), without(NOT_A_LENGTH, "a list")
    yield from each("Neighborhood shape", lambda bad: masks.Neighborhood(bad, 1), counts)
    yield from each("Neighborhood height", lambda bad: masks.Neighborhood((bad, 4), 1), NOT_A_COUNT)
    yield from each("Neighborhood kernel", lambda bad: masks.Neighborhood((4, 4), bad), NOT_A_COUNT)
    yield from each("Neighborhood dilation", lambda bad: masks.Neighborhood(4, 1, bad), counts)
    flags = without(NOT_A_COUNT, "bool")
    yield from each("Neighborhood causal", lambda bad: masks.Neighborhood(4, 1, 1, bad), flags)
    makers: dict[str, Callable[[Any], object]] = {
        "SlidingTiles shape": lambda bad: masks.SlidingTiles((bad, 4), 1, 1),
        "SlidingTiles tile": lambda bad: masks.SlidingTiles((4, 4), (2, bad), 1),
        "SlidingTiles window": lambda bad: masks.SlidingTiles((4, 4), 2, bad),
        "ShiftedWindows shape": lambda bad: masks.ShiftedWindows((bad, 4), 1),
        "ShiftedWindows window": lambda bad: masks.ShiftedWindows((4, 4), bad),
    }
    for name, make in makers.items():
        yield from each(name, make, NOT_A_COUNT)
    yield from each("ShiftedWindows shift", lambda bad: masks.ShiftedWindows(4, 2, bad), shifts)
    yield from each("Placed mask", masks.Placed, NOT_A_MASK)
    lengths = NOT_A_LENGTH
    yield from each("Placed before", lambda bad: masks.Placed(masks.Full(), bad), lengths)
    yield from each("Placed after", lambda bad: masks.Placed(masks.Full(), 0, bad), lengths)
    yield Case("Neighborhood of other lengths", lambda: masks.Neighborhood((2, 3), 1).region(5, 6))


def tables_and_trees() -> Iterator[Case]:
    tables: Values = {
        **without(NOT_CELLS, "a list"),
        "a list of int": lambda: [4],
        "a word": lambda: "mask",
        "nothing": list,
        "rows of nothing": lambda: [[], []],
        "no rows": lambda: torch.ones(0, 4, dtype=torch.bool),
        "objects": lambda: [[Odd()]],
        "an array of objects": lambda: np.array([[None]], dtype=object),
    }
    yield from each("Blocks table", lambda bad: masks.Blocks(bad, 2, 2), tables)
    yield from each("Blocks q_block", lambda bad: masks.Blocks("#", bad, 2), NOT_A_COUNT)
    yield from each("Blocks kv_block", lambda bad: masks.Blocks("#", 2, bad), NOT_A_COUNT)
    flags = without(NOT_A_COUNT, "bool")
    yield from each("Blocks causal", lambda bad: masks.Blocks("#", 2, 2, bad), flags)
    aligned: Callable[[Any], object] = lambda bad: masks.Blocks("#", 2, 2, align=bad)  # noqa: E731
    yield from each("Blocks align", aligned, NOT_AN_ALIGN)
    sizes = without(NOT_A_COUNT, "none")
    yield from each("Blocks q_len", lambda bad: masks.Blocks("#", 4, 4, q_len=bad), sizes)
    yield from each("Blocks kv_len", lambda bad: masks.Blocks("#", 4, 4, kv_len=bad), sizes)
    yield Case("Blocks of other lengths", lambda: masks.Blocks("##", 2, 2).region(2, 5))
    yield from each("Tree parents", masks.Tree, NOT_INTS)
    yield from each("Trees", lambda bad: masks.Tree([[-1], bad]), NOT_INTS)
    prefixes = without(NOT_A_LENGTH, "none")
    yield from each("Tree prefix", lambda bad: masks.Tree([-1], bad), prefixes)
    yield Case("Tree with a cycle", lambda: masks.Tree([1, 0]))
    yield Case("Tree of other lengths", lambda: masks.Tree([-1, 0]).region(3, 3))


def bomb() -> str:
    """Return a packed mask of 4 KB that unpacks to far more than its shape says."""
    import base64
    import zlib

    good = masks.Dense.keep(torch.ones(8, 8, dtype=torch.bool)).packed
    head = good.partition(":")[0]
    return f"{head}:{base64.b85encode(zlib.compress(bytes(1 << 26))).decode()}"


def methods() -> Iterator[Case]:
    mask = masks.Causal() & masks.SlidingWindow(4)
    both = {
        "region": mask.region,
        "outer": mask.outer,
        "enclosing materialize": mask.materialize,
        "is_region": mask.is_region,
        "check": mask.check,
        "show": mask.show,
        "plot": mask.plot,
        "lint": mask.lint,
        "simplify": mask.simplify,
    }
    for name, call in both.items():
        yield from each(f"Mask.{name} q_len", lambda bad, c=call: c(bad, 4), NOT_A_LENGTH)
        yield from each(f"Mask.{name} kv_len", lambda bad, c=call: c(4, bad), NOT_A_LENGTH)
    for name in ("region", "outer", "show", "plot"):
        for axis in ("batch", "head"):
            yield from each(
                f"Mask.{name} {axis}",
                lambda bad, n=name, a=axis: getattr(mask, n)(4, 4, **{a: bad}),
                NOT_A_LENGTH,
            )
    for axis in ("batch", "heads"):
        yield from each(
            f"Mask.materialize {axis}",
            lambda bad, a=axis: mask.materialize(4, 4, **{a: bad}),
            NOT_A_LENGTH,
        )
        yield from each(
            f"Mask.lint {axis}",
            lambda bad, a=axis: mask.lint(4, 4, **{a: bad}),
            without(NOT_A_LENGTH, "none"),
        )
    yield from each("Mask.show width", lambda bad: mask.show(4, 4, width=bad), NOT_A_COUNT)
    devices: Values = {
        "mistyped": lambda: "cpuu",
        "float": lambda: 1.5,
        "an object": Odd,
        "cuda": lambda: "cuda:99",
    }
    yield from each(
        "Mask.materialize device", lambda bad: mask.materialize(4, 4, device=bad), devices
    )
    ranges: Values = {
        "none": lambda: None,
        "int": lambda: 3,
        "a string": lambda: "03",
        "one": lambda: (0,),
        "three": lambda: (0, 1, 2),
        "floats": lambda: (0.0, 2.0),
        "bools": lambda: (False, True),
        "negative": lambda: (-1, 2),
        "reversed": lambda: (3, 1),
        "an object": Odd,
        "a tensor": lambda: torch.ones(2),
        "-10**5000": lambda: (-(10**5000), 2),
    }
    yield from each("Mask.cut q_range", lambda bad: mask.cut(bad, (0, 2)), ranges)
    yield from each("Mask.cut kv_range", lambda bad: mask.cut((0, 2), bad), ranges)
    yield from each(
        "Mask.cut q_len",
        lambda bad: mask.cut((0, 2), (0, 2), q_len=bad, kv_len=4),
        without(NOT_A_LENGTH, "none"),
    )
    indices: Values = {
        "int": lambda: 3,
        "none": lambda: None,
        "one slice": lambda: slice(0, 2),
        "three slices": lambda: (slice(0, 2),) * 3,
        "a step": lambda: (slice(0, 4, 2), slice(0, 2)),
        "floats": lambda: (slice(0.0, 2.0), slice(0, 2)),
        "strings": lambda: (slice("a", "b"), slice(0, 2)),
        "negative": lambda: (slice(-2, None), slice(0, 2)),
        "reversed": lambda: (slice(3, 1), slice(0, 2)),
        "an ellipsis": lambda: ...,
        "a mask": lambda: mask,
    }
    yield from each("Mask[]", lambda bad: mask[bad], indices)
    yield Case("Mask in bool", lambda: bool(mask))
    yield Case("Mask in and", lambda: mask and mask)
    yield Case("Dilated is no region", lambda: masks.Dilated(2).region(6, 6))
    yield Case("other lengths", lambda: masks.Documents([2, 3]).region(4, 4))
    yield Case("an anchored cut", lambda: masks.Causal()[:2, :2].region(2, 2))
    yield Case("fewer batches", lambda: masks.Padding([1, 2]).region(4, 4, batch=2))
    yield from each("Documents.blocks", masks.Documents([2, 3]).blocks, NOT_AN_INT, NEGATIVE)


def algebra() -> Iterator[Case]:
    mask = masks.Causal()
    operators: dict[str, Callable[[Any], object]] = {
        "&": lambda bad: mask & bad,
        "|": lambda bad: mask | bad,
        "-": lambda bad: mask - bad,
        "right &": lambda bad: bad & mask,
        "right |": lambda bad: bad | mask,
    }
    for name, call in operators.items():
        yield from each(f"Mask {name}", call, NOT_A_MASK, {"none": lambda: None})
    yield Case("other lengths cannot combine", lambda: masks.Documents([2]) & masks.Documents([3]))
    yield Case(
        "other heads cannot combine", lambda: masks.PerHead([mask] * 2) & masks.PerHead([mask] * 3)
    )
    deep: dict[str, Callable[[masks.Mask], object]] = {
        "str": str,
        "region": lambda m: m.region(8, 8),
        "lint": lambda m: m.lint(8, 8),
        "simplify": lambda m: m.simplify(8, 8),
    }
    for name, call in deep.items():
        yield Case(f"3,000 alternations, {name}", lambda c=call: c(nest(3000, alternating)))
        yield Case(
            f"3,000 complements, {name}",
            lambda c=call: c(nest(3000, lambda m, k: ~(m & masks.SlidingWindow(k + 1)))),
        )
        yield Case(f"3,000 cuts, {name}", lambda c=call: c(nest(3000, lambda m, k: m[1:, 1:])))


def searches() -> Iterator[Case]:
    sources = without(NOT_A_MASK, "a function", "a family", "a bool tensor", "an array", "a region")
    yield from each(
        "recover source",
        lambda bad: masks.recover(bad, 4, 4),
        sources,
        {"none": lambda: None, **without(NOT_CELLS, *NOT_A_TENSOR, "sparse", "meta")},
    )
    yield from each(
        "recover q_len", lambda bad: masks.recover(masks.Causal(), bad, 4), NOT_A_LENGTH
    )
    yield from each(
        "recover max_slices",
        lambda bad: masks.recover(masks.Causal(), 4, 4, max_slices=bad),
        without(NOT_A_COUNT, "none"),
    )
    yield from each(
        "recover q_offset",
        lambda bad: masks.recover(masks.Causal(), 4, 4, q_offset=bad),
        NOT_AN_INT,
    )
    yield from each(
        "lint_stack",
        lambda bad: masks.lint_stack(bad, 4),
        without(NOT_A_MASK, "a list of masks"),
        {"none": lambda: None, "nothing": list, "strings": lambda: ["Causal()"]},
    )
    yield from each(
        "lint_stack q_len", lambda bad: masks.lint_stack([masks.Causal()], bad), NOT_A_LENGTH
    )


def biases() -> Iterator[Case]:
    makers: dict[str, Callable[..., Any]] = {
        "ALiBi": pse.ALiBi,
        "SqrtALiBi": pse.SqrtALiBi,
        "LearnableALiBi": pse.LearnableALiBi,
    }
    heads = without(NOT_A_COUNT, "a list")
    slopes: Values = {
        "int": lambda: 3,
        "a string": lambda: "ab",
        "bytes": lambda: b"ab",
        "strings": lambda: ["a"],
        "none inside": lambda: [None],
        "nan": lambda: [float("nan")],
        "inf": lambda: [float("inf")],
        "complex": lambda: [1j],
        "10**400": lambda: [10**400],
        "10**5000": lambda: [10**5000],
        "a mapping": lambda: {1.0: 2.0},
        "an object": Odd,
        "a matrix": lambda: torch.ones(2, 2),
        "meta": lambda: torch.ones(2, device="meta"),
    }
    for name, make in makers.items():
        yield from each(f"{name} num_heads", make, heads, HUGE)
        yield from each(f"{name} slopes", lambda bad, m=make: m(slopes=bad), slopes)
        yield from each(f"{name} align", lambda bad, m=make: m(2, align=bad), NOT_AN_ALIGN)
        yield Case(f"{name} of nothing", make)
        yield Case(f"{name} both", lambda m=make: m(2, slopes=[0.5]))
    yield from each(
        "ALiBi learnable",
        lambda bad: pse.ALiBi(2, learnable=bad),
        {"a string": lambda: "no", "int": lambda: 1, "none": lambda: None},
    )
    t5: dict[str, list[Values]] = {
        "num_heads": [NOT_A_COUNT, HUGE],
        "num_buckets": [NOT_A_COUNT, HUGE],
        "max_distance": [NOT_A_COUNT],
        "bidirectional": [{"a string": lambda: "no", "int": lambda: 1, "none": lambda: None}],
        "align": [NOT_AN_ALIGN],
        "table": [
            without(NOT_A_TENSOR, "none"),
            without(strange_tensors(32, 2), "meta", "float8"),
            {"other shape": lambda: torch.ones(2, 32), "rank 1": lambda: torch.ones(32)},
        ],
    }
    for argument, tables in t5.items():
        yield from each(
            f"T5Relative {argument}",
            lambda bad, a=argument: pse.T5Relative(**{"num_heads": 2, a: bad}),
            *tables,
        )
    odd = {
        "rank 1": lambda: torch.ones(4),
        "rank 5": lambda: torch.ones(1, 1, 1, 4, 4),
        "nan": lambda: torch.full((4, 4), float("nan")),
        "inf": lambda: torch.full((4, 4), float("inf")),
    }
    yield from each(
        "pse.Dense", pse.Dense, NOT_A_TENSOR, without(strange_tensors(4, 4), "meta"), odd
    )
    yield from each(
        "pse.Dense before_scale",
        lambda bad: pse.Dense(torch.ones(4, 4), bad),
        {"a string": lambda: "no", "int": lambda: 1, "none": lambda: None},
    )
    odd = {
        "rank 0": lambda: torch.tensor(1.0),
        "rank 4": lambda: torch.ones(1, 1, 1, 4),
    }
    yield from each("KeyBias", pse.KeyBias, NOT_A_TENSOR, without(strange_tensors(4), "meta"), odd)
    index = torch.zeros(4, 4, dtype=torch.int64)
    yield from each(
        "pse.Table",
        lambda bad: pse.Table(bad, index),
        NOT_A_TENSOR,
        {"rank 1": lambda: torch.ones(4)},
    )
    yield from each(
        "pse.Table index",
        lambda bad: pse.Table(torch.ones(3, 2), bad),
        NOT_A_TENSOR,
        {
            "numbers": lambda: torch.ones(4, 4),
            "rank 1": lambda: index[0],
            "past": lambda: index + 3,
        },
    )
    yield from each(
        "pse.Sum",
        pse.Sum,
        without(NOT_A_BIAS, "a list of biases"),
        {"none": lambda: None, "nothing": list, "masks": lambda: [masks.Causal()]},
    )
    yield from each("pse.Cut", lambda bad: pse.Cut(bad, (0, 2), (0, 2), 4, 4), NOT_A_BIAS)
    yield from each("press_slopes", pse.press_slopes, NOT_A_COUNT, HUGE)
    yield from each("Bias +", lambda bad: pse.ALiBi(2) + bad, NOT_A_BIAS, {"none": lambda: None})
    yield from each("right Bias +", lambda bad: bad + pse.ALiBi(2), NOT_A_BIAS)
    yield from each(
        "PSE.register",
        Families("positional bias", pse.Pse, "pse", "ALiBi(8)").register("bad"),
        without(NOT_A_BIAS, "a family"),
    )
    yield Case("biases of other heads", lambda: pse.ALiBi(2) + pse.ALiBi(3))


def bias_methods() -> Iterator[Case]:
    ready: dict[str, pse.Pse] = {
        "ALiBi": pse.ALiBi(2),
        "T5Relative": pse.T5Relative(2),
        "Dense": pse.Dense(torch.zeros(4, 4)),
        "KeyBias": pse.KeyBias(torch.zeros(4)),
        "Table": pse.Table(torch.zeros(3, 2), torch.zeros(4, 4, dtype=torch.int64)),
        "Sum": pse.ALiBi(2) + pse.SqrtALiBi(2),
    }
    ranges: Values = {
        "none": lambda: None,
        "int": lambda: 3,
        "a string": lambda: "03",
        "one": lambda: (0,),
        "floats": lambda: (0.0, 2.0),
        "bools": lambda: (False, True),
        "negative": lambda: (-1, 2),
        "reversed": lambda: (3, 1),
        "too long": lambda: (0, 9),
        "an object": Odd,
    }
    for name, bias in ready.items():
        yield from each(
            f"{name}.materialize q_len", lambda bad, p=bias: p.materialize(bad, 4), NOT_A_LENGTH
        )
        yield from each(
            f"{name}.materialize kv_len", lambda bad, p=bias: p.materialize(4, bad), NOT_A_LENGTH
        )
        yield from each(
            f"{name}.materialize heads",
            lambda bad, p=bias: p.materialize(4, 4, heads=bad),
            without(NOT_A_COUNT, "none", "zero"),
        )
        yield from each(
            f"{name}.cut", lambda bad, p=bias: p.cut(bad, (0, 2), q_len=4, kv_len=4), ranges
        )
        yield from each(
            f"{name}.materialize dtype",
            lambda bad, p=bias: p.materialize(4, 4, dtype=bad),
            {
                "a string": lambda: "float32",
                "int64": lambda: torch.int64,
                "none": lambda: None,
                "a type": lambda: float,
            },
        )
    yield Case("fewer heads", lambda: pse.ALiBi(2).materialize(4, 4, heads=3))
