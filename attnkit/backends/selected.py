"""Running plans of selected blocks: one gather of whole blocks for each call, and the way back.

Tokens are laid out by folds (batch element and folded head), keys and values as units that every
block is made of. The indices of a call become the units that each sequence reads, on the device:
nothing of them is read on the host. What was gathered for a call is not kept; the backward gathers
again. Gradients of keys and values are summed unit by unit in the dtype of the statistics: by
`index_add_`, or where torch is to be deterministic as a product with a matrix of ones.

A learnable sink is one more part of the softmax, as in `merged`: heads are folded, and a call could
not tell their sinks apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

from attnkit.backends.base import AttentionOutput, Operands, Stats, stats_dtype
from attnkit.backends.graph import run_held
from attnkit.backends.merged import Answer, Drawn, Launcher
from attnkit.constants import constant
from attnkit.errors import CompositionError
from attnkit.first_order import first_order
from attnkit.kernel import pack_stats, unpack_stats
from attnkit.masks.selected import SelectedBlocks, Selection
from attnkit.planner import Request
from attnkit.planner.selected import (
    GatheredCall,
    SelectedPlan,
    pieces_of,
    selection_of,
    shift_of,
    unit_of,
)

__all__ = ["Laid", "checked", "run_selected", "selected_by"]


def selected_by(request: Request, operands: Operands) -> SelectedBlocks:
    """Return the selection of a call; `CompositionError` where its tensors are not this plan's."""
    selection = selection_of(request)
    if len(operands.given) != 1 + selection.gated + selection.counted:
        raise CompositionError(
            f"a plan for {selection!r} runs on its tensors, and {len(operands.given)} were given; "
            "give the mask with the call"
        )
    found = selection.bound(operands.given)
    if found.form != selection or found.indices.device != operands.query.device:
        raise CompositionError(
            f"a plan for {selection!r} on {operands.query.device} was given {found!r} on "
            f"{found.indices.device}; indices are on the device of the queries"
        )
    return found


def checked(chosen: SelectedBlocks, kv_len: int) -> Tensor | None:
    """Refuse wrong indices: on the host at once, on a device when it comes to them.

    Returns whether they are right, for a device that cannot stop by itself; then None.
    """
    if chosen.is_at_hand:
        chosen.refuse_wrong(kv_len)
        return None
    right = ~torch.stack([found.any() for found in chosen.wrong(kv_len)]).any()
    if not _asserts(right.device):
        return right
    told = (
        f"{chosen!r}: an index is out of range, occurs twice, or is that of an own or later block"
    )
    torch._assert_async(right, told)
    return None


def _asserts(device: torch.device) -> bool:
    """Whether a device has an assert that nobody waits for."""
    keys = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}
    key = keys.get(device.type, "PrivateUse1")
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("aten::_assert_async.msg", key))


def run_selected(launcher: Launcher, plan: SelectedPlan, operands: Operands) -> AttentionOutput:
    """Run the calls of a plan on the blocks that the indices of this call select."""
    if isinstance(operands.query, FakeTensor):
        return run_held(plan, operands)
    request, chosen = plan.request, selected_by(plan.request, operands)
    right = checked(chosen, request.kv_len)
    query, key, value = operands.by_head(request)
    out, lse, peak = _Selected.apply(  # type: ignore[no-untyped-call]
        launcher, plan, query, key, value, operands.sink, *_by_fold(request, chosen)
    )
    if right is not None:  # nothing wrong may look right
        out, lse = (torch.where(right, t, torch.nan) for t in (out, lse))
    return AttentionOutput(request.layout_of.from_bnsd(out), Stats(lse, peak))


def _by_fold(request: Request, chosen: SelectedBlocks) -> tuple[Tensor | None, ...]:
    """Return indices, gates and counts by fold, ``[fold, q_block, ...]``."""
    batch, heads = request.batch, chosen.form.shape[1]
    return tuple(
        None if t is None else t.expand(batch, heads, *t.shape[2:]).flatten(0, 1)
        for t in (chosen.indices, chosen.gates, chosen.counts)
    )


