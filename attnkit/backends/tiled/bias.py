"""What is added to the scores, tile by tile: slopes times distances, and carried tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor

from attnkit.backends.numbers import bounded, largest_bias
from attnkit.backends.tiled.schedule import Chunk
from attnkit.backends.tiled.terms import (
    Carried,
    Diagonals,
    Distances,
    Given,
    Lengths,
    Ragged,
    Term,
)
from attnkit.backends.tiled.tiles import Step, Workspace
from attnkit.errors import CompositionTypeError
from attnkit.planner import Request
from attnkit.planner.request import BiasTerm
from attnkit.pse import ByDistance, PerKey, Pse
from attnkit.pse.cut import uncut
from attnkit.pse.dense import Dense
from attnkit.pse.sloped import Sloped

__all__ = ["Bias", "bind", "with_tensors"]

# Distances are kept for this many shapes of tiles: a window needs one, and memory stays bounded.
KEPT = 4


# -- terms -------------------------------------------------------------------------------------


def bind(request: Request, pse: Pse | None, device: torch.device) -> tuple[Term, ...]:
    """Return the addends of a bias in the forms that tiles can be read from."""
    terms: list[Term] = []
    for part, known in _described(request, pse):
        whole, shift, lengths = uncut(part)
        if isinstance(whole, Sloped) and not part.before_scale:
            terms.append(Distances(whole, shift, lengths))
        else:
            terms.append(_carried(request, known, _tensor(request, part, known, device)))
    return tuple(terms)


def with_tensors(terms: Sequence[Term], given: Sequence[Tensor]) -> tuple[Term, ...]:
    """Return the terms with other tensors in place of their own, in order."""
    tensors = iter(given)
    return tuple(
        replace(term, tensor=next(tensors)) if isinstance(term, Carried) else term for term in terms
    )


def _described(request: Request, pse: Pse | None) -> list[tuple[Pse, BiasTerm]]:
    """Return the addends of a bias, each with what the request knows of it."""
    return list(zip(pse.parts if pse is not None else (), request.bias, strict=True))


def _carried(request: Request, known: BiasTerm, tensor: Tensor) -> Carried:
    """Return the term whose tensor is what `_tensor` makes."""
    factor = request.scale if known.before_scale else 1.0
    if known.by_distance:
        return Diagonals(tensor, factor, _diagonal_starts(request))
    if _is_ragged(request, known):
        cells = accumulate((q_len * kv_len for q_len, kv_len in request.sequences), initial=0)
        return Ragged(tensor, factor, tuple(cells))
    return Given(tensor, factor)


def _tensor(request: Request, part: Pse, known: BiasTerm, device: torch.device) -> Tensor:
    """Return what the cells of an addend follow from; gradients flow on to what it is made of."""
    wide = torch.float64 if request.dtype == torch.float64 else torch.float32
    if known.by_distance:
        return _diagonals(request, part, wide, device)
    if isinstance(part, Dense):
        return part.tensor[(None,) * (4 - part.tensor.ndim)]
    if isinstance(known.structure, PerKey):  # every row is the same: one is enough
        tensor = part.tensors[0]
        return tensor[(None,) * (3 - tensor.ndim)][:, :, None]
    # A family that says no more of itself costs what it is: a matrix.
    if not _is_ragged(request, known):
        return part.materialize(*request.sequences[0], dtype=wide, device=device)
    matrices = [
        part.materialize(*lengths, batch_index=number, dtype=wide, device=device)
        for number, lengths in enumerate(request.sequences)
    ]
    heads = max(matrix.shape[1] for matrix in matrices)
    flat = [rearrange(matrix, "1 n i j -> n (i j)") for matrix in matrices]
    return torch.cat([cells.expand(heads, -1) for cells in flat], dim=1)


def _is_ragged(request: Request, known: BiasTerm) -> bool:
    """Whether sequences of different lengths need a matrix each."""
    return len(set(request.sequences)) > 1 and not isinstance(known.structure, PerKey)


def _diagonal_starts(request: Request) -> dict[Lengths, int]:
    """Return where the diagonals of each size of score matrix begin, in the order they have."""
    starts, start = {}, 0
    for q_len, kv_len in dict.fromkeys(request.sequences):
        if q_len and kv_len:
            starts[q_len, kv_len] = start
            start += q_len + kv_len - 1
    return starts


def _diagonals(request: Request, part: Pse, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the numbers ``[1 | n, diagonals]`` of a bias by distance, in that order."""
    whole, shift, lengths = uncut(part)
    if not isinstance(whole, ByDistance):
        raise CompositionTypeError(f"{part!r} is planned as a bias by distance, and is none")
    where = whole.tensors[0].device if whole.tensors else device
    distances = [torch.arange(0, device=where)]
    for q_len, kv_len in _diagonal_starts(request):
        anchor = shift + whole.offset(*(lengths or (q_len, kv_len)))
        distances.append(torch.arange(1 - q_len - anchor, kv_len - anchor, device=where))
    return whole.at(torch.cat(distances), dtype).contiguous()


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
    _known: dict[tuple[int, int, int, int], Tensor] = field(default_factory=dict)

    def put(self, scores: Tensor, step: Step, chunk: Chunk, more: bool = False) -> None:
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
                distance = self._distance(k, term.part, base, step.block.rows, count)
                slopes = self._slope(k, term.part)[step.head : step.head + step.heads]
                if more or k:
                    target.addcmul_(distance, slopes)
                else:
                    torch.mul(distance.expand(target.shape), slopes, out=target)

    def add_gradient(
        self, grads: Sequence[Tensor | None], slope: Tensor, step: Step, chunk: Chunk
    ) -> None:
        """Add ``[b h i j]`` gradients of the scores to those of the carried tensors, in order."""
        carried = [term for term in self.terms if isinstance(term, Carried)]
        for term, grad in zip(carried, grads, strict=True):
            if grad is None:
                continue
            for column, first, count in step.runs(chunk):
                term.add(grad, slope[..., column : column + count], step, first, self.work)

    def _slope(self, k: int, part: Sloped) -> Tensor:
        if k not in self._slopes:
            slopes = torch.tensor(part.slopes, dtype=self.dtype, device=self.work.device)
            self._slopes[k] = (-self.unit * slopes)[:, None, None]
        return self._slopes[k]

    def _distance(self, k: int, part: Sloped, base: int, rows: int, keys: int) -> Tensor:
        """Return ``curve(abs(base + r - c))`` for rows r and columns c."""
        key = (k, base, rows, keys)
        if key not in self._known:
            if len(self._known) >= KEPT:
                self._known.clear()
            device = self.work.device
            i = torch.arange(base, base + rows, dtype=self.dtype, device=device)
            j = torch.arange(keys, dtype=self.dtype, device=device)
            self._known[key] = part.curve((i[:, None] - j).abs_())
        return self._known[key]


def _put(target: Tensor, cells: Tensor, factor: float, *, more: bool) -> None:
    """Write cells times a factor, or add them if there is `more` in the target already."""
    if more:
        target.add_(cells, alpha=factor)
    elif cells.dtype == target.dtype:
        torch.mul(cells, factor, out=target)
    else:  # a product of 16-bit cells would be rounded to 16 bits
        target.copy_(cells).mul_(factor)
