"""One small class behind the four registries: masks, biases, layouts, backends."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from attnkit.errors import CompositionError, CompositionTypeError, shown

__all__ = ["Registry", "closest", "suggestion"]

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
    """Names to entries, in order of registration; a name is not given to two things.

    What is defined again replaces itself: `importlib.reload`, or a notebook's cell that runs
    twice, registers a class of the same module and name.

    Other packages register by entry points: `group` says whose modules are imported, once, when
    somebody asks for a name that is not known, or for all names.

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

    def __init__(self, what: str, group: str | None = None) -> None:
        self.what = what
        self._entries: dict[str, T] = {}
        self._group = group
        self._broken: list[str] = []
        self._watchers: list[Callable[[], None]] = []

    def add(self, name: str, entry: T) -> T:
        """Register `entry` under `name`; a name that something else has is an error."""
        if not isinstance(name, str):
            raise CompositionTypeError(
                f"a {self.what} is registered under a string, not {shown(name)} "
                f"({type(name).__name__})"
            )
        if name in self._entries and not _is_again(self._entries[name], entry):
            raise CompositionError(
                f"the {self.what} {shown(name)} is registered already "
                f"(as {shown(self._entries[name])}); choose another name"
            )
        self._entries[name] = entry
        self._changed()
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
        self._changed()

    def on_change(self, call: Callable[[], None]) -> None:
        """Call a function after every change: what was derived from the entries is old then."""
        self._watchers.append(call)

    def __getitem__(self, name: str) -> T:
        if name in self:
            return self._entries[name]
        raise self.unknown(name, suggestion(name, self._entries))

    def unknown(self, name: object, hint: str) -> CompositionError:
        """Return the error for a name that is not known; plug-ins that failed are told, too."""
        broken = "".join(f"\n  {told}" for told in self._broken)
        return CompositionError(f"unknown {self.what} {shown(name)}{hint}{broken}")

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        return name in self._entries or name in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def items(self) -> tuple[tuple[str, T], ...]:
        """Return the (name, entry) pairs as they are now."""
        return tuple(self._all().items())

    def _changed(self) -> None:
        for call in self._watchers:
            call()

    def _all(self) -> dict[str, T]:
        """Return the entries, those of other packages included."""
        group, self._group = self._group, None  # once, also while such a package is imported
        for point in entry_points(group=group) if group else ():
            try:
                point.load()
            except Exception as error:  # whatever a module raises when it is imported
                told = f"the plug-in {point.name} = {point.value} failed: {error!r}"
                self._broken.append(told)
                warnings.warn(f"attnkit: {told}", RuntimeWarning, stacklevel=3)
        return self._entries


def suggestion(
    word: object, known: Collection[str], aliases: Mapping[str, str] | None = None
) -> str:
    """Return ``; did you mean 'x'? Known: ...`` for a word that is not known.

    >>> suggestion("szie", ["kind", "size"])
    "; did you mean 'size'? Known: kind, size"
    """
    words = {name: name for name in known} | dict(aliases or {})
    close = closest(word, words)
    hint = "." if close is None else f"; did you mean {words[close]!r}?"
    return f"{hint} Known: {', '.join(known)}"


def _is_again(old: object, new: object) -> bool:
    """Whether two things are one that was defined twice: equal, or a class of the same place."""
    places = [
        (one.__module__, one.__qualname__)
        for one in (each if isinstance(each, type) else type(each) for each in (old, new))
    ]
    redefined = isinstance(old, type) or type(old) is not type(new)
    return old == new or (redefined and places[0] == places[1])
