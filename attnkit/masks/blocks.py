"""Masks by blocks of positions: `Chunked`, `BlockCausal`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnkit.arguments import IntsLike, check_align, check_int, check_ints
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Align, Mask, anchor

__all__ = ["BlockCausal", "Chunked"]

Phase = int | tuple[int, ...]


@dataclass(frozen=True, repr=False, eq=False)
class _Chunks(Mask):
    """Keys of the query's block and of some before; a block starts at each `size` + phase."""

    size: int
    align: Align = "bottom_right"
    phase: Phase = 0

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(
            self, size: int, align: Align = "bottom_right", phase: int | IntsLike = 0
        ) -> None: ...

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_int(f"{owner} size", self.size, 1)
        check_align(owner, self.align)
        if type(self.phase) is int:
            check_int(f"{owner} phase", self.phase, 0)
            object.__setattr__(self, "phase", self.phase % self.size)
        else:
            given = check_ints(f"{owner} phase", self.phase, 0)
            kept = tuple(one % self.size for one in given)
            object.__setattr__(self, "phase", kept)

    @property
    def _before(self) -> int | None:
        """How many blocks before its own a query sees; None is all."""
        return None

    @property
    def batches(self) -> int | None:
        """One phase per batch element, where they differ."""
        return None if isinstance(self.phase, int) else len(self.phase)

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        at, size, before = anchor(self.align, q_len, kv_len), self.size, self._before
        phase = self.phase if isinstance(self.phase, int) else self.phase[batch]
        if size == 1:  # one band, not a slice per token
            lo = None if before is None else at - before
            return Region.of(Slice(0, q_len, 0, kv_len, lo=lo, hi=at))
        first, last = (at - phase) // size, (at + q_len - 1 - phase) // size
        least = -1 if phase else 0  # the block that the first keys are the rest of
        return Region.of(
            *(
                Slice(
                    max(0, c * size + phase - at),
                    min(q_len, (c + 1) * size + phase - at),
                    0 if before is None else max(0, (c - before) * size + phase),
                    min(kv_len, (c + 1) * size + phase),
                )
                for c in range(max(first, least), last + 1)
            )
        )


@MASKS.register("chunked")
@dataclass(frozen=True, init=False, repr=False, eq=False)
class Chunked(_Chunks):
    """Keys in the query's own chunk: ``(j - phase) // size == (p - phase) // size``.

    p is the query's position. `phase` is where a chunk starts, 0 unless it is said: one number,
    or one for each batch element (texts that are padded on the left start elsewhere).

    >>> print(Chunked(2).show(4, 4))
    ##..
    ##..
    ..##
    ..##
    >>> print(Chunked(3, phase=1).show(5, 5))
    #....
    .###.
    .###.
    .###.
    ....#
    """

    @property
    def _before(self) -> int | None:
        return 0


@MASKS.register("block_causal")
@dataclass(frozen=True, repr=False, eq=False)
class BlockCausal(_Chunks):
    """Keys in the query's own block and the blocks before: ``j // size <= p // size``.

    `phase` is where a block starts, one number or one for each batch element: ``(j - phase) //
    size``. With `before`, a query sees so many blocks before its own: ``p // size - before <= j //
    size <= p // size``.

    >>> print(BlockCausal(2).show(4, 4))
    ##..
    ##..
    ####
    ####
    >>> print(BlockCausal(2, before=1).show(6, 6))
    ##....
    ##....
    ####..
    ####..
    ..####
    ..####
    """

    before: int | None = None

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(
            self,
            size: int,
            align: Align = "bottom_right",
            phase: int | IntsLike = 0,
            before: int | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.before is not None:
            check_int("BlockCausal before", self.before, 0)

    @property
    def _before(self) -> int | None:
        return self.before
