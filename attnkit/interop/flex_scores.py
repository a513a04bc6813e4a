"""What a `score_mod` of FlexAttention does to a score: soft-cap, biases, cells taken out.

The function is called once, with a score and indices that note what is done to them, so that what
is found holds for every cell; some rows are computed both ways to compare.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from attnkit.geometry import Region
from attnkit.masks import Mask, Rectangle
from attnkit.masks.predicate import function_name
from attnkit.masks.recover import written_with
from attnkit.masks.sources import indices_used
from attnkit.masks.symbols import Extent, NotUnderstoodError, Side, Symbol, region_of
from attnkit.planner.scoring import ScoreFunction
from attnkit.pse import ALiBi, Dense, DistanceBias, KeyBias, Pse

__all__ = ["ScoreCall", "Scores", "read_scores"]

_ROWS = 4  # computed both ways


@dataclass(frozen=True)
class ScoreCall:
    """The score matrices that a function is asked for: their lengths, and how many."""

    q_len: int
    kv_len: int
    batch: int
    heads: int
    device: torch.device


@dataclass(frozen=True, eq=False)
class Scores:
    """A `score_mod` as what attnkit composes: ``softcap(factor * scale * q.k) + bias``, masked.

    `score_fn` is the function itself where it is none of that; then nothing else is said.
    """

    factor: float = 1.0
    softcap: float | None = None
    bias: Pse | None = None
    mask: Mask | None = None
    score_fn: ScoreFunction | None = None
    said: str = "no change"

    def __str__(self) -> str:
        return self.said


@dataclass(frozen=True, eq=False)
class _Score(Symbol):
    """A score, and what was done to it so far."""

    window: Extent
    inner: float = 1.0
    bent: bool = False
    outer: float = 1.0
    terms: tuple[tuple[int, Any], ...] = ()
    seen: Region | None = None
    takes_all = True

    def taken(self, name: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Return the score after one more operation."""
        if named:
            raise NotUnderstoodError
        if name in ("where", "masked_fill") and len(args) == 3:
            return self._masked(name, *args)
        if name == "tanh" and not (self.bent or self.terms or self.seen is not None):
            return replace(self, bent=True)
        if len(args) != 2:
            raise NotUnderstoodError
        if name in ("add", "sub") and (args[0] is self or name == "add"):
            other = args[1] if args[0] is self else args[0]
            return replace(self, terms=(*self.terms, (1 if name == "add" else -1, other)))
        if name in ("mul", "multiply") and not self.terms:
            return self._scaled(_number(args[1] if args[0] is self else args[0]))
        if name in ("truediv", "div", "divide") and not self.terms and args[0] is self:
            return self._scaled(1.0 / _number(args[1]))
        raise NotUnderstoodError

    def _scaled(self, factor: float) -> _Score:
        if self.seen is not None and factor <= 0:
            raise NotUnderstoodError
        if self.bent:
            return replace(self, outer=self.outer * factor)
        return replace(self, inner=self.inner * factor)

    def _masked(self, name: str, first: Any, second: Any, third: Any) -> _Score:
        """Return the score with cells taken out: ``where(cells, score, -inf)`` and its kin."""
        if name == "masked_fill":
            cells, kept, other, inside = second, first, third, False
        else:
            cells, inside = first, second is self
            kept, other = (second, third) if inside else (third, second)
        if kept is not self or _number(other) != -math.inf:
            raise NotUnderstoodError
        seen = region_of(cells, self.window)
        if not inside:
            seen = seen.complement(self.window.q_len, self.window.kv_len)
        both = seen if self.seen is None else self.seen & seen
        masked: _Score = replace(self, seen=both)
        return masked


def _number(value: Any) -> float:
    if isinstance(value, Tensor) and not value.dim() and not value.requires_grad:
        return float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise NotUnderstoodError


def read_scores(fn: ScoreFunction, call: ScoreCall, *, check: bool = True) -> Scores:
    """Return what a `score_mod` does, or itself where that has no name.

    >>> device = torch.device("cpu")
    >>> def mod(score, b, h, i, j): return 20 * torch.tanh(score / 20) + (j - i) * 2.0 ** -(h + 1)
    >>> print(read_scores(mod, ScoreCall(4, 4, 1, 2, device)))
    mod: soft-cap 20, a number per distance
    """
    name = function_name(fn)
    try:
        found = _read(fn, call)
        if not check or _agrees(found, fn, call):
            return replace(found, said=f"{name}: {found.said}")
    except Exception:  # whatever it does, it is called for each score then, and errors are told
        pass
    return Scores(score_fn=fn, said=f"{name}: no named form; it is called for each score")


