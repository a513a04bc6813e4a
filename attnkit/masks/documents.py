"""Masks from lengths: `Documents` (block diagonal) and `Padding` (keys that exist)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import Literal

import torch

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Mask, check_ints

__all__ = ["Documents", "Padding"]

Lengths = tuple[int, ...] | tuple[tuple[int, ...], ...]


def _lengths(name: str, values: object) -> Lengths:
    if isinstance(values, torch.Tensor) and values.dim() == 2:
        values = values.tolist()
    if isinstance(values, Sequence) and values and not isinstance(values[0], int):
        return tuple(check_ints(f"{name}[{b}]", row, 0) for b, row in enumerate(values))
    return check_ints(name, values, 0)


@MASKS.register("documents")
@dataclass(frozen=True, repr=False)
class Documents(Mask):
    """Packed documents that do not see each other: block diagonal, blocks of `lengths`.

    Document d holds the queries ``sum(lengths[:d]) <= i < sum(lengths[:d + 1])`` and as many
    keys; `kv_lengths` gives the keys' own lengths for cross-attention. One tuple serves every
    batch element, a tuple of tuples gives each its own. The lengths must sum to the score
    matrix's: a mask is never stretched or clipped.

    >>> print((Documents([2, 3])).show(5, 5))
    ##...
    ##...
    ..###
    ..###
    ..###
    """

    lengths: Lengths
    kv_lengths: Lengths | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", _lengths("Documents lengths", self.lengths))
        if self.kv_lengths is not None:
            kv = _lengths("Documents kv_lengths", self.kv_lengths)
            object.__setattr__(self, "kv_lengths", None if kv == self.lengths else kv)
        rows, keys = _per_batch(self.lengths), _per_batch(self._keys)
        if len(rows) != len(keys) or any(len(a) != len(b) for a, b in zip(rows, keys, strict=True)):
            raise CompositionError(
                f"{self!r}: each document needs a query length and a key length; the two lists "
                "differ in shape"
            )
        for name, per_batch in (("lengths", rows), ("kv_lengths", keys)):
            sums = [sum(one) for one in per_batch]
            if len(set(sums)) > 1:
                raise CompositionError(
                    f"{self!r}: the {name} of the batch elements sum to {sums}; the rows of one "
                    "batch have one length (give the padding a document of its own)"
                )

    @classmethod
    def from_ids(cls, ids: torch.Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Documents:
        """Build from a document number per token, [S] or [B, S]; tokens of one are contiguous.

        Reads the tensor on the host. Raises `CompositionError` if a number comes back after
        another one: that is no block diagonal.

        >>> Documents.from_ids([7, 7, 3])
        Documents((2, 1))
        """
        values = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        rows = values if values and isinstance(values[0], Sequence) else [values]
        lengths = []
        for b, row in enumerate(rows):
            runs = [(number, len(list(group))) for number, group in groupby(row)]
            numbers = [number for number, _ in runs]
            if len(set(numbers)) != len(numbers):
                again = next(n for k, n in enumerate(numbers) if n in numbers[:k])
                raise CompositionError(
                    f"from_ids: document {again!r} of batch element {b} comes back after another "
                    "one; documents are contiguous (for scattered ids use masks.Predicate)"
                )
            lengths.append(tuple(n for _, n in runs))
        return cls(lengths[0] if rows is not values else tuple(lengths))

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: torch.Tensor | Sequence[int], cu_seqlens_kv: object = None
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

    def blocks(self, batch: int = 0) -> tuple[Slice, ...]:
        """Return the blocks of one batch element, from the top; empty documents give none."""
        rows, keys = _per_batch(self.lengths), _per_batch(self._keys)
        b = batch if len(rows) > 1 else 0
        i, j = (list(accumulate(one, initial=0)) for one in (rows[b], keys[b]))
        parts = (Slice(i0, i1, j0, j1) for i0, i1, j0, j1 in zip(i, i[1:], j, j[1:], strict=False))
        return tuple(part for part in parts if part)

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        return _blocks_region(self, batch)

    @property
    def batches(self) -> int | None:
        """One list per batch element, where they differ."""
        return len(self.lengths) if isinstance(self.lengths[0], tuple) else None

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The sums of the lengths."""
        return sum(_per_batch(self.lengths)[0]), sum(_per_batch(self._keys)[0])


@lru_cache(maxsize=64)
def _blocks_region(documents: Documents, batch: int) -> Region:
    return Region.of(*documents.blocks(batch))


def _per_batch(lengths: Lengths) -> tuple[tuple[int, ...], ...]:
    return lengths if isinstance(lengths[0], tuple) else (lengths,)


def _differences(name: str, values: object) -> tuple[int, ...]:
    ends = check_ints(name, values, 0)
    if ends[0] != 0 or len(ends) < 2 or any(a > b for a, b in pairwise(ends)):
        raise CompositionError(
            f"{name}={ends} is not a list of cumulative lengths: it starts with 0, never falls, "
            "and has one entry more than there are documents (for lengths use Documents(lengths))"
        )
    return tuple(b - a for a, b in pairwise(ends))


@MASKS.register("padding")
@dataclass(frozen=True, repr=False)
class Padding(Mask):
    """The keys that exist, per batch element: ``j < lengths[batch]``, for side="right".

    With side="left" the padding comes first: ``j >= kv_len - lengths[batch]``. A query row
    beyond its own sequence still sees the existing keys; an element of length 0 has empty rows.

    >>> print(Padding([2, 4]).show(2, 4, batch=0))
    ##..
    ##..
    """

    lengths: tuple[int, ...]
    side: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", check_ints("Padding lengths", self.lengths, 0))
        if self.side not in ("right", "left"):
            raise CompositionTypeError(
                f"Padding got side={self.side!r}; the padding stands 'right' or 'left'"
            )

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Also refuse a sequence longer than the score matrix."""
        super().check(q_len, kv_len, batch, heads)
        if max(self.lengths) > kv_len:
            raise CompositionError(
                f"{self!r} has a sequence of {max(self.lengths)} keys, but kv_len is {kv_len}"
            )

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        length = self.lengths[batch]
        start = 0 if self.side == "right" else kv_len - length
        return Region.of(Slice(0, q_len, start, start + length))

    @property
    def batches(self) -> int | None:
        """One length per batch element."""
        return len(self.lengths)

    @property
    def anchored(self) -> bool:
        """Left padding counts from the last key."""
        return self.side == "left"
