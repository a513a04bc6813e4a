"""Texts and data of configurations: read safely, within stated limits.

YAML is 1.2: `no` and `on` are words, and JSON is YAML. A text is measured before anything is
made of it, and data before anything is validated: an alias counts as often as it is used, so
that ten lines cannot stand for a billion keys.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import SafeRepresenter

from attnkit.errors import ConfigError, shown
from attnkit.registry import suggestion

__all__ = [
    "MOST_CHARACTERS",
    "MOST_DEPTH",
    "MOST_NODES",
    "Origin",
    "check_size",
    "inner",
    "keys_of",
    "parts_of_data",
    "read_json",
    "read_yaml",
    "text_of",
    "write_yaml",
]

Keys = tuple[str | int, ...]

MOST_CHARACTERS = 1_000_000
"""How long a text may be."""

MOST_NODES = 20_000
"""How many mappings, lists, keys and values a configuration may have; an alias counts as a copy."""

MOST_DEPTH = 140
"""How deep its mappings and lists may nest: what the deepest mask takes, two levels for each."""

_TOO_MANY = (
    f"it has more than {MOST_NODES:,} keys and values (an alias counts as a copy); give a mask "
    "of that size as an object, in code"
)
_TOO_DEEP = (
    f"it nests deeper than {MOST_DEPTH} levels; write flat lists: {{kind: and, parts: [...]}} "
    "takes any number of parts"
)

# What readers of numbers, dates and tags raise for bad ones.
_BAD_SCALARS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def text_of(source: object) -> str:
    """Return a text, or that of a file; `ConfigError` says what is wrong with it."""
    if isinstance(source, str):
        return source
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
        raise ConfigError(f"{shown(str(path))}: is not UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{shown(str(path))}: {reason}") from None


def read_yaml(text: str) -> Any:
    """Return the data that a YAML text writes."""
    _check_length(text)
    try:
        yaml = _yaml()
        node = _nodes(text)
        too_large = check_size(node, _inside)
        if too_large is not None:
            raise ConfigError(too_large)
        data: Any = None if node is None else yaml.constructor.construct_document(node)
        return data
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"{_line_and_column(text, mark.index)}: "
        told = str(error.problem).partition(" with value")[0]  # of a key that appears twice
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"the text is not YAML: {where}{told}{context}") from None
    except ReaderError as error:
        where = _line_and_column(text, error.position)
        raise ConfigError(f"the text is not YAML: {where}: {error.reason}") from None


def write_yaml(data: Any) -> str:
    """Return a text that `read_yaml` reads back as `data`; what is innermost is on one line."""
    yaml: Any = _yaml()  # its options are typed as what they start with
    text = io.StringIO()
    yaml.default_flow_style, yaml.width = None, 100
    yaml.sort_base_mapping_type_on_output = False
    yaml.dump(data, text)
    return text.getvalue()


@dataclass(frozen=True)
class Origin:
    """A YAML text, and the keys under which data was taken from it."""

    text: str
    keys: Keys = ()

    def place(self, path: Keys) -> str:
        """Return where the value at a path of the data stands, or what comes closest to it.

        >>> Origin("mask:\\n  kind: causal\\n  size: 3\\n", ("mask",)).place(("size",))
        'line 3, column 9'
        """
        node = self._root
        for step in (*self.keys, *path):
            inside = _values(node)
            if step not in inside:
                break
            node = inside[step]
        return "" if node is None else _line_and_column(self.text, node.start_mark.index)

    @cached_property
    def _root(self) -> Node | None:
        return _nodes(self.text)


def keys_of(at: str) -> Keys:
    """Return the keys that ``model.layers.0`` writes."""
    return tuple(int(key) if key.isdecimal() else key for key in at.split(".")) if at else ()


def inner(data: Any, at: str) -> Any:
    """Return what is under such keys; `ConfigError` says which key there is instead.

    >>> inner({"model": {"layers": [1, 2]}}, "model.layers.1")
    2
    """
    for k, key in enumerate(keys := keys_of(at)):
        known = dict(enumerate(data)) if isinstance(data, list) else data
        if not isinstance(known, Mapping) or key not in known:
            there = ".".join(map(str, keys[:k])) or "the top"
            names = list(map(str, known)) if isinstance(known, Mapping) else []
            raise ConfigError(f"at {there} there is no key {key!r}{suggestion(key, names)}")
        data = known[key]
    return data


def _values(node: Node | None) -> Mapping[Any, Node]:
    if isinstance(node, SequenceNode):
        return dict(enumerate(node.value))
    if isinstance(node, MappingNode):
        return {key.value: value for key, value in node.value if isinstance(key, ScalarNode)}
    return {}


def _line_and_column(text: str, index: int) -> str:
    before = text[:index]
    return f"line {before.count(chr(10)) + 1}, column {index - before.rfind(chr(10))}"


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
        raise ConfigError(_TOO_DEEP) from None
    except ValueError as error:
        raise ConfigError(f"the text is not JSON: {error}") from None


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
                return _TOO_MANY
            if inside:
                open_.add(id(here))
                todo.append((here, inside))
                todo += [(part, None) for part in inside]
                continue
        sizes = [known[id(part)] for part in inside]
        nodes = 1 + sum(count for count, _ in sizes)
        depth = 1 + max(deepest for _, deepest in sizes) if sizes else 0
        if nodes > MOST_NODES:
            return _TOO_MANY
        if depth > MOST_DEPTH:
            return _TOO_DEEP
        known[id(here)] = nodes, depth
        open_.discard(id(here))
    return None


class _Constructor(SafeConstructor):
    """Makes plain data; says where a value is that cannot be read."""

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _BAD_SCALARS as error:
            raise ConstructorError(
                None, None, f"a value cannot be read: {error}", node.start_mark
            ) from None


class _Representer(SafeRepresenter):
    """Writes 1e-07 as 1.0e-07, which readers of YAML 1.1 do not take for a text."""

    def represent_float(self, data: float) -> ScalarNode:
        node = super().represent_float(data)
        if "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node


_Representer.add_representer(float, _Representer.represent_float)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor, yaml.Representer = _Constructor, _Representer
    return yaml


def _nodes(text: str) -> Node | None:
    """Return the tree of a text, every value with its place, whose size is checked while read."""
    depth = 0
    for count, event in enumerate(_yaml().parse(text)):
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise ConfigError(_TOO_DEEP)
        if count > 2 * MOST_NODES:
            raise ConfigError(_TOO_MANY)
    node: Node | None = _yaml().compose(text)
    return node


def _inside(node: object) -> Iterable[object]:
    if isinstance(node, MappingNode):
        return (part for pair in node.value for part in pair)
    return node.value if isinstance(node, SequenceNode) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ConfigError(f"the key {shown(name)} appears twice")
        found[name] = value
    return found


def _check_length(text: str | bytes | bytearray) -> None:
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(
            f"the text has {len(text):,} characters or more; a configuration has at most "
            f"{MOST_CHARACTERS:,} (large masks are built in code)"
        )
