"""`Sharding`: which positions of an axis each rank has, as a value."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise, repeat

import torch
from torch import Tensor

from attnkit.arguments import check_int
from attnkit.display import Text
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.planner.request import Request, state_of
from attnkit.ranges import Ranges, are_distinct, in_order, total

__all__ = ["MOST_RANKS", "Sharding", "between", "check_fits", "even_sizes", "owned"]

MOST_RANKS = 1 << 16
"""Ranks of a sharding, at most: nobody means more."""

_SHOWN = 12  # ranges that a repr lists
_LINES = 16  # ranks that a picture shows
# No position has more digits, and Python refuses to read numbers of thousands of them. A range ends
# before what is no part of it: "0:14:4" is not two of them.
_TEXT = re.compile(r"\s*(\d{1,20})\s*=((?:\s*(?:\d{1,20}:\d{1,20}(?![\d:])|\|))*)\s*")


@dataclass(frozen=True, repr=False)
class Sharding:
    """Which positions ``0 ... length - 1`` of an axis each rank has; each is with one rank.

    `ranks` has the positions of every rank in order, which is the order in which it holds them.
    A rank may have none. A packed batch is sharded along its axis of tokens. Shardings are values:
    they compare, hash, pickle, and print as text that `parse` reads back.

    >>> halves = Sharding(8, ((range(0, 2), range(6, 8)), (range(2, 6),)))
    >>> halves.sizes, halves.owner(3), halves.positions(0).tolist()
    ((4, 4), 1, [0, 1, 6, 7])
    >>> print(halves, "as text;", Sharding.parse("8 = 0:2 6:8 | 2:6") == halves)
    8 = 0:2 6:8 | 2:6 as text; True
    >>> print(halves.show())
    rank 0  ##....##  4 of 8 tokens in 2 ranges
    rank 1  ..####..  4 of 8 tokens

    Raises `CompositionError` where a position is with no rank, or with two.
    """

    length: int
    ranks: tuple[Ranges, ...]

    __getstate__ = state_of

    def __post_init__(self) -> None:
        check_int("length", self.length, 0)
        if not isinstance(self.ranks, tuple | list):
            raise CompositionTypeError(f"Sharding got ranks={shown(self.ranks)}; {_FORM}")
        object.__setattr__(self, "ranks", tuple(map(_positions, self.ranks)))
        if not 0 < len(self.ranks) <= MOST_RANKS:
            raise CompositionError(
                f"Sharding got {len(self.ranks)} ranks; there are from 1 to {MOST_RANKS:,}, each "
                "with its positions"
            )
        every = tuple(chain.from_iterable(self.ranks))
        if total(every) != self.length or not are_distinct(every, self.length):
            raise CompositionError(
                f"Sharding got {shown(self.ranks)} for {self.length} positions: "
                f"{_fault(self.length, self.ranks)}; each of them is with one rank, and with one "
                "only"
            )

    @classmethod
    def of(cls, length: int, spans: Iterable[Iterable[tuple[int, int]]]) -> Sharding:
        """Return the sharding of spans ``(start, stop)``, those of rank 0 first.

        >>> Sharding.of(4, [[(0, 1), (3, 4)], [(1, 3)]]).sizes
        (2, 2)
        """
        try:
            ranks = [[(start, stop) for start, stop in own] for own in spans]
        except (TypeError, ValueError):
            raise CompositionTypeError(
                f"Sharding.of got spans={shown(spans)}; give the spans (start, stop) of each rank, "
                "such as [[(0, 2), (6, 8)], [(2, 6)]]"
            ) from None
        for start, stop in chain.from_iterable(ranks):
            if check_int("start", start, 0) > check_int("stop", stop, 0):
                raise CompositionError(
                    f"Sharding.of got the span ({start}, {stop}); a span is (start, stop) with "
                    "start <= stop"
                )
        return cls(length, tuple(tuple(range(a, b) for a, b in own if a < b) for own in ranks))

    @classmethod
    def contiguous(cls, length: int, ranks: int) -> Sharding:
        """Return as many positions to each rank, to one: the first ones to rank 0, and so on.

        >>> print(Sharding.contiguous(8, 3))
        8 = 0:3 | 3:6 | 6:8
        """
        spans, start = [], 0
        for size in even_sizes(length, ranks):
            spans.append([(start, start + size)])
            start += size
        return cls.of(length, spans)

    @classmethod
    def zigzag(cls, length: int, ranks: int) -> Sharding:
        """Return as many positions to each rank, to one, half of them from either end.

        Of ``2 ranks`` chunks rank r has chunk r and chunk ``2 ranks - 1 - r``: under a causal mask
        all ranks have as many cells. The length may be any.

        >>> print(Sharding.zigzag(8, 2))
        8 = 0:2 6:8 | 2:6
        >>> print(Sharding.zigzag(9, 4))
        9 = 0:2 8:9 | 2:3 7:8 | 3:4 6:7 | 4:6
        """
        spans, start, stop = [], 0, length
        for size in even_sizes(length, ranks):
            back = size // 2
            spans.append([(start, start + size - back), (stop - back, stop)])
            start, stop = start + size - back, stop - back
        return cls.of(length, spans)

    @classmethod
    def parse(cls, text: str) -> Sharding:
        """Return the sharding that ``str(sharding)`` wrote.

        >>> Sharding.parse("4 = 1:3 | | 0:1 3:4").sizes
        (2, 0, 2)
        """
        found = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if found is None:
            raise CompositionError(
                f"{shown(text)} is no sharding; write the length, and the ranges of each rank: "
                "'8 = 0:2 6:8 | 2:6'"
            )
        spans = (
            [(int(a), int(b)) for a, b in re.findall(r"(\d+):(\d+)", own)]
            for own in found[2].split("|")
        )
        return cls.of(int(found[1]), spans)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """How many positions each rank has."""
        return tuple(map(total, self.ranks))

    def owner(self, position: int) -> int:
        """Return the rank that has a position.

        >>> Sharding.zigzag(8, 2).owner(7)
        0
        """
        if check_int("position", position, 0) >= self.length:
            raise CompositionError(
                f"position {position} is not one of {self.length}, counted from 0"
            )
        return self._owned[bisect_right(self._owned, position, key=lambda one: one[0]) - 1][2]

    @cached_property
    def _owned(self) -> list[tuple[int, int, int]]:
        return owned(self.ranks)

    def positions(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Return the positions of a rank in the order in which it holds them, ``[s]``.

        >>> Sharding.zigzag(8, 2).positions(0)
        tensor([0, 1, 6, 7])
        """
        own = self.ranks[self._checked(rank)]
        parts = [torch.arange(one.start, one.stop, device=device) for one in own]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)

    def take(self, tensor: Tensor, rank: int, dim: int = 1) -> Tensor:
        """Return a rank's part of a tensor that has all positions along `dim`.

        >>> Sharding.zigzag(4, 2).take(torch.arange(4), 0, dim=0).tolist()
        [0, 3]
        """
        self._check_axis(tensor, dim)
        own = self.ranks[self._checked(rank)]
        if tensor.shape[dim] != self.length:
            raise CompositionError(
                f"a tensor {list(tensor.shape)} has {tensor.shape[dim]} positions along dim {dim}; "
                f"this sharding is of {self.length}" + self._perhaps_local(tensor.shape[dim])
            )
        parts = [tensor.narrow(dim, one.start, len(one)) for one in own]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else tensor.narrow(dim, 0, 0)

    def restore(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """Return the whole of the parts of all ranks, each as `take` gives it.

        >>> two = Sharding.zigzag(4, 2)
        >>> two.restore([torch.tensor([0, 3]), torch.tensor([1, 2])], dim=0).tolist()
        [0, 1, 2, 3]
        """
        parts = list(parts)
        for part in parts:
            self._check_axis(part, dim)
        given = tuple(part.shape[dim] for part in parts)
        if given != self.sizes:
            raise CompositionError(
                f"restore got parts of {shown(given)} positions along dim {dim}; the ranks have "
                f"{shown(self.sizes)}"
            )
        places = {part.device for part in parts}
        order = torch.cat([self.positions(rank, parts[0].device) for rank in range(self.size)])
        if len(places) > 1:
            raise CompositionError(
                f"restore got parts on {', '.join(sorted(map(str, places)))}; bring them to one "
                "device"
            )
        return torch.cat(parts, dim).index_select(dim, order.argsort())

    def show(self, width: int = 64) -> Text:
        """Return a picture, a line for each of the first ranks: ``#`` theirs, ``+`` in part.

        >>> print(Sharding.zigzag(32, 3).show(8))
        rank 0  #+....+#  11 of 32 tokens in 2 ranges
        rank 1  .+#..++.  11 of 32 tokens in 2 ranges
        rank 2  ...##+..  10 of 32 tokens
        """
        columns = min(check_int("width", width, 1), self.length)
        some = min(self.size, _LINES)
        digits = len(str(some - 1))
        lines = [
            f"rank {rank:{digits}}  {self._line(rank, columns)}  {self.sizes[rank]:,} of "
            f"{self.length:,} tokens" + f" in {len(own):,} ranges" * (len(own) > 1)
            for rank, own in enumerate(self.ranks[:some])
        ]
        more = self.size - some
        return Text("\n".join(lines + ([f"and {more:,} more ranks"] if more else [])))

    def _repr_html_(self) -> str:
        """Return a picture for a notebook: a row for each rank."""
        from attnkit.parallel.shown import sharding_page

        return sharding_page(self)

    def _line(self, rank: int, columns: int) -> str:
        return "".join("#" if n == 1 else "+" if n else "." for n in self.held(rank, columns))

    def held(self, rank: int, columns: int) -> list[float]:
        """Return how much of each column is a rank's, of all positions in so many columns.

        >>> Sharding.zigzag(8, 2).held(0, 4)
        [1.0, 0.0, 0.0, 1.0]
        """
        ends = [self.length * column // max(columns, 1) for column in range(columns + 1)]
        held = [0] * columns
        for one in self.ranks[rank]:
            column = bisect_right(ends, one.start) - 1
            while column < columns and ends[column] < one.stop:
                held[column] += min(one.stop, ends[column + 1]) - max(one.start, ends[column])
                column += 1
        widths = (b - a for a, b in pairwise(ends))
        return [n / w for n, w in zip(held, widths, strict=True)]

    def _checked(self, rank: int) -> int:
        if check_int("rank", rank, 0) >= self.size:
            raise CompositionError(
                f"rank={rank} of a sharding of {self.size} ranks, counted from 0"
            )
        return rank

    def _check_axis(self, tensor: object, dim: int) -> None:
        if not isinstance(tensor, Tensor):
            raise CompositionTypeError(f"a sharding takes a tensor apart, not {shown(tensor)}")
        check_int("dim", dim, None)
        if not -tensor.dim() <= dim < tensor.dim():
            raise CompositionError(f"dim={dim} of a tensor {list(tensor.shape)}; it has no such")

    def _perhaps_local(self, count: int) -> str:
        fits = count in self.sizes
        return "; it looks like a part of one rank, as this gives it" if fits else ""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.length, self.ranks))

    def __str__(self) -> str:
        return f"{self.length} ={' |'.join(map(_spans, self.ranks))}"

    def __repr__(self) -> str:
        if sum(map(len, self.ranks)) <= _SHOWN and self.size <= _SHOWN:
            return f"Sharding.parse({str(self)!r})"
        counts = [len(own) for own in self.ranks]
        return (
            f"<Sharding of {self.length:,} tokens on {self.size:,} ranks: "
            f"{between(self.sizes)} each, in {between(counts)} ranges>"
        )


