"""`Slice`: a rectangle of the score matrix cut by a diagonal band. Knows nothing of torch.

    {(i, j) : i0 <= i < i1,  j0 <= j < j1,  lo <= j - i <= hi}

These are difference bounds on i, j and j - i over the integers, so tightening every bound
(shortest paths in a graph of three nodes) is exact: emptiness, equality and inclusion are
decidable without looking at cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from attnkit.errors import CompositionTypeError, shown
from attnkit.strips import Strip, close_bounds, strip_area

__all__ = ["Slice", "canonical_strips", "strips_of"]

_BOUNDS = ("i0", "i1", "j0", "j1", "lo", "hi")
_END = (int, type(None))


@dataclass(frozen=True, init=False)
class Slice:
    """A rectangle of the score matrix cut by a diagonal band, with every bound tight.

    ``Slice(i0, i1, j0, j1, lo, hi)`` is ``{(i, j): i0<=i<i1, j0<=j<j1, lo<=j-i<=hi}``; ``None``
    for `lo` or `hi` means unbounded. Two slices with the same cells are equal; every empty
    slice equals ``Slice(0, 0, 0, 0)``.

    Raises `CompositionTypeError` for a bound that is not an integer.

    >>> Slice(0, 4, 0, 4, hi=0)              # causal, 4 x 4; the closure finds lo
    Slice(i0=0, i1=4, j0=0, j1=4, lo=-3, hi=0)
    >>> Slice(0, 4, 0, 4, hi=0).area
    10
    >>> Slice(0, 100, 0, 4, lo=0) == Slice(0, 4, 0, 4, lo=0)     # rows below 3 hold nothing
    True
    """

    i0: int
    i1: int
    j0: int
    j1: int
    lo: int
    hi: int

    def __init__(
        self, i0: int, i1: int, j0: int, j1: int, lo: int | None = None, hi: int | None = None
    ) -> None:
        ints = type(i0) is type(i1) is type(j0) is type(j1) is int
        if not (ints and type(lo) in _END and type(hi) in _END):
            raise _not_a_bound(i0, i1, j0, j1, lo, hi)
        # A frozen instance takes its values through its dict.
        own = self.__dict__
        (
            own["i0"],
            own["i1"],
            own["j0"],
            own["j1"],
            own["lo"],
            own["hi"],
        ) = close_bounds(i0, i1, j0, j1, lo, hi)

    def __bool__(self) -> bool:
        return self.i1 > self.i0

    def __contains__(self, cell: tuple[int, int]) -> bool:
        i, j = cell
        return self.i0 <= i < self.i1 and self.j0 <= j < self.j1 and self.lo <= j - i <= self.hi

    def __and__(self, other: Slice) -> Slice:
        if not isinstance(other, Slice):
            return NotImplemented
        return Slice(
            max(self.i0, other.i0),
            min(self.i1, other.i1),
            max(self.j0, other.j0),
            min(self.j1, other.j1),
            max(self.lo, other.lo),
            min(self.hi, other.hi),
        )

    def __le__(self, other: Slice) -> bool:
        """Whether every cell of this slice lies in `other`."""
        if not isinstance(other, Slice):
            return NotImplemented
        return (self & other) == self

    def shift(self, di: int, dj: int) -> Slice:
        """Return the slice moved down by `di` rows and right by `dj` keys."""
        if not self:
            return self
        d = dj - di
        return Slice(
            self.i0 + di, self.i1 + di, self.j0 + dj, self.j1 + dj, self.lo + d, self.hi + d
        )

    def transpose(self) -> Slice:
        """Return ``{(j, i) : (i, j) in self}``."""
        return Slice(self.j0, self.j1, self.i0, self.i1, -self.hi, -self.lo)

    @property
    def area(self) -> int:
        """The number of cells."""
        return sum(strip_area(strip) for strip in strips_of(self))

    @property
    def is_rectangle(self) -> bool:
        """Whether neither diagonal takes a corner off the rectangle."""
        return self.lo == self.j0 - self.i1 + 1 and self.hi == self.j1 - 1 - self.i0


def _not_a_bound(*given: object) -> CompositionTypeError:
    """Return the error for the first bound of a slice that is not what it should be."""
    for bound, name in zip(given, _BOUNDS, strict=True):
        if type(bound) not in (_END if name in ("lo", "hi") else (int,)):
            return CompositionTypeError(
                f"Slice got {name}={shown(bound)} ({type(bound).__name__}); bounds are Python "
                "ints" + (", or None for no bound" if name in ("lo", "hi") else "")
            )
    return CompositionTypeError(f"Slice got {shown(given)}")


def strips_of(part: Slice) -> list[Strip]:
    """Cut a slice at the rows where a diagonal end meets a vertical one (at most 3 strips)."""
    i0, i1, j0, j1, lo, hi = part.i0, part.i1, part.j0, part.j1, part.lo, part.hi
    if part.is_rectangle:
        return [Strip(i0, i1, ((j0, 0, j1, 0),))]
    cuts = sorted({i0, i1, min(max(j0 - lo, i0), i1), min(max(j1 - 1 - hi, i0), i1)})
    strips = []
    for a, b in pairwise(cuts):
        start = (a + lo, 1) if a + lo >= j0 else (j0, 0)
        stop = (a + hi + 1, 1) if a + hi + 1 < j1 else (j1, 0)
        strips.append(Strip(a, b, ((*start, *stop),)))
    return strips


def canonical_strips(part: Slice) -> tuple[Strip, ...]:
    """Return a slice as maximal strips, as `Canonical` would make them, without trying rows."""
    i1, j0, j1, lo, hi = part.i1, part.j0, part.j1, part.lo, part.hi
    strips, row = [], part.i0
    while row < i1:
        start, stop, end = max(j0, row + lo), min(j1, row + hi + 1), i1
        if row + 1 == i1:  # slopes of a single row mean nothing: keep them unique
            strips.append(Strip(row, i1, ((start, 0, stop, 0),)))
            break
        moves, follows = row + lo >= j0, row + hi + 1 < j1
        if not moves:  # until the diagonal is met
            end = min(end, j0 - lo + 1)
        if follows:
            end = min(end, j1 - hi)
        strips.append(Strip(row, end, ((start, int(moves), stop, int(follows)),)))
        row = end
    return tuple(strips)
