"""`T5Relative`: a learnable logit per bucket of distances."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from attnkit.arguments import check_align, check_bool, check_floats, check_int
from attnkit.constants import constant
from attnkit.errors import CompositionError
from attnkit.pse.base import PSE, Align
from attnkit.pse.by_distance import MOST_HEADS, ByDistance
from attnkit.pse.structure import Stepped

__all__ = ["T5Relative", "t5_bucket"]

# Far beyond what has been trained; every distance up to the largest is looked at once.
_MOST_BUCKETS = 1 << 16
_MOST_DISTANCE = 1 << 20
_MOST_ENTRIES = 1 << 24


def t5_bucket(
    distance: Tensor, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    """Return the bucket of each distance ``j - i'``, as T5 counts them.

    Half of the buckets (of those of one direction, when `bidirectional`) hold one distance
    each; the others grow by a constant factor up to `max_distance`, and the last one holds all
    that is beyond. Without `bidirectional`, keys after the query share bucket 0.

    >>> t5_bucket(torch.tensor([-500, -20, -3, 0, 3]), bidirectional=False).tolist()
    [31, 17, 3, 0, 0]
    """
    check_int("t5_bucket: num_buckets", num_buckets, 1, _MOST_BUCKETS)
    check_int("t5_bucket: max_distance", max_distance, 1, _MOST_DISTANCE)
    base = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        base = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = num_buckets // 2
    # float32 and this order of operations, as in T5: they decide where buckets end.
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    large = exact + (share * (num_buckets - exact)).long()
    return base + torch.where(distance < exact, distance, large.clamp(max=num_buckets - 1))


@PSE.register("t5_relative")
@dataclass(frozen=True, init=False, repr=False, eq=False)
class T5Relative(ByDistance):
    """T5's relative bias: ``bias[h, i, j] = table[bucket(j - i'), h]``, added after the scale.

    ``i' = i + (kv_len - q_len)`` for ``align="bottom_right"``, so that the last query stands on
    the last key; ``i' = i`` for ``"top_left"``. `bidirectional` is T5's choice for encoders; a
    decoder has it off. (T5 itself does not scale its scores: ``scale=1.0``.)

    `table` is ``[num_buckets, n]``, the weight of T5's embedding: given, or zeros in an
    `nn.Parameter` that trains. The gradient reaches it on the fused kernel too. Materialises
    as ``[1, n, q_len, kv_len]`` in any floating dtype.

    Equality compares the table's content; configurations hold everything but the table.

    Raises `CompositionError` for buckets that cannot be formed or a table of another shape.

    Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified
    Text-to-Text Transformer" (JMLR 2020), and its published `_relative_position_bucket`.

    >>> T5Relative(8, bidirectional=False)
    T5Relative(8, bidirectional=False)
    >>> table = torch.arange(4.0)[:, None]
    >>> T5Relative(1, 4, 4, bidirectional=False, table=table).materialize(1, 6)
    tensor([[[[3., 3., 3., 2., 1., 0.]]]])
    """

    num_heads: int
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    align: Align = "bottom_right"
    table: Tensor = field(init=False)

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        align: Align = "bottom_right",
        *,
        table: Tensor | None = None,
    ) -> None:
        _check_buckets(num_heads, num_buckets, max_distance, bidirectional)
        check_align("T5Relative", align)
        shape = (num_buckets, num_heads)
        if table is None:
            table = nn.Parameter(torch.zeros(shape))
        check_floats("T5Relative: table", table)
        if tuple(table.shape) != shape:
            raise CompositionError(
                f"T5Relative: table {list(table.shape)}; it must be {list(shape)}, one logit per "
                "bucket and query head"
            )
        vars(self).update(num_heads=num_heads, num_buckets=num_buckets, max_distance=max_distance)
        vars(self).update(bidirectional=bidirectional, align=align, table=table)

    @property
    def heads(self) -> int:
        """The number of query heads: one column of the table each."""
        return self.num_heads

    @cached_property
    def structure(self) -> Stepped:
        """The distances at which buckets begin, and the bucket of each step."""
        with torch._C._DisableTorchDispatch():  # a plan may be made of fake tensors
            buckets = _buckets(
                self.num_buckets, self.max_distance, self.bidirectional, None
            ).tolist()
        begins = [k for k, row in enumerate(buckets) if k == 0 or row != buckets[k - 1]]
        starts = tuple(k - self.max_distance for k in begins)
        return Stepped(starts, tuple(buckets[k] for k in begins), self.align)

    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """Return each distance's entry of the table."""
        most = self.max_distance
        buckets = _buckets(self.num_buckets, most, self.bidirectional, distance.device)
        at = buckets[distance.clamp(-most, most) + most]
        # Not `table[at]`, whose gradient threads add up in any order.
        entries = self.table.to(dtype).index_select(0, at.flatten())
        return entries.view(*at.shape, self.num_heads).movedim(-1, 0)

    def __repr__(self) -> str:
        parts = [str(self.num_heads)]
        defaults = (("num_buckets", 32), ("max_distance", 128), ("bidirectional", True))
        for name, default in (*defaults, ("align", "bottom_right")):
            value = getattr(self, name)
            parts += [f"{name}={value!r}"] if value != default else []
        return f"T5Relative({', '.join(parts)})"


@constant
def _buckets(
    num_buckets: int, max_distance: int, bidirectional: bool, device: torch.device | None
) -> Tensor:
    """Return the buckets from the far past to the far future; all beyond is in the last ones."""
    distances = torch.arange(-max_distance, max_distance + 1, device=device)
    return t5_bucket(distances, num_buckets, max_distance, bidirectional)


def _check_buckets(
    num_heads: int, num_buckets: int, max_distance: int, bidirectional: bool
) -> None:
    for name, value, most in (
        ("num_heads", num_heads, MOST_HEADS),
        ("num_buckets", num_buckets, _MOST_BUCKETS),
        ("max_distance", max_distance, _MOST_DISTANCE),
    ):
        check_int(f"T5Relative: {name}", value, 1, most)
    check_bool("T5Relative: bidirectional", bidirectional)
    if num_heads * num_buckets > _MOST_ENTRIES:
        raise CompositionError(
            f"T5Relative: a table of {num_buckets} buckets for {num_heads} heads; it has at most "
            f"{_MOST_ENTRIES} entries"
        )
    unit = 4 if bidirectional else 2
    if num_buckets % unit:
        raise CompositionError(
            f"T5Relative: num_buckets={num_buckets} with bidirectional={bidirectional}; give a "
            f"multiple of {unit}: each direction has as many exact buckets as growing ones"
        )
    if max_distance <= num_buckets // unit:
        raise CompositionError(
            f"T5Relative: max_distance={max_distance} leaves nothing to the growing buckets, which "
            f"begin at {num_buckets // unit}; give a larger one"
        )
