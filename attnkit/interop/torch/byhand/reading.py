"""What recorded calls mean: a chain from ``q @ k`` to the weights, read as one attention.

The reading is exact or it is none: `NotAttention` says which call is no part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnkit.interop.torch.byhand.axes import Axes, Labelled, NotAttention, permutation
from attnkit.interop.torch.byhand.products import Product, product_of
from attnkit.interop.torch.byhand.records import Recorded
from attnkit.masks import Lifted, Mask

__all__ = ["EXCLUDES", "Hole", "Reading", "Term", "read"]

EXCLUDES = -1e4
"""A score that is *set* to this or less takes no part: its weight is 0 in every dtype."""


@dataclass
class Term:
    """A tensor that is added to the scores, times `factor`, times `folds`."""

    labelled: Labelled
    factor: float
    folds: list[Labelled] = field(default_factory=list)


@dataclass
class Hole:
    """Cells whose score is set to `value`: those where `keep` is not."""

    labelled: Labelled
    keep: bool
    value: float


@dataclass
class Reading:
    """Attention as far as it was read; see `attnkit.interop.torch.byhand.calls` for what it is.

    scores ``= scale * product(folds) * first.second + terms``, or `cap` times the tanh of that,
    -inf in the holes and outside of the sets. Weights are its softmax over the side `keys`,
    dropped with probability `dropout`, times `gain` and all `gains`.
    """

    axes: Axes
    first: Labelled
    second: Labelled
    number: Callable[[Tensor], float | None]
    scale: float = 1.0
    cap: float | None = None
    folds: list[Labelled] = field(default_factory=list)
    terms: list[Term] = field(default_factory=list)
    holes: list[Hole] = field(default_factory=list)
    sets: list[tuple[Mask, list[list[int]]]] = field(default_factory=list)
    shifted: bool = False
    shifts: list[Labelled] = field(default_factory=list)
    keys: str | None = None
    dropout: float = 0.0
    gain: float = 1.0
    gains: list[Labelled] = field(default_factory=list)
    empty: list[Hole] = field(default_factory=list)

    @property
    def masked(self) -> bool:
        """Whether some cells may take no part already."""
        return bool(self.holes or self.sets or self.terms)

    def operand(self, value: Any) -> float | Tensor | Recorded:
        """Return a factor or summand as a number where it is one that can be known."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, Recorded):
            return value
        if not isinstance(value, Tensor):
            raise NotAttention(f"the scores meet {type(value).__name__}")
        found = self.number(value)
        return value if found is None else found

    # -- what is done to scores ----------------------------------------------------------

    def multiply(self, value: float | Tensor | Recorded) -> None:
        """Multiply the scores, or the weights."""
        if isinstance(value, Recorded):
            raise NotAttention("scores are multiplied by what follows from scores")
        if isinstance(value, Tensor):
            self._fold(value)
        elif self.keys is not None:
            self.gain *= value
        elif value <= 0 and (self.masked or value == 0):
            raise NotAttention(f"masked scores are multiplied by {value}")
        else:
            if self.cap is None:
                self.scale *= value
            else:
                self.cap *= value
            for term in self.terms:
                term.factor *= value
            for hole in self.holes:
                hole.value *= value

    def _fold(self, value: Tensor) -> None:
        labelled = self.axes.label(value)
        sides = {self.axes.sides[one] for one in labelled.axes}
        if self.keys is not None:
            if self.keys in sides:
                raise NotAttention("weights are multiplied by a tensor with an axis of keys")
            self.gains.append(labelled)
            return
        if {"first", "second"} <= sides:
            raise NotAttention("scores are multiplied cell by cell")
        if self.holes or self.sets or self.shifted or self.cap is not None:
            raise NotAttention("masked or capped scores are multiplied by a tensor")
        self.folds.append(labelled)
        for term in self.terms:
            term.folds.append(labelled)

    def add(self, value: float | Tensor | Recorded, sign: float) -> None:
        """Add to the scores."""
        if self.keys is not None:
            raise NotAttention("something is added to the weights")
        if not isinstance(value, Tensor):
            # What is the same for all keys of a row, the softmax does not see.
            self.shifted = True
            if isinstance(value, Recorded):
                self.shifts.append(self.axes.label(value.stand_in))
            return
        lifted = getattr(value, "lifted", None)
        if isinstance(lifted, Lifted) and sign > 0:
            self.sets.append((lifted.mask, _as_four(self.axes.dims, value)))
            return
        self.terms.append(Term(self.axes.label(value), sign))

    def cap_scores(self) -> None:
        """Take the tanh of the scores."""
        if self.keys or self.masked or self.shifted or self.cap is not None or self.folds:
            raise NotAttention("tanh of more than scaled scores")
        self.cap = 1.0

    def fill(self, where: Any, value: Any, keep: bool) -> None:
        """Set cells to a number: of scores one that excludes them, of weights 0."""
        number = self.operand(value)
        if not isinstance(where, Tensor) or where.dtype != torch.bool:
            raise NotAttention("a fill without a bool tensor")
        labelled = self.axes.label(where)
        if self.keys is not None:
            self._empty(labelled, number, keep)
        elif not isinstance(number, float) or number > EXCLUDES:
            raise NotAttention("scores are set to a number that does not exclude them")
        else:
            self.holes.append(Hole(labelled, keep, number))

    def _empty(self, labelled: Labelled, number: Any, keep: bool) -> None:
        if number != 0 or isinstance(number, Tensor):
            raise NotAttention("weights are set to another number than 0")
        if any(hole.keep == keep and _same(hole.labelled, labelled) for hole in self.holes):
            return  # these weights are 0
        self.empty.append(Hole(labelled, keep, 0.0))

    def bound(self, low: Any) -> None:
        """Take the maximum with a number; only one that excludes leaves the weights alone."""
        if self.keys is not None or not isinstance(low, float) or low > EXCLUDES:
            raise NotAttention("scores are bounded from below")

    def soften(self, dim: int) -> None:
        """Take the softmax over a dimension."""
        if self.keys is not None:
            raise NotAttention("a softmax of weights")
        over = self.axes.dims[dim]
        for side in ("second", "first"):
            if over == self.axes.of_side(side):
                if any(one in shift.axes for shift in self.shifts for one in over):
                    raise NotAttention("scores are shifted by what differs from key to key")
                self.keys = side
                return
        raise NotAttention("the softmax is not over the keys")

    def drop(self, p: float) -> None:
        """Drop weights."""
        if self.keys is None or self.dropout:
            raise NotAttention("dropout of scores" if self.keys is None else "dropout twice")
        self.dropout = p


