"""Texts and data of configurations: read safely, within stated limits.

A text is measured while it is parsed, and data before anything is validated: an alias counts as
often as it is used, so that ten lines cannot stand for a billion keys.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.constructor import ConstructorError, SafeConstructor
from yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    Event,
    NodeEvent,
)
from yaml.resolver import Resolver

from attnkit.errors import ConfigError, shown

__all__ = [
    "MOST_CHARACTERS",
    "MOST_DEPTH",
    "MOST_NODES",
    "check_size",
    "parts_of_data",
    "read_file",
    "read_json",
    "read_yaml",
]

MOST_CHARACTERS = 1_000_000
"""How long a text may be."""

MOST_NODES = 20_000
"""How many mappings, lists, keys and values a configuration may have; an alias counts as a copy."""

MOST_DEPTH = 140
"""How deep its mappings and lists may nest: what the deepest mask takes, two levels for each."""

# A number in base 60 takes time quadratic in its length.
_LONGEST_NUMBER = 1_000

# What PyYAML's and Python's readers of numbers, dates and tags raise for bad ones.
_BAD_SCALARS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def read_file(source: object) -> str:
    """Return the text of a file; `ConfigError` says what is wrong with it."""
    try:
        path = Path(source)  # type: ignore[arg-type]
    except TypeError:
        raise ConfigError(
            f"a configuration comes from a text or a pathlib.Path, not {shown(source)}"
        ) from None
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError:
        raise ConfigError(f"{shown(str(path))}: is no UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{shown(str(path))}: {reason}") from None


def read_yaml(text: str) -> Any:
    """Return the data that a YAML text writes."""
    _check_length(text)
    try:
        loader = _Loader(_measured(text))
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"the text is no YAML: {error}") from None
    except ConfigError:
        raise
    except _BAD_SCALARS as error:
        raise ConfigError(f"the text is no YAML: a value cannot be read: {error}") from None


def read_json(text: object) -> Any:
    """Return the data that a JSON text writes."""
    if not isinstance(text, (str, bytes, bytearray)):
        raise ConfigError(f"a JSON text is a string or bytes, not {shown(text)}")
    _check_length(text)
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(_too_deep()) from None
    except ValueError as error:
        raise ConfigError(f"the text is no JSON: {error}") from None


def parts_of_data(value: object) -> Iterable[object]:
    """Return what a mapping or a list holds; nothing for anything else."""
    if isinstance(value, Mapping):
        return (part for item in value.items() for part in item)
    return value if isinstance(value, (list, tuple)) else ()


def check_size(
    value: object, parts: Callable[[object], Iterable[object]] = parts_of_data
) -> str | None:
    """Return what makes `value` larger than a configuration may be; None for nothing.

    `parts` says what a value holds. What is held in two places counts twice, and is looked at
    once; nothing here recurses.
    """
    known: dict[int, tuple[int, int]] = {}  # nodes and depth
    open_: set[int] = set()
    todo: list[tuple[object, list[object] | None]] = [(value, None)]
    seen = 0
    while todo:
        here, inside = todo.pop()
        if inside is None:
            if id(here) in known:
                continue
            if id(here) in open_:
                return "it contains itself"
            inside = list(parts(here))
            seen += len(inside)
            if seen > MOST_NODES:
                return _too_many()
            if inside:
                open_.add(id(here))
                todo.append((here, inside))
                todo += [(part, None) for part in inside]
                continue
        sizes = [known[id(part)] for part in inside]
        nodes = 1 + sum(count for count, _ in sizes)
        depth = 1 + max(deepest for _, deepest in sizes) if sizes else 0
        if nodes > MOST_NODES:
            return _too_many()
        if depth > MOST_DEPTH:
            return _too_deep()
        known[id(here)] = nodes, depth
        open_.discard(id(here))
    return None


class _Loader(Composer, SafeConstructor, Resolver):
    """YAML's safe loader over events already read; a key that stands twice is a mistake."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events[::-1]
        Composer.__init__(self)
        SafeConstructor.__init__(self)
        Resolver.__init__(self)

    def check_event(self, *choices: type[Event]) -> bool:
        return bool(self._events) and (not choices or isinstance(self._events[-1], choices))

    def peek_event(self) -> Event | None:
        return self._events[-1] if self._events else None

    def get_event(self) -> Event | None:
        return self._events.pop() if self._events else None

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if (
            isinstance(node, yaml.ScalarNode)
            and node.tag != "tag:yaml.org,2002:str"
            and len(node.value) > _LONGEST_NUMBER
        ):
            raise ConstructorError(
                None, None, f"a number of {len(node.value):,} characters", node.start_mark
            )
        return super().construct_object(node, deep)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # the constructor refuses it
            if key in seen:
                raise ConstructorError(
                    None, None, f"the key {shown(key)} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _measured(text: str) -> list[Event]:
    """Return the events of a YAML text, aliases counted as copies of what they name."""
    events: list[Event] = []
    sizes: dict[str, tuple[int, int]] = {}  # nodes and depth of what has an anchor
    open_: list[tuple[str | None, list[tuple[int, int]]]] = [(None, [])]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        events.append(event)
        if isinstance(event, CollectionStartEvent):
            sizes.pop(event.anchor or "", None)
            open_.append((event.anchor, []))
            if len(open_) > MOST_DEPTH + 1:
                raise ConfigError(_too_deep())
            continue
        if isinstance(event, CollectionEndEvent):
            anchor, parts = open_.pop()
            size = (1 + sum(n for n, _ in parts), 1 + max((d for _, d in parts), default=0))
        elif isinstance(event, AliasEvent):
            if any(event.anchor == anchor for anchor, _ in open_):
                raise ConfigError("it contains itself")
            anchor, size = None, sizes.get(event.anchor or "", (1, 0))
        elif isinstance(event, NodeEvent):
            anchor, size = event.anchor, (1, 0)
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        open_[-1][1].append(size)
        if len(events) > 2 * MOST_NODES or size[0] > MOST_NODES:
            raise ConfigError(_too_many())
        if size[1] + len(open_) - 1 > MOST_DEPTH:
            raise ConfigError(_too_deep())
    return events


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"the key {shown(name)} stands twice")
        found[name] = value
    return found


def _check_length(text: str | bytes | bytearray) -> None:
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(
            f"the text has {len(text):,} characters or more; a configuration has at most "
            f"{MOST_CHARACTERS:,} (large masks are built in code)"
        )


def _too_many() -> str:
    return (
        f"it has more than {MOST_NODES:,} keys and values (an alias counts as a copy); give a mask "
        "of that size as an object, in code"
    )


def _too_deep() -> str:
    return (
        f"it nests deeper than {MOST_DEPTH} levels; write flat lists: {{kind: and, parts: [...]}} "
        "takes any number of parts"
    )
