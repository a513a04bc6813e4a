"""`Choices`: how an author wants attention to be spread, in words; "auto" is left to the price."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from attnkit.arguments import check_bool, check_choice, check_int
from attnkit.errors import CompositionError, shown

__all__ = ["DROPOUTS", "METHODS", "Choices", "divisors"]

METHODS = {
    "auto": "the cheapest",
    "needed": "the keys that rows see",
    "ring": "all keys, a rank's at a time",
    "gather": "all keys at once",
    "ulysses": "tokens for heads, among all ranks",
    "hybrid": "tokens for heads among neighbours, and the keys that rows see between these",
}
DROPOUTS = {
    "global": "the cells that one process would drop",
    "local": "cells of each share's own choice, for kernels that count their own",
}


@dataclass(frozen=True)
class Choices:
    """What is asked for of the exchange; `attnkit.parallel.plan` says what each word means.

    `dropout` is which cells are dropped. Raises `CompositionError` for what is no choice.
    """

    method: str = "auto"
    heads_ways: int | Literal["auto"] = "auto"
    stages: int | Literal["auto"] = "auto"
    keep: bool | Literal["auto"] = "auto"
    dropout: str = "global"

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("dropout", self.dropout, DROPOUTS)
        if self.stages != "auto":
            check_int("stages", self.stages, 1)
        if self.keep != "auto":
            check_bool("keep", self.keep, "or 'auto'")
        if self.heads_ways != "auto":
            check_int("heads_ways", self.heads_ways, 1)

    def check(self, size: int) -> None:
        """Raise unless a plan for so many ranks may be so."""
        ways = self.heads_ways
        if ways == "auto":
            return
        if size % ways:
            raise CompositionError(
                f"heads_ways={ways} does not divide {size} ranks into neighbourhoods; give a "
                f"divisor: {shown(divisors(size))}"
            )
        meant = {"ulysses": ways == size, "hybrid": ways > 1}
        if not meant.get(self.method, self.method == "auto" or ways == 1):
            raise CompositionError(
                f"method={self.method!r} with heads_ways={ways} on {size} ranks: 'ulysses' splits "
                "the heads over all ranks, 'hybrid' over some neighbours, other methods do not"
            )


def divisors(size: int) -> list[int]:
    """Return the numbers that divide another.

    >>> divisors(6)
    [1, 2, 3, 6]
    """
    return [ways for ways in range(1, size + 1) if size % ways == 0]