def _same(a: Labelled, b: Labelled) -> bool:
    x, y = a.tensor, b.tensor
    return (
        a.axes == b.axes
        and x.data_ptr() == y.data_ptr()
        and x.stride() == y.stride()
        and x.dtype == y.dtype
    )


def _as_four(dims: list[list[int]], tensor: Tensor) -> list[list[int]]:
    """Return the factors of a mask ``[b, 1 or n, q_len, kv_len]`` that is a set."""
    if len(dims) != 4 or tensor.ndim != 4:
        raise NotAttention("a mask that is a set meets scores that are not [b, n, q_len, kv_len]")
    return [list(group) for group in dims]


# -- calls -----------------------------------------------------------------------------------


def read(record: Recorded, number: Callable[[Tensor], float | None]) -> Reading:
    """Read the calls up to a record; raises `NotAttention`."""
    chain = [record]
    while chain[-1].parent is not None:
        chain.append(chain[-1].parent)
    start, *rest = reversed(chain)
    reading = _start(start, number)
    for one in rest:
        one.check()
        _read_one(reading, one)
    return reading


def _start(record: Recorded, number: Callable[[Tensor], float | None]) -> Reading:
    record.check()
    product, first, second = product_of(record.name, record.args, record.kwargs)
    dtype = record.stand_in.dtype  # under autocast that of the product
    reading = begin(product, first.to(dtype), second.to(dtype), number)
    if record.name == "baddbmm":
        reading.scale = float(record.kwargs.get("alpha", 1))
        beta = float(record.kwargs.get("beta", 1))
        if beta:
            given: Any = record.kwargs.get("input", record.args[0] if record.args else None)
            reading.terms.append(Term(reading.axes.label(given), beta))
    return reading


def begin(
    product: Product, first: Tensor, second: Tensor, number: Callable[[Tensor], float | None]
) -> Reading:
    """Return the scores that a product makes."""
    sizes: dict[Any, int] = {}
    for labels, tensor in ((product.first, first), (product.second, second)):
        for one, size in zip(labels, tensor.shape, strict=True):
            sizes[one] = max(size, sizes.get(one, 1))
    if len(product.summed) != 1:
        raise NotAttention("a product that sums over other than one axis")
    rows, columns = product.free(0), product.free(1)
    axes = Axes()
    groups = {product.summed[0]: [-1]}
    for one in product.out:
        side = "first" if one in rows[-1:] else "second" if one in columns[-1:] else "lead"
        groups[one] = axes.new(sizes[one], side)
    for labels in (product.first, product.second):
        if any(one not in groups for one in labels):
            raise NotAttention("a product that sums one operand alone")
    axes.dims = [groups[one] for one in product.out]
    return Reading(
        axes,
        axes.label(first, [groups[one] for one in product.first]),
        axes.label(second, [groups[one] for one in product.second]),
        number,
    )


