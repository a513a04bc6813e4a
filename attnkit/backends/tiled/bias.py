"""What is added to the scores, tile by tile: slopes times distances, and carried tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor

from attnkit.backends.base import stats_dtype
from attnkit.backends.biases import by_diagonal, stored
from attnkit.backends.numbers import bounded, largest_bias
from attnkit.backends.tiled.schedule import KeyChunk
from attnkit.backends.tiled.terms import Carried, Diagonals, Distances, Stored, Term
from attnkit.backends.tiled.tiles import Step, Workspace
from attnkit.planner import Request
from attnkit.planner.request import BiasTerm
from attnkit.pse import PerKey, Pse, Root

__all__ = ["Bias", "bind", "with_tensors"]

# Distances are kept for this many shapes of tiles: a window needs one, and memory stays bounded.
KEPT = 4


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


# -- tiles -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Bias:
    """The addends of one call. `unit` is what one unit of score is in the tiles.

    Their sum is cut off where it would not be finite, as in every backend.
    """

    terms: Sequence[Term]
    unit: float
    dtype: torch.dtype
    work: Workspace
    _slopes: dict[int, Tensor] = field(default_factory=dict)
    _known: dict[tuple[bool, int, int, int], Tensor] = field(default_factory=dict)

    def put(self, scores: Tensor, step: Step, chunk: KeyChunk, more: bool = False) -> None:
        """Overwrite ``[b h i j]`` scores with the bias of their cells, or add it to them."""
        most = largest_bias(self.dtype) * self.unit
        for column, first, count in step.runs(chunk):
            target = scores[..., column : column + count]
            for k, term in enumerate(self.terms):
                if isinstance(term, Carried):
                    cells = term.cells(step, first, count, self.work).expand(target.shape)
                    factor = bounded(term.factor * self.unit, self.dtype)
                    _put(target, cells, factor, more=more or k > 0)
                    target.clamp_(-most, most)
                    continue
                base = step.row + term.anchor(step.lane) - first
                distance = self._distance(term.root, base, step.block.rows, count)
                slopes = self._slope(k, term.slopes)[step.head : step.head + step.heads]
                if more or k:
                    target.addcmul_(distance, slopes)
                else:
                    torch.mul(distance.expand(target.shape), slopes, out=target)

    def add_gradient(
        self, grads: Sequence[Tensor | None], slope: Tensor, step: Step, chunk: KeyChunk
    ) -> None:
        """Add ``[b h i j]`` gradients of the scores to those of the carried tensors, in order."""
        carried = [term for term in self.terms if isinstance(term, Carried)]
        for term, grad in zip(carried, grads, strict=True):
            if grad is None:
                continue
            for column, first, count in step.runs(chunk):
                term.add(grad, slope[..., column : column + count], step, first, self.work)

    def _slope(self, k: int, slopes: tuple[float, ...]) -> Tensor:
        if k not in self._slopes:
            own = torch.tensor(slopes, dtype=self.dtype, device=self.work.device)
            self._slopes[k] = (-self.unit * own)[:, None, None]
        return self._slopes[k]

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


def _put(target: Tensor, cells: Tensor, factor: float, *, more: bool) -> None:
    """Write cells times a factor, or add them if there is `more` in the target already."""
    if more:
        target.add_(cells, alpha=factor)
    elif cells.dtype == target.dtype:
        torch.mul(cells, factor, out=target)
    else:  # a product of 16-bit cells would be rounded to 16 bits
        target.copy_(cells).mul_(factor)
