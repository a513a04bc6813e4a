"""Tokens by folds and units, and which units each call reads: the gather of selected blocks.

A fold is a batch element and a folded head. A unit is the largest number of tokens that every
block, and each query block's own keys, are whole numbers of, so that one index of units is all
that a call's keys need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from attnkit.backends.base import stats_dtype
from attnkit.constants import constant
from attnkit.masks.selection import Selection
from attnkit.planner.selected import GatheredCall, SelectedPlan, pieces_of, shift_of, unit_of

__all__ = ["Gather", "Laid", "Recipe"]


class Recipe(NamedTuple):
    """What the units of one fold's query blocks are, in a call's order.

    `source` is the place among the indices ``(q k)`` of a unit of a selected block, and `offset`
    where in that block it is; of an own unit `offset` is where it is at all. `chosen` says which
    are selected, `places` where these are, block by block, and `slots` which indices are read.
    """

    source: Tensor
    offset: Tensor
    chosen: Tensor
    places: Tensor
    slots: Tensor


@constant
def _recipe(
    selection: Selection, kv_len: int, unit: int, blocks: tuple[int, int], device: torch.device
) -> Recipe:
    each, most = selection.kv_block // unit, selection.shape[3]
    source: list[int] = []
    offset: list[int] = []
    chosen: list[bool] = []
    slots: list[int] = []
    for i, sight in zip(range(*blocks), selection.sights(kv_len)[slice(*blocks)], strict=True):
        own = range(sight.start // unit, sight.stop // unit)
        read = range(i * most, i * most + sight.blocks)
        slots += read
        source += [slot for slot in read for _ in range(each)] + [0] * len(own)
        offset += [*range(each)] * sight.blocks + [*own]
        chosen += [True] * (sight.blocks * each) + [False] * len(own)
    places = np.flatnonzero(np.array(chosen, np.bool_))
    rows = (source, offset, chosen, places.reshape(-1, each).tolist(), slots)
    dtypes = (torch.int64, torch.int64, torch.bool, torch.int64, torch.int64)
    made = (torch.tensor(row, dtype=t, device=device) for row, t in zip(rows, dtypes, strict=True))
    return Recipe(*made)


@dataclass(frozen=True, eq=False)
class Gather:
    """What one call reads: the units of each of its folds, ``[fold unit]``."""

    recipe: Recipe
    units: Tensor
    live: Tensor | None
    """Which of them count; None where all do."""
    gates: Tensor | None

    @property
    def index(self) -> Tensor:
        """The units among those of all folds, in a call's order."""
        return self.units.flatten()

    def taken(self, tensor: Tensor) -> Tensor:
        """Return units ``[u, ...]`` in the call's order; what does not count is 0."""
        found = tensor.index_select(0, self.index)
        return found if self.live is None else self.cleared(found)

    def cleared(self, units: Tensor) -> Tensor:
        """Put to 0 what does not count."""
        if self.live is None:
            return units
        return units.masked_fill(~self.live.view(-1, *(1,) * (units.dim() - 1)), 0.0)


