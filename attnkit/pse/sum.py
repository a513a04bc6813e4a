"""`Sum`: several biases, each of which may reach a kernel in its own way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.pse.base import Pse, Rectangle

__all__ = ["Sum"]


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Sum(Pse):
    """The sum of several biases, ``p1 + p2``.

    The parts stay apart, because each may reach a kernel in its own way. Sums flatten
    and keep their order, since rounding makes the order of additions part of the value.
    Parts before and after the scale may mix; then there is no single matrix, and `term`
    takes the place of `materialize`.

    Raises `CompositionError` for no parts, or parts made for different heads or batches.

    >>> from attnkit.pse import ALiBi, SqrtALiBi
    >>> both = ALiBi(2) + SqrtALiBi(2)
    >>> both
    ALiBi(2) + SqrtALiBi(2)
    >>> (both + ALiBi(2)).parts == (ALiBi(2), SqrtALiBi(2), ALiBi(2))
    True
    """

    addends: tuple[Pse, ...]

    def __init__(self, addends: Iterable[Pse]) -> None:
        if not isinstance(addends, Iterable):
            raise CompositionTypeError(f"Sum adds a list of biases, not {shown(addends)}")
        flat: tuple[Pse, ...] = ()
        for addend in addends:
            if not isinstance(addend, Pse):
                raise CompositionTypeError(
                    f"Sum adds positional biases, not {type(addend).__name__}; "
                    "wrap a tensor as pse.Dense(tensor)"
                )
            flat += addend.parts
        if not flat:
            raise CompositionError("Sum of no biases; pass pse=None for none")
        object.__setattr__(self, "addends", flat)
        _agree("heads", [(part, part.heads) for part in flat])
        _agree("batch elements", [(part, part.batch) for part in flat])
        _agree("queries", [(part, part.extent[0]) for part in flat])
        _agree("keys", [(part, part.extent[1]) for part in flat])

    @property
    def members(self) -> tuple[Pse, ...]:
        """The addends, none of them a `Sum`."""
        return self.addends

    parts = members

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """The names that each addend gives its own, after its number."""
        names = enumerate(part.tensor_names for part in self.parts)
        return tuple(f"{k}_{name}" for k, own in names for name in own)

    @property
    def before_scale(self) -> bool:
        """Whether all parts are before the scale; a mixed sum has no answer and raises."""
        sides = {part.before_scale for part in self.parts}
        if len(sides) > 1:
            raise CompositionError(
                f"{self} mixes parts before and after the scale; ask each of .parts, or take "
                ".term(..., scale=...), which weighs each part"
            )
        return sides.pop()

    @property
    def toeplitz(self) -> bool:
        """Whether every part depends on the distance only."""
        return all(part.toeplitz for part in self.parts)

    def _bias_of(self, at: Rectangle) -> Sum:
        return Sum(part._bias_of(at) for part in self.parts)

    def _values(self, at: Rectangle, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        _ = self.before_scale  # raises for a mixed sum
        return reduce(add, (part._values(at, dtype, device).to(dtype) for part in self.parts))

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


def _agree(what: str, claims: list[tuple[Pse, int | None]]) -> None:
    made_for = [(part, count) for part, count in claims if count is not None]
    for part, count in made_for[1:]:
        first, expected = made_for[0]
        if count != expected:
            raise CompositionError(
                f"cannot add {first}, made for {expected} {what}, and {part}, made for {count}; "
                "both describe the same score matrices"
            )