_FORM = "give the positions of each rank, such as ((range(0, 2), range(6, 8)), (range(2, 6),))"


def even_sizes(length: int, ranks: int) -> Iterator[int]:
    """Return how many of some positions each rank has: as many, to one, the first ones more.

    >>> list(even_sizes(8, 3))
    [3, 3, 2]
    """
    few, more = divmod(check_int("length", length, 0), check_int("ranks", ranks, 1, MOST_RANKS))
    return chain(repeat(few + 1, more), repeat(few, ranks - more))


def owned(ranks: Sequence[Ranges]) -> list[tuple[int, int, int]]:
    """Return every range of some ranks from the lowest, and whose it is: ``(start, stop, rank)``.

    >>> owned([(range(0, 2), range(6, 8)), (range(2, 6),)])
    [(0, 2, 0), (2, 6, 1), (6, 8, 0)]
    """
    return sorted((one.start, one.stop, rank) for rank, own in enumerate(ranks) for one in own)


def _positions(own: object) -> Ranges:
    """Return what a rank is given, as a set."""
    if not isinstance(own, tuple | list) or not all(isinstance(one, range) for one in own):
        raise CompositionTypeError(f"Sharding got {shown(own)} for a rank; {_FORM}")
    for one in own:
        if abs(one.step) != 1:
            raise CompositionError(
                f"Sharding got {one} for a rank; positions are in ranges of step 1 (for every "
                "n-th position write a range for each)"
            )
    spans = in_order(own)
    if total(spans) != total(tuple(own)):
        raise CompositionError(
            f"Sharding got {shown(own)} for a rank, which has some position twice"
        )
    return spans


