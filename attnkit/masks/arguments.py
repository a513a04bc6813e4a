"""Checks of arguments that every family shares, and how a message shows a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from attnkit.errors import CompositionError, CompositionTypeError, clipped, shown
from attnkit.tensors import odd_kind

__all__ = [
    "IntsLike",
    "check_align",
    "check_int",
    "check_ints",
    "check_length",
    "check_readable",
    "describe",
    "holds_integers",
    "short",
    "unreadable",
]

IntsLike = Sequence[int] | torch.Tensor | np.ndarray[Any, Any]  # what `check_ints` takes

INTEGERS = frozenset(
    {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
    | {torch.uint16, torch.uint32, torch.uint64}
)


LARGEST = (1 << 63) - 1
"""The largest integer that a mask holds: positions are int64 in tensors."""

MOST_ENTRIES = 1 << 24
"""How many numbers a list of lengths has, at most."""


def short(value: Any) -> str:
    """Return a repr with long tuples cut in the middle.

    >>> short(tuple(range(100)))
    '(0, 1, 2, 3, ... 100 in all)'
    """
    if isinstance(value, tuple):
        items = [short(item) for item in (value if len(value) <= 8 else value[:4])]
        if len(value) > 8:
            return f"({', '.join(items)}, ... {len(value)} in all)"
        return f"({', '.join(items)}{',' * (len(value) == 1)})"
    return shown(value) if isinstance(value, str | int) else repr(value)


def describe(value: object) -> str:
    """Return what a wrong argument is, in a few words.

    >>> describe(torch.zeros(2, 3))
    'a tensor of shape (2, 3) and torch.float32'
    """
    if isinstance(value, torch.Tensor):
        odd = unreadable(value)
        if odd is not None:
            return f"{odd} of {value.dtype}"
    if isinstance(value, torch.Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, torch.Tensor) else "numpy array"
        return f"a {kind} of shape {tuple(value.shape)} and {value.dtype}"
    return f"{clipped(shown(value), 80)} ({type(value).__name__})"


def unreadable(tensor: torch.Tensor) -> str | None:
    """Return in words what kind of tensor this is, if it holds no plain numbers; else None.

    >>> unreadable(torch.zeros(2, device="meta"))
    'a tensor on the meta device'
    """
    kind = odd_kind(tensor)
    if kind is not None:
        return f"a {kind} tensor"
    return "a tensor on the meta device" if tensor.is_meta else None


def check_readable(name: str, tensor: torch.Tensor) -> None:
    """Raise `CompositionError` unless a tensor is dense and holds its numbers itself."""
    odd = unreadable(tensor)
    if odd is not None:
        raise CompositionError(
            f"{name} got {odd}, whose numbers cannot be read; give a dense tensor on a device "
            "(to_dense(), dequantize(), to_padded_tensor())"
        )


def check_align(owner: str, align: object) -> None:
    """Raise `CompositionError` unless `align` is one of the two words."""
    if not isinstance(align, str) or align not in ("bottom_right", "top_left"):
        raise CompositionError(
            f"{owner} got align={shown(align)}; it is 'bottom_right' (the last query sees every "
            "key) or 'top_left' (query 0 stands at key 0)"
        )


def check_int(name: str, value: object, minimum: int | None) -> int:
    """Return `value` if it is an int of at least `minimum`, and of no more than 64 bits.

    Nothing is converted: a bool is a slip, and reading a tensor may wait for a device.
    """
    if type(value) is not int:
        rule = "an int" if minimum is None else f"an int >= {minimum}"
        number = type(value) is not bool and hasattr(value, "__index__")
        raise CompositionTypeError(
            f"{name}={shown(value)} is of type {type(value).__name__}; it must be {rule}"
            + (f": write int({name.split()[-1]})" if number else "")
        )
    if minimum is not None and value < minimum:
        raise CompositionError(f"{name}={shown(value)} is too small; it must be >= {minimum}")
    if abs(value) > LARGEST:
        raise CompositionError(
            f"{name}={shown(value)} is too large; positions are 64-bit integers, so it is at most "
            f"{LARGEST} (leave a limit out, or write None, where there is none)"
        )
    return value


def check_ints(name: str, values: object, minimum: int) -> tuple[int, ...]:
    """Return a list, tensor or array of integers as a tuple, each at least `minimum`."""
    if isinstance(values, torch.Tensor):
        check_readable(name, values)
    if isinstance(values, torch.Tensor | np.ndarray):
        if values.ndim != 1 or not holds_integers(values):
            raise CompositionTypeError(
                f"{name} is {describe(values)}; it must be a 1-D tensor of integers, or a list "
                "of int"
            )
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | bytearray | memoryview):
        raise CompositionTypeError(f"{name} is {describe(values)}; it must be a sequence of int")
    if not values:
        raise CompositionError(f"{name} is empty; give at least one entry")
    check_length(name, values)
    for k, value in enumerate(values):
        if type(value) is not int or not minimum <= value <= LARGEST:
            check_int(f"{name}[{k}]", value, minimum)
    return tuple(values)


def check_length(name: str, values: Sequence[Any]) -> None:
    """Raise `CompositionError` for a list that nobody means to be read entry by entry."""
    if len(values) > MOST_ENTRIES:
        raise CompositionError(f"{name} has {len(values)} entries; it has at most {MOST_ENTRIES}")


def holds_integers(values: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether a tensor or array has an integer dtype; bool is none."""
    if isinstance(values, np.ndarray):
        return bool(np.issubdtype(values.dtype, np.integer))
    return values.dtype in INTEGERS