def _read_one(reading: Reading, record: Recorded) -> None:
    values = [_at(record, 0, "input", "self"), _at(record, 1, "other", "value")]
    place = next((k for k, one in enumerate(record.args) if isinstance(one, Recorded)), 0)
    other = values[1 - place] if place < 2 else None
    name = record.name
    if name in ("add", "sub", "rsub"):
        if record.kwargs.get("alpha", 1) != 1:
            raise NotAttention(f"{name} with alpha")
        # x - y is x + (-y), and y - x is -x + y
        turned = (name == "sub" and place == 1) or (name == "rsub" and place == 0)
        if turned:
            reading.multiply(-1.0)
        reading.add(reading.operand(other), 1.0 if turned or name == "add" else -1.0)
    elif name == "neg":
        reading.multiply(-1.0)
    elif name == "mul":
        reading.multiply(reading.operand(other))
    elif name == "div":
        if place or "rounding_mode" in record.kwargs:
            raise NotAttention("something is divided by the scores")
        divisor = reading.operand(other)
        if isinstance(divisor, Recorded):
            raise NotAttention("scores are divided by what follows from scores")
        reading.multiply(divisor.reciprocal() if isinstance(divisor, Tensor) else 1.0 / divisor)
    elif name in ("reshape", "same"):
        reading.axes.reshape(record.stand_in.shape)
    elif name == "permute":
        ndim = len(reading.axes.dims)
        reading.axes.permute(permutation(record.func, record.args[1:], record.kwargs, ndim))
    else:
        _LESS_COMMON[name](reading, record)


def _at(record: Recorded, place: int, *names: str, default: Any = None) -> Any:
    if len(record.args) > place:
        return record.args[place]
    return next((record.kwargs[name] for name in names if name in record.kwargs), default)


def _fill(reading: Reading, record: Recorded) -> None:
    if not isinstance(record.args[0], Recorded):
        raise NotAttention("the scores are written into a tensor")
    reading.fill(_at(record, 1, "mask"), _at(record, 2, "value"), keep=False)


def _where(reading: Reading, record: Recorded) -> None:
    # As a method, x.where(condition, y), the scores come first.
    x, y, z = (_at(record, 0), _at(record, 1, "input"), _at(record, 2, "other"))
    if isinstance(x, Recorded) and not isinstance(y, Recorded):
        reading.fill(y, z, keep=True)
    elif isinstance(y, Recorded) and not isinstance(z, Recorded):
        reading.fill(x, z, keep=True)
    elif isinstance(z, Recorded) and not isinstance(y, Recorded):
        reading.fill(x, y, keep=False)
    else:
        raise NotAttention("a choice between scores")


def _maximum(reading: Reading, record: Recorded) -> None:
    other = record.args[1] if isinstance(record.args[0], Recorded) else record.args[0]
    reading.bound(reading.operand(other))


def _clamp(reading: Reading, record: Recorded) -> None:
    low, high = _at(record, 1, "min"), _at(record, 2, "max")
    if high is not None and (isinstance(high, Tensor) or high < 1e30):
        raise NotAttention("scores are bounded from above")
    if low is not None:
        reading.bound(reading.operand(low))


def _softmax(reading: Reading, record: Recorded) -> None:
    dim = _at(record, 1, "dim")
    if dim is None:
        raise NotAttention("a softmax without dim")
    reading.soften(dim)


def _dropout(reading: Reading, record: Recorded) -> None:
    p, training = (
        _at(record, 1, "p", default=0.5),
        _at(record, 2, "training", "train", default=True),
    )
    if training and p:
        reading.drop(float(p))


def _nan_to_num(reading: Reading, record: Recorded) -> None:
    if _at(record, 1, "nan") not in (None, 0, 0.0):
        raise NotAttention("NaN weights become another number than 0")


def _largest(reading: Reading, record: Recorded) -> None:
    raise NotAttention("the largest score of a row is more than a shift")


def _detach(reading: Reading, record: Recorded) -> None:
    raise NotAttention("scores are detached")


_LESS_COMMON: dict[str, Callable[[Reading, Recorded], None]] = {
    "masked_fill": _fill,
    "where": _where,
    "maximum": _maximum,
    "clamp": _clamp,
    "largest": _largest,
    "detach": _detach,
    "tanh": lambda reading, _: reading.cap_scores(),
    "cast": lambda reading, _: None,
    "softmax": _softmax,
    "dropout": _dropout,
    "nan_to_num": _nan_to_num,
}
