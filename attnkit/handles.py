"""Handles: what a graph of `torch.compile` knows of a mask, a bias or the lengths of a batch.

A graph takes tensors as data, and objects as constants that it is guarded on: a mask that is new
in each step would be a new graph in each step. So each value has a handle from its birth on: one
number, in a tensor on the host. To a tracer that is one more input, and the operator of the graph
(`attnkit.backends.graph`) finds the value again by the number when it runs.

A number means nothing in another process, so no handle is ever pickled.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Hashable
from functools import cached_property
from itertools import count
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from attnkit.errors import CompositionError

__all__ = ["Handle", "born", "handle_of", "memory_of", "number_of", "told"]

_SIZE = 8  # bytes of an int64
_MOST_FOUND = 16


class Handle(bytearray):
    """The memory of one handle: a number, and beside it what the number means.

    Torch keeps this object for as long as any tensor has this memory: as long as the value lives,
    and then as long as a backward pass is due that was recorded with it. So it must not keep the
    value itself, which has the tensor; a twin without one is made when an operator asks first.
    """

    value: Any = None
    _owner: ref[Any] | None = None

    def read(self) -> Any:
        """Return the value, or its twin; None if it is gone."""
        if self.value is None and self._owner is not None:
            owner = self._owner()
            if owner is not None:
                self.value = twin = object.__new__(type(owner))
                vars(twin).update(vars(owner))
                del vars(twin)["_handle"]
        return self.value

    @cached_property
    def found(self) -> dict[Hashable, ref[Any]]:
        """What operators found out with this value the last: weak, for it may hold the value."""
        return {}

    def remember(self, key: Hashable, what: object) -> None:
        """Keep a way to what was found out, as long as somebody else keeps it."""
        if len(self.found) >= _MOST_FOUND:
            self.found.pop(next(iter(self.found)), None)  # the oldest
        self.found[key] = ref(what)


class _ByNumber:
    """Values, or the memory of their handles, by number. A number is never given again.

    Another process has other numbers, so that none of a graph from elsewhere means anything here.
    """

    def __init__(self) -> None:
        self._next = count(secrets.randbits(62))
        self.held: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def __contains__(self, number: int) -> bool:
        return number in self.held

    def number(self) -> int:
        return next(self._next)


_VALUES = _ByNumber()


def born(value: object) -> Tensor:
    """Return a handle for a value that is being made, and which will keep it.

    >>> from attnkit import masks
    >>> mask = masks.Causal()
    >>> told(mask._handle) == mask, told(mask._handle) is told(mask._handle)
    (True, True)
    """
    handle = _numbered()
    handle._owner = ref(value)
    return _tensor(handle)


def handle_of(value: object) -> Tensor:
    """Return a handle that keeps a value: of one that is made while a graph runs."""
    handle = _numbered()
    handle.value = value
    return _tensor(handle)


def number_of(value: object) -> int:
    """Return a number for a value, which somebody else keeps: ``told`` gives the value itself."""
    number = _VALUES.number()
    _VALUES.held[number] = value
    return number


def memory_of(handle: Tensor) -> Handle | None:
    """Return the memory that a handle was made with, if it is there; a copy will do."""
    found = _VALUES.held.get(int(handle))
    return found if isinstance(found, Handle) else None


def told(handle: Tensor) -> Any:
    """Return what a handle stands for; `CompositionError` where that is gone."""
    found = _VALUES.held.get(int(handle))
    value = found.read() if isinstance(found, Handle) else found
    if value is None:
        raise CompositionError(
            f"value {int(handle)} of a compiled attention is gone: its mask, bias or SeqLens was "
            "dropped while a copy of its handle was kept, or the graph comes from another process"
        )
    return value


def _numbered() -> Handle:
    number = _VALUES.number()
    handle = _VALUES.held[number] = Handle(number.to_bytes(_SIZE, sys.byteorder))
    return handle


def _tensor(memory: Handle) -> Tensor:
    if not torch.is_inference_mode_enabled():
        return torch.frombuffer(memory, dtype=torch.int64)
    with torch.inference_mode(False):  # a later training step keeps it for its backward
        return torch.frombuffer(memory, dtype=torch.int64)
