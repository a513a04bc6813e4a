"""Tensors that follow from plain values: made once, and kept for later calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch

__all__ = ["constant"]

P = ParamSpec("P")
T = TypeVar("T")


def constant(maxsize: int) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Keep what a function makes of hashable values, given by position: tensors, or their holders.

    A copy from the host makes it wait for a device, so it is made once. It is made outside of
    inference mode, whose tensors a later training step could not save for its backward. While
    a mode of torch takes the operators (fake tensors, tracing), nothing is kept: what is made
    there belongs to the mode.

    >>> @constant(maxsize=8)
    ... def row(length: int) -> torch.Tensor:
    ...     return torch.arange(length)
    >>> with torch.inference_mode():
    ...     row(3) is row(3), row(3).is_inference()
    (True, False)
    """

    def decorate(make: Callable[P, T]) -> Callable[P, T]:
        @wraps(make)
        def made(*args: Any) -> Any:
            with torch.inference_mode(False), torch.no_grad():
                return cast(Any, make)(*args)

        kept = lru_cache(maxsize)(made)

        @wraps(make)
        def get(*args: Any) -> Any:
            return (made if torch._C._len_torch_dispatch_stack() else kept)(*args)

        return cast(Callable[P, T], get)

    return decorate
