"""What a decoding step sees of masks and biases that speak of the whole text.

A step that adds the tokens ``[start, stop)`` to a text computes these rows of the square score
matrix, over the keys so far. Step by step equals all at once only if the mask never shows a
token something that comes later, and neither mask nor bias ever changes its mind: that is
checked, exactly, cell by cell where the mask is not a region. What is built for some length says
how long the text will be.
"""

from __future__ import annotations

from attnkit.errors import CompositionError
from attnkit.masks import Full, Mask
from attnkit.masks.base import Rectangle
from attnkit.pse import Pse

__all__ = ["rows_of_context", "rows_of_text", "text_length"]

Range = tuple[int, int]

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
    known, rows, keys = text_length(mask, pse, stop), (start, stop), (0, stop)
    length = stop if known is None else known
    mask.check(length, length)
    for batch in range(mask.batches or 1):
        for head in range(mask.heads or 1):
            _check_ahead(mask, start, stop, length, batch, head)
            # A mask of a known length was this very matrix in the steps before.
            if known is None and not mask._extends(start, stop, batch, head):
                raise CompositionError(
                    f"{mask!r} shows the first {start} tokens other keys in a text of {stop} than "
                    f"in one of {start}: it moves as the text grows, so decoding step by step "
                    "cannot equal the full forward; anchor it at the first key (align='top_left'; "
                    "for padding on the left ~masks.Prefix(its lengths), as masks.Padding.of says)"
                )
    whole = rows == (0, length)
    seen = mask if whole else mask.cut(rows, keys, q_len=length, kv_len=length)
    if pse is None:
        return seen, None
    pse.check(length, length)
    if known is None and not pse._extends(start, stop):
        raise CompositionError(
            f"{pse!r} gives the first {start} tokens other numbers in a text of {stop} than in one "
            f"of {start}, so decoding step by step cannot equal the full forward; use a bias of "
            "distances, or one that is built for the whole text"
        )
    return seen, pse.cut(rows, keys, q_len=length, kv_len=length)


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


def _check_ahead(mask: Mask, start: int, stop: int, length: int, batch: int, head: int) -> None:
    """Raise where a row would see a key that comes after the step that computes it."""
    told = None
    if _any_cell(mask, (start, stop), (stop, length), length, batch, head):
        told = f"tokens {start} to {stop - 1} see keys that come later"
    elif _any_cell(mask, (0, start), (start, stop), length, batch, head):
        told = f"the first {start} tokens see keys that came after they were computed"
    if told is not None:
        raise CompositionError(
            f"{mask!r} lets {told}, so decoding step by step cannot equal the full forward; "
            "intersect it with masks.Causal(), or give all tokens that see each other in one call"
        )


def _any_cell(mask: Mask, rows: Range, keys: Range, length: int, batch: int, head: int) -> bool:
    """Whether a rectangle of a square score matrix has an allowed cell; read where need be."""
    known = mask.enclosure(length, length, batch, head)
    if known.inner.cut(rows, keys).area:
        return True
    if known.exact or not known.outer.cut(rows, keys).area:
        return False
    height = max(1, _CELLS_AT_ONCE // (keys[1] - keys[0]))
    blocks = ((i, min(i + height, rows[1])) for i in range(*rows, height))
    return any(mask._read(Rectangle(b, keys, length, length, batch, head)).any() for b in blocks)
