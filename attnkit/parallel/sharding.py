"""`Sharding`: which positions of an axis each rank has, as a value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from attnkit.arguments import check_int
from attnkit.errors import CompositionError, shown
from attnkit.ranges import Ranges, are_distinct, in_order, total

__all__ = ["Sharding"]


@dataclass(frozen=True)
class Sharding:
    """Which positions ``0 ... length - 1`` of an axis each rank has; each is with one rank.

    `ranks` has the positions of every rank in order, which is the order in which it holds them.
    A rank may have none. A packed batch is sharded along its axis of tokens.

    >>> halves = Sharding(8, ((range(0, 2), range(6, 8)), (range(2, 6),)))
    >>> halves.sizes, halves.owner(3), halves.positions(0).tolist()
    ((4, 4), 1, [0, 1, 6, 7])

    Raises `CompositionError` where a position is with no rank, or with two.
    """

    length: int
    ranks: tuple[Ranges, ...]

    def __post_init__(self) -> None:
        check_int("length", self.length, 0)
        if not self.ranks:
            raise CompositionError("Sharding got no rank; give the positions of each")
        object.__setattr__(self, "ranks", tuple(map(in_order, self.ranks)))
        every = tuple(chain.from_iterable(self.ranks))
        if total(every) != self.length or not are_distinct(every, self.length):
            raise CompositionError(
                f"Sharding got {shown(self.ranks)} for {self.length} positions; each of them is "
                "with one rank, and with one only"
            )

    @classmethod
    def of(cls, length: int, spans: Iterable[Iterable[tuple[int, int]]]) -> Sharding:
        """Return the sharding of spans ``(start, stop)``, those of rank 0 first.

        >>> Sharding.of(4, [[(0, 1), (3, 4)], [(1, 3)]]).sizes
        (2, 2)
        """
        return cls(length, tuple(tuple(range(a, b) for a, b in own if a < b) for own in spans))

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many positions each rank has."""
        return tuple(map(total, self.ranks))

    def owner(self, position: int) -> int:
        """Return the rank that has a position."""
        for rank, ranges in enumerate(self.ranks):
            if any(position in one for one in ranges):
                return rank
        raise CompositionError(f"position {position} is not one of {self.length}")

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Return the positions of a rank in the order in which it holds them, ``[s]``."""
        parts = [torch.arange(one.start, one.stop, device=device) for one in self.ranks[rank]]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)

    def take(self, tensor: Tensor, rank: int, dim: int = 1) -> Tensor:
        """Return a rank's part of a tensor that has all positions along `dim`.

        >>> Sharding.of(4, [[(0, 1), (3, 4)], [(1, 3)]]).take(torch.arange(4), 0, dim=0).tolist()
        [0, 3]
        """
        if tensor.shape[dim] != self.length:
            raise CompositionError(
                f"a tensor {list(tensor.shape)} has {tensor.shape[dim]} positions along dim {dim}; "
                f"this sharding is of {self.length}"
            )
        parts = [tensor.narrow(dim, one.start, len(one)) for one in self.ranks[rank]]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0)

    def restore(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """Return the whole of the parts of all ranks, each as `take` gives it.

        >>> two = Sharding.of(4, [[(0, 1), (3, 4)], [(1, 3)]])
        >>> two.restore([torch.tensor([0, 3]), torch.tensor([1, 2])], dim=0).tolist()
        [0, 1, 2, 3]
        """
        order = torch.cat([self.positions(r, parts[0].device) for r in range(self.size)])
        return torch.cat(list(parts), dim).index_select(dim, order.argsort())
