"""One small class behind the four registries: masks, biases, layouts, backends."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from attnkit.errors import CompositionError, CompositionTypeError, shown

__all__ = ["Registry", "closest"]

T = TypeVar("T")

_LONGEST_WORD = 100  # longer ones are close to no name, and are not compared


def closest(word: object, known: Iterable[str]) -> str | None:
    """Return the known word that a mistyped one may have meant; None if there is none.

    >>> closest("casual", ["full", "causal"])
    'causal'
    """
    if not isinstance(word, str) or len(word) > _LONGEST_WORD:
        return None
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


class Registry(Generic[T]):
    """Names to entries, in order of registration; a name is given once and never replaced.

    >>> fruits = Registry[int]("fruit")
    >>> fruits.add("apple", 3)
    3
    >>> fruits["apple"]
    3
    >>> fruits["aple"]
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: unknown fruit 'aple'; did you mean 'apple'? Known: apple
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register `entry` under `name`; an already taken name is an error."""
        if not isinstance(name, str):
            raise CompositionTypeError(
                f"a {self.what} is registered under a string, not {shown(name)} "
                f"({type(name).__name__})"
            )
        if name in self._entries:
            raise CompositionError(
                f"the {self.what} {shown(name)} is registered already "
                f"(as {shown(self._entries[name])}); choose another name"
            )
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers what it decorates under `name`.

        >>> greetings = Registry[type]("greeting")
        >>> @greetings.register("hello")
        ... class Hello:
        ...     pass
        >>> greetings["hello"] is Hello
        True
        """
        return lambda entry: self.add(name, entry)

    def remove(self, name: str) -> None:
        """Forget `name` (for plug-ins that unload, and for tests)."""
        self[name]
        del self._entries[name]

    def __getitem__(self, name: str) -> T:
        if name in self:
            return self._entries[name]
        close = closest(name, self._entries)
        hint = "." if close is None else f"; did you mean {close!r}?"
        raise CompositionError(
            f"unknown {self.what} {shown(name)}{hint} Known: {', '.join(self._entries)}"
        )

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def items(self) -> tuple[tuple[str, T], ...]:
        """Return the (name, entry) pairs as they are now."""
        return tuple(self._entries.items())
