"""`OfHeads`: some of the heads of a mask that tells heads apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnkit.arguments import check_int, describe
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks.base import MASKS, Enclosure, Mask, Rectangle
from attnkit.masks.composite import Composite

__all__ = ["OfHeads", "check_heads"]


@MASKS.register("of_heads")
@dataclass(frozen=True, repr=False, eq=False)
class OfHeads(Composite):
    """Query heads ``start <= h < stop`` of another mask, counted from 0.

    `Mask.for_heads` makes one where a mask knows no closer form: of a function of heads, say.

    Raises `CompositionError` for heads that the mask does not tell apart.

    >>> from attnkit import masks
    >>> later = masks.Predicate(lambda b, h, i, j: j <= i + h, num_heads=4).for_heads(2, 4)
    >>> later.heads, int(later.materialize(4, 4, heads=2)[0, 0].sum())
    (2, 15)
    """

    mask: Mask
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            raise CompositionTypeError(f"OfHeads takes a mask, got {describe(self.mask)}")
        self._check_nesting()
        self._agreed  # noqa: B018 -- raises for a mask that comes with each call
        check_heads(self.mask, self.mask.heads, self.start, self.stop)
        if self.mask.heads is None:
            raise CompositionError(f"{self.mask!r} does not tell heads apart; it is that of any")

    @classmethod
    def of(cls, mask: Mask, start: int, stop: int) -> Mask:
        """Return what `Mask.for_heads` does."""
        check_heads(mask, mask.heads, start, stop)
        return mask if mask.heads in (None, stop - start) else mask._of_heads(start, stop)

    @property
    def members(self) -> tuple[Mask, ...]:
        """The mask of all heads."""
        return (self.mask,)

    @property
    def heads(self) -> int:
        """How many heads are left."""
        return self.stop - self.start

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Check the lengths against the mask, the heads against those that are left."""
        Mask.check(self, q_len, kv_len, batch, heads)
        self.mask.check(q_len, kv_len, batch)

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """As the mask's at that head."""
        return self.mask.enclosure(q_len, kv_len, batch, self.start + head)

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        return self.mask._read(at._replace(head=self.start + at.head), device)

    def _extends(self, shorter: int, longer: int, batch: int, head: int) -> bool:
        """As the mask at that head."""
        return self.mask._extends(shorter, longer, batch, self.start + head)

    def _of_heads(self, start: int, stop: int) -> Mask:
        return self.mask.for_heads(self.start + start, self.start + stop)


def check_heads(whole: object, most: int | None, start: object, stop: object) -> None:
    """Raise `CompositionError` unless these are heads of a mask or bias that tells `most` apart."""
    check_int("for_heads start", start, 0)
    check_int("for_heads stop", stop, 1)
    if not start < stop or (most is not None and stop > most):  # type: ignore[operator]
        told = "" if most is None else f" of {whole!r}, which tells {most} apart"
        raise CompositionError(
            f"heads {start} to {stop}{told}; give 0 <= start < stop, the heads that are left"
        )
