"""`Taken`: rows and keys of a mask from several places, each at the position that it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch

from attnkit.arguments import check_int, describe
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.masks.base import MASKS, Enclosure, Mask, Rectangle
from attnkit.masks.composite import Nested
from attnkit.masks.order import Order
from attnkit.ranges import Excerpt, ends_of, extent_of, met, picked, read_ranges, sizes_of, span

__all__ = ["Taken", "excerpt_of", "length_of", "read_excerpts", "taken_again"]

Ends = tuple[tuple[int, int], ...]

Written = tuple[int, int, Ends, Ends] | tuple[int, int, Ends, Ends, int]
"""An excerpt in numbers: q_len, kv_len, rows, keys, and the batch element where it is of one."""


@MASKS.register("taken")
@dataclass(frozen=True, repr=False, eq=False)
class Taken(Nested):
    """Rows and keys of another mask: ``allowed(u, v) = mask.allowed(rows[u], keys[v])``.

    An excerpt says of how large a score matrix they are, and which: `Excerpt`, or ``(q_len,
    kv_len, rows, keys)`` with the ``(start, stop)`` of ranges. One without a batch element holds
    for all of them. Else there is one for each batch element (or packed sequence) that is taken,
    which says whose it is, ``(q_len, kv_len, rows, keys, batch)``; these may differ in lengths.
    Positions stay what they are in the whole, so what is said by them still holds: a causal rank
    of a sharded text sees what its rows see there. `Mask.take` makes one.

    Raises `CompositionError` for positions outside of the mask, and at use for other lengths than
    those of the rows and keys.

    >>> from attnkit import masks
    >>> print(masks.Causal().take([(0, 2), (6, 8)], [(0, 3), (5, 8)], q_len=8, kv_len=8).show(4, 6))
    #.....
    ##....
    #####.
    ######
    """

    mask: Mask
    taken: tuple[Written, ...]

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(self, mask: Mask, taken: Sequence[Excerpt | Written]) -> None: ...

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            raise CompositionTypeError(f"Taken takes a mask, got {describe(self.mask)}")
        excerpts = read_excerpts("Taken", self.taken)
        if isinstance(self.mask, Taken):
            excerpts = taken_again(self.mask.excerpts, excerpts)
            object.__setattr__(self, "mask", self.mask.mask)
        vars(self).update(excerpts=excerpts, taken=tuple(map(_written, excerpts)))
        self._check_nesting()
        self._agreed  # noqa: B018 -- raises for a mask that comes with each call
        for sizes in {(one.q_len, one.kv_len) for one in excerpts}:
            self.mask.check(*sizes)
        most = max((one.batch or 0 for one in excerpts), default=0)
        if self.mask.batches is not None and most >= self.mask.batches:
            raise CompositionError(
                f"{self!r} takes batch element {most} of a mask that tells {self.mask.batches} "
                "apart, counted from 0"
            )

    @cached_property
    def excerpts(self) -> tuple[Excerpt, ...]:
        """What is taken: one for all batch elements, or one for each."""
        return read_excerpts("Taken", self.taken)

    @classmethod
    def of(cls, mask: Mask, rows: object, keys: object, q_len: object, kv_len: object) -> Mask:
        """Return what `Mask.take` does, of arguments in any form."""
        one = excerpt_of(mask, rows, keys, q_len, kv_len)
        return mask if one.is_whole else mask.take_excerpts((one,))

    @property
    def members(self) -> tuple[Mask, ...]:
        """The mask that rows and keys are taken of."""
        return (self.mask,)

    @property
    def batches(self) -> int | None:
        """One for each excerpt, where these are of batch elements."""
        return self.mask.batches if self.excerpts[0].batch is None else len(self.excerpts)

    @property
    def anchored(self) -> bool:
        """It is of these rows and keys, and of no more."""
        return True

    @cached_property
    def extent(self) -> tuple[int | None, int | None]:
        """How many rows and keys are taken, where excerpts agree."""
        return extent_of(self._sizes)

    @cached_property
    def _sizes(self) -> frozenset[tuple[int, int]]:
        return sizes_of(self.excerpts)

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Also refuse lengths that are of no excerpt, and what the mask refuses."""
        super().check(q_len, kv_len, batch, heads)
        if self.excerpts[0].batch is None:
            self.mask.check(self.excerpts[0].q_len, self.excerpts[0].kv_len, batch, heads)
        if (q_len, kv_len) not in self._sizes:
            told = ", ".join(f"{q} x {kv}" for q, kv in sorted(self._sizes)[:4])
            raise CompositionError(
                f"{self!r} is taken for score matrices of {told}, but this one is {q_len} x "
                f"{kv_len}; take as many rows and keys as there are"
            )

    def _of(self, batch: int) -> tuple[Excerpt, int]:
        """Return what is taken for a batch element, and the element of the mask that it is of."""
        if self.excerpts[0].batch is None:
            return self.excerpts[0], batch
        one = self.excerpts[batch]
        return one, 0 if self.mask.batches is None else one.batch or 0

    @cached_property
    def _known(self) -> dict[tuple[int, int], Enclosure]:
        """Enclosures by batch element and head: a mask of cells is asked again for each tile."""
        return {}

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Take both bounds of the mask."""
        place = (batch if self.batches is not None else 0, head if self.heads is not None else 0)
        if place not in self._known:
            one, number = self._of(place[0])
            at = one.q_len, one.kv_len, number, place[1]
            whole = self.mask.enclosure(*at) if one.batch is not None else _whole(self.mask, *at)
            self._known[place] = _taken_of(whole, one)
        return self._known[place]

    def in_order(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Order | None:
        """The order of the mask, of the rows and keys that are taken: alike for all elements."""
        one = self.excerpts[0]
        if one.batch is not None:
            return None
        whole = self.mask.in_order(one.q_len, one.kv_len, batch, head)
        return None if whole is None else whole.take(one.rows, one.keys)

    def _each_enclosure(self, q_len: int, kv_len: int, batch: int, head: int) -> list[Enclosure]:
        """Take each; what elements share of the mask is made once."""
        known: dict[tuple[int, int, int], Enclosure] = {}
        found: list[Enclosure] = []
        for one, number in map(self._of, range(batch)):
            key = one.q_len, one.kv_len, number
            if key not in known:
                known[key] = self.mask.enclosure(*key, head)
            found.append(_taken_of(known[key], one))
        return found

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        one, number = self._of(at.batch)
        cells = torch.zeros(at.shape, dtype=torch.bool, device=device)
        for u, rows in met(one.rows, *at.rows):
            for v, keys in met(one.keys, *at.keys):
                whole = Rectangle(span(rows), span(keys), one.q_len, one.kv_len, number, at.head)
                found = self.mask._cells(whole, device)  # asked where the whole is no region
                falls = [axis for axis, side in enumerate((rows, keys)) if side.step < 0]
                cells[u : u + len(rows), v : v + len(keys)] = found.flip(falls) if falls else found
        return cells

    def _of_heads(self, start: int, stop: int) -> Mask:
        return replace(self, mask=self.mask.for_heads(start, stop))

    def _text(self, show: Callable[[Any], str]) -> str:
        return f"Taken({show(self.mask)}, {show(self.taken)})"


def _whole(mask: Mask, q_len: int, kv_len: int, *plane: int) -> Enclosure:
    """Return the enclosure that ranks take theirs of, one after the other.

    The mask keeps that of each of its score matrices, at the lengths that were last asked for.
    """
    kept: dict[tuple[int, ...], tuple[tuple[int, int], Enclosure]]
    kept = vars(mask).setdefault("_wholes", {})
    found = kept.get(plane)
    if found is None or found[0] != (q_len, kv_len):
        found = kept[plane] = (q_len, kv_len), mask.enclosure(q_len, kv_len, *plane)
    return found[1]


def _taken_of(whole: Enclosure, one: Excerpt) -> Enclosure:
    inner = whole.inner.take(one.rows, one.keys)
    return Enclosure(inner, inner if whole.exact else whole.outer.take(one.rows, one.keys))


# -- excerpts --------------------------------------------------------------------------------


def read_excerpts(name: str, given: object) -> tuple[Excerpt, ...]:
    """Return excerpts, which may be written in numbers: all of a batch element, or one of none.

    >>> read_excerpts("Taken", [(4, 4, [(0, 2)], [(0, 4)])])[0].rows
    (range(0, 2),)
    """
    if not isinstance(given, (tuple, list)) or not given:
        raise CompositionTypeError(
            f"{name} takes a list of excerpts, got {describe(given)}; one for all batch elements, "
            "or one for each that is taken"
        )
    found = tuple(_read(name, one) for one in given)
    batches = {one.batch is None for one in found}
    if batches == {True, False} or (batches == {True} and len(found) > 1):
        raise CompositionError(
            f"{name} got {len(found)} excerpts, some of which say no batch element; one holds for "
            "all without it, and each of several says whose it is"
        )
    return found


def _read(name: str, given: object) -> Excerpt:
    if isinstance(given, Excerpt):
        given = (given.q_len, given.kv_len, given.rows, given.keys, given.batch)
    if not isinstance(given, (tuple, list)) or len(given) not in (4, 5):
        raise CompositionTypeError(
            f"{name} got the excerpt {shown(given)}; it is an Excerpt, or (q_len, kv_len, rows, "
            "keys) and, where it is of one, its batch element"
        )
    q_len, kv_len, rows, keys, *batch = given
    for what, length in (("q_len", q_len), ("kv_len", kv_len)):
        check_int(f"{name} {what}", length, 0)
    number = batch[0] if batch else None
    if number is not None:
        check_int(f"{name} batch", number, 0)
    own = read_ranges(f"{name} rows", rows, q_len)
    return Excerpt(q_len, kv_len, own, read_ranges(f"{name} keys", keys, kv_len), number)


def excerpt_of(
    whole: HasExtent, rows: object, keys: object, q_len: object = None, kv_len: object = None
) -> Excerpt:
    """Return an excerpt of a mask or a bias, from arguments in any form.

    Of lengths that do not matter it has some that do.

    >>> from attnkit.masks import Full
    >>> excerpt_of(Full(), [(0, 2)], [range(3, 4)], kv_len=9).sizes
    (2, 1)
    """
    q_len, kv_len = length_of(whole, 0, q_len), length_of(whole, 1, kv_len)
    own, others = read_ranges("rows", rows, q_len), read_ranges("keys", keys, kv_len)
    if q_len is None:
        q_len = max((span(one)[1] for one in own), default=0)
    if kv_len is None:
        kv_len = max((span(one)[1] for one in others), default=0)
    return Excerpt(q_len, kv_len, own, others)


class HasExtent(Protocol):
    """What rows and keys are taken of: a mask or a bias."""

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The lengths that it is built for."""

    @property
    def anchored(self) -> bool:
        """Whether more rows or keys would move what it holds."""


