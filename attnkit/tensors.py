"""What a tensor and a device must be, wherever one is given: checked here, told in one way."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from attnkit.errors import CompositionError, CompositionTypeError, shown

__all__ = ["check_device", "check_tensor", "odd_kind"]


def odd_kind(tensor: Tensor) -> str | None:
    """Return in a word what kind of tensor this is, if its numbers do not lie at strides.

    >>> odd_kind(torch.zeros(2)), odd_kind(torch.zeros(2).to_sparse())
    (None, 'sparse_coo')
    """
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.").removeprefix("_")
    return "quantised" if tensor.is_quantized else None


def check_tensor(name: str, tensor: object) -> None:
    """Raise `CompositionTypeError` for anything but a tensor whose numbers lie at strides.

    >>> check_tensor("key", [1.0])
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionTypeError: key is a list; give a torch tensor
    """
    if not isinstance(tensor, Tensor):
        raise CompositionTypeError(f"{name} is a {type(tensor).__name__}; give a torch tensor")
    kind = odd_kind(tensor)
    if kind is not None:
        raise CompositionTypeError(
            f"{name} is a {kind} tensor; give a dense one (to_dense(), dequantize(), "
            "to_padded_tensor(); texts of unlike lengths are packed into one, with SeqLens)"
        )


def check_device(device: object) -> None:
    """Raise `CompositionError` unless tensors can be made there: nothing else tells for certain.

    >>> check_device("cpu")
    >>> check_device(1.5)
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionTypeError: device=1.5; give a name such as 'cpu', or None
    """
    if not isinstance(device, torch.device | str | int | None) or isinstance(device, bool):
        raise CompositionTypeError(f"device={shown(device)}; give a name such as 'cpu', or None")
    try:
        torch.empty(0, device=cast(Any, device))
    except Exception as error:  # each kind of device has an error of its own
        reason = shown(str(error).partition("\n")[0])
        raise CompositionError(f"device={shown(device)} is not there: {reason}") from error
