"""The op's plain arguments as the binding reads them: what it takes, and as what.

The real op's binding takes numpy's scalars and arrays, and whatever else has an index, where it
wants an int, a list of ints or a float. The same is taken here, and becomes a Python number or a
tuple. What would have to change its value on the way (3.5 for an int, 2 for a bool, a set for a
list) is left as it is, for the rule about types to name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from attnkit.kernel.call import KernelCall

__all__ = ["as_python", "fits_int64", "mistyped"]


def as_python(name: str, value: Any) -> Any:
    """Return an argument as a Python number or tuple where it means one; else as it is.

    >>> as_python("scale", np.float32(0.5)), as_python("prefix", np.array([3, 4]))
    (0.5, (3, 4))
    >>> as_python("prefix", [3, 4.5])
    [3, 4.5]
    """
    try:
        return _KIND_OF[name][0](value)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        return value


def mistyped(call: KernelCall) -> list[str]:
    """Return the plain arguments of a call that are not of the type they are declared with."""
    return [name for name, (_, fits) in _KIND_OF.items() if not fits(getattr(call, name))]


def fits_int64(value: object) -> bool:
    """Return whether a value is an int that the op's 64 bits can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _int(value: Any) -> int:
    return int(operator.index(value))


def _ints(value: Any) -> Any:
    listed = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)
    return tuple(_int(item) for item in value) if listed else value


def _float(value: Any) -> float:
    # Text that reads as a number is text; arrays of one element are arrays.
    if isinstance(value, str | bytes | bytearray) or np.ndim(value) > 0:
        raise TypeError
    return float(value)


def _bool(value: Any) -> bool:
    number = value.item() if isinstance(value, np.bool_) else _int(value)
    if number not in (0, 1):
        raise ValueError
    return bool(number)


def _are_ints(value: object) -> bool:
    if not isinstance(value, tuple) or set(map(type, value)) - {int}:
        return value is None or (isinstance(value, tuple) and all(map(fits_int64, value)))
    return not value or (fits_int64(min(value)) and fits_int64(max(value)))  # many lengths


# How an argument of each type is read, and whether it is one then, by the type's annotation.
_KINDS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], bool]]] = {
    "int": (_int, fits_int64),
    "float": (_float, lambda value: isinstance(value, float) or fits_int64(value)),
    "bool": (_bool, lambda value: isinstance(value, bool)),
    "str": (lambda value: value, lambda value: isinstance(value, str)),
    "tuple[int, ...] | None": (_ints, _are_ints),
}
_KIND_OF = {f.name: _KINDS[str(f.type)] for f in fields(KernelCall) if f.type in _KINDS}
