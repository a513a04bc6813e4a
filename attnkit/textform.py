"""The text form of masks and biases: a small, safe reader over Python's expression grammar.

Text is an expression of registered names, literals and the operators that the objects
define themselves: ``Causal() & ~SlidingWindow(64)``, ``ALiBi(8) + SqrtALiBi(8)``. Nothing is
executed but the constructors that the caller hands in.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from attnkit.errors import AttnkitError, CompositionError, CompositionTypeError, shown

__all__ = ["arguments_text", "evaluate"]

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.Sub: operator.sub,
    ast.Add: operator.add,
}


def evaluate(text: str, names: Mapping[str, Callable[..., Any]], what: str) -> Any:
    """Read `text` with the constructors in `names`; `what` names the thing in messages.

    Raises `CompositionError` that repeats the text and points at what could not be read.
    """
    if not isinstance(text, str):
        raise CompositionTypeError(
            f"expected the text of a {what}, got {shown(text)} ({type(text).__name__})"
        )
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f"{error.msg} at column {error.offset}" if isinstance(error, SyntaxError) else error
        hint = "; what prints as <...> has no text form" if "<" in text else ""
        raise CompositionError(f"cannot read the {what} {text!r}: {where}{hint}") from None
    try:
        return _Reader(names, what).read(tree.body)
    except AttnkitError as error:
        raise type(error)(f"cannot read the {what} {text!r}: {error}") from None
    except (TypeError, LookupError, RecursionError) as error:
        raise CompositionError(f"cannot read the {what} {text!r}: {error}") from None


class _Reader:
    def __init__(self, names: Mapping[str, Callable[..., Any]], what: str) -> None:
        self.names = names
        self.what = what

    def read(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            return _BINARY[type(node.op)](self.read(node.left), self.read(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert | ast.USub):
            value = self.read(node.operand)
            return ~value if isinstance(node.op, ast.Invert) else -value
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.Subscript):
            return self.read(node.value)[self.read(node.slice)]
        if isinstance(node, ast.Slice):
            ends = (node.lower, node.upper, node.step)
            return slice(*(self.read(end) if end is not None else None for end in ends))
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self.read(item) for item in node.elts)
        if isinstance(node, ast.Constant) and isinstance(
            node.value, int | float | str | type(None)
        ):
            return node.value
        raise CompositionError(
            f"{ast.unparse(node)!r} is not part of the language; write calls of "
            f"{', '.join(self.names)} joined by operators"
        )

    def call(self, node: ast.Call) -> Any:
        name = ast.unparse(node.func)
        if name not in self.names:
            close = difflib.get_close_matches(name, self.names, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            raise CompositionError(
                f"unknown {self.what} {name}{hint} Known: {', '.join(self.names)}"
            )
        if any(keyword.arg is None for keyword in node.keywords):
            raise CompositionError(f"{ast.unparse(node)!r} unpacks a mapping; write key=value")
        arguments = [self.read(argument) for argument in node.args]
        keywords = {k.arg: self.read(k.value) for k in node.keywords if k.arg is not None}
        return self.names[name](*arguments, **keywords)


def arguments_text(value: Any, show: Callable[[Any], str] = repr) -> str:
    """Return a dataclass's arguments as text, trailing and named fields at their default left out.

    Words are named, everything else is positional until a field is left out:
    ``4, align='top_left'``.
    """
    parts = []
    positional = True
    for item in fields(value):
        given = getattr(value, item.name)
        if not item.init or (item.default is not MISSING and given == item.default):
            positional = False
            continue
        positional = positional and (item.default is MISSING or not isinstance(given, str))
        parts.append(show(given) if positional else f"{item.name}={show(given)}")
    return ", ".join(parts)
