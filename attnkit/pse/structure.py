"""What a bias states of itself: the few numbers that all of its cells are made of.

Planner and backends read this value, and never ask which family a bias is of. A small tensor
is bound as slopes, in compressed rows, tile by tile, or, where it trains (the fused kernel
never writes the gradient of a bias), as channels of query and key and as logits where partial
softmaxes merge. The small tensor is the first of the bias's `structure_tensors`. Positions are
those of the score matrix, and ``i' = i + (kv_len - q_len)`` for ``align="bottom_right"``, i for
``"top_left"``, and ``i + align`` for a number: the key that query 0 stands at. All but
`Toeplitz` and `PerCell` are added after the scale. `heads_axis` is the tensor's axis of heads.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from attnkit.arguments import Align, Anchor

__all__ = [
    "Align",
    "Indexed",
    "Linear",
    "OfDistance",
    "PerCell",
    "PerKey",
    "Root",
    "Stepped",
    "Structure",
    "Toeplitz",
    "sum_of_steps",
]


@dataclass(frozen=True)
class Toeplitz:
    """``bias[h, i, j] = f(h, j - i')``: a number for each distance and head.

    >>> import torch
    >>> from attnkit.pse import DistanceBias
    >>> DistanceBias(torch.zeros(2, 7), -3).cut((0, 2), (1, 3), q_len=4, kv_len=4).structure
    Toeplitz(align='bottom_right')
    """

    heads_axis: ClassVar[int | None] = None

    align: Align


@dataclass(frozen=True)
class Linear:
    """``bias[h, i, j] = -slope[h] * abs(i' - j)``; slopes [n] are constants, or the tensor.

    >>> from attnkit.pse import ALiBi
    >>> ALiBi(2, learnable=True).structure
    Linear(align='bottom_right', slopes=None)
    >>> ALiBi([1.0]).cut((0, 2), (1, 3), q_len=4, kv_len=4).structure
    Linear(align=-1, slopes=(1.0,))
    """

    heads_axis: ClassVar[int | None] = -1

    align: Anchor
    slopes: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Root:
    """``bias[h, i, j] = -slope[h] * sqrt(abs(i' - j))``, of constant slopes.

    >>> from attnkit.pse import SqrtALiBi
    >>> SqrtALiBi([0.5]).structure
    Root(align='bottom_right', slopes=(0.5,))
    """

    heads_axis: ClassVar[int | None] = None

    align: Anchor
    slopes: tuple[float, ...]


@dataclass(frozen=True)
class PerKey:
    """``bias[b, h, i, j] = tensor[b, h, j]``, tensor [kv_len], [n, kv_len] or [b, n, kv_len].

    >>> import torch
    >>> from attnkit.pse import KeyBias
    >>> KeyBias(torch.zeros(2, 5)).structure
    PerKey(per_head=True)
    """

    heads_axis: ClassVar[int | None] = -2

    per_head: bool


@dataclass(frozen=True)
class PerCell:
    """``bias[b, h, i, j] = tensor[b, h, i, j]``: the tensor as it is, in its dtype.

    >>> import torch
    >>> from attnkit.pse import Dense
    >>> Dense(torch.zeros(2, 2)).structure
    PerCell()
    """

    heads_axis: ClassVar[int | None] = -3


@dataclass(frozen=True)
class Indexed:
    """``bias[b, h, i, j] = tensor[index[b, i, j], h]``, the index the second of its tensors.

    Either may have one column, or batch element, for all.

    >>> import torch
    >>> from attnkit.pse import Table
    >>> Table(torch.zeros(3, 2), torch.zeros(4, 4, dtype=torch.int64)).structure
    Indexed()
    """

    heads_axis: ClassVar[int | None] = -1


@dataclass(frozen=True)
class Stepped:
    """``bias[h, i, j] = tensor[rows[k], h]`` where ``starts[k] <= j - i' < starts[k + 1]``.

    `starts` rise, and ``starts[0]`` stands for minus infinity: it is not looked at.

    >>> list(Stepped((0, 0, 4), (2, 0, 1), "bottom_right").steps(-3, 9))
    [(-3, -1, 2), (0, 3, 0), (4, 9, 1)]
    """

    heads_axis: ClassVar[int | None] = -1

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


def sum_of_steps(parts: Sequence[Stepped]) -> tuple[Stepped, tuple[tuple[int, ...], ...]]:
    """Return the steps of a sum of stepped biases, and the row of each table on every step.

    The sum's own table has a row per step. All count distances alike.

    >>> near, far = Stepped((0, 0), (1, 0), "top_left"), Stepped((0, -4), (5, 6), "top_left")
    >>> sum_of_steps([near, far])
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


OfDistance = Toeplitz | Linear | Root | Stepped
"""The structures of a bias that depends on the distance ``j - i'`` and the head alone."""

Structure = OfDistance | PerKey | Indexed | PerCell
