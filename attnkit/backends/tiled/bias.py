"""What is added to the scores, tile by tile: slopes times distances, and given tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnkit.backends.tiled.schedule import Chunk, Lane
from attnkit.backends.tiled.tiles import Step
from attnkit.planner import Request
from attnkit.pse import ALiBi, Pse, SqrtALiBi
from attnkit.pse.cut import Cut
from attnkit.pse.dense import Dense
from attnkit.pse.sloped import Sloped

__all__ = ["Bias", "Distances", "Given", "bind", "given_tensors", "outline", "with_tensors"]

# Distances are kept for this many shapes of tiles: a window needs one, and memory stays bounded.
KEPT = 4


@dataclass(frozen=True, eq=False)
class Distances:
    """A bias ``-slope[h] * curve(abs(i' - j))``, from its own formula: no matrix is built."""

    part: Sloped
    shift: int = 0
    lengths: tuple[int, int] | None = None

    def anchor(self, lane: Lane) -> int:
        """Return ``i' - i`` in a lane's score matrices."""
        return self.shift + self.part.offset(*(self.lengths or lane.lengths))


@dataclass(frozen=True, eq=False)
class Given:
    """A bias whose cells are a tensor ``[1 | b, 1 | n, i, j]``, times `factor`."""

    tensor: Tensor
    factor: float


def bind(request: Request, pse: Pse | None, device: torch.device) -> tuple[Distances | Given, ...]:
    """Return the addends of a bias in the forms that tiles can be read from.

    Families that have no such form are materialised, which costs what they are: a matrix.
    """
    terms: list[Distances | Given] = []
    wide = torch.float64 if request.dtype == torch.float64 else torch.float32
    for part in pse.parts if pse is not None else ():
        factor = request.scale if part.before_scale else 1.0
        if isinstance(part, Sloped):
            terms.append(Distances(part))
        elif isinstance(part, Cut) and isinstance(part.part, Sloped):
            shift = part.q_range[0] - part.kv_range[0]
            terms.append(Distances(part.part, shift, (part.q_len, part.kv_len)))
        elif isinstance(part, Dense):
            terms.append(Given(part.tensor[(None,) * (4 - part.tensor.ndim)], factor))
        else:
            lengths = request.sequences[0]
            terms.append(Given(part.materialize(*lengths, dtype=wide, device=device), factor))
    return tuple(terms)


def outline(request: Request) -> tuple[Distances | Given, ...]:
    """Return the terms that a request tells of, with nothing in place of given tensors."""
    families = {1.0: ALiBi, 0.5: SqrtALiBi}
    return tuple(
        Given(torch.empty(0), request.scale if term.before_scale else 1.0)
        if term.slopes is None
        else Distances(families[term.power](slopes=term.slopes, align=term.align))
        for term in request.bias
    )


def given_tensors(request: Request, pse: Pse | None, device: torch.device) -> list[Tensor]:
    """Return the tensors that fill the places of an `outline`, in order."""
    tensors = []
    for part, term in zip(pse.parts if pse is not None else (), request.bias, strict=True):
        if term.slopes is None and isinstance(part, Dense):
            tensors.append(part.tensor[(None,) * (4 - part.tensor.ndim)])
        elif term.slopes is None:
            tensors.append(part.materialize(*request.sequences[0], device=device))
    return tensors


def with_tensors(
    terms: Sequence[Distances | Given], given: Sequence[Tensor]
) -> tuple[Distances | Given, ...]:
    """Return the terms with other tensors in place of their own, in order."""
    tensors = iter(given)
    return tuple(
        replace(term, tensor=next(tensors)) if isinstance(term, Given) else term for term in terms
    )


@dataclass(eq=False)
class Bias:
    """The addends of one call. `unit` is what one unit of score is in the tiles."""

    terms: Sequence[Distances | Given]
    unit: float
    dtype: torch.dtype
    device: torch.device
    _slopes: dict[int, Tensor] = field(default_factory=dict)
    _known: dict[tuple[int, int, int, int], Tensor] = field(default_factory=dict)

    def fill(self, scores: Tensor, step: Step, chunk: Chunk) -> None:
        """Overwrite ``[b h i j]`` scores with the bias of their cells."""
        for column, first, count in step.runs(chunk):
            target = scores[..., column : column + count]
            for k, term in enumerate(self.terms):
                if isinstance(term, Given):
                    cells = _cells(term.tensor, step, first, count).expand(target.shape)
                    factor = term.factor * self.unit
                    if k:
                        target.add_(cells, alpha=factor)
                    else:
                        torch.mul(cells, factor, out=target)
                    continue
                base = step.row + term.anchor(step.lane) - first
                distance = self._distance(k, term.part, base, step.block.rows, count)
                slopes = self._slope(k, term.part)[step.head : step.head + step.heads]
                if k:
                    target.addcmul_(distance, slopes)
                else:
                    torch.mul(distance.expand(target.shape), slopes, out=target)

    def add_gradient(
        self, grads: Sequence[Tensor | None], slope: Tensor, step: Step, chunk: Chunk
    ) -> None:
        """Add ``[b h i j]`` gradients of the scores to those of the given tensors, in order."""
        given = [term for term in self.terms if isinstance(term, Given)]
        for term, grad in zip(given, grads, strict=True):
            if grad is None:
                continue
            for column, first, count in step.runs(chunk):
                part = slope[..., column : column + count]
                shared = [axis for axis in (0, 1) if grad.shape[axis] == 1 < part.shape[axis]]
                if shared:
                    part = part.sum(shared, keepdim=True)
                _cells(grad, step, first, count).add_(part, alpha=term.factor)

    def _slope(self, k: int, part: Sloped) -> Tensor:
        if k not in self._slopes:
            slopes = torch.tensor(part.slopes, dtype=self.dtype, device=self.device)
            self._slopes[k] = (-self.unit * slopes)[:, None, None]
        return self._slopes[k]

    def _distance(self, k: int, part: Sloped, base: int, rows: int, keys: int) -> Tensor:
        """Return ``curve(abs(base + r - c))`` for rows r and columns c."""
        key = (k, base, rows, keys)
        if key not in self._known:
            if len(self._known) >= KEPT:
                self._known.clear()
            i = torch.arange(base, base + rows, dtype=self.dtype, device=self.device)
            j = torch.arange(keys, dtype=self.dtype, device=self.device)
            self._known[key] = part.curve((i[:, None] - j).abs_())
        return self._known[key]


def _cells(tensor: Tensor, step: Step, first: int, count: int) -> Tensor:
    """Return the part of a ``[1 | b, 1 | n, i, j]`` tensor that a tile reads."""
    index = list(_ranges(step))
    for axis in (0, 1):
        if tensor.shape[axis] == 1:
            index[axis] = slice(None)
    index += [slice(step.row, step.row + step.block.rows), slice(first, first + count)]
    return tensor[tuple(index)]


def _ranges(step: Step) -> Iterator[slice]:
    matrix = step.lane.matrix + step.batch - step.lane.batches[0]
    yield slice(matrix, matrix + step.batches)
    yield slice(step.head, step.head + step.heads)
