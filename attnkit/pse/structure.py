"""What a planner may exploit of a bias: the few numbers that all of its cells are made of.

A bias that trains cannot reach the fused kernel as a bias, since the kernel never writes that
gradient. One whose cells follow from a small tensor can reach it another way: as channels of
query and key, or as logits that are added where partial softmaxes merge. A `Pse` family says
so by its `structure`; the small tensor is the first of its `tensors`. Positions are those of
the score matrix, and ``i' = i + (kv_len - q_len)`` for ``align="bottom_right"``, else i.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from attnkit.pse.base import Align

__all__ = ["Linear", "PerKey", "Stepped", "Structure", "joined"]


@dataclass(frozen=True)
class Linear:
    """``bias[h, i, j] = -tensor[h] * abs(i' - j)``, tensor [n].

    >>> from attnkit.pse import ALiBi
    >>> ALiBi(2, learnable=True).structure
    Linear(align='bottom_right')
    """

    align: Align


@dataclass(frozen=True)
class PerKey:
    """``bias[b, h, i, j] = tensor[b, h, j]``, tensor [kv_len], [n, kv_len] or [b, n, kv_len].

    >>> import torch
    >>> from attnkit.pse import KeyBias
    >>> KeyBias(torch.zeros(2, 5)).structure
    PerKey(per_head=True)
    """

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


def joined(parts: Sequence[Stepped]) -> tuple[Stepped, tuple[tuple[int, ...], ...]]:
    """Return the steps of a sum of stepped biases, and the row of each table on every step.

    The sum's own table has a row per step. All count distances alike.

    >>> near, far = Stepped((0, 0), (1, 0), "top_left"), Stepped((0, -4), (5, 6), "top_left")
    >>> joined([near, far])
    (Stepped(starts=(-4, -4, 0), rows=(0, 1, 2), align='top_left'), ((1, 1, 0), (5, 6, 6)))
    """
    cuts = sorted({start for part in parts for start in part.starts[1:]})
    firsts = [*cuts[:1], *cuts]
    rows = tuple(
        (part.rows[0], *(part.rows[bisect_right(part.starts, cut, 1) - 1] for cut in cuts))
        for part in parts
    )
    starts = tuple(firsts) if firsts else (0,)
    return Stepped(starts, tuple(range(len(cuts) + 1)), parts[0].align), rows


Structure = Linear | PerKey | Stepped
