"""The text form of masks and biases: a small, safe reader over Python's expression grammar.

Text is an expression of registered names, literals and the operators that the objects
define themselves: ``Causal() & ~SlidingWindow(64)``, ``ALiBi(8) + SqrtALiBi(8)``. Nothing is
executed but the constructors that the caller hands in.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, TypeVar, cast

from attnkit.errors import (
    LONGEST,
    AttnkitError,
    CompositionError,
    CompositionTypeError,
    clipped,
    shown,
)
from attnkit.registry import Registry, closest, suggestion

__all__ = [
    "LONGEST_TEXT",
    "LONGEST_WORDS",
    "Families",
    "arguments_text",
    "check_names",
    "evaluate",
]

LONGEST_WORDS = 1 << 18
"""Characters of a text that is read, what is in quotes left out."""

LONGEST_TEXT = 1 << 22
"""Characters of a text that is read, in all (a dense mask is one long word)."""

T = TypeVar("T")

_QUOTED = re.compile(r"""'[^'\\]*'|"[^"\\]*\"""")

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.Sub: operator.sub,
    ast.Add: operator.add,
}


def evaluate(text: str, names: Mapping[str, Callable[..., Any]], what: str) -> Any:
    """Read `text` with the constructors in `names`; `what` names the thing in messages.

    Raises `CompositionError` that repeats the text (its beginning) and points at what could not
    be read. A text of more than `LONGEST_TEXT` characters is not looked at, nor is one with
    more than `LONGEST_WORDS` outside of quotes.
    """
    if not isinstance(text, str):
        raise CompositionTypeError(
            f"expected the text of a {what}, got {shown(text)} ({type(text).__name__})"
        )
    _check_size(text, what)
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = _where(error)
        hint = "; what prints as <...> has no text form" if "<" in text else ""
        raise CompositionError(f"cannot read the {what} {shown(text)}: {where}{hint}") from None
    try:
        return _Reader(names, what).read(tree.body)
    except AttnkitError as error:
        raise type(error)(f"cannot read the {what} {shown(text)}: {error}") from None
    except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
        told = _where(error)
        raise CompositionError(f"cannot read the {what} {shown(text)}: {told}") from None


class Families(Registry[type[T]]):
    """The families of masks, or of biases: by the name in configs, and by class name in texts.

    `base` is what each derives from, in the `module` of attnkit whose entry points add others.
    """

    def __init__(self, what: str, base: type, module: str, example: str) -> None:
        super().__init__(what, f"attnkit.{module}")
        self.base, self.module, self.example = base, module, example

    def add(self, name: str, entry: type[T]) -> type[T]:
        """Register a family; its class name must be free too, for texts."""
        for known, family in self._entries.items():
            if family.__name__ == getattr(entry, "__name__", None) and known != name:
                raise CompositionError(
                    f"a {self.what} family named {entry.__name__} is registered already, as "
                    f"{known!r}; choose another class name, for {self.module}.parse tells families "
                    "apart by it"
                )
        derived = isinstance(entry, type) and issubclass(entry, self.base)
        if not derived or not is_dataclass(entry):
            raise CompositionTypeError(
                f"{shown(entry)} is not a {self.what} family; one is a frozen dataclass that "
                f"derives from {self.module}.{self.base.__name__} (put @dataclass(frozen=True) "
                "below the line that registers it)"
            )
        if vars(entry).get("__hash__", True) is None:
            raise CompositionTypeError(
                f"{shown(entry)} has no hash, and a {self.what} is a value: declare it with "
                "@dataclass(frozen=True)"
            )
        super().add(name, entry)
        cast(Any, entry).kind = name
        return entry

    def parse(self, text: str, functions: Mapping[str, Callable[..., Any]]) -> T:
        """Return the value that a text writes; `functions` may be called beside the families."""
        families = {family.__name__: family for _, family in self.items()}
        value = evaluate(text, {**functions, **families}, self.what)
        if not isinstance(value, self.base):
            raise CompositionError(
                f"the text {shown(text)} gives {shown(value)}, not a {self.what}; write for "
                f"instance {self.example!r}"
            )
        return cast(T, value)

    def value(
        self, name: str, given: object, read: Callable[[str], T], hint: Callable[[object], str]
    ) -> T:
        """Return an argument that is of a family, or the text of such a one, as the value.

        Raises `CompositionTypeError` for anything else; `hint` says what to do about it.
        """
        if isinstance(given, self.base):
            return cast(T, given)
        if isinstance(given, str):
            return read(given)
        if isinstance(given, type) and issubclass(given, self.base):
            told = f"is the class; call it: {name}={given.__name__}(...)"
        else:
            told = f"is a {type(given).__name__}; {hint(given)}"
        raise CompositionTypeError(f"{name}={shown(given)} {told}")


