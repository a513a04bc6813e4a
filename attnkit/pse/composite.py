"""Biases made of others: `Sum` of several, and `Cut`, the part of one inside a rectangle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
from torch import Tensor

from attnkit.arguments import anchor, check_range
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.masks.taken import taken_again
from attnkit.pse.base import Pse, Range, Rectangle
from attnkit.pse.part_of import PartOf
from attnkit.pse.structure import Linear, Root, Structure, Toeplitz
from attnkit.ranges import Excerpt, joined

__all__ = ["Cut", "Sum"]


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

    def take_excerpts(self, excerpts: Sequence[Excerpt]) -> Sum:
        """Return the sum of what is taken of each part."""
        return Sum(part.take_excerpts(excerpts) for part in self.parts)

    def _of_heads(self, start: int, stop: int) -> Sum:
        return Sum(part.for_heads(start, stop) for part in self.parts)

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


@dataclass(frozen=True, repr=False, eq=False)
class Cut(PartOf):
    """Rows and keys of another bias: ``bias[h, i, j] = part[h, i + q0, j + kv0]``.

    The whole score matrix has the lengths `q_len` x `kv_len`. Made by `Pse.cut` where a bias
    has no closer form. No cell outside of it is ever made.

    Raises `CompositionError` for ranges outside the matrix, and at use for other lengths.

    >>> from attnkit.pse import ALiBi
    >>> part = ALiBi([1.0]).cut((0, 1), (0, 3), q_len=3, kv_len=4)
    >>> part
    ALiBi(slopes=(1.0,)).cut((0, 1), (0, 3), q_len=3, kv_len=4)
    >>> part.materialize(1, 3)
    tensor([[[[-1., -0., -1.]]]])
    """

    q_range: Range
    kv_range: Range
    q_len: int
    kv_len: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("q_range", self.q_range, self.q_len)
        check_range("kv_range", self.kv_range, self.kv_len)
        vars(self).update(q_range=tuple(self.q_range), kv_range=tuple(self.kv_range))
        inner = self.part
        if not isinstance(inner, Cut):
            self.part.check(self.q_len, self.kv_len)
            return
        if (self.q_len, self.kv_len) != inner.extent:
            raise CompositionError(
                f"pse.{inner} is for score matrices of {inner.extent[0]} x {inner.extent[1]}, but "
                f"is cut as one of {self.q_len} x {self.kv_len}"
            )
        # A cut of a cut is one cut, however often it is cut.
        place = inner._whole(Rectangle(self.q_range, self.kv_range, self.q_len, self.kv_len))
        vars(self).update(part=inner.part, q_range=place.rows, kv_range=place.keys)
        vars(self).update(q_len=place.q_len, kv_len=place.kv_len)

    def _whole(self, at: Rectangle) -> Rectangle:
        """Return where a rectangle of the cut lies in the whole score matrix."""
        q0, kv0 = self.q_range[0], self.kv_range[0]
        rows, keys = (at.rows[0] + q0, at.rows[1] + q0), (at.keys[0] + kv0, at.keys[1] + kv0)
        return Rectangle(rows, keys, self.q_len, self.kv_len, at.batch)

    @property
    def structure(self) -> Structure | None:
        """A shift leaves distances as they differ, and moves the key that query 0 stands at."""
        known = self.part.structure
        if isinstance(known, Linear | Root):
            first = self.q_range[0] + anchor(known.align, self.q_len, self.kv_len)
            return replace(known, align=first - self.kv_range[0])
        return Toeplitz("bottom_right") if self.part.toeplitz else None

    @property
    def extent(self) -> tuple[int, int]:
        """The lengths of the two ranges."""
        return self.q_range[1] - self.q_range[0], self.kv_range[1] - self.kv_range[0]

    def _values(self, at: Rectangle, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        return self.part._values(self._whole(at), dtype, device)

    def take_excerpts(self, excerpts: Sequence[Excerpt]) -> Pse:
        """Return what is taken of the bias that is cut."""
        own = Excerpt(self.q_len, self.kv_len, joined([self.q_range]), joined([self.kv_range]))
        return self.part.take_excerpts(taken_again((own,), excerpts))

    def _of_heads(self, start: int, stop: int) -> Pse:
        return replace(self, part=self.part.for_heads(start, stop))

    def __repr__(self) -> str:
        where = f"{self.q_range}, {self.kv_range}, q_len={self.q_len}, kv_len={self.kv_len}"
        return f"{self.part!r}.cut({where})"
