"""A bias and a soft-cap as the function that FlexAttention calls per score.

FlexAttention hands over ``scale * q.k``: the soft-cap bends that, and a bias is added after. A
bias before the scale is multiplied by it here.
Tensors are captured, and gradients reach them where FlexAttention has a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.backends.numbers import largest_bias, usable_cap
from attnkit.planner import Request
from attnkit.pse import ByDistance, Cut, Pse, Sloped

__all__ = ["ScoreMod", "Scores", "scores_of"]

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Scores:
    """A score function, and what decides its code (not the lengths, not the values)."""

    fn: ScoreMod | None = None
    shape: tuple[object, ...] = ()


def scores_of(request: Request, pse: Pse | None, device: torch.device) -> Scores:
    """Return the score function of a request; None where scores stay as they are."""
    found = [_term(part, request, device) for part in (pse.parts if pse is not None else ())]
    terms, shapes = [term for term, _ in found], [shape for _, shape in found]
    cap = None if request.softcap is None else usable_cap(request.softcap, torch.float32)
    most = largest_bias(torch.float32)
    if not terms and cap is None:
        return Scores()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if not terms:
            return score
        first, *more = (term(b, h, i, j) for term in terms)
        return score + sum(more, first).clamp(-most, most)

    return Scores(score_mod, (*shapes, cap))


Cells = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A bias as a function of batch element, head, query and key."""

Term = tuple[Cells, object]


def _term(part: Pse, request: Request, device: torch.device) -> Term:
    """Return one addend as a function of cells, and what decides its code."""
    factor = request.scale if part.before_scale else 1.0
    known = _placed(part, request)
    if known is None:
        return _given(_matrix(part, request, device), factor)
    family, at = known.family, _positions(request, known.offsets).to(device)
    if isinstance(family, Sloped) and family.power in (1.0, 0.5):
        return _sloped(family, at)
    reach = request.q_len + request.kv_len + max(map(abs, known.offsets))
    every = torch.arange(1 - reach, reach, device=device)
    return _looked_up(factor * family.at(every, torch.float32), at - reach + 1)


class _Placed(NamedTuple):
    """A bias of distances, and where query 0 stands in each score matrix."""

    family: ByDistance
    offsets: Sequence[int]


def _placed(part: Pse, request: Request) -> _Placed | None:
    if isinstance(part, ByDistance):
        return _Placed(part, [part.offset(*lengths) for lengths in request.sequences])
    if isinstance(part, Cut) and isinstance(part.part, ByDistance):
        moved = part.q_range[0] - part.kv_range[0] + part.part.offset(part.q_len, part.kv_len)
        return _Placed(part.part, [moved] * request.batch)
    return None


def _positions(request: Request, offsets: Sequence[int]) -> Tensor:
    """Return the key position, in the whole batch, that each query stands at: [q_len] int32."""
    if request.seqlens is None:
        return torch.arange(request.q_len, dtype=torch.int32) + offsets[0]
    starts = zip(*request.token_starts, offsets, strict=False)  # the last starts are the totals
    moves = torch.tensor([key - query + offset for query, key, offset in starts])
    per_query = moves.repeat_interleave(torch.tensor([q for q, _ in request.sequences]))
    return (torch.arange(request.q_len) + per_query).to(torch.int32)


def _sloped(family: Sloped, at: Tensor) -> Term:
    """Return ``-slope[h] * curve(abs(at[i] - j))``: arithmetic, where there is a formula."""
    slopes = torch.tensor(family.slopes, device=at.device)
    root = family.power == 0.5

    def term(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = (at[i] - j).abs().to(torch.float32)
        return -slopes[h] * (distance.sqrt() if root else distance)

    return term, ("sloped", root)


def _looked_up(by_distance: Tensor, first: Tensor) -> Term:
    """Return ``by_distance[h, j - first[i]]``."""

    def term(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return by_distance[h, j - first[i]]

    return term, "looked up"


def _matrix(part: Pse, request: Request, device: torch.device) -> Tensor:
    """Return a bias ``[1 | b, 1 | n, 1 | i, j]``."""
    dtype = part.tensors[0].dtype if part.tensors else torch.float32
    matrix = part.materialize(request.q_len, request.kv_len, dtype=dtype, device=device)
    # A bias per key is an expanded view; one row of it is all that there is.
    return matrix[:, :, :1] if matrix.stride(2) == 0 else matrix


def _given(matrix: Tensor, factor: float) -> Term:
    """Return ``factor * matrix[b, h, i, j]``; axes of one entry are not indexed."""
    kept = (*(extent > 1 for extent in matrix.shape[:3]), True)
    shape = zip(matrix.shape, kept, strict=True)
    cells = matrix.reshape([extent for extent, keep in shape if keep])

    def term(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        index = tuple(x for x, keep in zip((b, h, i, j), kept, strict=True) if keep)
        return factor * cells[index].to(torch.float32)

    return term, ("given", kept, factor, matrix.dtype)
