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

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from attnkit.backends.base import AttentionOutput, Operands, Stats
from attnkit.backends.graph import run_held
from attnkit.backends.merged import Answer, Drawn, Launcher
from attnkit.backends.selected_units import Gather, Laid
from attnkit.errors import CompositionError
from attnkit.first_order import first_order
from attnkit.kernel import pack_stats, unpack_stats
from attnkit.masks.selected import SelectedBlocks
from attnkit.planner import Request
from attnkit.planner.selected import (
    GatheredCall,
    SelectedPlan,
    selection_of,
)

__all__ = ["checked", "run_selected", "selected_by"]


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
        for part in plan.gathers:
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
        for n, part in enumerate(self.plan.gathers):
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
                self._sum(part, gather, self.to_value, made.value)

    def _add(self, part: GatheredCall, gather: Gather, to_query: Tensor, to_key: Tensor) -> None:
        laid, dim = self.laid, self.laid.request.head_dim
        rows = laid.view_of(part, self.to_query)
        rows += to_query[..., :dim].view(rows.shape)
        self._sum(part, gather, self.to_key, to_key[..., :dim])
        if self.to_gates is not None:
            self._add_to_gates(part, gather, to_key[..., dim])

    def _sum(self, part: GatheredCall, gather: Gather, total: Tensor, slope: Tensor) -> None:
        """Add a call's keys ``[t m d]`` to their units."""
        units = gather.cleared(slope.to(total.dtype).reshape(-1, *total.shape[1:]))
        if not torch.are_deterministic_algorithms_enabled():
            total.index_add_(0, gather.index, units)
            return
        width, each = self.laid.width, gather.units.shape[1]
        for number, fold in enumerate(range(*part.folds)):
            first = fold // self.laid.shared * width
            places = torch.arange(first, first + width, device=total.device)
            here = (places[:, None] == gather.units[number]).to(total.dtype)
            own = units[number * each : (number + 1) * each].flatten(1)
            total[first : first + width] += (here @ own).view(-1, *total.shape[1:])

    def _add_to_gates(self, part: GatheredCall, gather: Gather, slope: Tensor) -> None:
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
