"""`Taken`: rows and keys of a bias from several places, each at the position that it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attnkit.arguments import Anchor, anchor, short
from attnkit.errors import CompositionError, clipped
from attnkit.masks.taken import read_excerpts, taken_again
from attnkit.pse.base import EVERY, Pse, Rectangle
from attnkit.pse.part_of import PartOf
from attnkit.pse.structure import (
    Align,
    Linear,
    OfDistance,
    PerKey,
    Root,
    Stepped,
    Structure,
    Toeplitz,
)
from attnkit.ranges import Excerpt, Ranges, ends_of, extent_of, met, sizes_of, span

__all__ = ["Taken", "shift_of"]

LONGEST_REPR = 1000


@dataclass(frozen=True, repr=False, eq=False)
class Taken(PartOf):
    """Rows and keys of another bias: ``bias[h, u, v] = part[h, rows[u], keys[v]]``.

    An excerpt says of how large a score matrix they are, and which. One without a batch element
    holds for all of them. Else there is one for each batch element (or packed sequence) that is
    taken, and they may differ in lengths. Made by `Pse.take` where a bias has no closer form.

    Its tensors are those of the other bias, whole: their gradient is zero where nothing was taken,
    so that the gradients of all ranks add up to that of one process. Cells are made as they are
    asked for, rectangle by rectangle, and no others.

    Raises `CompositionError` for positions outside of the matrix, and at use for other lengths
    than those of the rows and keys.

    >>> from attnkit import pse
    >>> own = pse.ALiBi([1.0]).take([(0, 1), (3, 4)], [(2, 4)], q_len=4, kv_len=4)
    >>> own
    ALiBi(slopes=(1.0,)).take(((0, 1), (3, 4)), ((2, 4),), q_len=4, kv_len=4)
    >>> own.materialize(2, 2)
    tensor([[[[-2., -3.],
              [-1., -0.]]]])
    """

    excerpts: tuple[Excerpt, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        excerpts = read_excerpts("pse.Taken", self.excerpts)
        inner = self.part
        if isinstance(inner, Taken):
            vars(self).update(part=inner.part)
            excerpts = taken_again(inner.excerpts, excerpts)
        vars(self).update(excerpts=excerpts)
        for sizes in {(one.q_len, one.kv_len) for one in excerpts}:
            self.part.check(*sizes)
        most = max((one.batch or 0 for one in excerpts), default=0)
        if self.part.batch is not None and most >= self.part.batch:
            raise CompositionError(
                f"pse.{self} takes batch element {most} of a bias made for a batch of "
                f"{self.part.batch}"
            )

    @property
    def anchored(self) -> bool:
        """It is of these rows and keys, and of no more."""
        return True

    @property
    def batch(self) -> int | None:
        """One for each excerpt, where these are of batch elements."""
        return self.part.batch if self.excerpts[0].batch is None else len(self.excerpts)

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
        """Also refuse lengths that are of no excerpt."""
        super().check(q_len, kv_len, batch, heads)
        if (q_len, kv_len) not in self._sizes:
            told = ", ".join(f"{q} x {kv}" for q, kv in sorted(self._sizes)[:4])
            raise CompositionError(
                f"pse.{self} is for score matrices of {told} (queries x keys), but this one is "
                f"{q_len} x {kv_len}"
            )

    # -- what its cells follow from ----------------------------------------------------------

    @cached_property
    def structure(self) -> Structure | None:
        """A number per distance, if that is as far in every excerpt; a number per key still is."""
        known = self.part.structure
        if isinstance(known, PerKey):
            return known if self.extent[1] is not None else None
        if not isinstance(known, OfDistance):
            return None
        found = shift_of(self.excerpts, known.align)
        if found is None:
            return None
        align, shift = found
        if isinstance(known, Stepped):
            return Stepped(tuple(start - shift for start in known.starts), known.rows, align)
        if isinstance(known, Linear | Root):
            if shift == 0:
                return replace(known, align=align)
            if len(self._sizes) == 1:
                ((q_len, kv_len),) = self._sizes
                return replace(known, align=anchor(align, q_len, kv_len) - shift)
        return Toeplitz(align)

    @property
    def structure_tensors(self) -> tuple[Tensor, ...]:
        """As that bias; a number per key of the keys that are taken."""
        numbers = self.part.structure_tensors
        if not isinstance(self.structure, PerKey):
            return numbers
        tensor = numbers[0]
        if self.excerpts[0].batch is None:
            return (_along(tensor, self.excerpts[0].keys),)
        whole = tensor[(None,) * (3 - tensor.ndim)]
        each = (
            _along(whole[one.batch : one.batch + 1] if len(whole) > 1 else whole, one.keys)
            for one in self.excerpts
            if one.batch is not None
        )
        return (torch.cat(list(each)),)

    def diagonals(
        self, q_len: int, kv_len: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """Return the numbers of distances, which all excerpts of these lengths have alike."""
        one = next((one for one in self.excerpts if one.sizes == (q_len, kv_len)), None)
        if one is None or one.batch is None:
            return super().diagonals(q_len, kv_len, dtype=dtype, device=device)
        alone = Taken(self.part, (replace(one, batch=None),))
        return alone.diagonals(q_len, kv_len, dtype=dtype, device=device)

    # -- cells -------------------------------------------------------------------------------

    def _values(self, at: Rectangle, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        if self.excerpts[0].batch is None:
            return self._block(self.excerpts[0], at, dtype, device)
        chosen = self.excerpts if at.batch == EVERY else self.excerpts[at.batch : at.batch + 1]
        blocks = [
            self._block(one, at._replace(batch=one.batch or 0), dtype, device) for one in chosen
        ]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def _block(
        self, one: Excerpt, at: Rectangle, dtype: torch.dtype, device: torch.device | None
    ) -> Tensor:
        """Return a rectangle of an excerpt: a piece for each range of rows and of keys in it."""
        sides = [list(met(one.rows, *at.rows)), list(met(one.keys, *at.keys))]
        if not all(sides):
            return torch.zeros(1, self.heads or 1, *at.shape, dtype=dtype, device=device)
        rows, keys = ([part for _, part in side] for side in sides)

        def piece(some: range, others: range) -> Tensor:
            place = Rectangle(span(some), span(others), one.q_len, one.kv_len, at.batch)
            cells = self.part._cells(place, dtype, device).expand(-1, -1, *place.shape)
            falls = [axis for axis, side in ((-2, some), (-1, others)) if side.step < 0]
            return cells.flip(falls) if falls else cells

        return _beside([_beside([piece(some, one) for one in keys], -1) for some in rows], -2)

    def take_excerpts(self, excerpts: Sequence[Excerpt]) -> Pse:
        """Return what is taken of this, as taken of the whole."""
        return self.part.take_excerpts(taken_again(self.excerpts, excerpts))

    def _of_heads(self, start: int, stop: int) -> Pse:
        return self.part.for_heads(start, stop).take_excerpts(self.excerpts)

    def __repr__(self) -> str:
        first = self.excerpts[0]
        if first.batch is not None:
            return clipped(f"{self.part!r}.take_excerpts({short(self.excerpts)})", LONGEST_REPR)
        where = f"{short(ends_of(first.rows))}, {short(ends_of(first.keys))}"
        lengths = f"q_len={first.q_len}, kv_len={first.kv_len}"
        return clipped(f"{self.part!r}.take({where}, {lengths})", LONGEST_REPR)


def shift_of(excerpts: Sequence[Excerpt], align: Anchor) -> tuple[Align, int] | None:
    """Return how the distances in excerpts are counted: the anchor, and what they are short of.

    A distance ``v - u'`` of an excerpt is ``j - i'`` less the shift. None where distances differ
    as positions do not, or excerpts do not agree.

    >>> step = Excerpt(8, 8, (range(6, 8),), (range(0, 8),))
    >>> shift_of([step], "bottom_right"), shift_of([step, step], "top_left")
    (('bottom_right', 0), ('bottom_right', 0))
    """
    shifts: dict[Align, set[int]] = {"bottom_right": set(), "top_left": set()}
    for one in excerpts:
        if not (one.rows and one.keys):
            continue  # it has no distances
        if len(one.rows) > 1 or len(one.keys) > 1 or one.rows[0].step < 0 or one.keys[0].step < 0:
            return None
        first = one.keys[0].start - one.rows[0].start - anchor(align, one.q_len, one.kv_len)
        for own, found in shifts.items():
            found.add(first + anchor(own, *one.sizes))
    agreed = [(own, min(found, default=0)) for own, found in shifts.items() if len(found) < 2]
    return min(agreed, key=lambda one: one[1] != 0, default=None)


def _along(tensor: Tensor, keys: Ranges) -> Tensor:
    """Return the entries of some keys along the last axis."""
    parts = [(tensor[..., slice(*span(one))], one.step) for one in keys]
    turned = [part if step > 0 else part.flip(-1) for part, step in parts]
    return _beside(turned or [tensor[..., :0]], -1)


def _beside(parts: Sequence[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), axis)
