"""`PerHead` and `PerBatch`: a mask of its own for each head, or for each batch element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from attnkit.masks.base import MASKS, Mask
from attnkit.masks.each import Each

__all__ = ["PerBatch", "PerHead"]


@MASKS.register("per_head")
@dataclass(frozen=True, repr=False, eq=False)
class PerHead(Each):
    """Head h has the mask ``masks[h]``; one entry per query head.

    >>> from attnkit import masks
    >>> mixed = masks.PerHead([masks.Causal(), masks.SlidingWindow(2)])
    >>> [mixed.region(4, 4, head=h).area for h in (0, 1)]
    [10, 7]
    """

    what: ClassVar[str] = "query head"

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(self, masks: Sequence[Mask]) -> None: ...

    @staticmethod
    def _own(mask: Mask) -> int | None:
        return mask.heads

    def _chosen(self, batch: int, head: int) -> tuple[Mask, int, int]:
        return self.masks[head], batch, 0

    @property
    def heads(self) -> int | None:
        """One mask per head."""
        return len(self.masks)


@MASKS.register("per_batch")
@dataclass(frozen=True, repr=False, eq=False)
class PerBatch(Each):
    """Batch element (or packed sequence) b has the mask ``masks[b]``.

    >>> from attnkit import masks
    >>> mixed = masks.PerBatch([masks.Causal(), masks.Full() & masks.Columns(0, 2)])
    >>> [mixed.region(4, 4, batch=b).area for b in (0, 1)]
    [10, 8]
    """

    what: ClassVar[str] = "batch element"

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(self, masks: Sequence[Mask]) -> None: ...

    @staticmethod
    def _own(mask: Mask) -> int | None:
        return mask.batches

    def _chosen(self, batch: int, head: int) -> tuple[Mask, int, int]:
        return self.masks[batch], 0, head

    @property
    def batches(self) -> int | None:
        """One mask per batch element."""
        return len(self.masks)
