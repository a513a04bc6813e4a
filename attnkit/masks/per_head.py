"""`PerHead` and `PerBatch`: a mask for each head, or for each batch element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from attnkit.arguments import describe
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks.base import MASKS, Enclosure, Mask, Rectangle
from attnkit.masks.composite import Composite
from attnkit.masks.order import Order

__all__ = ["PerBatch", "PerHead"]


@dataclass(frozen=True, repr=False, eq=False)
class _Each(Composite):
    """Masks that an index of the score matrix chooses from; `what` has one each.

    `_counts` names the property that counts them.
    """

    what: ClassVar[str]
    _counts: ClassVar[str]
    masks: tuple[Mask, ...]

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(self, masks: Sequence[Mask]) -> None: ...

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.masks, tuple | list):
            raise CompositionTypeError(
                f"{name} takes a list of masks, one per {self.what}; got {describe(self.masks)}"
            )
        if not self.masks:
            raise CompositionError(f"{name} got no masks; give one for each {self.what}")
        for mask in self.masks:
            if not isinstance(mask, Mask):
                raise CompositionTypeError(f"{name} takes masks, got {describe(mask)}")
            if getattr(mask, self._counts) is not None:
                raise CompositionError(
                    f"{name} cannot nest {mask!r}, which has one entry per {self.what} itself; "
                    "combine the two by & or |"
                )
        object.__setattr__(self, "masks", tuple(self.masks))
        self._check_nesting()
        self._agreed  # noqa: B018 -- raises on disagreement

    def _chosen(self, batch: int, head: int) -> tuple[Mask, int, int]:
        """Return the mask of a score matrix, and the indices that it is asked with."""
        if self._counts == "heads":
            return self.masks[head], batch, 0
        return self.masks[batch], 0, head

    @property
    def members(self) -> tuple[Mask, ...]:
        """The masks, in order."""
        return self.masks

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """As the mask that is chosen."""
        mask, batch, head = self._chosen(batch, head)
        return mask.enclosure(q_len, kv_len, batch, head)

    def in_order(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Order | None:
        """As the mask that is chosen."""
        mask, batch, head = self._chosen(batch, head)
        return mask.in_order(q_len, kv_len, batch, head)

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        mask, batch, head = self._chosen(at.batch, at.head)
        return mask._read(at._replace(batch=batch, head=head), device)

    def _extends(self, shorter: int, longer: int, batch: int, head: int) -> bool:
        """As the mask that is chosen."""
        mask, batch, head = self._chosen(batch, head)
        return mask._extends(shorter, longer, batch, head)


@MASKS.register("per_head")
@dataclass(frozen=True, init=False, repr=False, eq=False)
class PerHead(_Each):
    """Head h has the mask ``masks[h]``; one entry per query head.

    >>> from attnkit import masks
    >>> mixed = masks.PerHead([masks.Causal(), masks.SlidingWindow(2)])
    >>> [mixed.region(4, 4, head=h).area for h in (0, 1)]
    [10, 7]
    """

    what = "query head"
    _counts = "heads"

    @property
    def heads(self) -> int | None:
        """One mask per head."""
        return len(self.masks)

    def _of_heads(self, start: int, stop: int) -> Mask:
        own = self.masks[start:stop]
        return own[0] if len(own) == 1 else PerHead(own)


@MASKS.register("per_batch")
@dataclass(frozen=True, init=False, repr=False, eq=False)
class PerBatch(_Each):
    """Batch element (or packed sequence) b has the mask ``masks[b]``.

    >>> from attnkit import masks
    >>> mixed = masks.PerBatch([masks.Causal(), masks.Full() & masks.Columns(0, 2)])
    >>> [mixed.region(4, 4, batch=b).area for b in (0, 1)]
    [10, 8]
    """

    what = "batch element"
    _counts = "batches"

    @property
    def batches(self) -> int | None:
        """One mask per batch element."""
        return len(self.masks)

    def _of_heads(self, start: int, stop: int) -> Mask:
        return PerBatch([mask.for_heads(start, stop) for mask in self.masks])
