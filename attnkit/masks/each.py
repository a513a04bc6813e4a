"""A mask of its own for each head, or for each batch element: what the two have in common."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks.base import Enclosure, Mask, Rectangle, describe
from attnkit.masks.composite import Composite

__all__ = ["Each"]


@dataclass(frozen=True, repr=False, eq=False)
class Each(Composite):
    """Masks that an index of the score matrix chooses from."""

    what: ClassVar[str]
    """What has a mask each: a head, a batch element."""

    masks: tuple[Mask, ...]

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
            if self._own(mask) is not None:
                raise CompositionError(
                    f"{name} cannot nest {mask!r}, which has one entry per {self.what} itself; "
                    "combine the two by & or |"
                )
        object.__setattr__(self, "masks", tuple(self.masks))
        self._check_members()

    @staticmethod
    @abstractmethod
    def _own(mask: Mask) -> int | None:
        """Return how many entries a mask has of the same kind."""

    @abstractmethod
    def _chosen(self, batch: int, head: int) -> tuple[Mask, int, int]:
        """Return the mask of a score matrix, and the indices that it is asked with."""

    @property
    def members(self) -> tuple[Mask, ...]:
        """The masks, in order."""
        return self.masks

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """As the mask that is chosen."""
        mask, batch, head = self._chosen(batch, head)
        return mask.enclosure(q_len, kv_len, batch, head)

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        mask, batch, head = self._chosen(at.batch, at.head)
        return mask._read(at._replace(batch=batch, head=head), device)

    def _extends(self, shorter: int, longer: int, batch: int, head: int) -> bool:
        """As the mask that is chosen."""
        mask, batch, head = self._chosen(batch, head)
        return mask._extends(shorter, longer, batch, head)
