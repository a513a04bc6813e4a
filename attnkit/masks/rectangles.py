"""Masks that are rectangles: `Columns`, `Rows`, `Prefix` and `PrefixLM`. (`Full` is in base.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnkit.arguments import IntsLike, check_int, check_ints
from attnkit.errors import CompositionError
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Align, Enclosure, Mask
from attnkit.masks.causal import Causal

__all__ = ["Columns", "Prefix", "PrefixLM", "Rows"]


@dataclass(frozen=True, repr=False, eq=False)
class _Range(Mask):
    start: int
    stop: int | None = None
    anchored = False

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_int(f"{owner} start", self.start, 0)
        if self.stop is not None:
            check_int(f"{owner} stop", self.stop, 0)
            if self.stop <= self.start:
                raise CompositionError(
                    f"{owner}({self.start}, {self.stop}) is empty; it keeps start <= index < stop"
                )


@MASKS.register("columns")
@dataclass(frozen=True, repr=False, eq=False)
class Columns(_Range):
    """A range of keys, for every query: ``start <= j < stop``; stop None = to the end.

    >>> print(Columns(1, 3).show(2, 4))
    .##.
    .##.
    """

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        stop = kv_len if self.stop is None else min(self.stop, kv_len)
        return Region.columns(q_len, [(self.start, stop)])


@MASKS.register("rows")
@dataclass(frozen=True, repr=False, eq=False)
class Rows(_Range):
    """A range of queries, with every key: ``start <= i < stop``; stop None = to the end.

    >>> print(Rows(0, 1).show(2, 3))
    ###
    ...
    """

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        stop = q_len if self.stop is None else min(self.stop, q_len)
        return Region.of(Slice(self.start, stop, 0, kv_len))


@MASKS.register("prefix")
@dataclass(frozen=True, repr=False, eq=False)
class Prefix(Mask):
    """The first `length` keys, for every query: ``j < length``, or ``j < length[batch]``.

    >>> print((Causal() | Prefix(2)).show(4, 4))
    ##..
    ##..
    ###.
    ####
    """

    length: int | tuple[int, ...]
    anchored = False

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(self, length: int | IntsLike) -> None: ...

    def __post_init__(self) -> None:
        if type(self.length) is int:
            check_int("Prefix length", self.length, 0)
        else:
            object.__setattr__(self, "length", check_ints("Prefix length", self.length, 0))

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        length = self.length if isinstance(self.length, int) else self.length[batch]
        return Region.columns(q_len, [(0, min(length, kv_len))])

    def _each_enclosure(self, q_len: int, kv_len: int, batch: int, head: int) -> list[Enclosure]:
        """Those of equal lengths are one."""
        lengths = (self.length,) if isinstance(self.length, int) else self.length[:batch]
        known = {n: self.enclosure(q_len, kv_len, b) for b, n in enumerate(lengths)}
        return [known[n] for n in lengths]

    @property
    def batches(self) -> int | None:
        """One length per batch element, where they differ."""
        return None if isinstance(self.length, int) else len(self.length)


def PrefixLM(length: int | IntsLike, align: Align = "bottom_right") -> Mask:
    """Return the prefix-LM mask ``Causal(align) | Prefix(length)``.

    >>> PrefixLM(3)
    Causal() | Prefix(3)
    """
    return Causal(align) | Prefix(length)