class Laid:
    """Operands by folds, and how a plan's parts read them."""

    def __init__(
        self,
        plan: SelectedPlan,
        tensors: Sequence[Tensor],
        chosen: Sequence[Tensor | None],
    ) -> None:
        self.request, self.selection = plan.request, plan.selection
        self.folding, self.unit = plan.folding, unit_of(plan.request)
        self.wide = stats_dtype(plan.request.dtype)
        self.tensors = tuple(tensors)
        self.indices, self.gates, self.counts = chosen
        self.device = tensors[0].device

    @cached_property
    def query(self) -> Tensor:
        """``[fold s g d]``, its channels last."""
        request, selection = self.request, self.selection
        query = self.rows(self.tensors[0])
        ones = pieces_of(request.dtype) * selection.gated
        parts = [query, query.new_ones(*query.shape[:-1], ones)]
        if selection.counted:
            parts.append(query.new_full((*query.shape[:-1], 1), shift_of(request.dtype)))
        return torch.cat(parts, -1) if len(parts) > 2 or ones else query

    @cached_property
    def key(self) -> Tensor:
        """``[unit, tokens, m, d]`` of all folds."""
        return self.units(self.tensors[1])

    @cached_property
    def value(self) -> Tensor:
        """``[unit, tokens, m, d]`` of all folds."""
        return self.units(self.tensors[2])

    def rows(self, tensor: Tensor) -> Tensor:
        """``[b n s d] -> [fold s g d]``."""
        return rearrange(tensor, "b (f g) s d -> (b f) s g d", f=self.folding.heads)

    def units(self, tensor: Tensor) -> Tensor:
        """``[b n s d] -> [unit, tokens, m, d]``, of the key heads of each fold."""
        sizes = {"m": self.folding.keys, "u": self.unit}
        return rearrange(tensor, "b (f m) (c u) d -> (b f c) u m d", **sizes)

    def whole(self, units: Tensor) -> Tensor:
        """Return units as ``[b n s d]`` again."""
        b, n = self.tensors[1].shape[:2]
        f = n // self.folding.keys
        return rearrange(units, "(b f c) u m d -> b (f m) (c u) d", b=b, f=f)

    def gather(self, part: GatheredCall) -> Gather:
        """Return what a part reads."""
        if self.indices is None:
            raise ArithmeticError("a selection has indices")
        kv_len, folds = self.request.kv_len, slice(*part.folds)
        recipe = _recipe(self.selection, kv_len, self.unit, part.blocks, self.device)
        indices = self.indices[folds].flatten(1).long().index_select(1, recipe.source)
        each = self.selection.kv_block // self.unit
        units = torch.where(recipe.chosen, indices * each, 0) + recipe.offset
        live = gates = None
        if self.counts is not None:
            k = self.selection.shape[3]
            counts = self.counts[folds].index_select(1, recipe.source // k)
            live = ~recipe.chosen | (recipe.source % k < counts)
        if self.gates is not None:
            found = self.gates[folds].flatten(1).to(self.wide).index_select(1, recipe.source)
            gates = torch.where(recipe.chosen if live is None else recipe.chosen & live, found, 0.0)
        # What is not read may hold any number; one that is wrong is told, and reads nothing else.
        units = units.clamp(0, kv_len // self.unit - 1)
        first = _first_units(part.folds, self.shared, self.width, self.device)
        return Gather(recipe, units + first, live, gates)

    @property
    def shared(self) -> int:
        """The folds that read one key head."""
        return max(1, self.folding.heads // self.request.num_kv_heads)

    @property
    def width(self) -> int:
        """The units of each fold's keys."""
        return self.request.kv_len // self.unit

    def tensors_of(self, part: GatheredCall, gather: Gather, value: Tensor) -> dict[str, Any]:
        """Return the tensors of a part's call."""
        call = part.launch.call
        query, key = self.query_of(part), gather.taken(self.key)
        key = torch.cat([key, *self._channels(gather, key)], -1)
        mask = call.atten_mask
        return {
            "query": _wide(query, call.head_dim),
            "key": _wide(key.flatten(0, 1), call.head_dim),
            "value": gather.taken(value).flatten(0, 1),
            "atten_mask": None if mask is None else mask.build(self.device),
            "pse": None,
            "sink": None,
        }

    def query_of(self, part: GatheredCall) -> Tensor:
        """Return a part's query tokens, ``[t g d]``."""
        return self.of_part(part, self.query)

    def of_part(self, part: GatheredCall, rows: Tensor) -> Tensor:
        """Return a part's rows of a tensor ``[fold s ...]``, as tokens."""
        return self.view_of(part, rows).reshape(-1, *rows.shape[2:])

    def view_of(self, part: GatheredCall, rows: Tensor) -> Tensor:
        """Return the same as a view, ``[fold s ...]``."""
        first, last = (i * self.selection.q_block for i in part.blocks)
        return rows[slice(*part.folds), first:last]

    def _channels(self, gather: Gather, like: Tensor) -> Iterator[Tensor]:
        """Yield what keys have more: pieces of the gate, and what takes all weight."""
        shape = (*like.shape[:-1], 1)
        if gather.gates is not None:
            rest = gather.gates / self.request.scale
            for _ in range(pieces_of(like.dtype)):
                piece = rest.to(like.dtype)
                rest = rest - piece.to(rest.dtype)
                yield piece.view(-1, 1, 1, 1).expand(shape)
        if self.selection.counted:
            shift = -shift_of(like.dtype) * (1.0 if self.request.scale > 0 else -1.0)
            some = torch.zeros_like(gather.units, dtype=like.dtype)
            if gather.live is not None:
                some = some.masked_fill(~gather.live, shift)
            yield some.view(-1, 1, 1, 1).expand(shape)

    @cached_property
    def empty(self) -> Tensor | None:
        """Rows that no key is selected for, ``[fold s 1]``; None where each has own keys."""
        if self.counts is None or self.selection.causal:
            return None
        return (self.counts == 0).repeat_interleave(self.selection.q_block, 1)[..., None]


@constant
def _first_units(folds: tuple[int, int], shared: int, width: int, device: torch.device) -> Tensor:
    """Return the first unit of each fold's key heads, ``[fold 1]``."""
    return torch.arange(*folds, device=device)[:, None] // shared * width


def _wide(tokens: Tensor, dim: int) -> Tensor:
    """Return tokens with zeros up to so many dimensions."""
    more = dim - tokens.shape[-1]
    return pad(tokens, (0, more)) if more else tokens
