"""`Sorted`: a mask on positions in the order that it knows of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from attnkit.errors import CompositionError
from attnkit.geometry import Region
from attnkit.masks import Mask, Order

__all__ = ["Sorted"]


@dataclass(frozen=True, repr=False, eq=False)
class Sorted(Mask):
    """A mask on positions in the order that it knows of: a region.

    >>> from attnkit.masks import Band, Dilated
    >>> window = Sorted(Dilated(2) & Band(4, 0))
    >>> window.region(8, 8).area == int((Dilated(2) & Band(4, 0)).materialize(8, 8).sum())
    True
    """

    mask: Mask

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        order = self.order(q_len, kv_len, batch, head)
        if order is None:
            raise CompositionError(
                f"{self.mask!r} is no region in any order of {q_len} queries and {kv_len} keys "
                "that it knows of"
            )
        return order.region

    def order(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Order | None:
        """Return the mask's own order at these lengths, if it has one; kept, for it may be long."""
        own = batch if self.mask.batches is not None else 0
        key = (q_len, kv_len, own, head if self.mask.heads is not None else 0)
        if key not in self._orders:
            found = self.mask.in_order(*key)
            fits = found is not None and found.fits(q_len, kv_len)
            self._orders[key] = found if fits else None
        return self._orders[key]

    @cached_property
    def _orders(self) -> dict[tuple[int, int, int, int], Order | None]:
        return {}

    @property
    def batches(self) -> int | None:
        """As the mask."""
        return self.mask.batches

    @property
    def heads(self) -> int | None:
        """As the mask."""
        return self.mask.heads

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """As the mask."""
        return self.mask.extent

    def __repr__(self) -> str:
        return f"{self.mask!r}, positions sorted"
