"""`Mask`: the set of allowed cells as a value, and what every family of masks shares."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch

from attnkit.arguments import (
    Align,
    anchor,
    check_align,
    check_device,
    check_int,
    full_text,
    short,
)
from attnkit.display import Drawing, Text, colour
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError, clipped, shown
from attnkit.fields import GRID, Picture, layer
from attnkit.geometry import Region
from attnkit.handles import born
from attnkit.masks import picture
from attnkit.masks.operators import Operators
from attnkit.masks.order import Order
from attnkit.masks.trace import Enclosure, Rectangle, cells_of, paint, row_blocks
from attnkit.ranges import Excerpt
from attnkit.textform import Families, arguments_text, check_names

if TYPE_CHECKING:
    from typing_extensions import Self

    from attnkit.display.figure import Figure
    from attnkit.masks.finding import Finding

__all__ = [
    "MASKS",
    "Align",
    "Enclosure",
    "Full",
    "Mask",
    "Rectangle",
    "anchor",
    "check_align",
    "check_int",
]

LONGEST_REPR = 1000
"""Characters that ``repr(mask)`` takes, at most; ``str(mask)`` is whole."""


class Mask(Operators, ABC):
    """A set of allowed (query, key) cells; True means allowed, everywhere in attnkit.

    Masks are values: they compare, hash, print as text that `masks.parse` reads back, and
    combine by ``m1 & m2``, ``m1 | m2``, ``~m``, ``m1 - m2`` and ``m[q_slice, kv_slice]``. A mask
    does not know its lengths unless it is built for some (`extent`).

    Masks are equal when they are written alike: the same families with the same arguments, the
    parts of an intersection or union in any order. Whether two masks allow the same cells
    depends on the lengths, so their regions say it: ``a.region(8, 8) == b.region(8, 8)``.

    Masks nest at most 64 deep, and have at most 65,536 parts, each counted as often as it is
    written; a chain ``a | b | c`` is flat, however long.

    >>> from attnkit import masks
    >>> window, band = masks.SlidingWindow(4), masks.Band(3, 0)
    >>> window == band, window.region(8, 8) == band.region(8, 8)
    (False, True)

    A new family is a frozen dataclass that implements `_region` and is registered once with
    ``@masks.register("its_kind")``. One that is not a finite union of slices implements
    `enclosure` and `_cells` instead. With ``@dataclass(frozen=True, repr=False, eq=False)`` it
    inherits a short repr, and a hash that is computed once.

    >>> from attnkit import masks
    >>> mask = masks.Causal() & masks.SlidingWindow(2)
    >>> print(mask.show(3, 3))
    #..
    ##.
    .##
    >>> masks.parse(str(mask)) == mask
    True
    """

    kind: ClassVar[str]
    comes_with_call: ClassVar[bool] = False
    """Whether its cells are data of each call, and nothing that a plan could read."""
    _handle: torch.Tensor  # what a graph knows of it

    def __new__(cls, *given: Any, **named: Any) -> Self:
        """Make a mask; inside of a compiled function, one that its graph makes when it runs."""
        if torch.compiler.is_dynamo_compiling():
            from attnkit.masks import written

            if written.WRITER.takes(*given, *named.values()):
                return cast("Self", written.made(cls.__name__, given, named))
        return cast("Self", _new(cls, given, named))

    # -- what a family says --------------------------------------------------------------

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        """Return the exact set of allowed cells of one score matrix."""
        raise CompositionTypeError(
            f"{type(self).__name__} implements no `_region`; a mask family implements it, or "
            "`enclosure` and `_cells`"
        )

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Return the best regions known to lie inside and outside of the mask.

        The sizes are taken as they are: `check` them first (`region` and `outer` do).
        """
        region = self._region(q_len, kv_len, batch, head)
        if not region.fits(q_len, kv_len):
            raise CompositionError(
                f"{type(self).__name__}._region returned cells outside of the {q_len} x {kv_len} "
                f"score matrix: {shown(region)}; bound its slices by q_len and kv_len"
            )
        return Enclosure(region, region)

    def enclosures(self, q_len: int, kv_len: int, batch: int, head: int = 0) -> list[Enclosure]:
        """Return the enclosures of the first `batch` elements; what is alike is made once.

        >>> from attnkit import masks
        >>> [known.inner.area for known in masks.Padding([1, 3]).enclosures(2, 3, 2)]
        [2, 6]
        """
        if self.batches is None:
            return [self.enclosure(q_len, kv_len, 0, head)] * batch
        return self._each_enclosure(q_len, kv_len, batch, head)

    def _each_enclosure(self, q_len: int, kv_len: int, batch: int, head: int) -> list[Enclosure]:
        """Return the same of batch elements that the mask tells apart."""
        return [self.enclosure(q_len, kv_len, b, head) for b in range(batch)]

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        """Return the allowed cells of a rectangle as a bool tensor [rows, keys].

        Asked only where `enclosure` is not exact: a region paints itself. Only these cells are
        made, so that memory does not follow the score matrix.
        """
        raise CompositionTypeError(
            f"{type(self).__name__} implements `enclosure` with two bounds, but no `_cells`"
        )

    def _extends(self, shorter: int, longer: int, batch: int, head: int) -> bool:
        """Whether the square matrix of a text begins with that of a shorter one, cell for cell."""
        if self._alike_on_squares:
            return True
        old = self.enclosure(shorter, shorter, batch, head)
        new = self.enclosure(longer, longer, batch, head)
        keys = (0, shorter)
        if old.exact and new.exact:
            return new.inner.cut(keys, keys) == old.inner
        return all(
            torch.equal(
                self._read(Rectangle(rows, keys, longer, longer, batch, head)),
                self._read(Rectangle(rows, keys, shorter, shorter, batch, head)),
            )
            for rows in row_blocks(0, shorter, shorter)
        )

    def in_order(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Order | None:
        """Return an order of positions in which the mask is a region, or a smaller one.

        None where the mask knows of none but the order in which they stand. A planner may sort
        tokens by it, so batch elements and heads that are run together have one order of rows
        and one of keys. The sizes are taken as they are: `check` them first.

        >>> from attnkit import masks
        >>> order = (masks.Dilated(2) & masks.Causal()).in_order(4, 4)
        >>> order.rows, [len(order.region.slices), order.region.area]
        ((range(0, 4, 2), range(1, 4, 2)), [2, 6])
        """
        return None

    @property
    def batches(self) -> int | None:
        """How many batch elements the mask tells apart; None when all are alike."""
        return None

    @property
    def heads(self) -> int | None:
        """How many heads the mask tells apart; None when all are alike."""
        return None

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The (q_len, kv_len) the mask is built for; None where it fits any length."""
        return (None, None)

    @property
    def anchored(self) -> bool:
        """Whether more rows or keys would move the set, rather than extend it.

        So it is taken to be, unless a family knows better or counts from "top_left".
        """
        return getattr(self, "align", None) != "top_left"

    @property
    def _alike_on_squares(self) -> bool:
        """Whether a larger square matrix only extends the set; lengths may enter by `anchor`."""
        return not self.anchored

    @property
    def _nesting(self) -> tuple[int, int]:
        """How deep the mask nests, and how many masks it is written with."""
        return 1, 1

    # -- of a rank, or of one that has some of the heads ------------------------------------

    def take_excerpts(self, excerpts: Sequence[Excerpt]) -> Mask:
        """Return rows and keys that are taken of the mask: of all batch elements, or of each.

        `take` is the same with one excerpt. A packed batch has one for each sequence that is
        taken, which says by `Excerpt.batch` whose it is.

        >>> from attnkit import masks
        >>> second = Excerpt(4, 4, (range(2, 4),), (range(4),), batch=1)
        >>> masks.Prefix([1, 2]).take_excerpts((second,)).region(2, 4).area
        4
        """
        from attnkit.masks.taken import Taken

        return Taken(self, tuple(excerpts))

    def _of_heads(self, start: int, stop: int) -> Mask:
        """Return the mask of some of the heads that it tells apart; a family may know a closer."""
        from attnkit.masks.of_heads import OfHeads

        return OfHeads(self, start, stop)

    # -- of masks whose tensors come with each call ----------------------------------------

    @property
    def form(self) -> Mask:
        """What a plan may know of it: the same without the numbers that come with each call."""
        return self

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that come with each call, in the order in which `bound` takes them."""
        return ()

    def bound(self, tensors: Sequence[torch.Tensor]) -> Mask:
        """Return the mask with the tensors of a call.

        >>> from attnkit import masks
        >>> chosen = masks.SelectedBlocks(torch.zeros(1, 1, 2, 1).long(), 2, 2, causal=True)
        >>> chosen.form.bound(chosen.tensors) == chosen
        True
        """
        return self

    def _added(self, at: Rectangle, dtype: torch.dtype) -> torch.Tensor | None:
        """Return what it adds to the scores of a rectangle, ``[1 | b, heads, rows, keys]``."""
        return None

    # -- what everyone asks --------------------------------------------------------------

    def region(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Region:
        """Return the exact `Region` of the mask for one score matrix.

        Raises `CompositionError` when the mask is not a finite union of slices, was built for
        other lengths, or tells fewer batch elements or heads apart than asked for.

        >>> from attnkit import masks
        >>> masks.SlidingWindow(2).region(4, 4).area
        7
        """
        inner, outer = self._checked_enclosure(q_len, kv_len, batch, head)
        if inner != outer:
            raise CompositionError(
                f"{self!r} is not a union of slices at {q_len} x {kv_len}, so it has no Region; "
                "use materialize() for its cells, or outer() for a region around it"
            )
        return inner

    def outer(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Region:
        """Return a region that holds every allowed cell: the mask itself where it is one.

        >>> from attnkit import masks
        >>> masks.Dilated(2).outer(4, 4).area
        16
        """
        return self._checked_enclosure(q_len, kv_len, batch, head).outer

    def _checked_enclosure(self, q_len: int, kv_len: int, batch: int, head: int) -> Enclosure:
        """Check the request, then enclose."""
        self.check(q_len, kv_len)
        for name, index, count in (("batch", batch, self.batches), ("head", head, self.heads)):
            check_int(name, index, 0)
            if count is not None and index >= count:
                raise CompositionError(
                    f"{self!r} was asked for {name}={index}; it tells {count} apart, counted from 0"
                )
        return self.enclosure(q_len, kv_len, batch, head)

    def _read(self, at: Rectangle, device: torch.device | str | None = None) -> torch.Tensor:
        """Return the cells of a rectangle, from whichever form the family knows."""
        known = self.enclosure(at.q_len, at.kv_len, at.batch, at.head)
        if known.exact:
            return paint(known.inner.cut(at.rows, at.keys), *at.shape, device)
        return self._cells(at, device)

    @property
    def _places(self) -> list[tuple[int, int]]:
        """The batch element and head of each score matrix that the mask tells apart."""
        return list(product(range(self.batches or 1), range(self.heads or 1)))

    def is_region(self, q_len: int, kv_len: int) -> bool:
        """Whether the mask is a finite union of slices for every batch element and head.

        >>> from attnkit import masks
        >>> masks.Causal().is_region(8, 8), masks.Dilated(2).is_region(8, 8)
        (True, False)
        """
        self.check(q_len, kv_len)
        return all(self.enclosure(q_len, kv_len, *place).exact for place in self._places)

    def materialize(
        self,
        q_len: int,
        kv_len: int,
        batch: int = 1,
        heads: int = 1,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Return the mask as a bool tensor [B, N, Sq, Skv], True = allowed.

        Batch elements and heads that the mask does not tell apart share memory (an expanded
        view): clone before writing. Raises `CompositionError` for a mask built for other sizes.

        >>> from attnkit import masks
        >>> masks.Causal().materialize(2, 3)[0, 0].int().tolist()
        [[1, 1, 0], [1, 1, 1]]
        """
        self.check(q_len, kv_len, check_int("batch", batch, 0), check_int("heads", heads, 0))
        check_device(device)
        whole = (0, q_len), (0, kv_len), q_len, kv_len
        planes = [self._read(Rectangle(*whole, *place), device) for place in self._places]
        cells = torch.stack(planes).view(self.batches or 1, self.heads or 1, q_len, kv_len)
        return cells.expand(batch, heads, q_len, kv_len)

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Raise `CompositionError` unless the mask fits these sizes."""
        check_int("q_len", q_len, 0)
        check_int("kv_len", kv_len, 0)
        for name, count in (("batch", batch), ("heads", heads)):
            if count is not None:
                check_int(name, count, 0)
        if self.extent == (None, None) and self.batches is self.heads is None:
            return  # asked for every length of a packed batch
        lengths = zip(("q_len", "kv_len"), self.extent, (q_len, kv_len), strict=True)
        for name, want, given in lengths:
            if want is not None and want != given:
                raise CompositionError(
                    f"{self!r} is built for {name}={want}, but the score matrix has "
                    f"{name}={given}; build the mask for these lengths, or cut it: mask[a:b, c:d]"
                )
        for name, want, given_count in (
            ("batch elements", self.batches, batch),
            ("heads", self.heads, heads),
        ):
            if want is not None and given_count is not None and want != given_count:
                raise CompositionError(
                    f"{self!r} tells {want} {name} apart, but there are {given_count}; "
                    "give it one entry for each of them"
                )

    def show(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0, width: int = 64) -> Text:
        """Return a small terminal picture, at most `width` characters wide.

        ``#`` all allowed, ``+`` some allowed, ``.`` none; a row of text is a row (or several
        rows) of queries.

        >>> from attnkit import masks
        >>> print(masks.Causal().show(3, 5))
        ###..
        ####.
        #####
        """
        check_int("show width", width, 1)
        self.check(q_len, kv_len)
        rows = q_len if q_len <= width else 32
        return picture.text(self._shares(q_len, kv_len, batch, head, rows, width))

    def plot(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Figure:
        """Return a matplotlib figure of the score matrix (needs the extra `plot`).

        As the value of a notebook's cell it is shown once; so is a mask itself, as a picture.

        >>> from attnkit import masks
        >>> type(masks.Causal().plot(64, 64)).__name__
        'Figure'
        """
        share = self._shares(q_len, kv_len, batch, head, GRID, GRID)
        return picture.figure(Drawing(q_len, kv_len, (layer(share, colour(0)),), repr(self)))

    def _repr_html_(self) -> str:
        """Return a picture for a notebook, at lengths that suit the mask."""
        from attnkit.masks.shown import page

        return page(self)

    @property
    def _unread(self) -> int:
        """How many cells are read before anything is known of it, by whoever asks first."""
        return 0

    def _shares(self, q_len: int, kv_len: int, b: int, h: int, rows: int, keys: int) -> Picture:
        self._checked_enclosure(q_len, kv_len, b, h)
        return picture.shares(cells_of(self, q_len, kv_len, b, h), q_len, kv_len, rows, keys)

    def simplify(self, q_len: int | None = None, kv_len: int | None = None) -> Mask:
        """Return the simplest mask known with the same cells at these lengths.

        Proven by equality of regions (a `Dense` or `Predicate` is read cell by cell); the mask
        itself where nothing simpler is found. The lengths may be left out where the mask has its
        own (`extent`). At other lengths the answer may be another set. `masks.recover(mask, q_len,
        kv_len)` is the same with the reason.

        >>> from attnkit import masks
        >>> masks.Dense.keep(masks.SlidingWindow(4).materialize(16, 16)[0, 0]).simplify()
        SlidingWindow(4)
        >>> (masks.Causal() & masks.SlidingWindow(64)).simplify(32, 32)
        Causal()
        """
        from attnkit.masks.recover import recover

        return recover(self, q_len, kv_len).mask

    def lint(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> tuple[Finding, ...]:
        """Return what looks like a mistake in the mask at these lengths, with remedies.

        `batch` and `heads`, if said, are checked against the mask. See `masks.Finding` for codes.

        >>> from attnkit import masks
        >>> for finding in masks.Causal().lint(3, 2):
        ...     print(finding.code)
        empty-rows
        """
        from attnkit.masks.lint import lint

        return lint(self, q_len, kv_len, batch, heads)

    # -- value ---------------------------------------------------------------------------

    def _value(self) -> Hashable:
        """Return what equality compares: the arguments, unless a family says otherwise."""
        return tuple(getattr(self, item.name) for item in fields(cast(Any, self)))

    @cached_property
    def _hash(self) -> int:
        return hash((type(self), self._value()))

    def __hash__(self) -> int:
        # Plans are cached by mask: a mask of a thousand documents must not be read every time.
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask) or type(other) is not type(self):
            return NotImplemented
        return self is other or (self._hash == other._hash and self._value() == other._value())

    def __getstate__(self) -> dict[str, Any]:
        # What is cached stays behind: another process hashes strings differently.
        return {item.name: getattr(self, item.name) for item in fields(cast(Any, self))}

    # -- text ----------------------------------------------------------------------------

    def _text(self, show: Callable[[Any], str]) -> str:
        return f"{type(self).__name__}({arguments_text(self, show)})"

    def __str__(self) -> str:
        return self._text(full_text)

    def __repr__(self) -> str:
        return clipped(self._text(short), LONGEST_REPR)


@untraced(MASK_IN_GRAPH)
def _new(cls: type[Mask], given: Sequence[Any], named: dict[str, Any]) -> Any:
    """Make one for its constructor to fill in; a tracer that cannot write it down stops here."""
    check_names(cls, given, named)
    made = object.__new__(cls)
    vars(made)["_handle"] = born(made)
    return made


MASKS = Families[Mask]("mask", Mask, "masks", "Causal() & SlidingWindow(64)")


@MASKS.register("full")
@dataclass(frozen=True, repr=False, eq=False)
class Full(Mask):
    """Every key, for every query: ``allowed(i, j) = True``.

    >>> print(Full().show(2, 3))
    ###
    ###
    """

    anchored = False

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        return Region.full(q_len, kv_len)

    def take_excerpts(self, excerpts: Sequence[Excerpt]) -> Mask:
        """Return the mask itself."""
        return self