def length_of(whole: HasExtent, axis: int, given: object) -> int | None:
    """Return a length of a whole score matrix; None where what it holds does not depend on it."""
    name, known = ("q_len", "kv_len")[axis], whole.extent[axis]
    if given is not None:
        check_int(name, given, 0)
    if known is not None and given not in (None, known):
        raise CompositionError(
            f"{whole!r} is built for {name}={known}, but a part of it is asked for as one of "
            f"{name}={given}; leave it out"
        )
    length = known if given is None else given
    if length is None and whole.anchored:
        raise CompositionError(
            f"{whole!r}: what a part of it holds depends on the lengths of the whole score matrix; "
            "pass q_len= and kv_len="
        )
    return length  # type: ignore[return-value]


def _written(one: Excerpt) -> Written:
    four = (one.q_len, one.kv_len, ends_of(one.rows), ends_of(one.keys))
    return four if one.batch is None else (*four, one.batch)


def taken_again(first: Sequence[Excerpt], more: Sequence[Excerpt]) -> tuple[Excerpt, ...]:
    """Return the excerpts of what excerpts are taken of, as excerpts of the whole.

    >>> one = read_excerpts("Taken", [(9, 9, [(2, 6)], [(4, 9)])])
    >>> taken_again(one, read_excerpts("Taken", [(4, 5, [(3, -1)], [(0, 1), (3, 5)])]))[0].keys
    (range(4, 5), range(7, 9))
    """
    if more[0].batch is None:
        pairs = [(own, more[0], own.batch) for own in first]
    elif first[0].batch is None:
        pairs = [(first[0], one, one.batch) for one in more]
    else:
        wrong = next((one.batch for one in more if (one.batch or 0) >= len(first)), None)
        if wrong is not None:
            raise CompositionError(
                f"batch element {wrong} is taken of {len(first)} that were taken before"
            )
        pairs = [(first[one.batch or 0], one, first[one.batch or 0].batch) for one in more]
    for own, one, _ in pairs:
        if own.sizes != (one.q_len, one.kv_len):
            raise CompositionError(
                f"rows and keys are taken of a score matrix of {one.q_len} x {one.kv_len}, but "
                "{} x {} were taken before".format(*own.sizes)
            )
    return tuple(
        Excerpt(own.q_len, own.kv_len, picked(own.rows, one.rows), picked(own.keys, one.keys), b)
        for own, one, b in pairs
    )
