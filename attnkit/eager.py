"""What is made outside of graphs, even where `torch.compile` traces through its making."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

__all__ = ["BIAS_IN_GRAPH", "MASK_IN_GRAPH", "between_graphs", "untraced"]

MASK_IN_GRAPH = (
    "masks of tensors and functions are made outside of compiled code: make this one before the "
    "compiled function (in __init__, or at module level) and pass it in"
)
BIAS_IN_GRAPH = (
    "positional biases of tensors are made outside of compiled code: make this one before the "
    "compiled function (in __init__, or at module level) and pass it in"
)

F = TypeVar("F", bound=Callable[..., Any])


def untraced(reason: str) -> Callable[[F], F]:
    """Mark a function that `torch.compile` leaves its graph for; `reason` is what it says then.

    All that `torch.compiler.disable` does to a function that is only called while tracing, but
    that one loads the compiler, for seconds.
    """

    def mark(function: F) -> F:
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return function

    return mark


def between_graphs(reason: str) -> Callable[[F], F]:
    """Mark a function as `untraced` does, and what it calls: no graph is made of any of it."""

    def mark(function: F) -> F:
        @untraced(reason)
        @wraps(function)
        def run(*given: Any) -> Any:
            # Without a compiler there is nobody to keep out, and loading one takes seconds.
            compiler = sys.modules.get("torch._dynamo")
            return function(*given) if compiler is None else compiler.disable(function)(*given)

        return cast("F", run)

    return mark