def _check_size(text: str, what: str) -> None:
    words = len(text)
    if LONGEST_WORDS < words <= LONGEST_TEXT:
        words -= sum(len(found[0]) for found in _QUOTED.finditer(text))
    if words > LONGEST_WORDS:
        raise CompositionError(
            f"cannot read the {what} {shown(text)}: the text is too long; it has at most "
            f"{LONGEST_WORDS} characters outside of quotes and {LONGEST_TEXT} in all (build what "
            "is larger in Python, or keep it with pickle)"
        )


def _where(error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return f"{clipped(error.msg, LONGEST)} at column {error.offset}"
    if isinstance(error, RecursionError | MemoryError):
        return "it is nested too deep; write a long chain as Or((a, b, ...)) or And((a, b, ...))"
    return clipped(str(error), LONGEST)


@dataclass(frozen=True)
class _Reader:
    names: Mapping[str, Callable[..., Any]]
    what: str

    def read(self, node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp):
            return self.chain(node)
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
            f"{_source(node)} is not part of the language; write calls of "
            f"{', '.join(self.names)} joined by operators"
        )

    def chain(self, node: ast.expr) -> Any:
        """Read ``a | b | c``, which nests to the left, without a call per operator."""
        rest: list[ast.BinOp] = []
        while isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
            rest.append(node)
            node = node.left
        if isinstance(node, ast.BinOp):
            raise CompositionError(
                f"{_source(node)} is not part of the language: its operators are & | - + ~"
            )
        value = self.read(node)
        for one in reversed(rest):
            value = _BINARY[type(one.op)](value, self.read(one.right))
        return value

    def call(self, node: ast.Call) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else _source(node.func)
        if name not in self.names:
            raise CompositionError(
                f"unknown {self.what} {clipped(name, LONGEST)}{suggestion(name, self.names)}"
            )
        given = [keyword.arg for keyword in node.keywords]
        if None in given:
            raise CompositionError(f"{_source(node)} unpacks a mapping; write key=value")
        twice = [key for key, times in Counter(given).items() if times > 1]
        if twice:
            raise CompositionError(f"{name} got {shown(twice[0])} twice; say it once")
        arguments = [self.read(argument) for argument in node.args]
        keywords = {k.arg: self.read(k.value) for k in node.keywords if k.arg is not None}
        return self.names[name](*arguments, **keywords)


def _source(node: ast.expr) -> str:
    """Return what stood in the text, or as much of it as a message holds."""
    try:
        return shown(ast.unparse(node))
    except (RecursionError, ValueError):
        return f"a {type(node).__name__}"


def check_names(family: type, given: Sequence[object], named: Mapping[str, object]) -> None:
    """Raise `CompositionTypeError` for named arguments that a family's constructor has not.

    Of the arguments that are still free it names the one that was probably meant: one that is
    spelt alike, or else the first.
    """
    code = getattr(family.__init__, "__code__", None)  # type: ignore[misc]
    if code is None or code.co_flags & inspect.CO_VARKEYWORDS:
        return
    known = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    wrong = [name for name in named if name not in known]
    if not wrong:
        return
    free = [name for name in known[len(given) :] if name not in named] or known
    alike = closest(wrong[0], free) or next((name for name in free if name in wrong[0]), free[0])
    raise CompositionTypeError(
        f"{family.__name__} takes no {shown(wrong[0])}: did you mean {alike}="
        f"{clipped(shown(named[wrong[0]]), LONGEST)}? Its arguments are {', '.join(known)}"
    )


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
        positional = positional and not item.kw_only
        positional = positional and (item.default is MISSING or not isinstance(given, str))
        parts.append(show(given) if positional else f"{item.name}={show(given)}")
    return ", ".join(parts)
