"""`Documents`: several texts in one row, each of which sees itself alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from attnkit.arguments import (
    IntsLike,
    LengthsLike,
    check_int,
    check_ints,
    check_readable,
    describe,
    holds_integers,
    short,
    tokens,
)
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Enclosure, Mask, Rectangle
from attnkit.masks.composite import Nested, agree

__all__ = ["Documents"]

Lengths = tuple[int, ...] | tuple[tuple[int, ...], ...]
Range = tuple[int, int]


def _lengths(name: str, values: object) -> Lengths:
    if isinstance(values, torch.Tensor):
        check_readable(name, values)
    if isinstance(values, torch.Tensor | np.ndarray) and values.ndim == 2:
        if not holds_integers(values):
            raise CompositionTypeError(f"{name} is {describe(values)}; lengths are integers")
        values = values.tolist()
    rows = list(values) if isinstance(values, list | tuple) else []
    if rows and isinstance(rows[0], list | tuple | torch.Tensor | np.ndarray):
        return tuple(check_ints(f"{name}[{b}]", row, 0) for b, row in enumerate(rows))
    return check_ints(name, values, 0)


@MASKS.register("documents")
@dataclass(frozen=True, repr=False, eq=False)
class Documents(Nested):
    """Packed documents that do not see each other: block diagonal, blocks of `lengths`.

    Document d holds the queries ``sum(lengths[:d]) <= i < sum(lengths[:d + 1])`` and as many
    keys; `kv_lengths` gives the keys' own lengths for cross-attention. One tuple serves every
    batch element, a tuple of tuples gives each its own. The lengths must sum to the score
    matrix's: a mask is never stretched or clipped.

    `inside` is a mask that each document has for itself, as if its queries and keys were a score
    matrix of their own. That is not the same as ``Documents(...) & inside``, where positions
    count through the whole score matrix: with `kv_lengths`, a causal mask is then causal in no
    document.

    >>> from attnkit.masks import Causal
    >>> print(Documents([2, 3], inside=Causal()).show(5, 5))
    #....
    ##...
    ..#..
    ..##.
    ..###
    >>> print(Documents([2, 1], [3, 3], inside=Causal()).show(3, 6))
    ##....
    ###...
    ...###
    >>> print(Documents([2, 3]).show(5, 5))
    ##...
    ##...
    ..###
    ..###
    ..###
    """

    lengths: Lengths
    kv_lengths: Lengths | None = None
    inside: Mask | None = field(default=None, kw_only=True)
    anchored = True

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(
            self,
            lengths: LengthsLike,
            kv_lengths: LengthsLike | None = None,
            *,
            inside: Mask | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        if self.inside is not None and not isinstance(self.inside, Mask):
            raise CompositionTypeError(
                f"Documents takes a mask for inside, got {describe(self.inside)}"
            )
        self._check_nesting()
        object.__setattr__(self, "lengths", _lengths("Documents lengths", self.lengths))
        if self.kv_lengths is not None:
            kv = _lengths("Documents kv_lengths", self.kv_lengths)
            object.__setattr__(self, "kv_lengths", None if kv == self.lengths else kv)
        rows, keys = _per_batch(self.lengths), _per_batch(self._keys)
        if len(rows) != len(keys) or any(len(a) != len(b) for a, b in zip(rows, keys, strict=True)):
            raise CompositionError(
                f"{self!r}: each document needs a query length and a key length; the two lists "
                "differ in shape (a document without keys has the key length 0)"
            )
        for name, per_batch in (("lengths", rows), ("kv_lengths", keys)):
            sums = [sum(one) for one in per_batch]
            if len(set(sums)) > 1:
                raise CompositionError(
                    f"{self!r}: the {name} of the batch elements sum to {shown(sums)}; the rows of "
                    "one batch have one length (make the padding a document)"
                )
        if self.inside is not None:
            self._check_inside(self.inside)

    def _check_inside(self, inside: Mask) -> None:
        own = len(self.lengths) if isinstance(self.lengths[0], tuple) else None
        agree(
            "batch sizes",
            (self.apart, inside),
            (own, inside.batches),
            "give each one entry per batch element",
        )
        sizes = {size for b in range(own or 1) for size in self.sizes(b)}
        for rows, keys in sorted(sizes):
            try:
                inside.check(rows, keys)
            except CompositionError as error:
                raise type(error)(
                    f"Documents has a document of {rows} queries and {keys} keys, which its "
                    f"inside does not fit: {error}"
                ) from None

    @classmethod
    @untraced(MASK_IN_GRAPH)
    def from_ids(cls, ids: LengthsLike) -> Documents:
        """Build from a document number per token, [S] or [B, S]; tokens of one are contiguous.

        Reads the tensor on the host. Raises `CompositionError` if a number comes back after
        another one: that is not a block diagonal.

        >>> Documents.from_ids([7, 7, 3])
        Documents((2, 1))
        """
        rows = tokens("from_ids", ids)
        per_batch = rows if rows.dim() == 2 else rows[None]
        lengths = []
        for b, row in enumerate(per_batch):
            numbers, counts = row.unique_consecutive(return_counts=True)
            again = [number for number, times in Counter(numbers.tolist()).items() if times > 1]
            if again:
                raise CompositionError(
                    f"from_ids: document {again[0]} of batch element {b} comes back after another "
                    "one; documents are contiguous (for scattered ids: masks.SameId.of(ids))"
                )
            lengths.append(tuple(counts.tolist()))
        return cls(tuple(lengths) if rows.dim() == 2 else lengths[0])

    @classmethod
    @untraced(MASK_IN_GRAPH)
    def from_cu_seqlens(
        cls, cu_seqlens: IntsLike, cu_seqlens_kv: IntsLike | None = None
    ) -> Documents:
        """Build from cumulative lengths with the leading 0: [0, 2, 5] is two documents.

        >>> Documents.from_cu_seqlens([0, 2, 5])
        Documents((2, 3))
        """
        kv = None if cu_seqlens_kv is None else _differences("cu_seqlens_kv", cu_seqlens_kv)
        return cls(_differences("cu_seqlens", cu_seqlens), kv)

    @property
    def _keys(self) -> Lengths:
        return self.lengths if self.kv_lengths is None else self.kv_lengths

    @property
    def members(self) -> tuple[Mask, ...]:
        """The mask inside of each document, if there is one."""
        return () if self.inside is None else (self.inside,)

    @property
    def apart(self) -> Documents:
        """The documents alone, without what is inside of them."""
        return self if self.inside is None else replace(self, inside=None)

    def blocks(self, batch: int = 0) -> tuple[Slice, ...]:
        """Return the blocks of one batch element, from the top; empty documents give none.

        >>> [(block.i0, block.i1) for block in Documents([2, 3]).blocks()]
        [(0, 2), (2, 5)]
        """
        check_int("Documents batch", batch, 0)
        parts = (Slice(*rows, *keys) for rows, keys in self.places(batch))
        return tuple(part for part in parts if part)

    def places(self, batch: int = 0) -> list[tuple[Range, Range]]:
        """Return the queries and the keys of each document of a batch element, as ranges.

        >>> Documents((2, 3)).places()
        [((0, 2), (0, 2)), ((2, 5), (2, 5))]
        """
        sizes = zip(*self.sizes(batch), strict=True)
        rows, keys = (pairwise(accumulate(one, initial=0)) for one in sizes)
        return list(zip(rows, keys, strict=True))

    def sizes(self, batch: int = 0) -> list[tuple[int, int]]:
        """Return the number of queries and of keys of each document of a batch element."""
        rows, keys = _per_batch(self.lengths), _per_batch(self._keys)
        b = batch if len(rows) > 1 else 0
        return list(zip(rows[b], keys[b], strict=True))

    @cached_property
    def _known(self) -> dict[tuple[int, int], Enclosure]:
        """What was asked for so far, by batch element and head; lives as long as the mask."""
        return {}

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """The blocks; or the two bounds of the mask inside, placed in each block."""
        plane = (batch if self.batches is not None else 0, head if self.heads is not None else 0)
        if plane not in self._known:
            blocks = Region.of(*self.blocks(plane[0]))
            known = Enclosure(blocks, blocks)
            if self.inside is not None:
                known = self._each_in_its_block(self.inside, *plane)
            self._known[plane] = known
        known = self._known[plane]
        if known.outer.fits(q_len, kv_len):
            return known
        whole = Region.full(q_len, kv_len)  # a cut may ask for fewer rows or keys than there are
        return Enclosure(known.inner & whole, known.outer & whole)

    def _each_in_its_block(self, inside: Mask, batch: int, head: int) -> Enclosure:
        each = {
            size: inside.enclosure(*size, batch, head) for size in dict.fromkeys(self.sizes(batch))
        }
        inner, outer = [], []
        for size, ((row, _), (key, _)) in zip(self.sizes(batch), self.places(batch), strict=True):
            inner.append(each[size].inner.shift(row, key))
            outer.append(each[size].outer.shift(row, key))
        exact = all(found.exact for found in each.values())
        low = Region.union(inner)
        return Enclosure(low, low if exact else Region.union(outer))

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        cells = torch.zeros(at.shape, dtype=torch.bool, device=device)
        (top, bottom), (left, right) = at.rows, at.keys
        for (i, i_end), (j, j_end) in self.places(at.batch):
            rows = max(top, i), min(bottom, i_end)
            keys = max(left, j), min(right, j_end)
            if rows[0] < rows[1] and keys[0] < keys[1]:
                own = (rows[0] - i, rows[1] - i), (keys[0] - j, keys[1] - j)
                inside = Rectangle(*own, i_end - i, j_end - j, at.batch, at.head)
                target = cells[rows[0] - top : rows[1] - top, keys[0] - left : keys[1] - left]
                for mask in self.members:
                    target.copy_(mask._read(inside, device))
        return cells

    @property
    def batches(self) -> int | None:
        """One list per batch element, where they differ."""
        return len(self.lengths) if isinstance(self.lengths[0], tuple) else super().batches

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The sums of the lengths."""
        return sum(_per_batch(self.lengths)[0]), sum(_per_batch(self._keys)[0])


def _per_batch(lengths: Lengths) -> tuple[tuple[int, ...], ...]:
    return lengths if isinstance(lengths[0], tuple) else (lengths,)


def _differences(name: str, values: object) -> tuple[int, ...]:
    ends = check_ints(name, values, 0)
    if ends[0] != 0 or len(ends) < 2 or any(a > b for a, b in pairwise(ends)):
        raise CompositionError(
            f"{name}={short(ends)} is not a list of cumulative lengths: it starts with 0, never "
            "falls, and has one entry more than there are documents (for lengths use "
            "Documents(lengths))"
        )
    return tuple(b - a for a, b in pairwise(ends))
