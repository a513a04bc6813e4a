"""`PerHead`: a mask of its own for each head."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks.algebra import _agree
from attnkit.masks.base import MASKS, Enclosure, Mask

__all__ = ["PerHead"]


@MASKS.register("per_head")
@dataclass(frozen=True, repr=False)
class PerHead(Mask):
    """Head h has the mask ``masks[h]``; one entry per query head.

    >>> from attnkit import masks
    >>> mixed = masks.PerHead([masks.Causal(), masks.SlidingWindow(2)])
    >>> [mixed.region(4, 4, head=h).area for h in (0, 1)]
    [10, 7]
    """

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", tuple(self.masks))
        if not self.masks:
            raise CompositionError("PerHead got no masks; give one for each query head")
        for mask in self.masks:
            if not isinstance(mask, Mask):
                raise CompositionTypeError(f"PerHead takes masks, got {mask!r}")
            if mask.heads is not None:
                raise CompositionError(f"PerHead cannot nest {mask!r}, which tells heads apart")
        self.extent, self.batches  # noqa: B018 -- disagreement is an error now

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """As the head's own mask."""
        return self.masks[head].enclosure(q_len, kv_len, batch, 0)

    def _cells(
        self, q_len: int, kv_len: int, batch: int, head: int, device: torch.device | str | None
    ) -> torch.Tensor:
        return self.masks[head]._cells(q_len, kv_len, batch, 0, device)

    @property
    def batches(self) -> int | None:
        """The count that the heads agree on."""
        return _agree("batch sizes", self.masks, [mask.batches for mask in self.masks])

    @property
    def heads(self) -> int | None:
        """One mask per head."""
        return len(self.masks)

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The lengths that the heads agree on."""
        extents = [mask.extent for mask in self.masks]
        return (
            _agree("q_len", self.masks, [e[0] for e in extents]),
            _agree("kv_len", self.masks, [e[1] for e in extents]),
        )

    @property
    def anchored(self) -> bool:
        """Whether any head's mask is anchored."""
        return any(mask.anchored for mask in self.masks)
