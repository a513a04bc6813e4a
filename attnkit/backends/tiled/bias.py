"""What is added to the scores, tile by tile: slopes times distances, and carried tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TypeGuard, cast

import torch
from einops import rearrange
from torch import Tensor

from attnkit.backends.base import gradients_of, recorded, stats_dtype
from attnkit.backends.biases import by_diagonal, constants, diagonals_of, looked_up, stored
from attnkit.backends.numbers import bounded, largest_bias
from attnkit.backends.tiled.schedule import KeyChunk, Lane, RowBlock
from attnkit.backends.tiled.terms import (
    Carried,
    Diagonals,
    Distances,
    Ends,
    Excerpted,
    Lengths,
    LookedUp,
    Stored,
    Term,
)
from attnkit.backends.tiled.tiles import Step, Workspace
from attnkit.planner import Request
from attnkit.planner.request import BiasTerm
from attnkit.pse import Indexed, PerKey, Pse, Root, Taken
from attnkit.pse.base import rebound
from attnkit.pse.structure import OfDistance
from attnkit.ranges import total

__all__ = ["Bias", "Bound", "bind", "with_tensors"]

# Distances are kept for this many shapes of tiles: a window needs one, and memory stays bounded.
KEPT = 4
# Runs of rows and keys, on average, from which a share's bias is read piece by piece.
ROWS_OF_PIECE, KEYS_OF_PIECE = 16, 32


# -- terms -------------------------------------------------------------------------------------


def bind(request: Request, pse: Pse | None, device: torch.device) -> tuple[Term, ...]:
    """Return the addends of a bias in the forms that tiles can be read from."""
    if pse is None:
        return ()
    addends = zip(pse.parts, request.bias, strict=True)
    return tuple(_term(request, *addend, device) for addend in addends)


def with_tensors(terms: Sequence[Term], given: Sequence[Tensor]) -> tuple[Term, ...]:
    """Return the terms with other tensors in place of their own, in order."""
    tensors = iter(given)
    return tuple(
        replace(term, tensor=next(tensors)) if isinstance(term, Carried) else term for term in terms
    )


def _term(request: Request, part: Pse, known: BiasTerm, device: torch.device) -> Term:
    """Return an addend by what its cells follow from; a carried tensor has gradients to pass on."""
    structure, wide = known.structure, stats_dtype(request.dtype)
    factor = request.scale if known.before_scale else 1.0
    if known.slopes is not None:
        return Distances(known.slopes, known.align, isinstance(structure, Root))
    if known.by_distance:
        numbers, starts = by_diagonal(request, part, wide, device)
        return Diagonals(numbers, factor, starts)
    if isinstance(structure, Indexed):
        entries, index = looked_up(part, wide)
        return LookedUp(entries, factor, index)
    if is_in_long_runs(part):
        numbers, starts = diagonals_of(_wholes(part), part.part, wide, device)
        return Excerpted(numbers, factor, starts, part.excerpts)
    lengths = set(request.sequences)
    if len(lengths) == 1 or isinstance(structure, PerKey):
        return Stored(stored(part, request.sequences[0], wide, device), factor)
    # Sequences of different lengths have a matrix each.
    matrices = [
        part.materialize(*sizes, batch_index=number, dtype=wide, device=device)
        for number, sizes in enumerate(request.sequences)
    ]
    heads = max(matrix.shape[1] for matrix in matrices)
    flat = [rearrange(matrix, "1 n i j -> n (i j)").expand(heads, -1) for matrix in matrices]
    cells = accumulate((q_len * kv_len for q_len, kv_len in request.sequences), initial=0)
    return Stored(torch.cat(flat, dim=1), factor, tuple(cells))


def is_in_long_runs(part: Pse) -> TypeGuard[Taken]:
    """Whether a bias by distance has long runs of rows and keys of a whole, and several of them.

    Then tiles are made of a few pieces of the whole's diagonals. Else its matrix is made.
    """
    if not isinstance(part, Taken) or not isinstance(part.part.structure, OfDistance):
        return False
    rows = tuple(run for one in part.excerpts for run in one.rows)
    keys = tuple(run for one in part.excerpts for run in one.keys)
    long = total(rows) >= ROWS_OF_PIECE * len(rows) and total(keys) >= KEYS_OF_PIECE * len(keys)
    return long and all(one.step == 1 for one in (*rows, *keys))


def _wholes(part: Taken) -> list[tuple[int, int]]:
    return [(one.q_len, one.kv_len) for one in part.excerpts]


class Bound:
    """What the tiles of a request read of a bias, and how its gradient goes on to its tensors.

    The tiles' tensors, `made`, follow from those, `leaves`, by operators that torch knows and
    records here. Those that no gradient is `wanted` of are None.
    """

    def __init__(
        self,
        request: Request,
        pse: Pse | None,
        carried: Sequence[Tensor],
        wanted: Sequence[bool],
        device: torch.device,
    ) -> None:
        self.leaves = [t.detach().requires_grad_(w) for t, w in zip(carried, wanted, strict=True)]
        self.made: list[Tensor | None] = []
        if pse is None or not any(wanted):
            self.terms = bind(request, pse, device)
            return
        with recorded():
            terms = bind(request, rebound(pse, self.leaves), device)
        made = [term.tensor for term in terms if isinstance(term, Carried)]
        self.terms = with_tensors(terms, [tensor.detach() for tensor in made])
        self.made = [tensor if tensor.requires_grad else None for tensor in made]

    def handed_on(self, found: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Return what gradients of `made`, of any dtype, give to the tensors of the bias."""
        pairs = [
            (t, g if g is None or t is None else g.to(t.dtype))
            for t, g in zip(self.made, found, strict=True)
        ]
        return gradients_of(pairs, self.leaves, retain=True)


