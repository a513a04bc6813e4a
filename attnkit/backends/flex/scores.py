"""A bias, a soft-cap and a score function as the one that FlexAttention calls per score.

FlexAttention hands over ``scale * q.k``: the soft-cap bends that, and a bias is added after. A
bias before the scale is multiplied by it here. The author's function gets what has become of it.
Tensors are captured, and gradients reach them where FlexAttention has a backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnkit.backends.biases import by_diagonal, looked_up, numbers_of, stored
from attnkit.backends.numbers import largest_bias, usable_cap
from attnkit.masks.base import anchor
from attnkit.planner import Request
from attnkit.planner.request import BiasTerm
from attnkit.pse import Indexed, Pse, Root

__all__ = ["ScoreMod", "score_function"]

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def score_function(
    request: Request, pse: Pse | None, device: torch.device
) -> tuple[ScoreMod | None, tuple[object, ...]]:
    """Return the score function of a request, and what decides its code.

    That is neither lengths nor values. The function is None where scores stay as they are.
    """
    addends = zip(pse.parts if pse is not None else (), request.bias, strict=True)
    found = [_term(*addend, request, device) for addend in addends]
    terms, shapes = [term for term, _ in found], [shape for _, shape in found]
    cap = None if request.softcap is None else usable_cap(request.softcap, torch.float32)
    most = largest_bias(torch.float32)
    fn, place = request.score_fn, _place_in_sequence(request, device)
    if not terms and cap is None and fn is None:
        return None, ()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if terms:
            first, *more = (term(b, h, i, j) for term in terms)
            score = score + sum(more, first).clamp(-most, most)
        if fn is None:
            return score
        at = (b, h, i, j) if place is None else place(h, i, j)
        return fn(score, *at).to(score.dtype)

    return score_mod, (*shapes, cap, fn)


Cells = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A bias as a function of batch element, head, query and key."""

Term = tuple[Cells, object]


def _term(part: Pse, known: BiasTerm, request: Request, device: torch.device) -> Term:
    """Return one addend as a function of cells, and what decides its code."""
    factor = request.scale if part.before_scale else 1.0
    if known.slopes is not None:
        offsets = [anchor(known.align, *lengths) for lengths in request.sequences]
        slopes, root = numbers_of(part, torch.float32, device), isinstance(known.structure, Root)
        return _sloped(slopes, _key_positions(request, offsets).to(device), root)
    if known.by_distance:
        numbers, starts = by_diagonal(request, part, torch.float32, device)
        # Where the number for key 0 of its own sequence would stand: those of later keys follow.
        firsts = [1 - q_len - starts.get((q_len, kv), 0) for q_len, kv in request.sequences]
        per_head = (factor * numbers).expand(request.num_heads, -1)
        return _looked_up(per_head, _key_positions(request, firsts).to(device))
    if isinstance(known.structure, Indexed):
        return _entries(*looked_up(part, torch.float32), factor)
    return _read_off(stored(part, (request.q_len, request.kv_len), torch.float32, device), factor)


def _place_in_sequence(
    request: Request, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]] | None:
    """Return what finds a cell of a packed batch in its own sequence; None if it is not packed."""
    if request.seqlens is None or request.score_fn is None:
        return None
    lengths = torch.tensor([q for q, _ in request.sequences])
    rows, keys = (torch.tensor(starts[:-1]) for starts in request.token_starts)
    last = torch.tensor([max(kv - 1, 0) for _, kv in request.sequences])
    number = torch.arange(request.batch).repeat_interleave(lengths)
    per_query = (number, *(each[number] for each in (rows, keys, last)))
    number, row, key, last = (each.to(torch.int32).to(device) for each in per_query)

    def place(h: Tensor, i: Tensor, j: Tensor) -> tuple[Tensor, ...]:
        # Cells of no sequence are masked, but the function is asked for them: at a key it knows.
        inside = (j - key[i]).clamp(min=0).minimum(last[i])
        return number[i], h, i - row[i], inside

    return place


def _key_positions(request: Request, offsets: Sequence[int]) -> Tensor:
    """Return the key position, in the whole batch, that each query stands at: [q_len] int32."""
    if request.seqlens is None:
        return torch.arange(request.q_len, dtype=torch.int32) + offsets[0]
    starts = zip(*request.token_starts, offsets, strict=False)  # the last starts are the totals
    moves = torch.tensor([key - query + offset for query, key, offset in starts])
    per_query = moves.repeat_interleave(torch.tensor([q for q, _ in request.sequences]))
    return (torch.arange(request.q_len) + per_query).to(torch.int32)


def _sloped(slopes: Tensor, at: Tensor, root: bool) -> Term:
    """Return ``-slope[h] * abs(at[i] - j)``, or with its root: arithmetic, where there is some."""

    def term(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = (at[i] - j).abs().to(torch.float32)
        return -slopes[h] * (distance.sqrt() if root else distance)

    return term, ("sloped", root)


def _looked_up(by_distance: Tensor, first: Tensor) -> Term:
    """Return ``by_distance[h, j - first[i]]``; cells of no sequence read any of it."""
    last = by_distance.shape[1] - 1

    def term(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return by_distance[h, (j - first[i]).clamp(0, last)]

    return term, "looked up"


def _entries(table: Tensor, index: Tensor, factor: float) -> Term:
    """Return ``factor * table[h, index[b, i, j]]``; axes of one entry are not indexed."""
    shared = len(table) == 1, len(index) == 1
    columns = table[0] if shared[0] else table
    places = index[0] if shared[1] else index

    def term(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        at = places[i, j] if shared[1] else places[b, i, j]
        return factor * (columns[at] if shared[0] else columns[h, at])

    return term, ("entries", shared, factor)


def _read_off(matrix: Tensor, factor: float) -> Term:
    """Return ``factor * matrix[b, h, i, j]``; axes of one entry are not indexed."""
    kept = (*(extent > 1 for extent in matrix.shape[:3]), True)
    shape = zip(matrix.shape, kept, strict=True)
    cells = matrix.reshape([extent for extent, keep in shape if keep])

    def term(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        index = tuple(x for x, keep in zip((b, h, i, j), kept, strict=True) if keep)
        return factor * cells[index].to(torch.float32)

    return term, ("given", kept, factor, matrix.dtype)
