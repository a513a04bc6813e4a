"""What a planner may exploit of a bias: the few numbers that all of its cells are made of.

A bias that trains cannot reach the fused kernel as a bias, since the kernel never writes that
gradient. One whose cells follow from a small tensor can reach it another way: as channels of
query and key, or as logits that are added where partial softmaxes merge. A `Pse` family says
so by its `structure`; the small tensor is the first of its `tensors`. Positions are those of
the score matrix, and ``i' = i + (kv_len - q_len)`` for ``align="bottom_right"``, else i.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnkit.pse.base import Align

__all__ = ["Linear", "PerKey", "Stepped", "Structure"]


@dataclass(frozen=True)
class Linear:
    """``bias[h, i, j] = -tensor[h] * abs(i' - j)``, tensor [n]."""

    align: Align


@dataclass(frozen=True)
class PerKey:
    """``bias[b, h, i, j] = tensor[b, h, j]``, tensor [kv_len], [n, kv_len] or [b, n, kv_len]."""

    per_head: bool


@dataclass(frozen=True)
class Stepped:
    """``bias[h, i, j] = tensor[rows[k], h]`` where ``starts[k] <= j - i' < starts[k + 1]``.

    `starts` rise, and ``starts[0]`` stands for minus infinity: it is not looked at.

    >>> list(Stepped((0, 0, 4), (2, 0, 1), "bottom_right").steps(-3, 9))
    [(-3, -1, 2), (0, 3, 0), (4, 9, 1)]
    """

    starts: tuple[int, ...]
    rows: tuple[int, ...]
    align: Align

    def steps(self, lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first distance, last distance, row) of each step between two distances."""
        for k, row in enumerate(self.rows):
            first = lo if k == 0 else max(lo, self.starts[k])
            last = hi if k + 1 == len(self.rows) else min(hi, self.starts[k + 1] - 1)
            if first <= last:
                yield first, last, row


Structure = Linear | PerKey | Stepped
