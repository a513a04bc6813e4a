"""What a decoding step sees of masks and biases that speak of the whole text.

A step that adds the tokens ``[start, stop)`` to a text computes these rows of the square score
matrix, over the keys so far. Step by step equals all at once only if the mask never shows a
token something that comes later, and neither mask nor bias ever changes its mind: that is
checked, exactly, cell by cell where the mask is not a region. What is built for some length says
how long the text will be.

What is kept of the text may be less: the tokens that no later row can ever see are a set, too
(`seen_later`), and a rolling cache forgets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, product
from typing import TypeVar

import torch
from torch import Tensor

from attnkit.attend import attend, is_tracing
from attnkit.attention import Attention
from attnkit.backends import AttentionOutput, Operands, Stats
from attnkit.cache import KVCache
from attnkit.errors import CompositionError
from attnkit.masks import Full, Mask
from attnkit.masks.base import Enclosure, Rectangle
from attnkit.pse import Pse
from attnkit.seen import NewRows, Seen, bias_seen
from attnkit.strips import gaps
from attnkit.texts import HeldText, Runs, paired

__all__ = [
    "attend_rows",
    "known_length",
    "next_positions",
    "next_rows",
    "rows_of_context",
    "rows_of_text",
    "seen_later",
    "text_length",
    "unpadded",
]

Range = tuple[int, int]
T = TypeVar("T")

_CELLS_AT_ONCE = 1 << 20  # read together of a mask that is not a region


def text_length(mask: Mask | None, pse: Pse | None, stop: int) -> int | None:
    """Return how long a text of `stop` tokens so far will be, where a part is built for a length.

    A text attends to itself, so it has as many queries as keys: one known axis is both. None
    where no part says; then every step is the end of its own text.

    >>> from attnkit import masks
    >>> text_length(masks.Causal(), None, 4), text_length(masks.Full()[:, :6], None, 4)
    (None, 6)
    """
    length = None
    for part in (mask, pse):
        q_len, kv_len = (None, None) if part is None else part.extent
        own = q_len if kv_len is None else kv_len
        if q_len not in (None, own) or (length is not None and own not in (None, length)):
            raise CompositionError(
                f"{part!r} is built for {_any(q_len)} queries and {_any(kv_len)} keys"
                + ("" if length is None else f", the mask beside it for {length}")
                + "; with a cache both speak of one text, which has as many queries as keys"
            )
        length = own if own is not None else length
        if own is not None and stop > own:
            raise CompositionError(
                f"{part!r} is built for {own} x {own} cells, but the text has {stop} tokens now; "
                "with a cache masks and biases speak of the whole text, so build them for its "
                "final length"
            )
    return length


def rows_of_text(mask: Mask, pse: Pse | None, start: int, stop: int) -> tuple[Mask, Pse | None]:
    """Return the rows ``[start, stop)`` of a text's mask and bias over the keys ``[0, stop)``.

    Raises `CompositionError` where the rows would differ in a longer text, so that decoding
    step by step could not equal the full forward.

    >>> from attnkit import masks, pse
    >>> mask, bias = rows_of_text(masks.Causal(), pse.ALiBi(8, align="top_left"), 4, 6)
    >>> mask.region(2, 6) == masks.Causal().region(2, 6), bias
    (True, ALiBi(8))
    >>> rows_of_text(masks.Full(), None, 4, 6)
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: Full() lets the first 4 tokens see keys that came after \
they were computed, so decoding step by step cannot equal the full forward; intersect it with \
masks.Causal(), or give all tokens that see each other in one call
    """
    new = NewRows(HeldText().grown(stop), stop - start)
    return _cut(mask, pse, new, _checked(mask, pse, (new,)))


def known_length(mask: Mask, pse: Pse | None, start: int, stop: int) -> int | None:
    """Return how long a text will be, where a part says it, after checking a step.

    Raises `CompositionError` where the rows ``[start, stop)`` would differ in a longer text.

    >>> from attnkit import masks
    >>> known_length(masks.Causal(), None, 4, 6)
    """
    return _next(mask, pse, (NewRows(HeldText().grown(stop), stop - start),))[0]


def next_rows(
    cache: KVCache, mask: Mask, pse: Pse | None, counts: Sequence[int], like: Tensor
) -> tuple[Mask, Pse | None]:
    """Return what the next tokens see, `counts` of each text, of the keys that a cache will hold.

    A cache that is full forgets first what no row can see from now on. `like` has the dtype and
    device of the heads.

    >>> import torch
    >>> from attnkit import masks
    >>> cache, tokens = KVCache(rolling=True), torch.zeros(1, 16, 2, 8)
    >>> _ = cache.append(tokens, tokens)
    >>> rows, _ = next_rows(cache, masks.SlidingWindow(4), None, [1], tokens)
    >>> rows.region(1, 4).area, cache.texts
    (4, (HeldText(length=16, runs=((13, 16),), since=16),))
    """
    texts = _new_rows(cache, counts)
    if cache.is_full(counts):
        known = _checked(mask, pse, texts)
        places = _places(mask, cache.texts)
        cache.keep([seen_later(mask, t, max(counts), b, known) for t, b in places])
        texts = _new_rows(cache, counts)
    known, cut = _next(mask, pse, texts)
    if cut is not None:
        return cut
    return Seen(mask, texts, known), pse and bias_seen(pse, texts, known, like)


@lru_cache(maxsize=8)  # the layers of a model take the same step, one after the other
def _next(
    mask: Mask, pse: Pse | None, texts: tuple[NewRows, ...]
) -> tuple[int | None, tuple[Mask, Pse | None] | None]:
    """Return the length that texts will have, as `_checked` does, and a cut, if that is all."""
    known = _checked(mask, pse, texts)
    if len(texts) == 1 and len(texts[0].text.runs) < 2:
        return known, _cut(mask, pse, texts[0], known)
    return known, None


def next_positions(cache: KVCache, counts: Sequence[int], x: Tensor) -> Tensor:
    """Return the positions of the next tokens of texts of unlike lengths, ``[b s]`` or ``[t]``.

    >>> import torch
    >>> cache, tokens = KVCache(), torch.zeros(5, 2, 8)
    >>> _ = cache.append(tokens, tokens, [2, 3])
    >>> next_positions(cache, [1], torch.zeros(2, 1, 16))
    tensor([[2],
            [3]])
    """
    each = (range(t.length, t.length + count) for t, count in paired(cache.texts, counts))
    return (
        torch.tensor([*chain(*each)], dtype=torch.long)
        .view(x.shape[:-1])
        .to(x.device, non_blocking=True)
    )


def unpadded(found: AttentionOutput, counts: Sequence[int]) -> AttentionOutput:
    """Return results ``[b s n d]`` of texts as packed ones ``[t n d]``; see `memory.padded`.

    >>> import torch
    >>> from attnkit.backends import Stats
    >>> found = AttentionOutput(torch.zeros(2, 3, 4, 8), Stats(torch.zeros(2, 4, 3), torch.ones(1)))
    >>> unpadded(found, [3, 1]).output.shape
    torch.Size([4, 4, 8])
    """

    def packed(tensor: Tensor) -> Tensor:
        if min(counts) == max(counts):
            return tensor.flatten(0, 1)
        return torch.cat([row[:count] for row, count in zip(tensor, counts, strict=True)])

    def of_rows(made: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: packed(made().transpose(1, 2))

    stats = found.stats
    later = Stats(of_rows(lambda: stats.lse), of_rows(lambda: stats.max))
    return AttentionOutput(packed(found.output), later)


def seen_later(
    mask: Mask, text: HeldText, count: int, batches: Sequence[int] = (0,), known: int | None = None
) -> Runs:
    """Return which tokens of a text later rows can see: in some head, of some element of a batch.

    The set says it: it is asked for the next `count` rows, and on to twice the length of the text,
    or to its end where that is known. Rows that see again what was forgotten are refused when they
    come.

    >>> from attnkit import masks
    >>> mask = masks.Causal() & (masks.SlidingWindow(4) | masks.Columns(0, 2))
    >>> seen_later(mask, HeldText().grown(100), 1)
    ((0, 2), (97, 100))
    """
    stop = text.length
    end = max(2 * stop, stop + count) if known is None else known
    planes = (mask.enclosure(end, end, b, h) for b in batches for h in range(mask.heads or 1))
    later = (plane.outer.cut((stop, end), (0, stop)) for plane in planes)
    unseen = gaps(((part.j0, part.j1) for region in later for part in region.slices), 0, stop)
    return tuple(gaps(unseen, 0, stop))


def rows_of_context(
    mask: Mask, pse: Pse | None, start: int, stop: int, kv_len: int
) -> tuple[Mask, Pse | None]:
    """Return the query rows ``[start, stop)`` of a cross-attention, over all keys of the context.

    How many queries there will be is known from what is built for some number; where nothing is,
    a mask anchored at the last one is refused.

    >>> from attnkit import masks
    >>> rows_of_context(masks.Rows(2, 5), None, 4, 6, 3)[0].region(2, 3).area
    3
    """
    known, beside = mask.extent[0], None if pse is None else pse.extent[0]
    if known is not None and beside not in (None, known):
        raise CompositionError(
            f"{mask!r} is built for {known} queries, {pse!r} for {beside}; both speak of one score "
            "matrix"
        )
    q_len, rows, keys = beside if known is None else known, (start, stop), (0, kv_len)
    seen = mask if isinstance(mask, Full) else mask.cut(rows, keys, q_len=q_len, kv_len=kv_len)
    return seen, None if pse is None else pse.cut(rows, keys, q_len=q_len, kv_len=kv_len)


def _any(length: int | None) -> str:
    return "any number of" if length is None else str(length)


def _new_rows(cache: KVCache, counts: Sequence[int]) -> tuple[NewRows, ...]:
    """Return the rows that `counts` tokens more are of each text, one entry where all are alike."""
    texts = tuple(NewRows(text.grown(n), n) for text, n in paired(cache.texts, counts))
    return texts[:1] if len(set(texts)) == 1 else texts


def _places(mask: Mask, texts: Sequence[T]) -> Iterator[tuple[T, Sequence[int]]]:
    """Yield each entry of texts, and the batch elements of the mask that it stands for."""
    every = range(mask.batches or 1)
    for k, text in enumerate(texts):
        yield text, every if len(texts) == 1 or mask.batches is None else (k,)


def _checked(mask: Mask, pse: Pse | None, texts: Sequence[NewRows]) -> int | None:
    """Return the length that the texts will have, where it is known.

    Raises where new rows could not equal those of the full forward.
    """
    known = text_length(mask, pse, max(new.text.length for new in texts))
    for new, batches in _places(mask, texts):
        length = new.text.length if known is None else known
        mask.check(length, length, len(texts) if len(texts) > 1 else None)
        for place in product(batches, range(mask.heads or 1)):
            _check_rows(mask, new, known, *place)
        if pse is not None:
            pse.check(length, length)
            start, stop = new.rows
            if known is None and not pse._extends(start, stop):
                raise CompositionError(
                    f"{pse!r} gives the first {start} tokens other numbers in a text of {stop} "
                    f"than in one of {start}, so decoding step by step cannot equal the full "
                    "forward; use a bias of distances, or one that is built for the whole text"
                )
    return known


def _cut(mask: Mask, pse: Pse | None, new: NewRows, known: int | None) -> tuple[Mask, Pse | None]:
    """Return the rows of one text, of which one run of keys is held."""
    length = new.text.length if known is None else known
    keys = new.text.runs[0] if new.text.runs else (0, 0)
    whole = (new.rows, keys) == ((0, length), (0, length))
    seen = mask if whole else mask.cut(new.rows, keys, q_len=length, kv_len=length)
    return seen, None if pse is None else pse.cut(new.rows, keys, q_len=length, kv_len=length)


def _check_rows(mask: Mask, new: NewRows, known: int | None, batch: int, head: int) -> None:
    """Raise where rows see what they cannot, or the mask has changed its mind."""
    (start, stop), length = new.rows, new.text.length if known is None else known
    bounds = mask.enclosure(length, length, batch, head)

    def sees(rows: Range, keys: Range) -> bool:
        return _any_cell(mask, bounds, Rectangle(rows, keys, length, length, batch, head))

    told = None
    if sees((start, stop), (stop, length)):
        told = f"tokens {start} to {stop - 1} see keys that come later"
    elif sees((0, start), (start, stop)):
        told = f"the first {start} tokens see keys that came after they were computed"
    if told is not None:
        raise CompositionError(
            f"{mask!r} lets {told}, so decoding step by step cannot equal the full forward; "
            "intersect it with masks.Causal(), or give all tokens that see each other in one call"
        )
    for keys in new.text.forgotten:
        if sees((start, stop), keys):
            raise CompositionError(
                f"{mask!r} lets tokens {start} to {stop - 1} see some of the keys {keys[0]} to "
                f"{keys[1] - 1}, which the cache has forgotten: the rows before them saw none; "
                "give the same mask in every call, or use a cache that is not rolling"
            )
    # A mask of a known length was this very matrix in the steps before.
    if known is None and not mask._extends(start, stop, batch, head):
        raise CompositionError(
            f"{mask!r} shows the first {start} tokens other keys in a text of {stop} than "
            f"in one of {start}: it moves as the text grows, so decoding step by step "
            "cannot equal the full forward; anchor it at the first key (align='top_left'; "
            "for padding on the left ~masks.Prefix(its lengths), as masks.Padding.of says)"
        )


def _any_cell(mask: Mask, bounds: Enclosure, at: Rectangle) -> bool:
    """Whether a rectangle has an allowed cell: by the mask's bounds, and read where need be."""
    if 0 in at.shape:
        return False
    if bounds.inner.cut(at.rows, at.keys).area:
        return True
    if bounds.exact or not bounds.outer.cut(at.rows, at.keys).area:
        return False
    height = max(1, _CELLS_AT_ONCE // at.shape[1])
    starts = range(*at.rows, height)
    blocks = (at._replace(rows=(i, min(i + height, at.rows[1]))) for i in starts)
    return any(mask._read(block).any() for block in blocks)


def attend_rows(
    core: Attention, query: Tensor, key: Tensor, value: Tensor, mask: Mask, pse: Pse | None
) -> AttentionOutput:
    """Attend ``[b s n d]`` as a module does, with another mask and bias than its own.

    >>> from attnkit import masks
    >>> x, core = torch.randn(1, 4, 2, 8), Attention(2, 8)
    >>> found = attend_rows(core, x, x, x, masks.Columns(2), None)
    >>> torch.equal(found.output, core(x, x, x, mask=masks.Columns(2)))
    True
    """
    asked = core._asked(None, None)._replace(layout="BSND")
    if is_tracing():
        asked = asked._replace(masks=(mask, None), biases=(pse, None))
        return attend(asked, query, key, value, core.sink, None)
    asked = asked._replace(masks=(None, mask), biases=(None, pse))
    plan = core._plan(asked, query, key, value, core.sink, None)
    return core._run(plan, Operands(query, key, value, pse, core.sink))
