"""`Selection`: what is known of blocks that are selected at run time, before they are.

Sizes of blocks, how many are selected, causality: all that a plan depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.geometry import Region, Slice
from attnkit.masks.base import Enclosure, Mask, Rectangle

if TYPE_CHECKING:
    from attnkit.masks.selected import SelectedBlocks

__all__ = ["BlockSight", "Selection"]


class BlockSight(NamedTuple):
    """What a query block sees: how many selected blocks, and keys of its own, ``[start, stop)``.

    Its own keys begin with a key block, and end with the query block's last query.
    """

    blocks: int
    start: int = 0
    stop: int = 0


@dataclass(frozen=True, repr=False, eq=False)
class Selection(Mask):
    """What is known of `SelectedBlocks` before a call: all but the numbers in its tensors.

    `shape` is that of the indices, ``[1 | b, heads, q_blocks, k]``.

    >>> from attnkit.masks import SelectedBlocks
    >>> chosen = SelectedBlocks(torch.zeros(1, 2, 4, 1, dtype=torch.int64), 16, 16, causal=True)
    >>> chosen.form
    SelectedBlocks(indices [1, 2, 4, 1], q_block=16, kv_block=16, causal=True)
    >>> chosen.form.sights(64)
    (BlockSight(blocks=0, start=0, stop=16), BlockSight(blocks=1, start=16, stop=32), \
BlockSight(blocks=1, start=32, stop=48), BlockSight(blocks=1, start=48, stop=64))
    """

    shape: tuple[int, int, int, int]
    q_block: int
    kv_block: int
    causal: bool
    gated: bool = False
    counted: bool = False
    comes_with_call = True

    @property
    def q_len(self) -> int:
        """The number of queries that it is for."""
        return self.shape[2] * self.q_block

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The number of queries, and any number of keys."""
        return self.q_len, None

    def sights(self, kv_len: int) -> tuple[BlockSight, ...]:
        """Return what each query block sees, of so many keys."""
        most = self.shape[3]
        if not self.causal:
            return (BlockSight(most),) * self.shape[2]
        first = kv_len - self.q_len
        starts = (first + i * self.q_block for i in range(self.shape[2]))
        return tuple(
            BlockSight(
                min(most, at // self.kv_block),
                at // self.kv_block * self.kv_block,
                at + self.q_block,
            )
            for at in starts
        )

    def choices(self, kv_len: int) -> tuple[int, ...]:
        """Return how many key blocks each query block may select from, counted from the first."""
        if not self.causal:
            return (kv_len // self.kv_block,) * self.shape[2]
        return tuple(sight.start // self.kv_block for sight in self.sights(kv_len))

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Raise `CompositionError` unless blocks and indices fit these sizes."""
        super().check(q_len, kv_len)
        if self.causal and kv_len < q_len:
            raise CompositionError(
                f"{self!r} is causal, and there are {q_len} queries for {kv_len} keys; queries are "
                "the last tokens of the keys' text"
            )
        if not self.causal and kv_len % self.kv_block:
            raise CompositionError(
                f"{self!r} selects whole blocks, and {kv_len} keys are not a multiple of "
                f"{self.kv_block}; pad the keys, or choose kv_block to divide their number"
            )
        if not self.causal and self.shape[3] > kv_len // self.kv_block:
            raise CompositionError(
                f"{self!r} has room for {self.shape[3]} different blocks, and {kv_len} keys are "
                f"{kv_len // self.kv_block}; select at most so many"
            )
        if batch is not None and self.shape[0] not in (1, batch):
            raise CompositionError(
                f"{self!r} tells {self.shape[0]} batch elements apart, and there are {batch}; "
                "indices are [b, heads, q_blocks, k], with 1 for all alike"
            )
        if heads is not None and heads % self.shape[1]:
            raise CompositionError(
                f"{self!r} selects for {self.shape[1]} heads, and there are {heads} query heads; "
                "it is 1 for all alike, the number of key heads, or of query heads"
            )

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Before the call: what lies in the past, or everything."""
        causal = Slice(0, q_len, 0, kv_len, hi=kv_len - q_len)
        around = Region.of(causal) if self.causal else Region.full(q_len, kv_len)
        return Enclosure(Region.empty(), around)

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> Tensor:
        raise CompositionTypeError(
            f"{self!r}: its indices come with each call, and a plan cannot read them"
        )

    def bound(self, tensors: Sequence[Tensor]) -> SelectedBlocks:
        """Return the mask with the tensors of a call: indices, gates and counts."""
        from attnkit.masks.selected import SelectedBlocks

        given = iter(tensors)
        indices = next(given)
        gates, counts = (next(given) if has else None for has in (self.gated, self.counted))
        return SelectedBlocks(indices, self.q_block, self.kv_block, self.causal, gates, counts)

    @property
    def anchored(self) -> bool:
        """Causality is anchored at the last query."""
        return self.causal

    def _text(self, show: Callable[[Any], str]) -> str:
        parts = [f"indices {list(self.shape)}"]
        parts += [f"q_block={self.q_block}", f"kv_block={self.kv_block}"]
        parts += ["causal=True"] * self.causal
        parts += [f"gates {list(self.shape)}"] * self.gated
        parts += [f"counts {list(self.shape[:3])}"] * self.counted
        return f"SelectedBlocks({', '.join(parts)})"
