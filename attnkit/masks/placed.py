"""`Placed`: a mask among other tokens, as that of an image among text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from attnkit.arguments import check_int, describe
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.masks.base import MASKS, Enclosure, Mask, Rectangle
from attnkit.masks.composite import Nested
from attnkit.masks.order import Order

__all__ = ["Placed"]

Count = int | tuple[int, int]


@MASKS.register("placed")
@dataclass(frozen=True, repr=False, eq=False)
class Placed(Nested):
    """A mask with other tokens before and after it: ``mask.allowed(i - before, j - before)``.

    The mask is one of the tokens between: those before and after see nothing here and are not
    seen, and what they see is said beside it. So class tokens, registers and text join the mask of
    a grid: ``Placed(grid, before=5) | Columns(0, 5) | Rows(0, 5)`` has five tokens in front that
    see all and are seen by all. `before` and `after` are one count, or (queries, keys) where these
    differ. It is the opposite of a cut: ``Placed(mask, 2)[2:, 2:]`` is the mask.

    Raises `CompositionError` at lengths where the mask between does not fit.

    >>> from attnkit import masks
    >>> image = masks.Neighborhood(4, 3)
    >>> print((Placed(image, before=1) | masks.Columns(0, 1) | masks.Rows(0, 1)).show(5, 5))
    #####
    ####.
    ####.
    #.###
    #.###
    >>> Placed(image, before=1).extent
    (5, 5)
    """

    mask: Mask
    before: Count = 0
    after: Count = 0

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(
            self, mask: Mask, before: int | Sequence[int] = 0, after: int | Sequence[int] = 0
        ) -> None: ...

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            raise CompositionTypeError(f"Placed takes a mask, got {describe(self.mask)}")
        self._check_nesting()
        for name in ("before", "after"):
            object.__setattr__(self, name, _count(f"Placed {name}", getattr(self, name)))

    @property
    def members(self) -> tuple[Mask, ...]:
        """The mask between."""
        return (self.mask,)

    @property
    def _first(self) -> tuple[int, int]:
        """The first row and key of the mask between."""
        return _pair(self.before)

    def _between(self, q_len: int, kv_len: int) -> tuple[int, int]:
        """The lengths that are left to the mask, or less than 0."""
        beside = zip((q_len, kv_len), _pair(self.before), _pair(self.after), strict=True)
        rows, keys = (length - first - last for length, first, last in beside)
        return rows, keys

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The lengths of the mask, and of what is beside it."""
        each = zip(self.mask.extent, _pair(self.before), _pair(self.after), strict=True)
        rows, keys = (None if own is None else own + a + b for own, a, b in each)
        return rows, keys

    @property
    def anchored(self) -> bool:
        """As the mask; and where tokens come after it, those move."""
        return super().anchored or self.after != 0

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Also check the mask between, at the lengths that are left to it."""
        super().check(q_len, kv_len, batch, heads)
        rows, keys = self._between(q_len, kv_len)
        if min(rows, keys) < 0:
            raise CompositionError(
                f"{self!r} has more tokens before and after its mask than the score matrix of "
                f"{q_len} x {kv_len} has; they count queries and keys alike, unless said apart"
            )
        self.mask.check(rows, keys, batch, heads)

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Move both bounds of the mask."""
        rows, keys = self._between(q_len, kv_len)
        known = self.mask.enclosure(max(rows, 0), max(keys, 0), batch, head)
        inner = known.inner.shift(*self._first)
        return Enclosure(inner, inner if known.exact else known.outer.shift(*self._first))

    def in_order(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Order | None:
        """As the mask between; the tokens before and after it stay where they are."""
        inner = self.mask.in_order(*self._between(q_len, kv_len), batch, head)
        if inner is None:
            return None
        orders = zip((inner.rows, inner.keys), self._first, (q_len, kv_len), strict=True)
        rows, keys = (
            tuple(part for part in (range(first), *moved, range(stop, length)) if part)
            for order, first, length in orders
            for moved in [tuple(range(r.start + first, r.stop + first, r.step) for r in order)]
            for stop in [first + sum(map(len, order))]
        )
        return Order(rows, keys, inner.region.shift(*self._first))

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        device = torch.get_default_device() if device is None else device
        lengths = self._between(at.q_len, at.kv_len)
        cells = torch.zeros(at.shape, dtype=torch.bool, device=device)
        ends = zip((at.rows, at.keys), self._first, lengths, strict=True)
        rows, keys = (
            (min(max(a - first, 0), size), min(max(b - first, 0), size))
            for (a, b), first, size in ends
        )
        if rows[0] < rows[1] and keys[0] < keys[1]:
            inside = Rectangle(rows, keys, *lengths, at.batch, at.head)
            starts = zip(self._first, (rows, keys), (at.rows, at.keys), strict=True)
            i, j = (first + own[0] - asked[0] for first, own, asked in starts)
            height, width = inside.shape
            cells[i : i + height, j : j + width] = self.mask._read(inside, device)
        return cells

    def _of_heads(self, start: int, stop: int) -> Mask:
        return replace(self, mask=self.mask.for_heads(start, stop))

    def _read(self, at: Rectangle, device: torch.device | str | None = None) -> torch.Tensor:
        return self._cells(at, device)  # which form is read is for the mask between to say


def _pair(count: Count) -> tuple[int, int]:
    return count if isinstance(count, tuple) else (count, count)


def _count(name: str, given: object) -> Count:
    if not isinstance(given, tuple | list):
        return check_int(name, given, 0)
    if len(given) != 2:
        raise CompositionTypeError(
            f"{name}={shown(given)} has {len(given)} entries; it is how many tokens there are, or "
            "(queries, keys)"
        )
    rows, keys = (check_int(f"{name}[{k}]", one, 0) for k, one in enumerate(given))
    return rows if rows == keys else (rows, keys)
