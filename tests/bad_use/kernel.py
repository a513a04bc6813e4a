"""Wrong calls of the operator and its gradient, argument by argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import attnkit as ak
from attnkit import kernel
from tests.bad_use.values import (
    NOT_A_COUNT,
    NOT_A_LENGTH,
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

BEYOND_INT64: Values = {
    "2**63": lambda: 2**63,
    "-2**63-1": lambda: -(2**63) - 1,
    "10**400": lambda: 10**400,
    "-10**5000": lambda: -(10**5000),
}
# The binding of torch takes a tensor of one element for a number, and numpy's numbers.
NOT_AN_INDEX = without(NOT_AN_INT, "a tensor", "a meta tensor", "bool")
NOT_A_LIST: Values = {
    "int": lambda: 5,
    "float": lambda: 5.0,
    "a string": lambda: "6",
    "bytes": lambda: b"6",
    "a mapping": dict,
    "an object": Odd,
    "floats": lambda: [6.0],
    "strings": lambda: ["6"],
    "none inside": lambda: [None],
    "negative": lambda: [-6],
    "nested": lambda: [[6]],
    "a matrix": lambda: torch.ones(2, 2, dtype=torch.int64),
    "a float tensor": lambda: torch.ones(1),
    "a float array": lambda: np.ones(1),
    "10**400": lambda: [10**400],
}
MODES: Values = {"-1": lambda: -1, "9": lambda: 9, "99": lambda: 99}


def cases() -> Iterator[Case]:
    yield from forward()
    yield from gradient()
    yield from helpers()


def arguments() -> dict[str, list[Values]]:
    some = without(NOT_A_TENSOR, "none")
    return {
        "head_num": [without(NOT_A_COUNT, "bool", "a tensor", "a meta tensor"), {"3": lambda: 3}],
        "input_layout": [NOT_A_NAME, {"TND": lambda: "TND"}],
        "pse": [some, strange_tensors(1, 2, 6, 6), shapes(1, 2, 6, 6)],
        "padding_mask": [some, {"a tensor": lambda: torch.ones(1, 1, 6, 6)}],
        "atten_mask": [
            some,
            without(strange_tensors(1, 1, 6, 6), "bool", "uint8"),
            {
                "values other than 0 and 1": lambda: torch.full((6, 6), 2, dtype=torch.uint8),
                "float": lambda: torch.ones(6, 6),
                "rank 1": lambda: torch.ones(6, dtype=torch.bool),
                "other size": lambda: torch.ones(5, 6, dtype=torch.bool),
            },
        ],
        "scale": [without(NOT_A_REAL, "a meta tensor")],
        "keep_prob": [without(NOT_A_REAL, "a meta tensor"), {"0": lambda: 0.0, "1.5": lambda: 1.5}],
        "pre_tokens": [NOT_AN_INDEX, BEYOND_INT64],
        "next_tokens": [NOT_AN_INDEX, BEYOND_INT64],
        "inner_precise": [NOT_AN_INDEX, BEYOND_INT64, {"-1": lambda: -1, "9": lambda: 9}],
        "prefix": [NOT_A_LIST, {"unused": lambda: [3]}],
        "actual_seq_qlen": [NOT_A_LIST],
        "actual_seq_kvlen": [NOT_A_LIST],
        "sparse_mode": [NOT_AN_INDEX, BEYOND_INT64, MODES],
        "gen_mask_parallel": [{"a string": lambda: "no", "none": lambda: None, "a list": list}],
        "sync": [{"a string": lambda: "no", "none": lambda: None, "a list": list}],
        "pse_type": [NOT_AN_INDEX, BEYOND_INT64, {"-1": lambda: -1, "9": lambda: 9}],
        "q_start_idx": [NOT_A_LIST],
        "kv_start_idx": [NOT_A_LIST],
        "sink": [some, strange_tensors(2)],
        "seed": [NOT_AN_INDEX, BEYOND_INT64],
        "offset": [NOT_AN_INDEX, BEYOND_INT64],
    }


def forward() -> Iterator[Case]:
    one = torch.ones(1, 6, 2, 16)
    tables = [NOT_A_TENSOR, strange_tensors(1, 6, 2, 16), shapes(1, 6, 2, 16)]

    def call(**given: Any) -> object:
        right = {"query": one, "key": one, "value": one, "head_num": 2, "input_layout": "BSND"}
        return ak.fusion_attention(**{**right, **given})

    for name in ("query", "key", "value"):
        own = tables
        if name == "value":
            own = [*tables[:2], without(tables[2], "[1, 6, 2, 17]")]
        yield from each(f"fusion_attention {name}", lambda bad, n=name: call(**{n: bad}), *own)
    yield Case(
        "fusion_attention in int64",
        lambda: call(query=one.long(), key=one.long(), value=one.long()),
    )
    for name, wrong in arguments().items():
        yield from each(f"fusion_attention {name}", lambda bad, n=name: call(**{n: bad}), *wrong)
    for mode in range(2, 9):
        yield (
            Case(
                f"fusion_attention mode {mode} without a mask",
                lambda m=mode: call(sparse_mode=m, prefix=[3] if m in (5, 6) else None),
            )
            if mode < 7
            else Case(
                f"fusion_attention mode {mode} unpacked",
                lambda m=mode: call(
                    sparse_mode=m, atten_mask=torch.ones(2048, 2048, dtype=torch.bool).triu(1)
                ),
            )
        )
    yield Case(
        "fusion_attention TND without lengths",
        lambda: ak.fusion_attention(*[torch.ones(6, 2, 16)] * 3, 2, "TND"),
    )
    yield Case(
        "fusion_attention TND lengths beyond",
        lambda: ak.fusion_attention(
            *[torch.ones(6, 2, 16)] * 3, 2, "TND", actual_seq_qlen=[3, 7], actual_seq_kvlen=[3, 6]
        ),
    )
    yield Case(
        "fusion_attention TND lengths falling",
        lambda: ak.fusion_attention(
            *[torch.ones(6, 2, 16)] * 3,
            2,
            "TND",
            actual_seq_qlen=[4, 3, 6],
            actual_seq_kvlen=[3, 4, 6],
        ),
    )
    yield Case("fusion_attention two spellings", lambda: call(pre_tokens=3, pre_tockens=4))
    yield Case(
        "fusion_attention D = 0",
        lambda: ak.fusion_attention(*[torch.ones(1, 6, 2, 0)] * 3, 2, "BSND"),
    )


def gradient() -> Iterator[Case]:
    one = torch.ones(1, 6, 2, 16)
    out = ak.fusion_attention(one, one, one, 2, "BSND")
    right: dict[str, Any] = {
        "query": one,
        "key": one,
        "value": one,
        "dy": one,
        "head_num": 2,
        "input_layout": "BSND",
        "softmax_max": out.softmax_max,
        "softmax_sum": out.softmax_sum,
        "attention_in": out.attention_out,
    }

    def call(**given: Any) -> object:
        return ak.fusion_attention_grad(**{**right, **given})

    strange = strange_tensors(1, 6, 2, 16)
    for name in ("query", "key", "value", "dy", "attention_in"):
        yield from each(
            f"fusion_attention_grad {name}",
            lambda bad, n=name: call(**{n: bad}),
            NOT_A_TENSOR,
            strange,
            {
                "[1, 6, 2]": lambda: torch.ones(1, 6, 2),
                "other length": lambda: torch.ones(1, 5, 2, 16),
            },
        )
    for name in ("softmax_max", "softmax_sum"):
        shape = tuple(out.softmax_max.shape)
        yield from each(
            f"fusion_attention_grad {name}",
            lambda bad, n=name: call(**{n: bad}),
            NOT_A_TENSOR,
            strange_tensors(*shape),
            {
                "half": lambda s=shape: torch.ones(s).half(),
                "other size": lambda: torch.ones(1, 2, 5, 8),
            },
        )
    for name, wrong in arguments().items():
        if name in ("pse", "atten_mask", "sink", "padding_mask"):
            continue
        yield from each(
            f"fusion_attention_grad {name}", lambda bad, n=name: call(**{n: bad}), *wrong
        )
    yield from each(
        "fusion_attention_grad numels", lambda bad: call(numels=bad), NOT_AN_INDEX, BEYOND_INT64
    )


def helpers() -> Iterator[Case]:
    one = torch.ones(1, 2, 6, 8)
    lists: Values = {
        "none": lambda: None,
        "nothing": list,
        "a tensor": lambda: one,
        "strings": lambda: ["x"],
        "int": lambda: 3,
        "an object": Odd,
    }
    merges: dict[str, Callable[[Any], object]] = {
        "outputs": lambda bad: kernel.merge_partials(bad, [one], [one]),
        "maxima": lambda bad: kernel.merge_partials([one], bad, [one]),
        "sums": lambda bad: kernel.merge_partials([one], [one], bad),
    }
    for name, call in merges.items():
        yield from each(f"merge_partials {name}", call, lists)
    yield from each("log_sum_exp", lambda bad: kernel.log_sum_exp(bad, one), NOT_A_TENSOR)
    yield from each("dropout_bytes", kernel.dropout_bytes, NOT_A_LENGTH)
    yield from each(
        "dropout_mask numels", lambda bad: kernel.dropout_mask(bad, 0.5, seed=0), NOT_A_LENGTH
    )
    yield from each(
        "dropout_mask keep_prob",
        lambda bad: kernel.dropout_mask(8, bad, seed=0),
        NOT_A_REAL,
        {"-1": lambda: -1.0, "2": lambda: 2.0},
    )
    yield from each(
        "dropout_mask seed", lambda bad: kernel.dropout_mask(8, 0.5, seed=bad), NOT_AN_INDEX
    )
    yield from each("TensorSpec.of", kernel.TensorSpec.of, without(NOT_A_TENSOR, "an array"))
    yield from each("AttenMask.of", kernel.AttenMask.of, without(NOT_A_TENSOR, "an array"))
