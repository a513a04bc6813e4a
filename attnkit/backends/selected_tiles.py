"""Selected blocks on torch's own operators: a gather of its own, and batched products.

Each batch element, folded head and query block is one product of its rows with the keys that it
selects and those of its own; the masked cells among them are few. As many are taken at once as
`CELLS` scores allow, and for gradients each such batch is computed once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from attnkit.backends.base import AttentionOutput, Operands, Stats, stats_dtype
from attnkit.backends.numbers import bounded, usable_cap
from attnkit.backends.selected import checked, selected_by
from attnkit.backends.tiled.whole import is_sound
from attnkit.constants import constant
from attnkit.errors import Refusal
from attnkit.masks.selected import SelectedBlocks
from attnkit.masks.selection import Selection
from attnkit.planner import Plan, Request
from attnkit.planner.selected import selection_of

__all__ = ["run_tiles", "selected_refusals"]

Found = tuple[Tensor, Tensor | None, Tensor | None]
Attend = Callable[[Request, "_Batch"], Found]

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

CELLS = 1 << 21
"""Scores that are held at a time."""


def selected_refusals(request: Request, name: str) -> list[Refusal]:
    """Return why a selection is not for batched products."""
    selection, found = selection_of(request), []
    if request.seqlens is not None:
        reason = "blocks are selected in dense layouts, where all texts are equally long"
        found.append(Refusal("selected-packed", reason, name))
    if request.bias or request.score_fn is not None:
        reason = "positions are lost where keys are gathered; the reference computes it"
        found.append(Refusal("selected-bias", reason, name))
    heads, own = request.num_kv_heads, selection.shape[1]
    if heads % own and own % heads:
        reason = f"{own} heads select and {heads} have keys; one must be a multiple of the other"
        found.append(Refusal("selected-heads", reason, name))
    return found


class _Own(NamedTuple):
    """The own keys of query blocks: where they are ``[q w]``, which are there, which are seen."""

    keys: Tensor
    some: Tensor
    seen: Tensor


@constant
def _own(selection: Selection, kv_len: int, device: torch.device) -> _Own:
    sights = selection.sights(kv_len)
    width = max(sight.stop - sight.start for sight in sights)
    start = torch.tensor([sight.start for sight in sights], device=device)[:, None]
    stop = torch.tensor([sight.stop for sight in sights], device=device)[:, None]
    keys = start + torch.arange(width, device=device)
    first = torch.arange(selection.shape[2], device=device) * selection.q_block
    rows = (
        (kv_len - selection.q_len) + first[:, None] + torch.arange(selection.q_block, device=device)
    )
    seen = keys[:, None] <= rows[..., None]
    return _Own(keys.clamp(max=max(0, kv_len - 1)), keys < stop, seen)


class _Batch(NamedTuple):
    """Some query blocks: rows ``[x g r d]``, keys ``[x j d]``, and what is added to scores."""

    query: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor
    gates: Tensor | None
    sink: Tensor | None


def run_tiles(plan: Plan, operands: Operands) -> AttentionOutput:
    """Attend to selected blocks; autograd records what happens here."""
    request, chosen = plan.request, selected_by(plan.request, operands)
    right = checked(chosen, request.kv_len)
    blocks = _ByBlock(request, chosen, operands)
    fused = _fits_torch(request, chosen, operands)
    out, lse, peak = blocks.run(_attend_fused if fused else _attend)
    if fused and torch.is_grad_enabled():  # of torch's kernel only the output has gradients
        lse = None

    def told(found: Tensor) -> Tensor:
        return found if right is None else torch.where(right, found, torch.nan)

    def statistic(number: int) -> Tensor:
        return told(cast(Tensor, blocks.run(_attend)[number]))

    output = request.layout_of.from_bnsd(told(out).to(request.dtype))
    return AttentionOutput(
        output,
        Stats(
            partial(statistic, 1) if lse is None else told(lse),
            partial(statistic, 2) if peak is None else peak.detach(),
        ),
    )


def _fits_torch(request: Request, chosen: SelectedBlocks, operands: Operands) -> bool:
    """Whether torch's fused kernel for the CPU computes it: nothing but masked rows with keys."""
    terms = request.sink or request.softcap is not None or request.dropout
    trains = chosen.gates is not None and chosen.gates.requires_grad and torch.is_grad_enabled()
    sees = chosen.causal or chosen.counts is None
    plain = operands.query.device.type == "cpu" and request.head_dim == request.value_dim
    return plain and sees and not terms and not trains and bool(request.q_len)


