"""`PerHead`: a mask of its own for each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks.base import MASKS, Enclosure, Mask, Rectangle, describe
from attnkit.masks.composite import Composite

__all__ = ["PerHead"]


@MASKS.register("per_head")
@dataclass(frozen=True, repr=False, eq=False)
class PerHead(Composite):
    """Head h has the mask ``masks[h]``; one entry per query head.

    >>> from attnkit import masks
    >>> mixed = masks.PerHead([masks.Causal(), masks.SlidingWindow(2)])
    >>> [mixed.region(4, 4, head=h).area for h in (0, 1)]
    [10, 7]
    """

    masks: tuple[Mask, ...]

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(self, masks: Sequence[Mask]) -> None: ...

    def __post_init__(self) -> None:
        if not isinstance(self.masks, tuple | list):
            raise CompositionTypeError(
                f"PerHead takes a list of masks, one per query head; got {describe(self.masks)}"
            )
        if not self.masks:
            raise CompositionError("PerHead got no masks; give one for each query head")
        for mask in self.masks:
            if not isinstance(mask, Mask):
                raise CompositionTypeError(f"PerHead takes masks, got {describe(mask)}")
            if mask.heads is not None:
                raise CompositionError(
                    f"PerHead cannot nest {mask!r}, which tells heads apart itself; combine the "
                    "two by & or |"
                )
        object.__setattr__(self, "masks", tuple(self.masks))
        self._check_members()

    @property
    def members(self) -> tuple[Mask, ...]:
        """The masks of the heads."""
        return self.masks

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """As the head's own mask."""
        return self.masks[head].enclosure(q_len, kv_len, batch, 0)

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        return self.masks[at.head]._read(at._replace(head=0), device)

    def _extends(self, shorter: int, longer: int, batch: int, head: int) -> bool:
        """As the head's own mask."""
        return self.masks[head]._extends(shorter, longer, batch, 0)

    @property
    def heads(self) -> int | None:
        """One mask per head."""
        return len(self.masks)
