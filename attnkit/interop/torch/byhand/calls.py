"""One call of attnkit for a reading: where batch ends and heads begin, the mask, the bias."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from operator import add, and_
from typing import Any

import torch
from torch import Tensor

from attnkit.interop.torch.byhand.axes import Labelled, NotAttention
from attnkit.interop.torch.byhand.products import Product
from attnkit.interop.torch.byhand.reading import EXCLUDES, Hole, Reading, Term
from attnkit.masks import Mask
from attnkit.pse import Dense, KeyBias, Pse
from attnkit.pse.additive import Additive

__all__ = ["Call", "Reader", "call_of"]

Reader = Callable[[Tensor, bool | None, int], Additive]
"""Reads a tensor [1|b, 1|n, 1|q_len, kv_len]: bool with what True means, or what is added."""


@dataclass(frozen=True)
class Call:
    """A call of attnkit on ``[b n s d]`` tensors, and how its output is the product's."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None
    bias: Pse | None
    scale: float
    softcap: float | None
    dropout: float
    dtype: torch.dtype
    finish: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Plane:
    """The factors of batch, heads, queries and keys, in the order of the call's tensors."""

    groups: tuple[list[int], list[int], list[int], list[int]]
    sizes: dict[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(prod(self.sizes[one] for one in group) for group in self.groups)

    def tensor(self, labelled: Labelled) -> Tensor:
        """Return a mask or bias with four axes; 1 where it serves all."""
        return labelled.over(self.groups, self.sizes)


def call_of(
    reading: Reading, product: Product, weights_first: bool, value: Tensor, read: Reader
) -> Call:
    """Return the call that the product of the weights with values is.

    `product` has the weights as its first operand, or as its second.
    """
    axes = reading.axes
    if reading.keys is None:
        raise NotAttention("a product of scores without a softmax")
    mine = product.first if weights_first else product.second
    theirs = product.second if weights_first else product.first
    groups = dict(zip(mine, axes.dims, strict=True))
    wide = product.free(1 if weights_first else 0)
    summed = [one for name in product.summed for one in groups[name]]
    keys = axes.of_side(reading.keys)
    queries = axes.of_side("first" if reading.keys == "second" else "second")
    if len(wide) != 1 or sorted(summed) != sorted(keys):
        raise NotAttention("the weights are not summed over the keys")
    keys = summed
    lead = axes.of_side("lead")
    taken = axes.label(value, [groups.get(one, [-1]) for one in theirs])
    query, key = (reading.first, reading.second)[:: 1 if reading.keys == "second" else -1]
    query, key, scale = _folded(reading, query, key)
    if any(groups[2:] != [queries, keys] for _, groups in reading.sets):
        raise NotAttention("rows and keys of a mask that is a set were mixed")
    cut = _cut(reading, lead, key, taken)
    plane = _Plane((lead[:cut], lead[cut:], queries, keys), axes.sizes)
    shared = _shared(plane, key, taken)
    tensors = (
        query.over((lead[:cut], lead[cut:], queries, [-1]), axes.sizes),
        *(one.over((lead[:cut], shared, keys, [-1]), axes.sizes) for one in (key, taken)),
    )
    mask, bias = _terms(reading, plane, read, tensors[0].dtype)
    finish = _finish(reading, plane, groups, product.out, wide[0], tensors[2])
    b, n = plane.shape[:2]
    wanted = [t.expand(b, -1, -1, -1) if len(t) != b else t for t in tensors]
    wanted[0] = wanted[0].expand(-1, n, -1, -1)
    dtype = reduce(torch.promote_types, (t.dtype for t in wanted))
    wanted = [t.to(dtype) for t in wanted]
    return Call(
        wanted[0],
        wanted[1],
        wanted[2],
        mask,
        bias,
        scale,
        None if reading.cap is None else abs(reading.cap),
        reading.dropout,
        value.dtype,
        finish,
    )


def _folded(reading: Reading, query: Labelled, key: Labelled) -> tuple[Labelled, Labelled, float]:
    """Multiply query or key by what the scores are multiplied by."""
    of_keys = reading.axes.of_side(reading.keys or "")
    for fold in reading.folds:
        if any(one in of_keys for one in fold.axes):
            key = _times(key, fold)
        else:
            query = _times(query, fold)
    # m * tanh(a * q.k) is the soft-cap m of m * a * q.k
    scale = reading.scale * (1.0 if reading.cap is None else reading.cap)
    return (query, key, scale) if scale > 0 else (_negative(query), key, -scale)


def _negative(one: Labelled) -> Labelled:
    return Labelled(-one.tensor, one.axes)


def _times(one: Labelled, fold: Labelled) -> Labelled:
    """Return the product of two labelled tensors, as one with the factors of both."""
    order = [*dict.fromkeys(a for a in (*one.axes, *fold.axes) if a != -1)]
    tail = [-1] if -1 in one.axes else []
    sides = []
    for labelled in (one, fold):
        mine = labelled.ordered([*order, *tail])
        tensor = mine.tensor
        for at, axis in enumerate([*order, *tail]):
            if axis not in mine.axes:
                tensor = tensor.unsqueeze(at)
        sides.append(tensor)
    return Labelled((sides[0] * sides[1]).to(one.tensor.dtype), [*order, *tail])


def _cut(reading: Reading, lead: list[int], key: Labelled, value: Labelled) -> int:
    """Return how many of the leading factors are the batch: so that the least is expanded."""
    usual = len(lead) - 1 if len(reading.axes.dims) > 3 else len(lead)
    costs: list[tuple[int, int, int]] = []
    for cut in range(len(lead) + 1):
        cost = sum(_expanded(one, lead, cut, reading) for one in _masks_of(reading))
        for mask, groups in reading.sets:
            batch, heads = groups[0], groups[1]
            split = lead[:cut] == batch and lead[cut:] == heads
            if not split and (mask.batches is not None or mask.heads is not None):
                cost += 1 << 60
        for one in (key, value):
            has = [axis in one.axes for axis in lead]
            if any(has[:cut]) and not all(has[:cut]):
                cost += one.tensor.numel()
            if has[cut:] != sorted(has[cut:], reverse=True):  # heads are shared by blocks
                cost += one.tensor.numel()
        costs.append((cost, abs(cut - usual), cut))
    least = min(costs)
    if least[0] >= 1 << 60:
        raise NotAttention("batch and heads of a mask that is a set were mixed")
    return least[2]


def _masks_of(reading: Reading) -> list[Labelled]:
    return [*(one.labelled for one in reading.terms), *(one.labelled for one in reading.holes)]


def _expanded(one: Labelled, lead: list[int], cut: int, reading: Reading) -> int:
    times = 1
    for part in (lead[:cut], lead[cut:]):
        if any(axis in one.axes for axis in part):
            times *= prod(reading.axes.sizes[axis] for axis in part if axis not in one.axes)
    return one.tensor.numel() * (times - 1)


def _shared(plane: _Plane, key: Labelled, value: Labelled) -> list[int]:
    """Return the factors of the heads that keys and values have: whole blocks share one."""
    heads = plane.groups[1]
    mine = [axis for axis in heads if axis in key.axes or axis in value.axes]
    return mine if mine == heads[: len(mine)] else list(heads)


def _terms(
    reading: Reading, plane: _Plane, read: Reader, dtype: torch.dtype
) -> tuple[Mask | None, Pse | None]:
    """Return the mask and the bias."""
    masks = [mask for mask, _ in reading.sets]
    biases: list[Dense | KeyBias] = []
    dense: list[Tensor] = []
    for hole in reading.holes:
        masks.append(_hole(hole, plane, read))
    excluded = list(masks)
    for term in reading.terms:
        mask, bias = _term(term, plane, read)
        if mask is not None:
            masks.append(mask)
        if isinstance(bias, KeyBias):
            biases.append(bias)
        elif bias is not None:
            dense.append(bias.tensor)
    _check_empty(reading, plane, read, excluded)
    if dense:
        total = reduce(add, (t[(None,) * (4 - t.ndim)] for t in dense))
        rows, keys = plane.shape[2:]
        biases.append(Dense(total.expand(-1, -1, rows, keys), validate=False))
    if dtype == torch.float64:
        biases = [type(one)(one.tensor.double(), validate=False) for one in biases]
    mask = reduce(and_, masks) if masks else None
    total_bias: Pse | None = reduce(add, biases) if biases else None
    return mask, total_bias


def _hole(hole: Hole, plane: _Plane, read: Reader) -> Mask:
    if hole.value > EXCLUDES:
        raise NotAttention("a number that excludes cells was made smaller after it was set")
    return read(_full_keys(plane.tensor(hole.labelled), plane), hole.keep, plane.shape[3]).mask


def _check_empty(reading: Reading, plane: _Plane, read: Reader, masks: list[Mask]) -> None:
    """Raise where weights are set to 0 that are not masked already; whole rows may be."""
    for one in reading.empty:
        if any(axis in plane.groups[3] for axis in one.labelled.axes):
            kept = read(plane.tensor(one.labelled), one.keep, plane.shape[3]).mask
            if kept not in masks:
                raise NotAttention("weights are set to 0 that were not masked")


def _full_keys(tensor: Tensor, plane: _Plane) -> Tensor:
    """Return it with an axis of all keys: for a mask needs one."""
    return tensor if tensor.shape[-1] != 1 else tensor.expand(-1, -1, -1, plane.shape[3])


def _term(term: Term, plane: _Plane, read: Reader) -> tuple[Mask | None, Dense | KeyBias | None]:
    tensor = _full_keys(plane.tensor(term.labelled), plane)
    if term.factor < 0:
        tensor = -tensor
    found = read(tensor, None, plane.shape[3])
    bias, factor = found.bias, abs(term.factor)
    if not isinstance(bias, Dense | KeyBias):
        return found.mask, None
    values = bias.tensor if factor == 1 else bias.tensor * factor
    per_key = isinstance(bias, KeyBias)
    if per_key:
        values = values.unsqueeze(-2)
    values = values[(None,) * (4 - values.ndim)]
    for fold in term.folds:
        values = values * plane.tensor(fold)
    if values.shape[2] == 1:
        return found.mask, KeyBias(values[:, :, 0], validate=False)
    return found.mask, Dense(values, validate=False)


def _finish(
    reading: Reading,
    plane: _Plane,
    groups: dict[Any, list[int]],
    out: Sequence[Any],
    wide: Any,
    value: Tensor,
) -> Callable[[Tensor], Tensor]:
    """Return the function from the call's output [b n s d] to that of the product."""
    lead = [*plane.groups[0], *plane.groups[1]]
    order = [*lead, *plane.groups[2], -1]
    sizes = {**plane.sizes, -1: value.shape[-1]}
    wanted = [[-1] if one == wide else groups[one] for one in out]
    flat = [axis for group in wanted for axis in group]
    if sorted(flat) != sorted(order):
        raise NotAttention("the product of weights and values sums more than the keys")
    shape = [prod(sizes[axis] for axis in group) for group in wanted]
    gain, gains = reading.gain, reading.gains
    rows = [
        ~plane.tensor(one.labelled) if one.keep else plane.tensor(one.labelled)
        for one in reading.empty
        if not any(axis in plane.groups[3] for axis in one.labelled.axes)
    ]

    def finish(output: Tensor) -> Tensor:
        for one in gains:
            output = (output * plane.tensor(one)).to(output.dtype)
        for row in rows:
            output = output.masked_fill(row, 0.0)
        if gain != 1:
            output = output * gain
        if flat == order:
            return output.reshape(shape)
        whole = output.reshape([sizes[axis] for axis in order])
        return whole.permute([order.index(axis) for axis in flat]).reshape(shape)

    return finish
