"""What is added to the scores, tile by tile: slopes times distances, entries of a vector of
distances, and given tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnkit.backends.tiled.schedule import Chunk, Lane
from attnkit.backends.tiled.tiles import Step
from attnkit.planner import Request
from attnkit.planner.request import BiasTerm
from attnkit.pse import ALiBi, Align, Linear, PerKey, Pse, SqrtALiBi, Stepped
from attnkit.pse.cut import Cut
from attnkit.pse.dense import Dense
from attnkit.pse.sloped import Sloped

__all__ = [
    "Bias",
    "Distances",
    "Given",
    "Term",
    "Vector",
    "bind",
    "by_distance",
    "given_tensors",
    "outline",
    "with_tensors",
]

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
class Vector:
    """A bias ``tensor[h, j - i' - first]``: one number per head and distance, and no matrix."""

    tensor: Tensor
    first: int
    align: Align
    factor: float

    def anchor(self, lane: Lane) -> int:
        """Return ``i' - i`` in a lane's score matrices."""
        return _offset(self.align, *lane.lengths)


@dataclass(frozen=True, eq=False)
class Given:
    """A bias whose cells are a tensor ``[1 | b, 1 | n, 1 | i, j]``, times `factor`."""

    tensor: Tensor
    factor: float


Term = Distances | Vector | Given


def bind(request: Request, pse: Pse | None, device: torch.device) -> tuple[Term, ...]:
    """Return the addends of a bias in the forms that tiles can be read from.

    Families that have no such form are materialised, which costs what they are: a matrix.
    """
    terms: list[Term] = []
    for part, term in zip(pse.parts if pse is not None else (), request.bias, strict=True):
        if isinstance(part, Sloped):
            terms.append(Distances(part))
        elif isinstance(part, Cut) and isinstance(part.part, Sloped):
            shift = part.q_range[0] - part.kv_range[0]
            terms.append(Distances(part.part, shift, (part.q_len, part.kv_len)))
        else:
            terms.append(_form(request, term, _tensor(request, part, term, device)))
    return tuple(terms)


def outline(request: Request) -> tuple[Term, ...]:
    """Return the terms that a request tells of, with nothing in place of given tensors."""
    families = {1.0: ALiBi, 0.5: SqrtALiBi}
    return tuple(
        _form(request, term, torch.empty(0))
        if term.slopes is None
        else Distances(families[term.power](slopes=term.slopes, align=term.align))
        for term in request.bias
    )


def given_tensors(request: Request, pse: Pse | None, device: torch.device) -> list[Tensor]:
    """Return the tensors that fill the places of an `outline`, in order."""
    pairs = zip(pse.parts if pse is not None else (), request.bias, strict=True)
    return [_tensor(request, part, term, device) for part, term in pairs if term.slopes is None]


def with_tensors(terms: Sequence[Term], given: Sequence[Tensor]) -> tuple[Term, ...]:
    """Return the terms with other tensors in place of their own, in order."""
    tensors = iter(given)
    return tuple(
        term if isinstance(term, Distances) else replace(term, tensor=next(tensors))
        for term in terms
    )


def by_distance(term: BiasTerm) -> bool:
    """Whether an addend follows from the distance between query and key."""
    return term.slopes is not None or isinstance(term.structure, Linear | Stepped)


def _form(request: Request, term: BiasTerm, tensor: Tensor) -> Vector | Given:
    factor = request.scale if term.before_scale else 1.0
    if isinstance(term.structure, Linear | Stepped):
        align = term.structure.align
        return Vector(tensor, _distances(request, align)[0], align, factor)
    return Given(tensor, factor)


def _tensor(request: Request, part: Pse, term: BiasTerm, device: torch.device) -> Tensor:
    """Return what the form of an addend reads from; gradients reach the tensors of the bias."""
    if isinstance(part, Dense):
        return part.tensor[(None,) * (4 - part.tensor.ndim)]
    wide = torch.float64 if request.dtype == torch.float64 else torch.float32
    if isinstance(term.structure, Linear | Stepped):
        distance = torch.arange(*_distances(request, term.structure.align), device=device)
        return _entries(term.structure, part.tensors[0].to(wide), distance)
    if isinstance(term.structure, PerKey):
        keys = part.tensors[0].to(wide)
        return keys[(None,) * (3 - keys.ndim)].unsqueeze(2)
    return part.materialize(*request.sequences[0], dtype=wide, device=device)


def _entries(structure: Linear | Stepped, tensor: Tensor, distance: Tensor) -> Tensor:
    """Return a bias at distances, ``[n d]``, as its structure defines it."""
    if isinstance(structure, Linear):
        return -tensor[:, None] * distance.abs()
    starts = torch.tensor(structure.starts[1:], device=distance.device)
    rows = torch.tensor(structure.rows, device=distance.device)
    return tensor[rows[torch.bucketize(distance, starts, right=True)]].transpose(0, 1)


def _distances(request: Request, align: Align) -> tuple[int, int]:
    """Return the range of distances ``j - i'`` in all score matrices."""
    ends = [(_offset(align, q, kv), q, kv) for q, kv in request.sequences]
    return min(1 - q - at for at, q, _ in ends), max(kv - at for at, _, kv in ends)


def _offset(align: Align, q_len: int, kv_len: int) -> int:
    return kv_len - q_len if align == "bottom_right" else 0


@dataclass(eq=False)
class Bias:
    """The addends of one call. `unit` is what one unit of score is in the tiles."""

    terms: Sequence[Term]
    unit: float
    dtype: torch.dtype
    device: torch.device
    _slopes: dict[int, Tensor] = field(default_factory=dict)
    _known: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def fill(self, scores: Tensor, step: Step, chunk: Chunk) -> None:
        """Overwrite ``[b h i j]`` scores with the bias of their cells."""
        for column, first, count in step.runs(chunk):
            target = scores[..., column : column + count]
            for k, term in enumerate(self.terms):
                if isinstance(term, Distances):
                    base = step.row + term.anchor(step.lane) - first
                    cells = self._distance(k, term.part, base, step.block.rows, count)
                    slopes = self._slope(k, term.part)[step.head : step.head + step.heads]
                    if k:
                        target.addcmul_(cells, slopes)
                    else:
                        torch.mul(cells.expand(target.shape), slopes, out=target)
                    continue
                if isinstance(term, Vector):
                    cells = self._diagonals(k, term, step, first, count)
                else:
                    cells = _cells(term.tensor, step, first, count)
                factor = term.factor * self.unit
                if k:
                    target.add_(cells, alpha=factor)
                else:
                    torch.mul(cells.expand(target.shape), factor, out=target)

    def add_gradient(
        self, grads: Sequence[Tensor | None], slope: Tensor, step: Step, chunk: Chunk
    ) -> None:
        """Add ``[b h i j]`` gradients of the scores to those of the given tensors, in order."""
        given = [term for term in self.terms if not isinstance(term, Distances)]
        for term, grad in zip(given, grads, strict=True):
            if grad is None:
                continue
            for column, first, count in step.runs(chunk):
                part = slope[..., column : column + count]
                if isinstance(term, Vector):
                    _add_diagonals(grad, part, term, step, first)
                    continue
                shared = [axis for axis in (0, 1, 2) if grad.shape[axis] == 1 < part.shape[axis]]
                if shared:
                    part = part.sum(shared, keepdim=True)
                _cells(grad, step, first, count).add_(part, alpha=term.factor)

    def _diagonals(self, k: int, term: Vector, step: Step, first: int, count: int) -> Tensor:
        """Return the ``[h i j]`` cells of a tile from the entries of their distances."""
        rows, start = step.block.rows, _first_entry(term, step, first)
        key = (k, start, rows, count, step.head)
        if key not in self._known:
            if len(self._known) >= KEPT:
                self._known.clear()
            length = rows + count - 1
            entries = _heads(term.tensor, step)[:, start : start + length]
            self._known[key] = _skewed(entries[:, None].expand(-1, rows, -1).contiguous(), count)
        return self._known[key]

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


def _first_entry(term: Vector, step: Step, first: int) -> int:
    """Return which entry the last row of a tile meets at its first key, the least distance."""
    last = step.row + step.block.rows - 1 + term.anchor(step.lane)
    return first - last - term.first


def _skewed(entries: Tensor, count: int) -> Tensor:
    """View ``[h r (r + c - 1)]`` rows as ``[h r c]``, each shifted by one against the next."""
    heads, rows, length = entries.shape
    strides = (rows * length, length - 1, 1)
    return entries.as_strided((heads, rows, count), strides, entries.storage_offset() + rows - 1)


def _add_diagonals(grad: Tensor, part: Tensor, term: Vector, step: Step, first: int) -> None:
    """Add the ``[b h i j]`` gradients of a tile to those of the entries of their distances."""
    _, heads, rows, count = part.shape
    length, start = rows + count - 1, _first_entry(term, step, first)
    entries = part.new_zeros(heads, rows, length)
    _skewed(entries, count).copy_(part.sum(0))
    found = entries.sum(1)
    if grad.shape[0] == 1:
        found = found.sum(0, keepdim=True)
    _heads(grad, step)[:, start : start + length].add_(found, alpha=term.factor)


def _heads(entries: Tensor, step: Step) -> Tensor:
    """Return the rows of ``[1 | n, distances]`` entries that a step reads."""
    return entries if len(entries) == 1 else entries[step.head : step.head + step.heads]


def _cells(tensor: Tensor, step: Step, first: int, count: int) -> Tensor:
    """Return the part of a ``[1 | b, 1 | n, 1 | i, j]`` tensor that a tile reads."""
    index = [*_ranges(step), slice(step.row, step.row + step.block.rows)]
    for axis in (0, 1, 2):
        if tensor.shape[axis] == 1:
            index[axis] = slice(None)
    index.append(slice(first, first + count))
    return tensor[tuple(index)]


def _ranges(step: Step) -> Iterator[slice]:
    matrix = step.lane.matrix + step.batch - step.lane.batches[0]
    yield slice(matrix, matrix + step.batches)
    yield slice(step.head, step.head + step.heads)
