"""Wrong calls: attention, plans, modules, caches, rotary positions, layouts and lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import attnkit as ak
from attnkit import layouts, masks, pse
from tests.bad_use.values import (
    HUGE,
    NOT_A_BIAS,
    NOT_A_COUNT,
    NOT_A_LENGTH,
    NOT_A_MASK,
    NOT_A_NAME,
    NOT_A_REAL,
    NOT_A_TENSOR,
    NOT_AN_INT,
    Case,
    Odd,
    Values,
    each,
    shapes,
    strange_tensors,
    without,
)

NOT_A_DROPOUT: Values = {
    **NOT_A_REAL,
    "-0.1": lambda: -0.1,
    "1.0": lambda: 1.0,
    "2": lambda: 2,
}
NOT_A_CAP: Values = {**without(NOT_A_REAL, "none"), "0": lambda: 0.0, "-1": lambda: -1.0}
NOT_A_SCALE: Values = without(NOT_A_REAL, "none")
NOT_LENGTHS: Values = {
    "int": lambda: 6,
    "a string": lambda: "6",
    "bytes": lambda: b"6",
    "a list": lambda: [6],
    "a tensor": lambda: torch.tensor([6]),
    "an object": Odd,
}
NOT_A_BACKEND: Values = {
    **NOT_A_NAME,
    "a backend": lambda: ak.plan,
    "upper case": lambda: "TILED",
}
NOT_A_LAYOUT: Values = {
    **NOT_A_NAME,
    "another library's": lambda: "sbhd",
    "a layout": lambda: layouts.BSND,
}
NOT_A_FLAG: Values = {
    "a string": lambda: "no",
    "int": lambda: 1,
    "float": lambda: 0.0,
    "none": lambda: None,
    "a list": list,
    "an object": Odd,
}


def x(*shape: int) -> torch.Tensor:
    return torch.ones(shape or (1, 6, 2, 8))


def cases() -> Iterator[Case]:
    yield from functional()
    yield from merging()
    yield from module()
    yield from multi_head()
    yield from caches()
    yield from rotary()
    yield from lengths()
    yield from forms()
    yield from plans()


def functional() -> Iterator[Case]:
    one = x()
    for name, call in (("attention", ak.attention), ("plan", ak.plan)):
        for position, operand in enumerate(("query", "key", "value")):

            def wrong(bad: object, call: Any = call, position: int = position) -> object:
                given: list[Any] = [one, one, one]
                given[position] = bad
                return call(*given)

            yield from each(f"{name} {operand}", wrong, NOT_A_TENSOR)
            yield from each(f"{name} {operand}", wrong, strange_tensors(1, 6, 2, 8))
            fits = {"[1, 6, 2, 9]", "[1, 6, 2, 0]"} if operand == "value" else set()
            yield from each(f"{name} {operand}", wrong, without(shapes(1, 6, 2, 8), *fits))
        yield Case(f"{name} in int64", lambda call=call: call(*[one.long()] * 3))
        yield Case(f"{name} in complex", lambda call=call: call(*[one.to(torch.complex64)] * 3))
        yield Case(f"{name} sparse", lambda call=call: call(*[one.to_sparse()] * 3))
        yield Case(f"{name} mkldnn", lambda call=call: call(*[one.to_mkldnn()] * 3))
        yield Case(f"{name} float8", lambda call=call: call(*[one.to(torch.float8_e5m2)] * 3))
        yield Case(f"{name} mixed dtypes", lambda call=call: call(one, one.half(), one.double()))
        arguments: dict[str, list[Values]] = {
            "mask": [NOT_A_MASK],
            "pse": [NOT_A_BIAS],
            "layout": [NOT_A_LAYOUT],
            "scale": [NOT_A_SCALE],
            "dropout": [NOT_A_DROPOUT],
            "softcap": [NOT_A_CAP],
            "backend": [NOT_A_BACKEND],
            "seqlens": [NOT_LENGTHS],
            "num_heads": [without(NOT_A_COUNT, "none"), HUGE, {"3": lambda: 3}],
            "num_kv_heads": [without(NOT_A_COUNT, "none"), HUGE, {"3": lambda: 3}],
            "sink": [
                without(NOT_A_TENSOR, "none"),
                without(strange_tensors(2), "float8"),
                without(shapes(2), "[2]"),
            ],
        }
        for argument, tables in arguments.items():

            def given(bad: object, call: Any = call, argument: str = argument) -> object:
                return call(one, one, one, **{argument: bad})

            yield from each(f"{name} {argument}", given, *tables)
        for layout in ("BSH", "SBH"):
            merged = x(1, 6, 16)
            yield Case(
                f"{name} {layout} without num_heads",
                lambda call=call, merged=merged, layout=layout: call(*[merged] * 3, layout=layout),
            )
            yield from each(
                f"{name} {layout} num_heads",
                lambda bad, call=call, merged=merged, layout=layout: call(
                    *[merged] * 3, layout=layout, num_heads=bad
                ),
                NOT_A_COUNT,
                HUGE,
                {"3": lambda: 3},
            )
        yield Case(
            f"{name} TND without seqlens", lambda call=call: call(*[x(6, 2, 8)] * 3, layout="TND")
        )
        for told, made in (
            ("too short", lambda: ak.SeqLens([3, 2])),
            ("too long", lambda: ak.SeqLens([3, 4])),
            ("keys too long", lambda: ak.SeqLens([3, 3], [3, 4])),
        ):
            yield Case(
                f"{name} TND seqlens {told}",
                lambda call=call, made=made: call(*[x(6, 2, 8)] * 3, layout="TND", seqlens=made()),
            )
        for told, mask in (
            ("other lengths", lambda: masks.Documents([3, 4])),
            ("other batch", lambda: masks.Padding([3, 4])),
            ("other heads", lambda: masks.PerHead([masks.Causal()] * 3)),
            ("dense of other size", lambda: masks.Dense.keep(torch.ones(3, 3, dtype=torch.bool))),
            ("a function of floats", lambda: masks.Predicate(lambda b, h, i, j: i + j)),
        ):
            if call is ak.plan and "function" in told:
                continue  # a plan asks no function for its cells
            yield Case(
                f"{name} mask for {told}",
                lambda call=call, mask=mask: call(one, one, one, mask=mask()),
            )
        for told, bias in (
            ("other heads", lambda: pse.ALiBi(3)),
            ("other lengths", lambda: pse.Dense(torch.zeros(3, 3))),
            ("other batch", lambda: pse.Dense(torch.zeros(3, 2, 6, 6))),
            ("other keys", lambda: pse.KeyBias(torch.zeros(5))),
        ):
            yield Case(
                f"{name} pse for {told}",
                lambda call=call, bias=bias: call(one, one, one, pse=bias()),
            )
    yield Case(
        "emulated cannot cap", lambda: ak.attention(one, one, one, softcap=3.0, backend="emulated")
    )
    yield Case("ascend without an NPU", lambda: ak.attention(one, one, one, backend="ascend"))


def merging() -> Iterator[Case]:
    output, lse = x(), torch.zeros(1, 2, 6)
    fits = {"[1, 6, 2, 9]"}
    given = {
        "parts": (lambda bad: ak.merge(bad), [NOT_A_TENSOR]),
        "part": (lambda bad: ak.merge([(output, lse), bad]), [NOT_A_TENSOR]),
        "output": (
            lambda bad: ak.merge([(bad, lse)]),
            [NOT_A_TENSOR, strange_tensors(1, 6, 2, 8), without(shapes(1, 6, 2, 8), *fits)],
        ),
        "lse": (
            lambda bad: ak.merge([(output, bad)]),
            [NOT_A_TENSOR, strange_tensors(1, 2, 6), without(shapes(1, 2, 6), "[1, 2, 6]")],
        ),
        "layout": (lambda bad: ak.merge([(output, lse)], layout=bad), [NOT_A_LAYOUT]),
        "sink": (
            lambda bad: ak.merge([(output, lse)], sink=bad),
            [without(NOT_A_TENSOR, "none"), strange_tensors(2), without(shapes(2), "[2]")],
        ),
    }
    for name, (call, tables) in given.items():
        yield from each(f"merge {name}", call, *tables)


def module() -> Iterator[Case]:
    arguments: dict[str, list[Values]] = {
        "num_heads": [NOT_A_COUNT, HUGE],
        "head_dim": [NOT_A_COUNT, HUGE],
        "num_kv_heads": [without(NOT_A_COUNT, "none"), HUGE, {"3": lambda: 3}],
        "mask": [NOT_A_MASK],
        "pse": [NOT_A_BIAS],
        "layout": [NOT_A_LAYOUT],
        "scale": [NOT_A_SCALE],
        "dropout": [NOT_A_DROPOUT],
        "sink": [NOT_A_FLAG],
        "softcap": [NOT_A_CAP],
        "backend": [NOT_A_BACKEND],
    }
    for argument, tables in arguments.items():

        def build(bad: object, argument: str = argument) -> object:
            return ak.Attention(**{"num_heads": 2, "head_dim": 8, argument: bad})

        yield from each(f"Attention {argument}", build, *tables)
    layer = ak.Attention(2, 8, mask=masks.Causal(), pse=pse.ALiBi(2))
    one = x()
    for name, method in (("()", layer), (".plan", layer.plan), (".explain", layer.explain)):
        for argument, table in (
            ("mask", NOT_A_MASK),
            ("pse", NOT_A_BIAS),
            ("seqlens", NOT_LENGTHS),
        ):
            yield from each(
                f"Attention{name} {argument}",
                lambda bad, method=method, argument=argument: method(
                    one, one, one, **{argument: bad}
                ),
                table,
            )
        yield from each(
            f"Attention{name} query",
            lambda bad, method=method: method(bad, one, one),
            NOT_A_TENSOR,
            strange_tensors(1, 6, 2, 8),
            shapes(1, 6, 2, 8),
        )
        yield from each(
            f"Attention{name} value",
            lambda bad, method=method: method(one, one, bad),
            NOT_A_TENSOR,
            strange_tensors(1, 6, 2, 8),
        )
    yield Case("Attention num_kv_heads does not divide", lambda: ak.Attention(4, 8, num_kv_heads=3))


def multi_head() -> Iterator[Case]:
    devices: Values = {
        "mistyped": lambda: "cpuu",
        "float": lambda: 1.5,
        "a list": list,
        "an object": Odd,
        "bool": lambda: True,
        "a dtype": lambda: torch.float32,
    }
    dtypes: Values = {
        "a string": lambda: "float32",
        "int64": lambda: torch.int64,
        "bool dtype": lambda: torch.bool,
        "complex": lambda: torch.complex64,
        "float8": lambda: torch.float8_e4m3fn,
        "int": lambda: 3,
        "an object": Odd,
        "a device": lambda: torch.device("cpu"),
    }
    arguments: dict[str, list[Values]] = {
        "dim": [NOT_A_COUNT, HUGE, {"not divisible": lambda: 15}],
        "num_heads": [NOT_A_COUNT, HUGE, {"not divisible": lambda: 3}],
        "num_kv_heads": [without(NOT_A_COUNT, "none"), HUGE],
        "head_dim": [without(NOT_A_COUNT, "none"), HUGE],
        "kv_dim": [without(NOT_A_COUNT, "none"), HUGE],
        "v_head_dim": [without(NOT_A_COUNT, "none"), HUGE],
        "bias": [without(NOT_A_FLAG, "a list"), {"a wrong name": lambda: ["q", "o"]}],
        "qk_norm": [without(NOT_A_FLAG, "none"), {"a dtype": lambda: torch.float32}],
        "gate": [without(NOT_A_FLAG, "none"), {"True": lambda: True}],
        "rotary": [without(NOT_A_FLAG, "none"), {"a family": lambda: ak.Rotary}],
        "mask": [NOT_A_MASK],
        "pse": [NOT_A_BIAS],
        "dropout": [NOT_A_DROPOUT],
        "scale": [NOT_A_SCALE],
        "softcap": [NOT_A_CAP],
        "sink": [NOT_A_FLAG],
        "backend": [NOT_A_BACKEND],
        "layout": [NOT_A_LAYOUT],
        "device": [devices],
        "dtype": [dtypes],
    }
    for argument, tables in arguments.items():

        def build(bad: object, argument: str = argument) -> object:
            return ak.MultiHeadAttention(**{"dim": 16, "num_heads": 2, argument: bad})

        yield from each(f"MultiHeadAttention {argument}", build, *tables)
    layer = ak.MultiHeadAttention(16, 2, mask=masks.Causal())
    one = x(1, 6, 16)
    bad_x = [NOT_A_TENSOR, strange_tensors(1, 6, 16), without(shapes(1, 6, 16), "[1, 6]")]
    yield from each("MultiHeadAttention() x", layer, *bad_x)
    context = [without(NOT_A_TENSOR, "none"), *bad_x[1:]]
    yield from each("MultiHeadAttention() context", lambda bad: layer(one, bad), *context)
    yield from each("MultiHeadAttention() mask", lambda bad: layer(one, mask=bad), NOT_A_MASK)
    yield from each("MultiHeadAttention() pse", lambda bad: layer(one, pse=bad), NOT_A_BIAS)
    yield from each(
        "MultiHeadAttention() seqlens", lambda bad: layer(one, seqlens=bad), NOT_LENGTHS
    )
    yield from each(
        "MultiHeadAttention() cache",
        lambda bad: layer(one, cache=bad),
        without(NOT_A_TENSOR, "none"),
    )
    turning = ak.MultiHeadAttention(16, 2, rotary=True)
    yield from each(
        "MultiHeadAttention() positions",
        lambda bad: turning(one, positions=bad),
        without(NOT_A_TENSOR, "none"),
        {"too few": lambda: torch.arange(5), "of other texts": lambda: torch.zeros(2, 6)},
    )
    yield from each("MultiHeadAttention.plan x", layer.plan, *bad_x)
    yield Case("decoding without no_grad", lambda: layer(one, cache=ak.KVCache()))


def caches() -> Iterator[Case]:
    step = x(1, 3, 2, 8)

    def filled() -> ak.KVCache:
        cache = ak.KVCache()
        cache.append(step, step)
        return cache

    yield from each("KVCache capacity", ak.KVCache, without(NOT_A_COUNT, "none"))
    yield from each("KVCache capacity, used", lambda bad: ak.KVCache(bad).append(step, step), HUGE)
    tables = [
        NOT_A_TENSOR,
        without(strange_tensors(1, 3, 2, 8), "meta", "float8"),
        shapes(1, 3, 2, 8),
    ]
    unlike = {
        "batch": lambda: x(2, 3, 2, 8),
        "heads": lambda: x(1, 3, 4, 8),
        "dtype": lambda: step.double(),
        "meta": lambda: step.to("meta"),
        "gradient": lambda: x(1, 3, 2, 8).requires_grad_(),
    }
    wide = {"[1, 3, 2, 9]", "[1, 3, 2, 0]"}  # keys and values may differ in width
    fresh = [tables[0], tables[1], without(tables[2], *wide)]
    for name in ("append", "seal"):
        yield from each(
            f"KVCache.{name} key", lambda bad, n=name: getattr(ak.KVCache(), n)(bad, step), *fresh
        )
        yield from each(
            f"KVCache.{name} value", lambda bad, n=name: getattr(ak.KVCache(), n)(step, bad), *fresh
        )
    yield from each(
        "KVCache.append more keys",
        lambda bad: filled().append(bad, step),
        tables[0],
        tables[1],
        tables[2],
        unlike,
    )
    yield from each("KVCache.append more values", lambda bad: filled().append(step, bad), unlike)
    yield from each("KVCache.truncate", lambda bad: filled().truncate(bad), NOT_A_LENGTH, HUGE)
    yield from each("KVCache.answered", lambda bad: filled().answered(bad), NOT_A_LENGTH)
    yield Case("KVCache.read of nothing", lambda: ak.KVCache().read())
    yield Case("KVCache.seal of a used one", lambda: filled().seal(step, step))
    yield Case("KVCache beyond its capacity", lambda: ak.KVCache(2).append(step, step))


def rotary() -> Iterator[Case]:
    heads, where = x(1, 6, 2, 8), torch.arange(6)
    turn = ak.Rotary()
    yield from each(
        "Rotary base",
        ak.Rotary,
        NOT_A_REAL,
        {"0": lambda: 0, "-1": lambda: -1.0, "bool": lambda: True},
    )
    yield from each(
        "Rotary rotary_dim",
        lambda bad: ak.Rotary(rotary_dim=bad),
        without(NOT_A_COUNT, "none", "a tensor"),
        {"odd": lambda: 3},
    )
    yield from each("Rotary pairing", lambda bad: ak.Rotary(pairing=bad), NOT_A_NAME)
    yield from each("Rotary.dims", turn.dims, NOT_A_COUNT, {"odd": lambda: 3})
    strange = without(strange_tensors(1, 6, 2, 8), "float8")
    yield from each(
        "Rotary.rotate heads",
        lambda bad: turn.rotate(bad, where),
        NOT_A_TENSOR,
        strange,
        {
            "rank 2": lambda: x(6, 8),
            "odd": lambda: x(1, 6, 2, 7),
            "other length": lambda: x(1, 5, 2, 8),
        },
    )
    yield from each(
        "Rotary.rotate positions",
        lambda bad: turn.rotate(heads, bad),
        NOT_A_TENSOR,
        without(strange_tensors(6), "int64", "uint8", "float8"),
        {
            "too few": lambda: torch.arange(5),
            "rank 2": lambda: torch.ones(2, 6),
            "a scalar": lambda: torch.tensor(1),
        },
    )


def lengths() -> Iterator[Case]:
    wrong: Values = {
        "int": lambda: 3,
        "a string": lambda: "12",
        "bytes": lambda: b"12",
        "a mapping": dict,
        "a set": lambda: {1, 2},
        "a generator": lambda: (n for n in (1, 2)),
        "an object": Odd,
        "floats": lambda: [1.0],
        "bools": lambda: [True],
        "negative": lambda: [3, -1],
        "nothing": list,
        "strings": lambda: ["3"],
        "none inside": lambda: [None],
        "nested": lambda: [[1]],
        "a float tensor": lambda: torch.ones(2),
        "a bool tensor": lambda: torch.ones(2, dtype=torch.bool),
        "a matrix": lambda: torch.ones(2, 2, dtype=torch.int64),
        "a scalar": lambda: torch.tensor(3),
        "an array": lambda: np.ones((2, 2), int),
        "a float array": lambda: np.ones(2),
        "an array of objects": lambda: np.array([None, 1], dtype=object),
        "meta": lambda: torch.ones(2, dtype=torch.int64, device="meta"),
        "sparse": lambda: torch.ones(2, dtype=torch.int64).to_sparse(),
        "nested tensor": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "complex": lambda: torch.ones(2, dtype=torch.complex64),
        "-10**5000": lambda: [-(10**5000)],
    }
    yield from each("SeqLens q", ak.SeqLens, wrong, {"none": lambda: None})
    yield from each(
        "SeqLens kv",
        lambda bad: ak.SeqLens([1, 2], bad),
        wrong,
        {"too few": lambda: [1], "too many": lambda: [1, 1, 1]},
    )
    falling = {"falling": lambda: [0, 3, 2], "not from 0": lambda: [1, 2]}
    yield from each("SeqLens.from_cu_seqlens", ak.SeqLens.from_cu_seqlens, wrong, falling)
    one = ak.SeqLens([1, 2])
    yield from each("SeqLens.check_totals", lambda bad: one.check_totals(bad, 3), NOT_AN_INT)


def forms() -> Iterator[Case]:
    yield from each("layouts.get", layouts.get, NOT_A_LAYOUT)
    yield from each(
        "layouts.register",
        layouts.register,
        {**NOT_A_TENSOR, "taken": lambda: layouts.Layout("BSND", "s b n d")},
    )
    patterns: Values = {
        **without(NOT_A_NAME, "mistyped"),
        "no such axes": lambda: "b s h w",
        "an axis twice": lambda: "b b n d",
        "no heads": lambda: "b s d",
        "an ellipsis": lambda: "b ... d",
        "open bracket": lambda: "b s (n d",
    }
    yield from each(
        "Layout name",
        lambda bad: layouts.Layout(bad, "b s n d"),
        without(NOT_A_NAME, "mistyped", "a megabyte"),
    )
    yield from each("Layout pattern", lambda bad: layouts.Layout("ODD", bad), patterns)
    merged = layouts.BSH
    methods: dict[str, Callable[[Any], object]] = {
        "to_bnsd": lambda bad: merged.to_bnsd(bad, 2),
        "from_bnsd": layouts.BSND.from_bnsd,
        "to_tnd": lambda bad: merged.to_tnd(bad, 2),
        "from_tnd": layouts.BSND.from_tnd,
        "split": lambda bad: layouts.TND.split(bad, [1]),
        "join": layouts.TND.join,
    }
    odd = {"rank 1": lambda: x(6), "rank 6": lambda: x(1, 1, 1, 1, 1, 1)}
    for name, call in methods.items():
        yield from each(f"Layout.{name}", call, NOT_A_TENSOR, odd)
    yield from each(
        "Layout.to_bnsd num_heads",
        lambda bad: merged.to_bnsd(x(1, 6, 16), bad),
        NOT_A_COUNT,
        {"3": lambda: 3},
    )
    yield from each(
        "Layout.from_tnd batch",
        lambda bad: layouts.BSND.from_tnd(x(6, 2, 8), bad),
        NOT_A_COUNT,
        {"4": lambda: 4},
    )
    yield from each(
        "Layout.split lengths",
        lambda bad: layouts.TND.split(x(6, 2, 8), bad),
        {
            "int": lambda: 6,
            "negative": lambda: [7, -1],
            "too few": lambda: [3, 2],
            "floats": lambda: [6.0],
            "a string": lambda: "6",
            "none": lambda: None,
        },
    )


def plans() -> Iterator[Case]:
    one = x()
    plan = ak.plan(one, one, one, mask=masks.Causal(), backend="emulated")
    index = without(NOT_A_LENGTH, "-1")
    yield from each(
        "Plan.plot batch",
        lambda bad: plan.plot(batch=bad),
        index,
        {"-1": lambda: -1, "too many": lambda: 9},
    )
    yield from each(
        "Plan.plot head",
        lambda bad: plan.plot(head=bad),
        index,
        {"-1": lambda: -1, "too many": lambda: 99},
    )
