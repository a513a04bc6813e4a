"""Who has which tokens: shardings that are even in tokens, in cells, or in both.

`even` is even in both, for any mask. The cells of rows under a mask are a few lines
(`parallel.load`), so that it is found without looking at rows:

1. Tokens fall into *stretches*: blocks that share no key with others, neighbouring small ones
   together; a block whose rows differ is folded, its tokens taken from both ends by turns, where
   such pairs have as many cells each (so it is with a causal mask), or else, if it has more tokens
   than a rank, each of its lines is.
2. Stretches are laid end to end, those with the most cells per token first. A rank takes its
   tokens from the beginning or, if that is uneven, some from the beginning and the others from
   the end: all from the beginning is too many cells, all from the end too few, and in between,
   one token more or less at a time, there is a number that fits. So the rest is as dense as the
   whole was, and the next rank finds one, too.

Under a causal mask this is zigzag, under a window it is contiguous; and where one of these two is
even, it is that. Where single rows have so many cells that no number fits, those with the fewest
are dealt to all ranks alike, so that the first do not use them up. A rank has few stretches, four
as a rule, that others have a part of: only their keys travel.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from heapq import heappop, heappush
from itertools import pairwise

from attnkit.arguments import check_choice, check_int, check_number
from attnkit.errors import CompositionError
from attnkit.geometry import Region
from attnkit.layouts import SeqLens
from attnkit.masks import Mask
from attnkit.parallel.load import Load, planes_of
from attnkit.parallel.plane import seen_by
from attnkit.parallel.sharding import MOST_RANKS, Sharding, even_sizes, owned
from attnkit.parallel.stretches import Chain, Stretch, Untaken, stretches
from attnkit.ranges import Ranges, in_order, total, without

__all__ = [
    "BALANCES",
    "LAYER_CELLS",
    "WITHIN",
    "balanced",
    "candidates",
    "even",
    "keys_of",
    "line",
]

WITHIN = 0.002
"""How far over the mean a rank's cells may be where that saves keys: a stretch cut less."""

LAYER_CELLS = 27_000
"""How many cells cost as much as what a layer does for a token beside attention.

A layer of a model of 8 billion has about 218 million weights: 2 x 218 million operations for each
token, beside 4 x 4,096 for each cell, where its heads have 4,096 channels.
"""