def _fault(length: int, ranks: tuple[Ranges, ...]) -> str:
    """Return in words the first position that is not with one rank."""
    each = owned(ranks)
    if each and each[0][0] < 0:
        return f"there is no position {each[0][0]}"
    at, before = 0, -1
    for start, stop, rank in each:
        if start > at:
            break
        if start < at:
            return f"position {start} is with ranks {before} and {rank}"
        at, before = stop, rank
    return f"position {at} is with no rank" if at < length else f"there is no position {at - 1}"


def _spans(own: Ranges) -> str:
    return "".join(f" {one.start}:{one.stop}" for one in own)


def between(counts: Sequence[int]) -> str:
    """Say between which numbers some counts are.

    >>> between([5, 4, 4]), between([4, 4])
    ('4 to 5', '4')
    """
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def check_fits(request: Request, queries: Sharding, keys: Sharding) -> None:
    """Raise `CompositionError` unless such shardings divide a request among ranks."""
    if request.share is not None:
        raise CompositionError("a share of an attention is not sharded again; plan the whole")
    if request.mask.comes_with_call:
        raise CompositionError(
            f"{shown(request.mask)} comes with each call, and which keys a rank needs is planned "
            "before; run it on the ranks of a batch instead"
        )
    if queries.size != keys.size:
        raise CompositionError(
            f"the queries are sharded over {queries.size} ranks, the keys over {keys.size}; both "
            "are over the same ranks"
        )
    for name, sharding, length in (
        ("queries", queries, request.q_len),
        ("keys", keys, request.kv_len),
    ):
        if sharding.length != length:
            raise CompositionError(
                f"the sharding of the {name} is of {sharding.length} positions; there are {length}"
            )