# -- which units a part reads ------------------------------------------------------------------


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
class _Gather:
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

    def gather(self, part: GatheredCall) -> _Gather:
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
        return _Gather(recipe, units + self._first(part), live, gates)

    def _first(self, part: GatheredCall) -> Tensor:
        """Return the first unit of each fold's key heads, ``[fold 1]``."""
        folding, heads = self.folding, self.tensors[1].shape[1]
        shared = max(1, folding.heads // heads)  # folds that read one key head
        numbers = torch.arange(*part.folds, device=self.device) // shared
        return (numbers * (self.request.kv_len // self.unit))[:, None]

    def tensors_of(self, part: GatheredCall, gather: _Gather, value: Tensor) -> dict[str, Any]:
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

    def _channels(self, gather: _Gather, like: Tensor) -> Iterator[Tensor]:
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


def _wide(tokens: Tensor, dim: int) -> Tensor:
    """Return tokens with zeros up to so many dimensions."""
    more = dim - tokens.shape[-1]
    return pad(tokens, (0, more)) if more else tokens


# -- all parts ---------------------------------------------------------------------------------


class _Selected(torch.autograd.Function):
    """Attends tensors ``[b n s d]``: output, log-sum-exp and maximum ``[b n s]``."""

    @staticmethod
    def forward(
        ctx: Any,
        launcher: Launcher,
        plan: SelectedPlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sink: Tensor | None,
        *chosen: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the calls, each of which answers rows of its own."""
        laid = Laid(plan, (query, key, value), chosen)
        batch, _, rows, _ = query.shape
        shape = (laid.folding.folds, rows, laid.folding.queries)
        out = query.new_empty(*shape, value.shape[-1])
        peak, total = (query.new_empty(shape, dtype=laid.wide) for _ in range(2))
        random: list[Drawn] = []
        for part in plan.parts:
            call = part.launch.call
            given = laid.tensors_of(part, laid.gather(part), laid.value)
            answer = launcher.forward(call, given)
            random.append(answer.random)
            stats = (unpack_stats(call, stat) for stat in (answer.peak, answer.total))
            for there, found in zip((out, peak, total), (answer.out, *stats), strict=True):
                view = laid.view_of(part, there)
                view.copy_(found.view(view.shape))
        if laid.empty is not None:
            peak.masked_fill_(laid.empty, -torch.inf)
            total.masked_fill_(laid.empty, 0.0)
        if sink is not None:
            out, peak, total = _with_sink(laid, out, peak, total, sink)
        ctx.save_for_backward(query, key, value, sink, *chosen, out, peak, total)
        ctx.launcher, ctx.plan, ctx.random = launcher, plan, random
        result, lse, most = (
            rearrange(t, "(b f) s g ... -> b (f g) s ...", b=batch)
            for t in (out, peak + total.log(), peak)
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(most)
        return result, lse, most

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dlse: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gather again, and give each call's own backward the statistics of its rows."""
        saved = ctx.saved_tensors

        def make() -> tuple[Tensor | None, ...]:
            way = _WayBack(ctx.launcher, ctx.plan, saved)
            if dy is not None:
                way.through(dy, ctx.random)
            if dlse is not None:
                way.through_lse(dlse)
            return way.found()

        return (None, None, *first_order(make, dy, dlse, *saved[:4], saved[5]), None)


def _with_sink(
    laid: Laid, out: Tensor, peak: Tensor, total: Tensor, sink: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge a sink: one more score, of no value."""
    logits = _sinks(laid, sink)
    highest = torch.maximum(peak, logits)
    own = total * (peak - highest).exp()
    whole = own + (logits - highest).exp()
    out = (out.to(laid.wide) * (own / whole)[..., None]).to(out.dtype)
    return out, highest, whole


def _sinks(laid: Laid, sink: Tensor) -> Tensor:
    """Return the sinks by fold, ``[fold 1 g]``."""
    each = rearrange(sink.to(laid.wide), "(f g) -> f 1 g", f=laid.folding.heads)
    return each.repeat(laid.request.batch, 1, 1)


class _WayBack:
    """Gradients while they are summed up, in the dtype of the statistics."""

    def __init__(self, launcher: Launcher, plan: SelectedPlan, saved: Sequence[Any]) -> None:
        *tensors, self.sink, indices, gates, counts, out, peak, total = saved
        self.launcher, self.plan = launcher, plan
        self.laid = laid = Laid(plan, tensors, (indices, gates, counts))
        empty = total == 0
        self.out = out
        self.peak, self.total = peak.masked_fill(empty, 0.0), total.masked_fill(empty, 1.0)
        self.to_query = torch.zeros_like(laid.rows(tensors[0]), dtype=laid.wide)
        self.to_key, self.to_value = (
            torch.zeros_like(units, dtype=laid.wide) for units in (laid.key, laid.value)
        )
        self.to_gates = None if gates is None else torch.zeros_like(gates, dtype=laid.wide)
        self.to_sink = None if self.sink is None else torch.zeros_like(self.sink, dtype=laid.wide)

    def through(self, dy: Tensor, random: Sequence[Drawn]) -> None:
        """Add what flows through the output."""
        slope = self.laid.rows(dy)
        self._launch(slope, self.out, self.laid.value, random)
        self._add_to_sink((slope * self.out).to(self.laid.wide).sum(-1).neg())

    def through_lse(self, dlse: Tensor) -> None:
        """Add what flows through the log-sum-exp: see `merged`."""
        laid = self.laid
        value, out = torch.zeros_like(laid.value), torch.zeros_like(self.out)
        value[..., 0] = 1.0
        slope = torch.zeros_like(out)
        slope[..., 0] = laid.rows(dlse[..., None])[..., 0]
        self._launch(slope, out, value, None)
        self._add_to_sink(slope[..., 0].to(laid.wide))

    def _launch(
        self, slope: Tensor, out: Tensor, value: Tensor, random: Sequence[Drawn] | None
    ) -> None:
        laid = self.laid
        for n, part in enumerate(self.plan.parts):
            gather, call = laid.gather(part), part.launch.call
            call = replace(call, keep_prob=1.0) if random is None else call
            drawn = (0, 0, 0) if random is None else random[n]
            own, peak, total = (laid.of_part(part, t) for t in (out, self.peak, self.total))
            answer = Answer(own, pack_stats(call, peak), pack_stats(call, total), drawn)
            dy = laid.of_part(part, slope).contiguous()
            tensors = laid.tensors_of(part, gather, value)
            made = self.launcher.backward(call, tensors, dy, answer)
            self._add(part, gather, made.query, made.key)
            if random is not None:
                self._sum(self.to_value, gather, made.value)

    def _add(self, part: GatheredCall, gather: _Gather, to_query: Tensor, to_key: Tensor) -> None:
        laid, dim = self.laid, self.laid.request.head_dim
        rows = laid.view_of(part, self.to_query)
        rows += to_query[..., :dim].view(rows.shape)
        self._sum(self.to_key, gather, to_key[..., :dim])
        if self.to_gates is not None:
            self._add_to_gates(part, gather, to_key[..., dim])

    def _sum(self, total: Tensor, gather: _Gather, part: Tensor) -> None:
        """Add a call's keys ``[t m d]`` to their units."""
        units = gather.cleared(part.to(total.dtype).reshape(-1, *total.shape[1:]))
        if not torch.are_deterministic_algorithms_enabled():
            total.index_add_(0, gather.index, units)
            return
        numbers = torch.arange(len(total), device=total.device)
        here = (numbers[:, None] == gather.index).to(total.dtype)
        total += (here @ units.flatten(1)).view(total.shape)

    def _add_to_gates(self, part: GatheredCall, gather: _Gather, slope: Tensor) -> None:
        """Add what the channel's first piece got, ``[t m]``: the scale times that of the score."""
        if self.to_gates is None:
            return
        recipe, folds = gather.recipe, slice(*part.folds)
        by_unit = slope.to(self.laid.wide).view(*gather.units.shape, -1).sum(-1)
        by_unit = by_unit if gather.live is None else by_unit.masked_fill(~gather.live, 0.0)
        by_block = by_unit.index_select(1, recipe.places.flatten())
        found = by_block.view(len(by_unit), *recipe.places.shape).sum(-1) / self.laid.request.scale
        self.to_gates.flatten(1)[folds].index_add_(1, recipe.slots, found)

    def _add_to_sink(self, slope: Tensor) -> None:
        """Add the gradient of the sink, whose weight is that of one more score."""
        if self.sink is not None and self.to_sink is not None:
            share = (_sinks(self.laid, self.sink) - self.peak).exp() / self.total
            found = rearrange(share * slope, "(b f) s g -> b s (f g)", f=self.laid.folding.heads)
            self.to_sink += found.sum((0, 1))

    def found(self) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key, value, sink, indices and gates, in their dtypes."""
        laid = self.laid
        query = rearrange(self.to_query, "(b f) s g d -> b (f g) s d", f=laid.folding.heads)
        each = (query, laid.whole(self.to_key), laid.whole(self.to_value))
        typed = [g.to(t.dtype) for g, t in zip(each, laid.tensors, strict=True)]
        sink, gates = _typed(self.to_sink, self.sink), _typed(self.to_gates, laid.gates)
        return (*typed, sink, None, gates)


def _typed(slope: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if slope is None or like is None else slope.to(like.dtype)