def even(load: Load, ranks: int, within: float = WITHIN) -> Sharding:
    """Return a sharding that is even in tokens, to one, and in cells.

    With h for half of what the row with the most cells has more than the one with the least, and
    m for the mean cells of as many tokens as a rank has, a rank of P has at most
    ``(1 + within) m + h (1 + 2 (1 + 1/2 + ... + 1/(P - 1)))`` cells: each comes to within h of the
    mean of what is left, and moves it by its error shared by the others. Errors cancel as a rule,
    so that it is about h. All ranks find the same sharding.

    >>> from attnkit import masks
    >>> from attnkit.parallel.load import load_of
    >>> print(even(load_of([masks.Causal()], 16), 2))
    16 = 0:4 12:16 | 4:12
    >>> print(even(load_of([masks.Documents([4, 2, 2])], 8), 2))
    8 = 0:2 6:8 | 2:6
    """
    check_number("within", within, lambda x: 0 <= x < 1, "at least 0 and below 1")
    sizes = list(even_sizes(load.length, ranks))
    most = (1 + within) * load.total / max(load.length, 1)
    for simple in (Sharding.contiguous(load.length, ranks), Sharding.zigzag(load.length, ranks)):
        each = zip(load.of_ranks(simple), sizes, strict=True)
        if all(cells <= most * size for cells, size in each):
            return simple
    found = list(stretches(load, load.length // ranks, within))
    found.sort(key=lambda one: (-one.cells(load) / one.size, one.start))
    dealt = _dealt(load, sizes, found, None, within)
    over = _over(load, dealt, within)
    if over > 0 and len(found) > 2:  # a few rows with many cells, which do not go up in ranks
        other = _dealt(load, sizes, found[:-1], found[-1], within)
        dealt = other if _over(load, other, within) < over else dealt
    return dealt


def _dealt(
    load: Load, sizes: Sequence[int], found: Sequence[Stretch], last: Stretch | None, within: float
) -> Sharding:
    """Deal stretches, those with the most cells first; of the last one all ranks have as much."""
    chain = Chain(load, found)
    length = chain.starts[-1]
    rest: Ranges = (range(length),) if length else ()
    most = (1 + within) * chain.sums[-1] / max(length, 1)
    spans, place = [], 0
    for size, share in zip(sizes, even_sizes(last.size if last else 0, len(sizes)), strict=True):
        taken = Untaken(chain, rest).fair(size - share, within, most)
        spans.append([span for one in taken for span in chain.spans(one.start, one.stop)])
        rest = without(rest, in_order(taken))
        if last is not None:
            spans[-1] += last.spans(place, place + share)
            place += share
    return Sharding.of(load.length, spans)


def _over(load: Load, dealt: Sharding, within: float) -> float:
    """Return how many cells some rank has over what tolerance gives its tokens."""
    mean = (1 + within) ** 2 * load.total / max(load.length, 1)
    each = zip(load.of_ranks(dealt), dealt.sizes, strict=True)
    return max(cells - mean * size for cells, size in each)


def line(load: Load, ranks: int, token_cells: float = LAYER_CELLS) -> Sharding:
    """Return a sharding that is even in cells plus `token_cells` for each token: in time.

    Stretches stay in their order, so that fewer are cut and fewer keys travel than with `even`;
    but a rank of many short texts has more tokens than others, in memory too.

    >>> from attnkit import masks
    >>> from attnkit.parallel.load import load_of
    >>> print(line(load_of([masks.Documents([4, 2, 2])], 8), 2, token_cells=0))
    8 = 0:3 | 3:8
    """
    check_number("token_cells", token_cells, lambda x: 0 <= x < 1e15, "0 or more")
    check_int("ranks", ranks, 1, MOST_RANKS)
    chain = Chain(load, list(stretches(load, load.length // ranks, WITHIN)))

    def cost(place: int) -> float:
        return chain.before(place) + token_cells * place

    ends, every = [0], cost(load.length)
    for rank in range(1, ranks):
        wanted = every * rank / ranks
        at = bisect_left(range(load.length), wanted, lo=ends[-1], key=cost)
        ends.append(at - (at > ends[-1] and cost(at) - wanted > wanted - cost(at - 1)))
    ends.append(load.length)
    return Sharding.of(load.length, [chain.spans(a, b) for a, b in pairwise(ends)])


def keys_of(seen: Sequence[Ranges], kv_len: int) -> Sharding:
    """Return who has the keys of cross-attention, given which keys the rows of each rank see.

    Ranks have as many keys, to one. Either the keys are cut as they lie, or each goes to a rank
    that sees it, as far as that has room: in the order of keys, to the one that soonest sees no
    more. Of the two it is the one of which fewer keys travel.

    >>> print(keys_of([(range(4, 8),), (range(4),)], 8))
    8 = 4:8 | 0:4
    """
    as_they_lie = Sharding.contiguous(kv_len, len(seen))
    where_seen = Sharding.of(kv_len, _where_seen(seen, kv_len))
    return min((as_they_lie, where_seen), key=lambda one: _travelling(seen, one))


def _travelling(seen: Sequence[Ranges], keys: Sharding) -> int:
    each = zip(seen, keys.ranks, strict=True)
    return sum(total(without(some, own)) for some, own in each)


def _where_seen(seen: Sequence[Ranges], kv_len: int) -> list[list[tuple[int, int]]]:
    room = list(even_sizes(kv_len, len(seen)))
    found: list[list[tuple[int, int]]] = [[] for _ in seen]
    starts = owned(seen)
    rows = {0, kv_len, *(end for start, stop, _ in starts for end in (start, stop))}
    waiting: list[tuple[int, int, int]] = []  # (the last key a rank sees, rank, until here)
    unseen, k = [], 0
    for start, stop in pairwise(sorted(rows)):
        while k < len(starts) and starts[k][0] <= start:
            rank = starts[k][2]
            heappush(waiting, (seen[rank][-1].stop, rank, starts[k][1]))
            k += 1
        while start < stop and waiting:
            _, rank, until = waiting[0]
            if until <= start or not room[rank]:
                heappop(waiting)
                continue
            count = min(stop - start, room[rank])
            found[rank].append((start, start + count))
            room[rank] -= count
            start += count
        unseen += [(start, stop)] * (start < stop)
    for start, stop in unseen:
        _fill(found, room, start, stop)
    return found


def _fill(found: list[list[tuple[int, int]]], room: list[int], start: int, stop: int) -> None:
    """Deal keys to the first ranks that have room."""
    for rank, free in enumerate(room):
        count = min(free, stop - start)
        if count:
            found[rank].append((start, start + count))
            room[rank], start = free - count, start + count


BALANCES = {
    "auto": "even, where no price is known",
    "even": "in tokens and in cells",
    "contiguous": "neighbouring tokens, as they lie",
    "zigzag": "a part of either end",
    "line": "in cells and tokens together",
}


def balanced(
    masks: Sequence[Mask],
    tokens: int | None,
    keys: int | None,
    seqlens: SeqLens | None,
    ranks: int,
    kind: str | Sharding = "even",
) -> tuple[Sharding, Sharding]:
    """Return who has which queries and which keys: in self-attention one object, twice.

    `masks` are those of the layers, one sharding for all of them: their cells add up, and without
    any, tokens alone are dealt. `tokens` is the length of the text, or `seqlens` has those of a
    packed batch, whose tokens are one axis. `keys` is the length of another text that is attended
    to, or None: its keys are dealt by `keys_of`, so that ranks have as many. `kind` is one of
    `BALANCES`, or the sharding of the queries. Masks that are no region count with the region
    around them.

    >>> from attnkit import masks
    >>> queries, keys = balanced([masks.Causal()], 8, None, None, 2)
    >>> print(queries, keys is queries)
    8 = 0:2 6:8 | 2:6 True

    Raises `CompositionError` for a sharding of other tokens or ranks.
    """
    return _both_sides(*_loaded(masks, tokens, keys, seqlens), ranks, kind)


def candidates(
    masks: Sequence[Mask],
    tokens: int | None,
    keys: int | None,
    seqlens: SeqLens | None,
    ranks: int,
) -> dict[str, tuple[Sharding, Sharding]]:
    """Return every kind of `balanced` by its name, those that are another's equal left out.

    >>> from attnkit import masks
    >>> list(candidates([masks.Causal()], 8, None, None, 2))
    ['even', 'contiguous']
    """
    texts = _loaded(masks, tokens, keys, seqlens)
    found: dict[str, tuple[Sharding, Sharding]] = {}
    for kind in (one for one in BALANCES if one != "auto"):
        made = _both_sides(*texts, ranks, kind)
        if made not in found.values():
            found[kind] = made
    return found


def _loaded(
    masks: Sequence[Mask], tokens: int | None, keys: int | None, seqlens: SeqLens | None
) -> tuple[dict[Region, int], Load, int | None]:
    """Return regions, the load of the queries, and how many keys are dealt apart, if any are."""
    planes, length, exact = planes_of(masks, tokens, keys, seqlens)
    if seqlens is not None and (keys is not None or seqlens.q != seqlens.kv):
        keys = seqlens.total_kv
    return planes, Load.of(planes, length, exact), keys


def _both_sides(
    planes: Collection[Region], load: Load, kv_len: int | None, ranks: int, kind: str | Sharding
) -> tuple[Sharding, Sharding]:
    queries = _of_kind(load, ranks, kind)
    if kv_len is None:
        return queries, queries
    if kind in ("contiguous", "zigzag"):
        return queries, _simple(kv_len, ranks, kind)
    return queries, keys_of([seen_by(planes, rows) for rows in queries.ranks], kv_len)


def _of_kind(load: Load, ranks: int, kind: str | Sharding) -> Sharding:
    if isinstance(kind, Sharding):
        if (kind.length, kind.size) != (load.length, ranks):
            raise CompositionError(
                f"{kind!r} is of {kind.length} tokens on {kind.size} ranks, not of {load.length} "
                f"on {ranks}; make one for these"
            )
        return kind
    check_choice("balance", kind, BALANCES)
    if kind in ("contiguous", "zigzag"):
        return _simple(load.length, ranks, kind)
    return line(load, ranks) if kind == "line" else even(load, ranks)


def _simple(length: int, ranks: int, kind: str | Sharding) -> Sharding:
    make = Sharding.zigzag if kind == "zigzag" else Sharding.contiguous
    return make(length, ranks)