# -- tiles -------------------------------------------------------------------------------------


class Bias:
    """The addends of one call, read tile by tile.

    Their sum is cut off where it would not be finite, as in every backend. With `lengths` all
    score matrices are of these and share one bias ``[1 | n, i, j]``: it is made once, and tiles
    are windows of it, as those of its gradient are.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        dtype: torch.dtype,
        work: Workspace,
        heads: int,
        lengths: Lengths | None,
    ) -> None:
        self.terms, self.dtype, self.work = terms, dtype, work
        self.all: Step | None = None
        if lengths is not None:
            lane = Lane((0, 1), (0, heads), 0, (0, 0), lengths)
            self.all = Step(lane, RowBlock(0, lengths[0], 1, 0, ()), 0, 1, 0, 1, 0, heads, 0, 1, 1)
        self._made: dict[float, Tensor] = {}
        self._slope: Tensor | None = None
        self._joined: tuple[Tensor, Tensor] | None = None
        self._slopes: dict[tuple[int, float], Tensor] = {}
        self._known: dict[tuple[bool, int, int, int], Tensor] = {}

    def put(
        self, scores: Tensor, step: Step, chunk: KeyChunk, unit: float, more: bool = False
    ) -> None:
        """Overwrite ``[b h i j]`` scores with the bias of their cells, or add it to them.

        In them one unit of score is `unit`.
        """
        for column, first, count in step.runs(chunk):
            target = scores[..., column : column + count]
            if self.all is None:
                self._put(target, step, first, unit, more)
            elif more:
                target.add_(_window(self._whole(unit), step, first, count))
            else:
                target.copy_(_window(self._whole(unit), step, first, count))

    def mask(self, step: Step, first: int, count: int) -> Tensor:
        """Return the bias as torch's kernel takes it: ``[1 | b, 1 | h, 1 | i, j]``, a view.

        What is not made once is one tensor, which is not cut off.
        """
        if self.all is not None:
            return _window(self._whole(1.0), step, first, count)[None]
        (term,) = self.terms
        if not isinstance(term, Stored):
            raise ArithmeticError("a bias of several addends is no view of one of them")
        return term.window(term.tensor, step, first, count)

    def joined(self, mask: Tensor, cells: Tensor) -> Tensor:
        """Return the sum of a bias that all share and of the masks that batch elements have.

        It is made once for all that have these masks.
        """
        if self._joined is None or self._joined[0] is not cells:
            self._joined = (cells, mask + cells)
        return self._joined[1]

    def add_gradient(
        self, grads: Sequence[Tensor | None], slope: Tensor, step: Step, chunk: KeyChunk
    ) -> None:
        """Add ``[b h i j]`` gradients of the scores to those of the carried tensors, in order."""
        for column, first, count in step.runs(chunk):
            part = slope[..., column : column + count]
            if self.all is None:
                self._add(grads, part, step, first)
                continue
            if self._slope is None:
                heads, lengths = self.all.heads, self.all.lane.lengths
                self._slope = self.work.take("bias slope", self.dtype, heads, *lengths).zero_()
            part = part[0] if len(part) == 1 else part.sum(0)
            _window(self._slope, step, first, count).add_(part)

    def hand_on(self, grads: Sequence[Tensor | None]) -> None:
        """Hand what was added up for all score matrices on to the carried tensors."""
        if self._slope is not None and self.all is not None:
            self._add(grads, self._slope[None], self.all, 0)

    def _add(self, grads: Sequence[Tensor | None], part: Tensor, step: Step, first: int) -> None:
        carried = [term for term in self.terms if isinstance(term, Carried)]
        for term, grad in zip(carried, grads, strict=True):
            if grad is not None:
                term.add(grad, part, step, first, self.work)

    def _whole(self, unit: float) -> Tensor:
        """Return the bias ``[n i j]`` that all score matrices share."""
        if unit not in self._made:
            step = cast(Step, self.all)
            sizes = (step.heads, *step.lane.lengths)
            self._made[unit] = self.work.take(f"bias times {unit}", self.dtype, *sizes)
            self._put(self._made[unit][None], step, 0, unit, False)
        return self._made[unit]

    def _put(self, target: Tensor, step: Step, first: int, unit: float, more: bool) -> None:
        most = largest_bias(self.dtype) * unit
        for k, term in enumerate(self.terms):
            if isinstance(term, Carried):
                ends = Ends(bounded(term.factor * unit, self.dtype), most)
                term.put(target, step, first, self.work, ends, more=more or k > 0)
                continue
            base = step.row + term.anchor(step.lane) - first
            distance = self._distance(term.root, base, step.block.rows, target.shape[3])
            slopes = self._slopes_of(k, term.slopes, unit)[step.head : step.head + step.heads]
            if more or k:
                target.addcmul_(distance, slopes)
            else:
                torch.mul(distance.expand(target.shape), slopes, out=target)

    def _slopes_of(self, k: int, slopes: tuple[float, ...], unit: float) -> Tensor:
        if (k, unit) not in self._slopes:
            own = constants(slopes, self.dtype, self.work.device)
            self._slopes[k, unit] = (-unit * own)[:, None, None]
        return self._slopes[k, unit]

    def _distance(self, root: bool, base: int, rows: int, keys: int) -> Tensor:
        """Return ``abs(base + r - c)``, or its root, for rows r and columns c."""
        key = (root, base, rows, keys)
        if key not in self._known:
            if len(self._known) >= KEPT:
                self._known.clear()
            device = self.work.device
            i = torch.arange(base, base + rows, dtype=self.dtype, device=device)
            j = torch.arange(keys, dtype=self.dtype, device=device)
            distance = (i[:, None] - j).abs_()
            self._known[key] = distance.sqrt_() if root else distance
        return self._known[key]


def _window(cells: Tensor, step: Step, first: int, count: int) -> Tensor:
    """Return the part of ``[n i j]`` that a tile reads, as a view."""
    heads, rows = (
        slice(step.head, step.head + step.heads),
        slice(step.row, step.row + step.block.rows),
    )
    return cells[heads, rows, first : first + count]
