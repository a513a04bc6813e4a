"""Masks that depend on the distance from query to key: `Causal`, `SlidingWindow`, `Band`.

With the query's position p = i + anchor (anchor 0 for "top_left", kv_len - q_len for
"bottom_right"), each is a band around the diagonal j = p.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnkit.arguments import check_align, check_int
from attnkit.errors import CompositionError, shown
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Align, Mask, anchor

__all__ = ["Band", "Causal", "SlidingWindow"]


def _band(q_len: int, kv_len: int, align: Align, left: int | None, right: int | None) -> Region:
    """Return ``p - left <= j <= p + right``."""
    at = anchor(align, q_len, kv_len)
    lo = None if left is None else at - left
    hi = None if right is None else at + right
    return Region.of(Slice(0, q_len, 0, kv_len, lo, hi))


@MASKS.register("causal")
@dataclass(frozen=True, repr=False, eq=False)
class Causal(Mask):
    """Keys up to the query's own position: ``j <= p``.

    `align` says where query 0 is when the lengths differ. "bottom_right" (default): p = i +
    kv_len - q_len, so that the last query sees every key, as decoding with a cache needs.
    "top_left": p = i, as torch's ``is_causal`` has it. With more queries than keys, bottom-right
    leaves the first q_len - kv_len rows empty; top-left never leaves one.

    >>> print(Causal().show(2, 4))
    ###.
    ####
    >>> print(Causal(align="top_left").show(2, 4))
    #...
    ##..
    """

    align: Align = "bottom_right"

    def __post_init__(self) -> None:
        check_align("Causal", self.align)

    _alike_on_squares = True

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        return _band(q_len, kv_len, self.align, None, 0)


@MASKS.register("sliding_window")
@dataclass(frozen=True, repr=False, eq=False)
class SlidingWindow(Mask):
    """Exactly the last `size` keys, the query's own included: ``p - size < j <= p``.

    The field has two meanings for "a window of W"; this is the one that keeps W keys
    (transformers, xFormers). `Band` counts distances instead.

    >>> print(SlidingWindow(2).show(3, 3))
    #..
    ##.
    .##
    """

    size: int
    align: Align = "bottom_right"

    def __post_init__(self) -> None:
        if type(self.size) is int and self.size < 1:
            raise CompositionError(
                f"SlidingWindow(size={shown(self.size)}) is an empty window; size counts the keys "
                "that a query keeps, itself included, so it is at least 1"
            )
        check_int("SlidingWindow size", self.size, 1)
        check_align("SlidingWindow", self.align)

    _alike_on_squares = True

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        return _band(q_len, kv_len, self.align, self.size - 1, 0)


@MASKS.register("band")
@dataclass(frozen=True, repr=False, eq=False)
class Band(Mask):
    """Keys by distance, both ends inclusive: ``p - left <= j <= p + right``; None = unbounded.

    A negative end moves the band off the diagonal; ``left + right < 0`` is empty and an error.

    >>> print(Band(1, 1).show(4, 4))
    ##..
    ###.
    .###
    ..##
    """

    left: int | None
    right: int | None
    align: Align = "bottom_right"

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            end = getattr(self, name)
            if end is not None:
                check_int(f"Band {name}", end, None)
        if self.left is not None and self.right is not None and self.left + self.right < 0:
            raise CompositionError(
                f"Band(left={shown(self.left)}, right={shown(self.right)}) is empty: it keeps the "
                "keys from p - left to p + right, so left + right must be >= 0"
            )
        check_align("Band", self.align)

    _alike_on_squares = True

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        return _band(q_len, kv_len, self.align, self.left, self.right)

    @property
    def anchored(self) -> bool:
        """Only a bottom-right anchor moves with the lengths."""
        return super().anchored and not (self.left is None and self.right is None)