class _ByBlock:
    """Operands by query blocks, each with one key head."""

    def __init__(self, request: Request, chosen: SelectedBlocks, operands: Operands) -> None:
        self.request, self.chosen, self.selection = request, chosen, chosen.form
        self.folds = max(self.selection.shape[1], request.num_kv_heads)
        wide = stats_dtype(request.dtype)
        query, key, value = (t.to(wide) for t in operands.by_head(request))
        self.query = rearrange(
            query, "b (f g) (i r) d -> (b f i) g r d", f=self.folds, r=self.selection.q_block
        )
        short = -request.kv_len % self.selection.kv_block
        self.pair = tuple(pad(t.flatten(0, 1), (0, 0, 0, short)) for t in (key, value))
        self.sink = None
        if operands.sink is not None:
            self.sink = rearrange(operands.sink.to(wide), "(f g) -> f g 1", f=self.folds)

    def run(self, attend: Attend) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return what a function makes of all query blocks, ``[b n s ...]``."""
        request, again = self.request, torch.is_grad_enabled()
        drops = request.dropout > 0
        parts = [
            checkpoint(attend, request, batch, use_reentrant=False, preserve_rng_state=drops)
            if again
            else attend(request, batch)
            for batch in self.batches()
        ]
        sizes = {"b": request.batch, "f": self.folds}
        out, lse, peak = (
            None
            if column[0] is None
            else rearrange(torch.cat(column), "(b f i) g r ... -> b (f g) (i r) ...", **sizes)
            for column in zip(*parts, strict=True)
        )
        return cast(Tensor, out), lse, peak

    def batches(self) -> Iterator[_Batch]:
        """Yield query blocks, as many as may be held at once."""
        selection, device = self.selection, self.query.device
        live = self._by_fold(self.chosen.live(self.request.kv_len))
        index = self._by_fold(self.chosen.indices).long().masked_fill(~live, 0)
        gates = None if self.chosen.gates is None else self._by_fold(self.chosen.gates)
        own = _own(selection, self.request.kv_len, device) if selection.causal else None
        each = selection.shape[3] * selection.kv_block
        each += 0 if own is None else own.keys.shape[1]
        count, heads, rows, _ = self.query.shape
        most = max(1, CELLS // (each * heads * rows))
        for start in range(0, count, most):
            some = torch.arange(start, min(start + most, count), device=device)
            here = slice(start, start + most)
            yield self._batch(some, here, index[here], live[here], gates, own)

    def _batch(
        self,
        some: Tensor,
        here: slice,
        index: Tensor,
        live: Tensor,
        gates: Tensor | None,
        own: _Own | None,
    ) -> _Batch:
        selection, (key, value) = self.selection, self.pair
        size, rows = selection.kv_block, selection.q_block
        fold, block = some // selection.shape[2], some % selection.shape[2]
        shared = self.folds // self.request.num_kv_heads
        head = fold // shared  # of all batch elements
        blocks = key.shape[1] // size
        unit = (head[:, None] * blocks + index.clamp(0, blocks - 1)).flatten()
        keys, values = (
            rearrange(t, "h (c u) d -> (h c) u d", u=size)
            .index_select(0, unit)
            .reshape(*index.shape, size, -1)
            .masked_fill(~live[..., None, None], 0.0)
            .flatten(1, 2)
            for t in (key, value)
        )
        seen = live.repeat_interleave(size, 1)[:, None].expand(-1, rows, -1)
        added = None if gates is None else gates[here].to(key.dtype).repeat_interleave(size, 1)
        if own is not None:
            place = own.keys.index_select(0, block) + head[:, None] * key.shape[1]
            some_own = own.some.index_select(0, block)
            mine = (
                t.flatten(0, 1)
                .index_select(0, place.flatten())
                .reshape(*place.shape, -1)
                .masked_fill(~some_own[..., None], 0.0)
                for t in (key, value)
            )
            keys, values = (torch.cat(two, 1) for two in zip((keys, values), mine, strict=True))
            seen = torch.cat([seen, own.seen.index_select(0, block)], -1)
            if added is not None:
                added = pad(added, (0, place.shape[1]))
        sink = None
        if self.sink is not None:
            sink = self.sink.index_select(0, fold % self.folds)
        return _Batch(self.query[here], keys, values, seen[:, None], added, sink)

    def _by_fold(self, tensor: Tensor) -> Tensor:
        """Return ``[1 | b, heads, q ...]`` for every query block of every fold, ``[x ...]``."""
        times = self.folds // tensor.shape[1]
        found = tensor.expand(self.request.batch, *tensor.shape[1:])
        return found.repeat_interleave(times, 1).flatten(0, 2)


def _attend_fused(request: Request, batch: _Batch) -> Found:
    """Return output ``[x g r d]`` and log-sum-exp of query blocks, by torch's own kernel."""
    heads = batch.query.shape[1]
    key, value = (t[:, None].expand(-1, heads, -1, -1) for t in (batch.key, batch.value))
    mask = torch.zeros(batch.seen.shape, dtype=batch.query.dtype)
    if batch.gates is not None:
        mask = mask + batch.gates[:, None, None]
    mask = mask.masked_fill(~batch.seen, -torch.inf)
    scale = bounded(request.scale, batch.query.dtype)
    out, lse = _TorchKernel.apply(scale, mask, batch.query, key, value)  # type: ignore[no-untyped-call]
    return (out, lse, None) if is_sound(lse) else _attend(request, batch)


