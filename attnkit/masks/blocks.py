"""Masks by blocks of positions: `Chunked`, `BlockCausal`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from attnkit.arguments import check_align, check_int
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Align, Mask, anchor

__all__ = ["BlockCausal", "Chunked"]


@dataclass(frozen=True, repr=False, eq=False)
class _Blocks(Mask):
    size: int
    align: Align = "bottom_right"
    _causal: ClassVar[bool]

    def __post_init__(self) -> None:
        check_int(f"{type(self).__name__} size", self.size, 1)
        check_align(type(self).__name__, self.align)

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        at = anchor(self.align, q_len, kv_len)
        if self.size == 1:  # one diagonal, not a slice per token
            lo = None if self._causal else at
            return Region.of(Slice(0, q_len, 0, kv_len, lo=lo, hi=at))
        first, last = at // self.size, (at + q_len - 1) // self.size
        return Region.of(
            *(
                Slice(
                    max(0, c * self.size - at),
                    min(q_len, (c + 1) * self.size - at),
                    0 if self._causal else max(0, c * self.size),
                    min(kv_len, (c + 1) * self.size),
                )
                for c in range(max(first, 0), last + 1)
            )
        )


@MASKS.register("chunked")
@dataclass(frozen=True, repr=False, eq=False)
class Chunked(_Blocks):
    """Keys in the query's own chunk: ``j // size == p // size``, p the query's position.

    >>> print(Chunked(2).show(4, 4))
    ##..
    ##..
    ..##
    ..##
    """

    _causal = False


@MASKS.register("block_causal")
@dataclass(frozen=True, repr=False, eq=False)
class BlockCausal(_Blocks):
    """Keys in the query's own block and the blocks before: ``j // size <= p // size``.

    >>> print(BlockCausal(2).show(4, 4))
    ##..
    ##..
    ####
    ####
    """

    _causal = True
