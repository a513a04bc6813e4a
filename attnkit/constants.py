"""Tensors that follow from plain values: made once, and kept for later calls."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from threading import Lock
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["Store", "constant"]

P = ParamSpec("P")
T = TypeVar("T")


class Store:
    """Values by key: the last `most` that were made, as long as their tensors hold `bytes` or less.

    >>> store = Store(most=2, bytes=64)
    >>> for n in (1, 2, 3, 100):
    ...     _ = store.get(n, lambda n=n: torch.zeros(n))
    >>> list(store)  # 1 was one too many, and 100 floats are kept by nobody
    [2, 3]
    """

    def __init__(self, most: int, bytes: int) -> None:
        self.most = most
        self.bytes = bytes
        self._lock = Lock()
        self.values: dict[Hashable, Any] = {}
        self.held = 0  # the bytes of all of them
        self._sizes: dict[Hashable, int] = {}

    def get(self, key: Hashable, make: Callable[..., T], *args: Any) -> T:
        """Return what is kept under a key, or what is made now, and keep that."""
        found = self.values.get(key, self)
        if found is not self:
            return cast(T, found)
        made = make(*args)  # not under the lock: what is made may be made of other kept values
        size = _size(made)
        if size <= self.bytes:
            with self._lock:
                self.held += size - self._sizes.get(key, 0)  # another thread may have made it, too
                self.values[key], self._sizes[key] = made, size
                while len(self._sizes) > self.most or self.held > self.bytes:
                    oldest = next(iter(self._sizes))
                    del self.values[oldest]
                    self.held -= self._sizes.pop(oldest)
        return made

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._sizes.clear()
            self.values.clear()
            self.held = 0

    def __iter__(self) -> Any:
        return iter(tuple(self._sizes))


def _size(value: object) -> int:
    """Return the bytes of a tensor, or of those in a tuple or in the attributes of a value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = value if isinstance(value, tuple) else vars(value).values() if _holds(value) else ()
    return sum(_size(part) for part in parts)


def _holds(value: object) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value)


KEPT = Store(most=1024, bytes=1 << 28)
"""What `constant` functions made: masks, indices, slopes. `KEPT.clear()` empties it."""


def constant(make: Callable[P, T]) -> Callable[P, T]:
    """Keep what a function makes of hashable values, given by position: tensors, or their holders.

    A copy from the host makes it wait for a device, so it is made once. It is made outside of
    inference mode, whose tensors a later training step could not save for its backward. While
    a mode of torch takes the operators (fake tensors, tracing), nothing is kept: what is made
    there belongs to the mode.

    >>> @constant
    ... def row(length: int) -> torch.Tensor:
    ...     return torch.arange(length)
    >>> with torch.inference_mode():
    ...     row(3) is row(3), row(3).is_inference()
    (True, False)
    """

    def made(*args: Any) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return cast(Any, make)(*args)  # type: ignore[no-any-return]

    @wraps(make)
    def get(*args: Any) -> T:
        if torch.compiler.is_dynamo_compiling():  # made by the graph
            return cast(Any, make)(*args)  # type: ignore[no-any-return]
        if torch._C._len_torch_dispatch_stack():
            return made(*args)
        found = KEPT.values.get((make, args), KEPT)  # one look: it is on hot paths
        return KEPT.get((make, args), made, *args) if found is KEPT else cast(T, found)

    return cast(Callable[P, T], get)
