"""Checks of arguments that every family shares, and how a message shows a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from attnkit.errors import CompositionError, CompositionTypeError, shown

__all__ = [
    "IntsLike",
    "check_align",
    "check_int",
    "check_ints",
    "describe",
    "holds_integers",
    "short",
]

IntsLike = Sequence[int] | torch.Tensor | np.ndarray[Any, Any]  # what `check_ints` takes


def short(value: Any) -> str:
    """Return a repr with long tuples cut in the middle.

    >>> short(tuple(range(100)))
    '(0, 1, 2, 3, ... 100 in all)'
    """
    if isinstance(value, tuple) and len(value) > 8:
        return f"({', '.join(short(item) for item in value[:4])}, ... {len(value)} in all)"
    return repr(value)


def describe(value: object) -> str:
    """Return what a wrong argument is, in a few words.

    >>> describe(torch.zeros(2, 3))
    'a tensor of shape (2, 3) and torch.float32'
    """
    if isinstance(value, torch.Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, torch.Tensor) else "numpy array"
        return f"a {kind} of shape {tuple(value.shape)} and {value.dtype}"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def check_align(owner: str, align: object) -> None:
    """Raise `CompositionError` unless `align` is one of the two words."""
    if align not in ("bottom_right", "top_left"):
        raise CompositionError(
            f"{owner} got align={align!r}; it is 'bottom_right' (the last query sees every "
            "key) or 'top_left' (query 0 stands at key 0)"
        )


def check_int(name: str, value: object, minimum: int | None) -> int:
    """Return `value` if it is an int of at least `minimum`.

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
        raise CompositionError(f"{name}={value} is too small; it must be >= {minimum}")
    return value


def check_ints(name: str, values: object, minimum: int) -> tuple[int, ...]:
    """Return a list, tensor or array of integers as a tuple, each at least `minimum`."""
    if isinstance(values, torch.Tensor | np.ndarray):
        if values.ndim != 1 or not holds_integers(values):
            raise CompositionTypeError(
                f"{name} is {describe(values)}; it must be a 1-D tensor of integers, or a list "
                "of int"
            )
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise CompositionTypeError(f"{name} is {describe(values)}; it must be a sequence of int")
    if not values:
        raise CompositionError(f"{name} is empty; give at least one entry")
    for k, value in enumerate(values):
        if type(value) is not int or value < minimum:
            check_int(f"{name}[{k}]", value, minimum)
    return tuple(values)


def holds_integers(values: torch.Tensor | np.ndarray[Any, Any]) -> bool:
    """Whether a tensor or array has an integer dtype; bool is none."""
    if isinstance(values, np.ndarray):
        return bool(np.issubdtype(values.dtype, np.integer))
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
