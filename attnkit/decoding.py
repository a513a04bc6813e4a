"""What a decoding step sees of masks and biases that speak of the whole text.

A step that adds the tokens ``[start, stop)`` to a text computes these rows of the square score
matrix, over the keys so far. Step by step equals all at once only if the mask never shows a
token something that comes later, and never changes its mind: both are checked, exactly.
"""

from __future__ import annotations

from attnkit.errors import CompositionError
from attnkit.masks import Full, Mask
from attnkit.pse import Pse

__all__ = ["rows_of_bias", "rows_of_context_bias", "rows_of_context_mask", "rows_of_mask"]


def rows_of_mask(mask: Mask, start: int, stop: int) -> Mask:
    """Return the rows ``[start, stop)`` of a mask over the keys ``[0, stop)``.

    Raises `CompositionError` where the rows would differ in a longer text, so that decoding
    step by step could not equal the full forward.

    >>> from attnkit import masks
    >>> rows_of_mask(masks.Causal(), 4, 6).region(2, 6) == masks.Causal().region(2, 6)
    True
    >>> rows_of_mask(masks.Full(), 4, 6)
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: Full() lets the first 4 tokens see keys that came after \
they were computed, so decoding step by step cannot equal the full forward; intersect it with \
masks.Causal(), or give all tokens that see each other in one call
    """
    q_len, kv_len = _whole(mask.extent, stop)
    if stop > min(q_len, kv_len):
        raise CompositionError(
            f"{mask!r} is built for {q_len} x {kv_len} cells, but the text has {stop} tokens now; "
            "with a cache a mask speaks of the whole text, so build it for its final length"
        )
    for batch in range(mask.batches or 1):
        for head in range(mask.heads or 1):
            _check_settled(mask, start, stop, (q_len, kv_len), batch, head)
    if (start, stop) == (0, q_len) and stop == kv_len:
        return mask
    return mask.cut((start, stop), (0, stop), q_len=q_len, kv_len=kv_len)


def rows_of_bias(pse: Pse | None, start: int, stop: int) -> Pse | None:
    """Return the rows ``[start, stop)`` of a bias over the keys ``[0, stop)``.

    >>> from attnkit.pse import ALiBi
    >>> rows_of_bias(ALiBi(8, align="top_left"), 4, 6)
    ALiBi(8)
    """
    if pse is None:
        return None
    q_len, kv_len = _whole(pse.extent, stop)
    if stop > min(q_len, kv_len):
        raise CompositionError(
            f"{pse!r} is built for {q_len} x {kv_len} cells, but the text has {stop} tokens now; "
            "with a cache a bias speaks of the whole text, so build it for its final length"
        )
    return pse.cut((start, stop), (0, stop), q_len=q_len, kv_len=kv_len)


def rows_of_context_mask(mask: Mask, start: int, stop: int, kv_len: int) -> Mask:
    """Return the query rows ``[start, stop)`` of a cross-attention mask, all keys of the context.

    How many queries there will be is not known: a mask anchored at the last one is refused.
    """
    if isinstance(mask, Full):
        return mask
    return mask.cut((start, stop), (0, kv_len), q_len=mask.extent[0], kv_len=kv_len)


def rows_of_context_bias(pse: Pse | None, start: int, stop: int, kv_len: int) -> Pse | None:
    """Return the query rows ``[start, stop)`` of a cross-attention bias, all keys."""
    if pse is None:
        return None
    return pse.cut((start, stop), (0, kv_len), q_len=pse.extent[0], kv_len=kv_len)


def _whole(extent: tuple[int | None, int | None], stop: int) -> tuple[int, int]:
    q_len, kv_len = extent
    return (stop if q_len is None else q_len), (stop if kv_len is None else kv_len)


def _check_settled(
    mask: Mask, start: int, stop: int, whole: tuple[int, int], batch: int, head: int
) -> None:
    """Compare what rows see now with what they saw, and with what they will see."""
    now = mask.enclosure(*whole, batch, head)
    if now.inner.cut((start, stop), (stop, whole[1])).area:
        raise CompositionError(
            f"{mask!r} lets tokens {start} to {stop - 1} see keys that come later, so decoding "
            "step by step cannot equal the full forward; intersect it with masks.Causal(), or "
            "give all tokens that see each other in one call"
        )
    if not start:
        return
    if now.inner.cut((0, start), (start, stop)).area:
        raise CompositionError(
            f"{mask!r} lets the first {start} tokens see keys that came after they were computed, "
            "so decoding step by step cannot equal the full forward; intersect it with "
            "masks.Causal(), or give all tokens that see each other in one call"
        )
    shorter = _whole(mask.extent, start)
    before = mask.enclosure(*shorter, batch, head)
    square = ((0, start), (0, start))
    if before.exact and now.exact and now.inner.cut(*square) != before.inner.cut(*square):
        raise CompositionError(
            f"{mask!r} shows the first {start} tokens other keys in a text of {stop} than in one "
            f"of {start}: it moves as the text grows, so decoding step by step cannot equal the "
            "full forward; anchor it at the first key (align='top_left', side='right')"
        )
