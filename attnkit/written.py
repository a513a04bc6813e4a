"""Values that are made inside of a compiled function: written down there, made when the graph runs.

A tracer must not follow how a mask is made, nor keep one that it made itself. So while
`torch.compile` traces, a constructor or an operator of masks (of biases) leaves its own text in
the graph, ``Documents((2, 3))`` or ``combined('and', _0(), _1())``, in which ``_0()`` is the first
of the values that it is made of. One operator reads the text and gives a handle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import index
from typing import Any, cast

import torch
from torch import Tensor

from attnkit.handles import handle_of, told

__all__ = ["Writer"]

Reader = Callable[[str, Mapping[str, Callable[[], Any]]], Any]


class Writer:
    """How values of one kind are written into graphs: the operator of that kind.

    `read` gives the value of a text, with functions for the values that it is made of.
    """

    def __init__(self, name: str, kind: type, read: Reader) -> None:
        self.kind = kind
        self._made = torch.library.custom_op(
            f"attnkit::{name}",
            partial(_made, read),
            mutates_args=(),
            schema="(Tensor[] parts, str text) -> Tensor",
        )
        self._made.register_fake(_shape)

    def takes(self, *given: object) -> bool:
        """Whether arguments can be written: numbers, words, values of the kind, lists of those."""
        return all(
            self.takes(*one)
            if isinstance(one, (tuple, list))
            else isinstance(one, (int, float, str, self.kind)) or one is None
            for one in given
        )

    def write(self, name: str, given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
        """Return the handle of ``name(*given, **named)``, which the graph makes when it runs."""
        parts: list[Tensor] = []
        words = [self._word(one, parts) for one in given]
        words += [f"{key}={self._word(one, parts)}" for key, one in named.items()]
        return self.text(f"{name}({', '.join(words)})", parts)

    def text(self, text: str, parts: Sequence[Tensor] = ()) -> Tensor:
        """Return the handle of what a text writes, which the graph makes when it runs."""
        made: Tensor = self._made(list(parts), text)
        return made

    def _word(self, value: Any, parts: list[Tensor]) -> str:
        if isinstance(value, self.kind):
            parts.append(cast(Any, value)._handle)
            return f"_{len(parts) - 1}()"
        if isinstance(value, (tuple, list)):
            return "(" + "".join([self._word(one, parts) + ", " for one in value]) + ")"
        if isinstance(value, int) and not isinstance(value, bool):
            value = index(value)  # a size that the tracer would leave open
        return _literal(value)


def _literal(value: object) -> str:
    return repr(value)


_literal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _made(read: Reader, parts: list[Tensor], text: str) -> Tensor:
    return handle_of(read(text, {f"_{k}": partial(told, one) for k, one in enumerate(parts)}))


def _shape(parts: list[Tensor], text: str) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")
