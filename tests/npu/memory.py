"""The stand-in device's memory is the host's: its tensors seen as CPU tensors, without a copy."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

__all__ = ["on_host", "view"]


def view(
    storage: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int], offset: int
) -> torch.Tensor:
    """Return the CPU tensor at an address; `offset` counts elements."""
    if not storage or 0 in shape:
        return torch.empty(shape, dtype=dtype)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    size = (last + 1) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(storage)
    flat = torch.frombuffer(memory, dtype=dtype)
    return flat.as_strided(tuple(shape), tuple(stride), offset)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return an NPU tensor as a CPU tensor of the same memory."""
    storage = tensor.untyped_storage().data_ptr()
    return view(storage, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
