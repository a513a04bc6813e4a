"""Wrong values by what is wrong with them, each made anew for the case that gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attnkit import masks, pse

Values = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """One wrong use: `call()` must raise an error of attnkit's."""

    name: str
    call: Callable[[], object]


class Odd:
    """An object that nothing expects, with a repr of its own."""

    def __repr__(self) -> str:
        return "<odd>"


class Mute:
    """An object that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


NOT_A_NUMBER: Values = {
    "none": lambda: None,
    "a string": lambda: "4",
    "bytes": lambda: b"4",
    "a list": lambda: [4],
    "a mapping": dict,
    "an object": Odd,
    "an object without repr": Mute,
    "a class": lambda: int,
    "complex": lambda: 4j,
    "a tensor of two": lambda: torch.ones(2),
    "an array of two": lambda: np.ones(2),
    "a meta tensor": lambda: torch.ones((), device="meta"),
    "a megabyte": lambda: "x" * (1 << 20),
}

NOT_AN_INT: Values = {
    **NOT_A_NUMBER,
    "bool": lambda: True,
    "float": lambda: 4.0,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "a tensor": lambda: torch.tensor(4),
}

NEGATIVE: Values = {
    "-1": lambda: -1,
    "-2**63": lambda: -(2**63),
    "-10**400": lambda: -(10**400),
    "-10**5000": lambda: -(10**5000),
}

NOT_A_COUNT: Values = {**NOT_AN_INT, **NEGATIVE, "zero": lambda: 0}

NOT_A_LENGTH: Values = {**NOT_AN_INT, **NEGATIVE}

NOT_A_REAL: Values = {
    **NOT_A_NUMBER,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "10**400": lambda: 10**400,
    "-10**5000": lambda: -(10**5000),
}

HUGE: Values = {
    "2**40": lambda: 2**40,
    "2**63": lambda: 2**63,
    "10**400": lambda: 10**400,
    "10**5000": lambda: 10**5000,
}

NOT_A_NAME: Values = {
    "none": lambda: None,
    "int": lambda: 3,
    "bool": lambda: True,
    "bytes": lambda: b"BSND",
    "a list": lambda: ["BSND"],
    "a mapping": dict,
    "an object": Odd,
    "an object without repr": Mute,
    "empty": lambda: "",
    "mistyped": lambda: "bsdn",
    "a megabyte": lambda: "x" * (1 << 20),
    "a tensor": lambda: torch.ones(2),
    "10**5000": lambda: 10**5000,
}

NOT_A_MASK: Values = {
    "bool": lambda: True,
    "int": lambda: 3,
    "a string": lambda: "causal",
    "bytes": lambda: b"Causal()",
    "a list of masks": lambda: [masks.Causal()],
    "a family": lambda: masks.Causal,
    "a function": lambda: lambda b, h, i, j: i >= j,
    "a bool tensor": lambda: torch.ones(6, 6, dtype=torch.bool),
    "an array": lambda: np.ones((6, 6), dtype=bool),
    "a meta tensor": lambda: torch.ones(6, 6, device="meta"),
    "a sparse tensor": lambda: torch.ones(6, 6).to_sparse(),
    "a bias": lambda: pse.ALiBi(2),
    "an object": Odd,
    "an object without repr": Mute,
    "a mapping": lambda: {"kind": "causal"},
    "a region": lambda: masks.Causal().region(6, 6),
    "complex": lambda: 1j,
}

NOT_A_BIAS: Values = {
    "bool": lambda: True,
    "int": lambda: 3,
    "float": lambda: 0.5,
    "a string": lambda: "alibi",
    "bytes": lambda: b"ALiBi(2)",
    "a list of biases": lambda: [pse.ALiBi(2)],
    "a family": lambda: pse.ALiBi,
    "a function": lambda: lambda *given: 0,
    "a tensor": lambda: torch.zeros(6, 6),
    "an array": lambda: np.zeros((6, 6)),
    "a meta tensor": lambda: torch.ones(6, 6, device="meta"),
    "a sparse tensor": lambda: torch.ones(6, 6).to_sparse(),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(6, 6)),
    "a mask": lambda: masks.Causal(),
    "an object": Odd,
    "an object without repr": Mute,
    "a mapping": lambda: {"kind": "alibi"},
}

NOT_A_TENSOR: Values = {
    "none": lambda: None,
    "int": lambda: 3,
    "a string": lambda: "x",
    "bytes": lambda: b"x",
    "a list": lambda: [[1.0]],
    "an array": lambda: np.zeros((1, 6, 2, 8), dtype=np.float32),
    "an object": Odd,
    "an object without repr": Mute,
    "a class": lambda: torch.Tensor,
    "a mapping": dict,
}


def strange_tensors(*shape: int) -> Values:
    """Return tensors of a right shape that no call can compute with."""

    def whole(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype)

    return {
        "int64": lambda: whole(torch.int64),
        "uint8": lambda: whole(torch.uint8),
        "bool": lambda: whole(torch.bool),
        "complex64": lambda: whole(torch.complex64),
        "float8": lambda: whole().to(torch.float8_e4m3fn),
        "sparse": lambda: whole().to_sparse(),
        "mkldnn": lambda: whole().to_mkldnn(),
        "meta": lambda: torch.ones(shape, device="meta"),
        "nested": lambda: torch.nested.nested_tensor([whole(), whole()]),
    }


def shapes(*shape: int) -> Values:
    """Return tensors of wrong rank or size, by their shapes."""
    wrong = [
        (),
        shape[:1],
        shape[:-1],
        (1, *shape),
        (*shape, 1),
        (*shape[:-1], shape[-1] + 1),
        (*shape[:-1], 0),
    ]
    return {str(list(one)): lambda one=one: torch.ones(one) for one in dict.fromkeys(wrong)}


def each(name: str, call: Callable[[Any], object], *tables: Values) -> Iterator[Case]:
    """Yield the cases of one argument: `call` with each value of the tables."""
    merged = {what: make for table in tables for what, make in table.items()}
    for what, make in merged.items():
        yield Case(f"{name}: {what}", lambda make=make: call(make()))


def without(table: Values, *names: str) -> Values:
    """Return a table without the entries that are right here."""
    return {name: table[name] for name in table if name not in names}
