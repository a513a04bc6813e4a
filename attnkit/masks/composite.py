"""What masks that are made of other masks share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from attnkit.masks.base import Mask, agree

__all__ = ["Agreement", "Composite", "agreement"]


class Agreement(NamedTuple):
    """What masks that are taken together agree on."""

    q_len: int | None
    kv_len: int | None
    batches: int | None
    heads: int | None
    anchored: bool


def agreement(masks: Sequence[Mask]) -> Agreement:
    """Return what masks agree on; raise `CompositionError` where they disagree."""
    rows, keys = zip(*(mask.extent for mask in masks), strict=True)
    batches, heads = [mask.batches for mask in masks], [mask.heads for mask in masks]
    lengths = "build them for the same lengths, or cut one: mask[a:b, c:d]"
    return Agreement(
        agree("q_len", masks, rows, lengths),
        agree("kv_len", masks, keys, lengths),
        agree("batch sizes", masks, batches, "give each one entry per batch element"),
        agree("head counts", masks, heads, "give each one entry per query head"),
        any(mask.anchored for mask in masks),
    )


@dataclass(frozen=True, repr=False, eq=False)
class Composite(Mask):
    """A mask made of others (`members`), which must fit the same score matrices."""

    @property
    @abstractmethod
    def members(self) -> tuple[Mask, ...]:
        """The masks that this one is made of."""

    def _check_members(self) -> None:
        self._check_nesting()
        self._agreed  # noqa: B018 -- raises on disagreement

    @cached_property
    def _agreed(self) -> Agreement:
        return agreement(self.members)

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Check every member, so that the message names the one that does not fit."""
        for member in self.members:
            member.check(q_len, kv_len, batch, heads)
        super().check(q_len, kv_len, batch, heads)

    def _extends(self, shorter: int, longer: int, batch: int, head: int) -> bool:
        """Every member extends, or what they make together does."""
        alike = all(member._extends(shorter, longer, batch, head) for member in self.members)
        return alike or super()._extends(shorter, longer, batch, head)

    @property
    def batches(self) -> int | None:
        """The count that the members agree on."""
        return self._agreed.batches

    @property
    def heads(self) -> int | None:
        """The count that the members agree on."""
        return self._agreed.heads

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The lengths that the members agree on."""
        return self._agreed.q_len, self._agreed.kv_len

    @property
    def anchored(self) -> bool:
        """Whether any member is anchored."""
        return self._agreed.anchored
