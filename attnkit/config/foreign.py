"""Mappings and lists of other libraries as dicts and lists: those of OmegaConf, above all.

A container that resolves what it holds, when it is read, may fail while it is read. That is told
as any other problem of a configuration, with the path of the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from attnkit.config.problems import NOTHING, Path, unread
from attnkit.config.text import MOST_DEPTH, MOST_NODES
from attnkit.errors import clipped

__all__ = ["plain", "read_plain"]

_WIDTH = 200


def plain(value: object) -> tuple[Any, dict[Path, str]]:
    """Return `value` in dicts and lists of its own, and what could not be read of it, by path.

    What holds nothing of other libraries is returned as it is.

    >>> from types import MappingProxyType
    >>> plain({"mask": MappingProxyType({"kind": "causal"})})
    ({'mask': {'kind': 'causal'}}, {})
    """
    containers = _Containers()
    return containers.read(value, ()), containers.told


def read_plain(value: object) -> Any:
    """Return what `plain` does; raise what pydantic collects where a part cannot be read.

    >>> read_plain([1, (2, 3)])
    [1, (2, 3)]
    """
    read, told = plain(value)
    if told:
        raise unread(told)
    return read


class _Containers:
    """One walk through data; `told` is what could not be read."""

    def __init__(self) -> None:
        self.told: dict[Path, str] = {}
        self._left = MOST_NODES  # keys and values of other libraries
        # Plain containers may be held in many places: each by its id, and what it was read as.
        self._known: dict[int, tuple[object, Any]] = {}

    def read(self, value: object, path: Path) -> Any:
        if isinstance(value, (dict, list, tuple)):
            # What is too deep, or holds itself, is left to `check_size`, which says so.
            if id(value) not in self._known and len(path) <= MOST_DEPTH:
                self._known[id(value)] = value, value
                self._known[id(value)] = value, self._same(value, path)
            return self._known.get(id(value), (value, value))[1]
        if isinstance(value, Mapping):
            return dict(self._foreign(value, value, path))
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray)):
            return [part for _, part in self._foreign(value, range(len(value)), path)]
        return value

    def _same(self, value: dict[Any, Any] | list[Any] | tuple[Any, ...], path: Path) -> Any:
        """Return a plain container, or a copy where something foreign is in it."""
        items = value.items() if isinstance(value, dict) else enumerate(value)
        read = {key: self.read(part, (*path, key)) for key, part in items}
        if isinstance(value, dict):
            return value if all(read[key] is value[key] for key in value) else read
        parts = list(read.values())
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else parts

    def _foreign(self, value: Any, keys: Iterable[Any], path: Path) -> Iterator[tuple[Any, Any]]:
        for key in keys:
            here = (*path, key)
            self._left -= 1
            if self._left < 0 or len(path) > MOST_DEPTH:
                self.told.setdefault(path[:1], "holds itself, or more than a configuration may")
                return
            try:
                part = value[key]
            except Exception as error:  # whatever its library raises
                first, *_ = str(error).splitlines() or [type(error).__name__]
                self.told[here] = f"cannot be read: {clipped(first, _WIDTH)}"
                part = NOTHING
            yield key, self.read(part, here)
