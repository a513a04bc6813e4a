"""A share of a request: what it asks of some rows, keys and heads, as a request of its own."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from attnkit.layouts import SeqLens
from attnkit.planner import Request
from attnkit.planner.request import BiasTerm, Share, bias_terms
from attnkit.planner.scoring import taken_score
from attnkit.pse import Pse
from attnkit.ranges import Excerpt, Ranges, in_order, total

__all__ = ["excerpts", "key_heads", "local_bias", "local_request", "terms_of"]


def key_heads(whole: Request, heads: range) -> range:
    """Return the key heads that some query heads read."""
    group = whole.num_heads // whole.num_kv_heads
    return range(heads.start // group, -(-heads.stop // group)) if heads else range(0)


def local_request(
    whole: Request,
    bias: Pse | None,
    rows: Ranges,
    keys: Ranges,
    heads: range | None = None,
    local_dropout: bool = False,
) -> Request:
    """Return the share of a request that some rows, keys and heads have; it has some of each.

    Rows and keys are in order, positions on the whole's axes of tokens. Sequences of a packed
    batch without a row or without a key are left out with all of their tokens: what is there is
    said by ``share.rows`` and ``share.keys``. The share has no sink, which joins once where shares
    are merged. Heads read whole groups of key heads, or a part of one. With `local_dropout` it
    drops cells of its own choice, if any.
    """
    heads = range(whole.num_heads) if heads is None else heads
    mask = whole.mask
    if len(heads) < whole.num_heads:
        mask = mask.for_heads(heads.start, heads.stop)
    seqlens = None
    some: tuple[Excerpt, ...] = (Excerpt(whole.q_len, whole.kv_len, rows, keys),)
    if whole.seqlens is not None:
        some = excerpts(whole, rows, keys)
        seqlens = _lengths(some)
        rows, keys = _left(whole, some)
        if mask.batches is not None or not all(one.is_whole for one in some):
            mask = mask.take_excerpts(some)
    else:
        mask = mask.take(rows, keys, q_len=whole.q_len, kv_len=whole.kv_len)
    terms = terms_of(whole, local_bias(whole, bias, rows, keys, heads))
    return replace(
        whole,
        mask=mask,
        bias=terms,
        batch=whole.batch if seqlens is None else len(seqlens),
        q_len=total(rows),
        kv_len=total(keys),
        num_heads=len(heads),
        num_kv_heads=len(key_heads(whole, heads)),
        sink=False,
        seqlens=seqlens,
        score_fn=taken_score(whole.score_fn, some, heads.start),
        share=Share(
            *(whole.q_len, whole.kv_len, rows, keys, whole.num_heads, heads.start),
            local_dropout and whole.dropout > 0,
        ),
    )


def terms_of(whole: Request, bias: Pse | None) -> tuple[BiasTerm, ...]:
    """Return what a plan may know of a bias, or of a share of it, as the whole asks for it.

    Gradients are those that the whole asks for, whether or not they are recorded now.
    """
    with torch.set_grad_enabled(any(term.requires_grad for term in whole.bias)):
        return bias_terms(bias)


def local_bias(
    whole: Request, bias: Pse | None, rows: Ranges, keys: Ranges, heads: range | None = None
) -> Pse | None:
    """Return the bias of a share, on the same tensors; its arguments are those of the share."""
    if bias is None:
        return None
    if heads is not None and len(heads) < whole.num_heads:
        bias = bias.for_heads(heads.start, heads.stop)
    if whole.seqlens is None:
        return bias.take(rows, keys, q_len=whole.q_len, kv_len=whole.kv_len)
    some = excerpts(whole, rows, keys)
    if bias.batch is None and all(one.is_whole for one in some):
        return bias
    return bias.take_excerpts(some)


def excerpts(whole: Request, rows: Ranges, keys: Ranges) -> tuple[Excerpt, ...]:
    """Return what some rows and keys are of each packed sequence that has some of both.

    >>> from attnkit.planner import Composition, read_request
    >>> x = torch.empty(6, 2, 16, device="meta")
    >>> packed = read_request(Composition(layout="TND"), x, x, x, seqlens=SeqLens([2, 3, 1]))
    >>> [(one.batch, one.rows, one.keys) for one in excerpts(packed, (range(3),), (range(2, 6),))]
    [(1, (range(0, 1),), (range(0, 3),))]
    """
    starts = whole.token_starts
    of_rows, of_keys = (
        dict(_by_sequence(some, at)) for some, at in zip((rows, keys), starts, strict=True)
    )
    return tuple(
        Excerpt(*whole.sequences[b], tuple(own), tuple(of_keys[b]), b)
        for b, own in of_rows.items()
        if b in of_keys
    )


def _by_sequence(ranges: Ranges, starts: Sequence[int]) -> Iterator[tuple[int, list[range]]]:
    """Yield the sequences that some tokens are of, in order, and which of theirs these are."""
    own: list[range] = []
    k = -1
    for one in ranges:
        at = one.start
        while at < one.stop:
            if k < 0 or at >= starts[k + 1]:
                if own:
                    yield k, own
                k, own = bisect_right(starts, at) - 1, []
            stop = min(one.stop, starts[k + 1])
            own.append(range(at - starts[k], stop - starts[k]))
            at = stop
    if own:
        yield k, own


def _lengths(some: Sequence[Excerpt]) -> SeqLens:
    return SeqLens([one.sizes[0] for one in some], [one.sizes[1] for one in some])


def _left(whole: Request, some: Sequence[Excerpt]) -> tuple[Ranges, Ranges]:
    """Return the rows and keys of excerpts, as positions among all tokens."""
    queries, keys = whole.token_starts

    def moved(ranges: Ranges, start: int) -> Iterator[range]:
        return (range(one.start + start, one.stop + start) for one in ranges)

    rows = in_order(r for one in some for r in moved(one.rows, queries[one.batch or 0]))
    return rows, in_order(r for one in some for r in moved(one.keys, keys[one.batch or 0]))
