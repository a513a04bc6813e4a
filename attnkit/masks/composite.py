"""What masks that are made of other masks share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from attnkit.masks.base import Mask, agree

__all__ = ["Composite"]


@dataclass(frozen=True, repr=False, eq=False)
class Composite(Mask):
    """A mask made of others (`members`), which must fit the same score matrices."""

    @property
    @abstractmethod
    def members(self) -> tuple[Mask, ...]:
        """The masks that this one is made of."""

    def _check_members(self) -> None:
        self.extent, self.batches, self.heads  # noqa: B018 -- each raises on disagreement

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Check every member, so that the message names the one that does not fit."""
        for member in self.members:
            member.check(q_len, kv_len, batch, heads)
        super().check(q_len, kv_len, batch, heads)

    @property
    def batches(self) -> int | None:
        """The count that the members agree on."""
        counts = [member.batches for member in self.members]
        return agree("batch sizes", self.members, counts, "give each one entry per batch element")

    @property
    def heads(self) -> int | None:
        """The count that the members agree on."""
        counts = [member.heads for member in self.members]
        return agree("head counts", self.members, counts, "give each one entry per query head")

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The lengths that the members agree on."""
        rows, keys = zip(*(member.extent for member in self.members), strict=True)
        remedy = "build them for the same lengths, or cut one: mask[a:b, c:d]"
        return (
            agree("q_len", self.members, rows, remedy),
            agree("kv_len", self.members, keys, remedy),
        )

    @property
    def anchored(self) -> bool:
        """Whether any member is anchored."""
        return any(member.anchored for member in self.members)
