"""The op's plain arguments as the binding reads them: what it takes, and as what.

The real op's binding takes numpy's scalars and arrays, and whatever else has an index, where it
wants an int, a list of ints or a float. The same is taken here, and becomes a Python number or a
tuple. What would have to change its value on the way (3.5 for an int, 2 for a bool, a set for a
list) is left as it is, for the rule about types to name.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from attnkit.errors import KernelContractTypeError, shown

__all__ = [
    "BOOLS",
    "FLOATS",
    "INTEGERS",
    "LISTS",
    "TEXTS",
    "as_python",
    "check_count",
    "check_tensors_given",
    "fits_int64",
]

INTEGERS = (
    "head_num",
    "pre_tokens",
    "next_tokens",
    "inner_precise",
    "sparse_mode",
    "pse_type",
    "seed",
    "offset",
)
FLOATS = ("scale", "keep_prob")
BOOLS = ("gen_mask_parallel", "sync")
TEXTS = ("input_layout", "softmax_layout")
LISTS = ("prefix", "actual_seq_qlen", "actual_seq_kvlen", "q_start_idx", "kv_start_idx")


def as_python(name: str, value: Any) -> Any:
    """Return an argument as a Python number or tuple where it means one; else as it is.

    >>> as_python("scale", np.float32(0.5)), as_python("prefix", np.array([3, 4]))
    (0.5, (3, 4))
    >>> as_python("prefix", [3, 4.5])
    [3, 4.5]
    """
    try:
        return _READERS[name](value) if name in _READERS else value
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return value


def check_tensors_given(function: str, *given: tuple[str, object]) -> None:
    """Raise `KernelContractTypeError` for what is not a tensor."""
    for name, value in given:
        if not isinstance(value, torch.Tensor):
            raise KernelContractTypeError(
                f"{function} got {name}={shown(value)}, of type {type(value).__name__}; it takes "
                "tensors",
                ["argument-type"],
            )


def check_count(function: str, name: str, value: object) -> int:
    """Return an int that is not negative and fits into 64 bits."""
    if not isinstance(value, int) or not fits_int64(value) or value < 0:
        raise KernelContractTypeError(
            f"{function} got {name}={shown(value)}; it is an int from 0 to 2**63 - 1",
            ["argument-type"],
        )
    return value


def fits_int64(value: object) -> bool:
    """Return whether a value is an int that the op's 64 bits can hold."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _int(value: Any) -> int:
    return int(operator.index(value))


def _ints(value: Any) -> Any:
    if value is None:
        return None
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


_READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys((*INTEGERS, "numels"), _int),
    **dict.fromkeys(FLOATS, _float),
    **dict.fromkeys(BOOLS, _bool),
    **dict.fromkeys(LISTS, _ints),
}