class _TorchKernel(torch.autograd.Function):
    """Torch's kernel, whose derivative has none of its own: further ones are the definition's."""

    @staticmethod
    def forward(
        ctx: Any, scale: float, mask: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward(query, key, value, 0.0, False, attn_mask=mask, scale=scale)
        ctx.save_for_backward(mask, query, key, value, out, lse)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        mask, query, key, value, out, lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            weights = (ctx.scale * query @ key.mT + mask).softmax(-1)
            leaves = (query, key, value)
            found = torch.autograd.grad(weights @ value, leaves, dy, create_graph=True)
        else:
            given = (dy, query, key, value, out, lse, 0.0, False)
            found = _backward(*given, attn_mask=mask, scale=ctx.scale)
        return (None, None, *found)


def _attend(request: Request, batch: _Batch) -> Found:
    """Return output ``[x g r d]``, log-sum-exp and maximum ``[x g r]`` of query blocks."""
    wide = batch.query.dtype
    heads = batch.query.shape[1]
    rows = batch.query.flatten(1, 2) @ batch.key.mT
    scores = bounded(request.scale, wide) * rearrange(rows, "x (g r) j -> x g r j", g=heads)
    if request.softcap is not None:
        cap = usable_cap(request.softcap, wide)
        scores = cap * torch.tanh(scores / cap)
    if batch.gates is not None:
        scores = scores + batch.gates[:, None, None]
    scores = scores.masked_fill(~batch.seen, -torch.inf)
    peak = scores.detach().amax(-1)
    if batch.sink is not None:
        peak = torch.maximum(peak, batch.sink.detach())
    empty = peak == -torch.inf
    shift = peak.masked_fill(empty, 0.0)
    powers = (scores - shift[..., None]).exp()
    total = powers.sum(-1)
    if batch.sink is not None:
        total = total + (batch.sink - shift).exp()
    weights = powers / total.masked_fill(empty, 1.0)[..., None]
    if request.dropout:
        kept = torch.rand_like(weights) >= request.dropout
        weights = weights * kept / (1.0 - request.dropout)
    made = weights.flatten(1, 2) @ batch.value
    out = rearrange(made, "x (g r) d -> x g r d", g=heads)
    return out, peak + total.masked_fill(empty, 1.0).log(), peak
