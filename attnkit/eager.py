"""What is made outside of graphs, even where `torch.compile` traces through its making."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["BIAS_IN_GRAPH", "MASK_IN_GRAPH", "untraced"]

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
