"""Statistics that are made when somebody looks at them, or refused then."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

from torch import Tensor

from attnkit.backends.base import Stats

__all__ = ["Deferred"]


class Deferred(Stats):
    """Statistics behind a function: a caller who wants the output alone does not pay for them.

    >>> import torch
    >>> later = Deferred(lambda: Stats(torch.zeros(1), torch.ones(1)))
    >>> later.lse
    tensor([0.])
    """

    def __init__(self, make: Callable[[], Stats]) -> None:
        object.__setattr__(self, "_make", make)

    @cached_property
    def _made(self) -> Stats:
        make: Callable[[], Stats] = self.__dict__["_make"]
        return make()

    @property
    def max(self) -> Tensor:
        """The largest score of each row, or the log-sum-exp."""
        return self._made.max

    @property
    def sum(self) -> Tensor:
        """The sum that goes with it."""
        return self._made.sum

    def __repr__(self) -> str:
        return "Deferred(...)"