def _read(fn: ScoreFunction, call: ScoreCall) -> Scores:
    window = Extent(call.q_len, call.kv_len, by_distance=True)
    noted: list[_Score] = []

    def terms(b: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        sides = (Side(window, axis, window.indices(axis, call.device)) for axis in (0, 1))
        got: Any = fn(_Score(window), b, h, *sides)  # type: ignore[arg-type]
        if not isinstance(got, _Score):
            raise NotUnderstoodError
        noted.append(got)
        return tuple(sign * _values(one, b) for sign, one in got.terms)

    b, h = (torch.arange(n, device=call.device) for n in (call.batch, call.heads))
    first = terms(b[0], h[0])
    score = noted[0]
    values: tuple[Tensor, ...] = ()
    if first:
        values = torch.vmap(torch.vmap(terms, in_dims=(None, 0)), in_dims=(0, None))(b, h)
    if score.seen is not None:  # a set may tell heads apart, and is read for the first alone
        _refuse_places(fn, call)
    axes = [one.axis if isinstance(one, Side) else 1 for _, one in score.terms]
    biases = [_bias(value, axis, call) for value, axis in zip(values, axes, strict=True)]
    mask = None
    if score.seen is not None:
        mask = written_with(((score.seen,),), call.q_len, call.kv_len, "").mask
    return _named(score, [bias for bias in biases if bias is not None], mask)


def _refuse_places(fn: ScoreFunction, call: ScoreCall) -> None:
    """Go no further where cells are taken out and heads or batch elements could differ in it."""
    if call.batch * call.heads == 1:
        return
    one = torch.zeros((), device=call.device)
    if indices_used(lambda b, h, i, j: fn(one, b, h, i, j) > -math.inf, call.device):
        raise NotUnderstoodError


def _values(one: Any, b: Tensor) -> Tensor:
    """Return a term as a tensor: for each row, key or distance, or one number for all."""
    if isinstance(one, Side):
        values = one.values
    elif isinstance(one, Tensor) and not one.dim():
        values = one[None]
    else:
        values = torch.full((1,), _number(one), dtype=torch.float64, device=b.device)
    return values if values.is_floating_point() else values.double()


def _named(score: _Score, biases: list[Pse], mask: Mask | None) -> Scores:
    factor, cap = score.inner, None
    said = []
    if score.bent:
        cap, factor = score.outer, score.inner * score.outer
        if cap <= 0:
            raise NotUnderstoodError
        said.append(f"soft-cap {cap:g}")
    else:
        factor *= score.outer
    factor = 1.0 if abs(factor - 1.0) < 1e-12 else factor
    said += [f"scores times {factor:g}"] * (factor != 1.0)
    said += [_SAID.get(type(bias).__name__, repr(bias)) for bias in biases]
    said += [] if mask is None else [f"cells taken out: {mask!r}"]
    bias = reduce(add, biases) if biases else None
    return Scores(factor, cap, bias, mask, None, ", ".join(said) or "no change")


_SAID = {
    "ALiBi": "ALiBi",
    "DistanceBias": "a number per distance",
    "KeyBias": "a number per key",
    "Dense": "a number per cell",
}


def _bias(values: Tensor, axis: int, call: ScoreCall) -> Pse | None:
    """Return a term ``[b, n, entries]`` as a bias; None where it is 0."""
    if not values.requires_grad and not bool(values.any()):
        return None
    plain = values.detach()
    if bool((plain == plain[:1]).all()) and not values.requires_grad:
        values = values[:1]
    if bool((plain == plain[:, :1]).all()) and not values.requires_grad:
        values = values[:, :1]
    if axis == 3:
        return Dense(values, validate=False)
    if axis == 0:
        full = values[..., None].expand(*values.shape, call.kv_len)
        return Dense(full, validate=False)
    if axis == 1:
        return KeyBias(values.expand(*values.shape[:2], call.kv_len), validate=False)
    if len(values) > 1:
        raise NotUnderstoodError  # batch elements with distances of their own
    numbers = values[0] if values.shape[1] > 1 else values[0, 0]
    return _slopes(values[0], call) or DistanceBias(numbers, 1 - call.q_len, "top_left")


def _slopes(values: Tensor, call: ScoreCall) -> Pse | None:
    """Return ALiBi where the numbers are ``-slope * |distance|``."""
    if values.requires_grad or values.shape[0] != call.heads or values.shape[1] < 2:
        return None
    distance = torch.arange(1 - call.q_len, call.kv_len, device=values.device).abs()
    at = int((distance == 1).nonzero()[0])
    slopes = -values[:, at]
    if not torch.equal(-slopes[:, None] * distance, values):
        return None
    return ALiBi(slopes=slopes.tolist(), align="top_left")


def _agrees(found: Scores, fn: ScoreFunction, call: ScoreCall) -> bool:
    """Whether some rows of the first and the last score matrix are what the function says."""
    rows = sorted({round(k * (call.q_len - 1) / (_ROWS - 1)) for k in range(_ROWS)})
    for b, h in {(0, 0), (call.batch - 1, call.heads - 1)}:
        for i in rows:
            if not torch.allclose(_mine(found, call, b, h, i), _theirs(fn, call, b, h, i)):
                return False
    return True


def _scores(call: ScoreCall) -> Tensor:
    return torch.linspace(-9.0, 9.0, call.kv_len, dtype=torch.float64, device=call.device)


def _theirs(fn: ScoreFunction, call: ScoreCall, b: int, h: int, i: int) -> Tensor:
    at = [torch.tensor(one, device=call.device) for one in (b, h, i)]
    keys = torch.arange(call.kv_len, device=call.device)
    each = torch.vmap(lambda score, j: fn(score, at[0], at[1], at[2], j))
    with torch.no_grad():
        row: Tensor = each(_scores(call), keys)
    return row


def _mine(found: Scores, call: ScoreCall, b: int, h: int, i: int) -> Tensor:
    scores = found.factor * _scores(call)
    if found.softcap is not None:
        scores = found.softcap * torch.tanh(scores / found.softcap)
    lengths = call.q_len, call.kv_len
    if found.bias is not None:
        for part in found.bias.parts:
            at = Rectangle((i, i + 1), (0, call.kv_len), *lengths)
            cells = part._values(at, torch.float64, call.device).detach().double()
            cells = cells[(None,) * (4 - cells.dim())]
            scores = scores + cells[b % len(cells), h % cells.shape[1], 0]
    if found.mask is not None:
        row = torch.zeros(call.kv_len, dtype=torch.bool, device=call.device)
        for start, stop in found.mask.region(*lengths).row(i):
            row[start:stop] = True
        scores = scores.masked_fill(~row, -math.inf)
    return scores
