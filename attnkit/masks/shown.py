"""What a notebook shows of a mask: a picture of its cells at lengths that suit it, and words.

Nobody waits for a display: lengths follow from the numbers that the mask is written with, what is
no region is read for `_CORNER` x `_CORNER` cells at most, and what would take longer is said in
words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import NamedTuple

from attnkit.display import Drawing, colour, html
from attnkit.errors import CompositionError
from attnkit.fields import layer
from attnkit.masks.base import Mask
from attnkit.masks.picture import shares
from attnkit.masks.trace import Rectangle, count_slices

__all__ = ["drawing", "guessed", "lengths", "page", "page_of", "pictured"]

_GRID = 96
_CORNER = 128
_SHORTEST, _LONGEST = 16, 1 << 20
_MOST_NUMBERS = 1 << 15  # that a mask is written with: its region takes time that follows these
_MOST_READ = 1 << 24  # cells of tensors that nobody has looked at yet
_MOST_SLICES = 1 << 10  # that a mask with a number as small as its smallest would have
_MOST_PLACES = 4
_COUNTS = ("batch", "heads", "num_heads")  # numbers that say nothing of lengths


class Looked(NamedTuple):
    """A picture of one score matrix, and what was counted: allowed cells, all cells, slices.

    There are no slices where the mask is no region. `corner` says that only the first cells of a
    larger matrix were looked at.
    """

    drawing: Drawing
    allowed: int
    cells: int
    slices: int | None
    corner: bool


def page(mask: Mask) -> str:
    """Return what `Mask._repr_html_` does: its text, and a picture or why there is none.

    >>> from attnkit import masks
    >>> "58 of 256 cells" in page(masks.SlidingWindow(4))
    True
    """

    def build() -> str:
        return html.block(html.heading("Mask"), pictured(mask))

    return html.safely(build, lambda: repr(mask))


def page_of(name: str, mask: Mask, said: Sequence[str], sizes: tuple[int, int] | None) -> str:
    """Return a page of a mask that was found somewhere: what is said of it, and its picture.

    >>> from attnkit import masks
    >>> "a causal flag" in page_of("Lifted", masks.Causal(), ["a causal flag"], None)
    True
    """

    def build() -> str:
        return html.block(html.heading(name), pictured(mask, sizes), *map(html.note, said))

    return html.safely(build, lambda: repr(mask))


def pictured(mask: Mask, sizes: tuple[int, int] | None = None) -> str:
    """Return the text and pictures of a mask, at lengths that suit it, as a part of a page."""
    text = f"<p>{html.code(repr(mask))}</p>"
    try:
        return text + _pictures(mask, *(sizes or lengths(mask)), sizes is None)
    except Exception as error:  # a mask's own code, or a user's function
        return text + html.note(f"no picture: {type(error).__name__}: {error}")


def _pictures(mask: Mask, q_len: int, kv_len: int, chosen: bool) -> str:
    """Return the first pictures of a mask and what is counted in them."""
    places = list(islice(_places(mask), _MOST_PLACES + 1))
    if len(places) == 1:
        looked = drawing(mask, q_len, kv_len)
        return html.picture(looked.drawing) + html.note(_told(mask, q_len, kv_len, chosen, looked))
    every = [drawing(mask, q_len, kv_len, *place) for place in places[:_MOST_PLACES]]
    count = (mask.batches or 1) * (mask.heads or 1)
    more = f"{count - len(every):,} more like these; " if count > len(every) else ""
    told = _told(mask, q_len, kv_len, chosen, *every)
    return html.pictures(one.drawing for one in every) + html.note(more + told)


def _places(mask: Mask) -> Iterator[tuple[int, int]]:
    """Yield the score matrices that a mask tells apart; one where it tells none apart."""
    return ((b, h) for b in range(mask.batches or 1) for h in range(mask.heads or 1))


def drawing(mask: Mask, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Looked:
    """Return a picture of one score matrix that is soon made.

    Raises `CompositionError` where it would not be.

    >>> from attnkit import masks
    >>> drawing(masks.Causal(), 4, 4).allowed
    10
    """
    mask.check(q_len, kv_len)
    unread = mask._unread
    if unread > _MOST_READ:
        raise CompositionError(
            f"its {unread:,} cells are not read for a display; mask.show(q_len, kv_len) reads them"
        )
    known = mask.enclosure(q_len, kv_len, batch, head)
    apart = (("batch", batch, mask.batches), ("head", head, mask.heads))
    place = ", ".join(f"{name} {index}" for name, index, count in apart if count is not None)
    rows, keys, slices = q_len, kv_len, None
    if known.exact:
        share = shares(known.inner, q_len, kv_len, _GRID, _GRID)
        allowed, slices = known.inner.area, count_slices(known.inner)
    else:
        rows, keys = min(q_len, _CORNER), min(kv_len, _CORNER)
        at = Rectangle((0, rows), (0, keys), q_len, kv_len, batch, head)
        cells = mask._read(at, "cpu")
        allowed = int(cells.sum())
        share = shares(lambda i0, i1: cells[i0:i1], rows, keys, _GRID, _GRID)
    corner = (rows, keys) != (q_len, kv_len)
    drawn = Drawing(rows, keys, (layer(share, colour(0)),), place or repr(mask))
    return Looked(drawn, allowed, rows * keys, slices, corner)


def _told(mask: Mask, q_len: int, kv_len: int, chosen: bool, *every: Looked) -> str:
    """Say which cells are drawn, and how many of them are allowed."""
    first = every[0]
    sizes = f"{q_len:,} queries (down) x {kv_len:,} keys"
    if chosen and None in mask.extent:
        sizes += " (it fits other lengths)"
    rows, keys = first.drawing.q_len, first.drawing.kv_len
    if first.corner:
        sizes = f"the first {rows:,} queries (down) and {keys:,} keys of {sizes}"
    allowed, cells = sum(one.allowed for one in every), sum(one.cells for one in every)
    share = f" ({100 * allowed / cells:.1f} %)" if cells else ""
    slices = sum(one.slices or 0 for one in every)
    exact = all(one.slices is not None for one in every)
    form = f"{slices:,} slice{'s' * (slices != 1)}" if exact else "no union of slices"
    return f"{sizes}: {allowed:,} of {cells:,} cells{share}, {form}"


def lengths(mask: Mask) -> tuple[int, int]:
    """Return lengths at which a mask is seen: its own, or some that follow from its numbers.

    Raises `CompositionError` for a mask that is written with too many numbers.

    >>> from attnkit import masks
    >>> lengths(masks.Causal()), lengths(masks.SlidingWindow(64)), lengths(masks.Documents([3, 5]))
    ((16, 16), (192, 192), (8, 8))
    """
    length = max(_SHORTEST, guessed(mask))
    q_len, kv_len = mask.extent
    both = q_len if q_len is not None else kv_len if kv_len is not None else length
    return both if q_len is None else q_len, both if kv_len is None else kv_len


def guessed(value: object) -> int:
    """Return a length at which the sizes that a mask or a bias is written with are seen.

    >>> from attnkit import masks
    >>> guessed(masks.SlidingWindow(64)), guessed(masks.Causal())
    (192, 0)
    """
    numbers = list(islice(_numbers(value), _MOST_NUMBERS + 1))
    if len(numbers) > _MOST_NUMBERS:
        raise CompositionError(
            f"it is written with more than {_MOST_NUMBERS:,} numbers; show(q_len, kv_len) draws it"
        )
    sizes = [abs(number) for number in numbers if abs(number) > 1]
    return min(_LONGEST, _MOST_SLICES * min(sizes, default=1), 3 * max(sizes, default=0))


def _numbers(value: object) -> Iterator[int]:
    """Yield the integers that a value, or a list of them, is written with."""
    if is_dataclass(value):
        for item in fields(value):
            if item.name not in _COUNTS:
                yield from _numbers(getattr(value, item.name))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, range):
        yield from (value.start, value.stop)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value
