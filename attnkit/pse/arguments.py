"""Checks of arguments that several families of biases share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnkit import tensors
from attnkit.errors import CompositionError, CompositionTypeError, shown

__all__ = ["check_align", "check_count", "check_floating", "check_tensor", "finite_floats"]

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_align(owner: str, align: object) -> None:
    """Raise `CompositionError` unless `align` is one of the two words."""
    if not isinstance(align, str) or align not in ("bottom_right", "top_left"):
        raise CompositionError(
            f"{owner}: align={shown(align)}; choose 'bottom_right' (the last query stands on the "
            "last key) or 'top_left' (the first on the first)"
        )


def check_count(name: str, value: object, most: int) -> int:
    """Return `value` if it is an int from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise CompositionTypeError(f"{name} is a positive int, got {shown(value)}")
    if value < 1:
        raise CompositionError(f"{name} is a positive int, got {shown(value)}")
    if value > most:
        raise CompositionError(f"{name} is at most {most}, got {shown(value)}")
    return value


def check_tensor(owner: str, tensor: Tensor) -> None:
    """Raise unless a tensor is a dense one of a dtype that scores are computed in."""
    tensors.check_tensor(owner, tensor)
    if tensor.dtype not in FLOATING:
        remedy = "cast it first"
        if tensor.dtype == torch.bool:
            remedy = "a boolean tensor is a mask: masks.Dense.keep(t) or .drop(t)"
        raise CompositionTypeError(
            f"{owner} got {shown(tensor)}: a bias has a floating dtype of 16, 32 or 64 bits; "
            f"{remedy}"
        )


def check_floating(owner: object, dtype: object) -> None:
    """Raise `CompositionTypeError` unless a bias can be materialised as this dtype."""
    if dtype not in FLOATING:
        raise CompositionTypeError(
            f"{owner} cannot be materialised as {shown(dtype)}; ask for a float of 16, 32 or 64 "
            "bits"
        )


def finite_floats(owner: str, values: Sequence[object]) -> tuple[float, ...]:
    """Return numbers as floats; raise `CompositionError` for one that is none, or not finite."""
    return tuple(_finite(owner, value) for value in values)


def _finite(owner: str, value: object) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        found = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        found = math.inf
    if not number or not math.isfinite(found):
        raise CompositionError(f"{owner}: a slope is a finite float, got {shown(value)}")
    return found
