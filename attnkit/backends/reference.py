"""The reference backend: what every composition means, in einops. Runs anything, anywhere.

    score = scale * q.k, with a soft-cap c * tanh(score / c);  + bias
    score = score_fn(score, b, h, i, j), where there is one;  masked: -inf
    output = softmax(score) @ v, over the allowed keys (and the sink, which has no value)

A row without any allowed key gives 0. A key that no query of its sequence may see counts for
nothing, whatever it and its value hold. Low precision is computed in float32.

Where the scores are many, rows are computed a block at a time, and once more for the gradients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnkit.backends.base import (
    AttentionOutput,
    Backend,
    Kept,
    Operands,
    Partial,
    Stats,
    added,
    gradients_of,
    of_whole_rows,
    recorded,
    register,
    stats_dtype,
    unrounded,
    without_cells,
)
from attnkit.backends.dropout import chances_of, drawn_seed
from attnkit.backends.matrix import Matrix, matrix_of, row_blocks
from attnkit.backends.numbers import bounded, largest_bias, usable_cap
from attnkit.backends.selected import checked, selected_by
from attnkit.errors import Refusal
from attnkit.geometry import Region
from attnkit.masks.selection import Selection
from attnkit.planner import Plan, Request
from attnkit.planner.scoring import modified
from attnkit.pse import Pse

__all__ = ["Reference", "attend", "bias_of", "scores_of"]


class Reference(Backend):
    """The definition: one dense score matrix per batch element and head."""

    name = "reference"
    auto = 40

    def refusals(self, request: Request) -> list[Refusal]:
        """Return nothing: the definition runs everything, but what no share can be planned of."""
        if request.share is None:
            return []
        found = without_cells(request, self.name)
        if request.score_trains:
            reason = (
                "score_fn reads a tensor that asks for a gradient, and a share hands on gradients "
                "of its operands alone; what trains as a bias (pse=) trains here"
            )
            found.append(Refusal("score-gradient", reason, self.name))
        return found

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        """Attend a dense batch at once, packed sequences one after the other."""
        return self.run_on(drawn_seed(plan.request, operands.query.device), plan, operands)

    def run_on(self, seed: Tensor | None, plan: Plan, operands: Operands) -> AttentionOutput:
        """Attend, and drop what a seed tells to."""
        request, layout = plan.request, plan.request.layout_of
        chances = chances_of(request, seed, operands.query.device)
        if isinstance(request.mask, Selection):
            right = checked(selected_by(request, operands), request.kv_len)
            if right is not None:  # nothing wrong may look right
                query = torch.where(right, operands.query, torch.nan)
                operands = replace(operands, query=query)
        if not layout.packed:
            output, lse, peak = attend(matrix_of(request, operands, None, chances))
            return AttentionOutput(layout.from_bnsd(output), Stats(lse, peak))
        matrices = (matrix_of(request, operands, b, chances) for b in range(request.batch))
        parts = [attend(one) for one in matrices]
        lse, peak = (
            torch.cat([rearrange(part, "1 n s -> s n") for part in column])
            for column in zip(*((lse, peak) for _, lse, peak in parts), strict=True)
        )
        return AttentionOutput(layout.join([out for out, _, _ in parts]), Stats(lse, peak))

    def partial(self, plan: Plan, operands: Operands, seed: Tensor | None) -> Partial:
        """Attend as `run` does, in the dtype of the statistics."""
        made = self.compute(plan, unrounded(operands), seed)
        return Partial(made.output, made.stats.lse)

    def partial_gradients(
        self,
        plan: Plan,
        operands: Operands,
        kept: Kept,
        wanted: tuple[bool, ...],
        random: object = None,
    ) -> tuple[Tensor | None, ...]:
        """Return what a share gives to the gradients.

        With weights ``w = exp(score - lse)`` of whole rows, and ``delta = sum(dO * O)`` and dlse of
        these, they are the gradients of ``sum(dO * (w @ v)) + sum((dlse - delta) * sum_j w)``.
        """
        if kept.grad is None and kept.grad_lse is None:
            return (None,) * len(wanted)
        leaves = unrounded(operands, wanted).leaves
        apart = [
            None if t is None else t.detach().requires_grad_(want)
            for t, want in zip(leaves, wanted, strict=True)
        ]
        whole = _whole_rows(plan.request, kept)
        total: tuple[Tensor | None, ...] = (None,) * len(wanted)
        chances = chances_of(plan.request, kept.seed, operands.query.device)
        with recorded():
            for block in row_blocks(plan.request, Operands.of(operands.pse, apart), chances):
                found = gradients_of(_made_of_share(block, whole), apart, retain=True)
                total = tuple(added(*pair) for pair in zip(total, found, strict=True))
        return total


def attend(one: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output ``[b n s d]``, the log-sum-exp and the largest score ``[b n s]``."""
    blocks = list(one.blocks())
    if len(blocks) == 1:
        return _attend(blocks[0])
    # Of a block nothing is kept for the gradients but what it is made of. Transforms of torch.func
    # do not know that: they keep all.
    again = torch.is_grad_enabled() and not one.request.transformed
    parts = [
        checkpoint(_attend, block, use_reentrant=False, preserve_rng_state=False)
        if again
        else _attend(block)
        for block in blocks
    ]
    output, lse, peak = (torch.cat(column, 2) for column in zip(*parts, strict=True))
    return output, lse, peak


def _attend(one: Matrix) -> tuple[Tensor, Tensor, Tensor]:
    wide = stats_dtype(one.query.dtype)
    scores, value = scores_of(one)
    columns = scores
    if one.sink is not None:
        logits = one.sink.to(wide)[:, None, None].expand(*scores.shape[:-1], 1)
        columns = torch.cat([scores, logits], dim=-1)
    weights, lse, peak = _softmax(columns)
    output = _valued(one, weights[..., : scores.shape[-1]], value.to(wide))
    return output.to(one.query.dtype), lse, peak


def _valued(one: Matrix, weights: Tensor, value: Tensor) -> Tensor:
    """Return what weights ``[b n i j]`` make of the values, after dropout: ``[b n i d]``."""
    request = one.request
    if one.chances is not None:
        row, key = one.first_token
        rows = slice(row, row + weights.shape[-2])
        weights = weights * one.chances.survivors(rows, key, weights.shape[-1]) / one.chances.kept
    output = einsum(
        rearrange(weights, "b (n g) i j -> b n g i j", n=request.num_kv_heads),
        value,
        "b n g i j, b n j d -> b n g i d",
    )
    return rearrange(output, "b n g i d -> b (n g) i d")


class _WholeRows(NamedTuple):
    """Of rows over all of their keys: log-sum-exp, gradient of the output, and dlse - delta."""

    lse: Tensor
    grad: Tensor
    slope: Tensor


def _whole_rows(request: Request, kept: Kept) -> _WholeRows:
    """Return what is kept of whole rows, ``[b n s]`` and ``[b n s d]``; empty rows have lse 0."""
    view, kept = request.layout_of.view, of_whole_rows(kept, stats_dtype(request.dtype))
    output, grad = (view(t, request.num_heads) for t in (kept.output, kept.arrived))
    lse, grad_lse = kept.lse, kept.grad_lse
    if request.seqlens is not None:
        lse, grad_lse = lse.mT[None], None if grad_lse is None else grad_lse.mT[None]
    slope = -(grad * output).sum(-1)
    slope = slope if grad_lse is None else slope + grad_lse
    return _WholeRows(lse.masked_fill(lse == -torch.inf, 0.0), grad, slope)


def _made_of_share(rows: Matrix, whole: _WholeRows) -> list[tuple[Tensor, Tensor]]:
    """Return what some rows of a share make, each with the gradient that arrives for it."""
    lse, grad, slope = map(rows.rows_of, whole)
    scores, value = scores_of(rows)
    weights = torch.exp(scores - lse[..., None])
    return [(_valued(rows, weights, value), grad), (weights.sum(-1), slope)]


def scores_of(one: Matrix) -> tuple[Tensor, Tensor]:
    """Return the scores ``[b n i j]``, -inf where a cell is masked, and the values ``[b n j d]``.

    Keys and values that no query sees are 0 there: 0 * NaN is NaN, so they are not multiplied.
    """
    request, wide = one.request, stats_dtype(one.query.dtype)
    key, value = one.key, one.value
    allowed = _allowed(one)
    if allowed is not None:
        unseen = ~_by_key_head(allowed, request)
        key, value = key.masked_fill(unseen, 0.0), value.masked_fill(unseen, 0.0)
    scores = bounded(request.scale, wide) * einsum(
        rearrange(one.query.to(wide), "b (n g) i d -> b n g i d", n=request.num_kv_heads),
        key.to(wide),
        "b n g i d, b n j d -> b n g i j",
    )
    scores = rearrange(scores, "b n g i j -> b (n g) i j")
    if request.softcap is not None:
        cap = usable_cap(request.softcap, wide)
        scores = cap * torch.tanh(scores / cap)
    if one.pse is not None:
        scores = scores + bias_of(one.pse, request, one.sequence, scores)
    gates = one.mask._added(one.place, wide)
    if gates is not None:
        scores = scores + _by_query_head(gates, request)
    if request.score_fn is not None:
        if allowed is not None:  # a slope of the function where a cell is masked counts for nothing
            scores = torch.where(allowed, scores, scores.detach())
        first = (one.sequence or 0, 0, *one.corner)
        index = (
            torch.arange(start, start + size, device=scores.device)
            for start, size in zip(first, scores.shape, strict=True)
        )
        scores = modified(request.score_fn, scores, *index)
    return (scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)), value


def bias_of(pse: Pse, request: Request, sequence: int | None, scores: Tensor) -> Tensor:
    """Return what is added to scores ``[b n i j]``, cut off where sums would not be finite."""
    q_len, kv_len = scores.shape[-2:]
    most = largest_bias(scores.dtype)
    terms = [
        part.term(
            q_len,
            kv_len,
            scale=request.scale,
            batch_index=sequence,
            dtype=scores.dtype,
            device=scores.device,
        )
        for part in pse.parts
    ]
    # The values are cut, the gradient is not: it is that of the bias as it was given.
    halves = [_cut_off(term, 4 * most / len(terms)) for term in terms]
    return _cut_off(sum(halves[1:], halves[0]), most)


def _cut_off(bias: Tensor, most: float) -> Tensor:
    top = torch.finfo(bias.dtype).max
    finite = bias.clamp(-top, top)
    return finite.detach().clamp(-most, most) + (finite - finite.detach())


def _by_key_head(allowed: Tensor, request: Request) -> Tensor:
    """Return which keys some query sees, ``[1 | b, 1 | n, j, 1]``, over heads that share a key."""
    seen = allowed.any(-2)[..., None]
    if seen.shape[1] > 1:
        seen = rearrange(seen, "b (n g) j 1 -> b n g j 1", n=request.num_kv_heads).any(2)
    return seen


def _softmax(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, log-sum-exp and maximum; rows without any term have weights 0."""
    if columns.shape[-1] == 0:
        nothing = columns.detach().sum(-1) - torch.inf
        return columns, nothing, nothing
    peak = columns.detach().amax(-1, keepdim=True)
    empty = peak == -torch.inf
    exponentials = torch.exp(columns - peak.masked_fill(empty, 0.0))
    total = exponentials.sum(-1, keepdim=True).masked_fill(empty, 1.0)
    lse = (peak + total.log()).squeeze(-1)
    return exponentials / total, lse, peak.squeeze(-1)


def _allowed(one: Matrix) -> Tensor | None:
    """Return the allowed cells [b or 1, n or 1, i, j]; None where everything is allowed."""
    mask, at = one.mask, one.place
    apart = range(mask.batches or 1) if one.sequence is None else [one.sequence]
    batches = apart if mask.batches else [0]
    planes = [(b, h) for b in batches for h in range(mask.heads or 1)]
    full, lengths = Region.full(*at.shape), (at.q_len, at.kv_len)
    known = (mask.enclosure(*lengths, *plane).inner for plane in planes)
    if all(inner.cut(at.rows, at.keys) == full for inner in known):
        return None
    cells = [mask._read(at._replace(batch=b, head=h), one.query.device) for b, h in planes]
    found = rearrange(torch.stack(cells), "(b n) i j -> b n i j", b=len(batches))
    return _by_query_head(found, one.request)


def _by_query_head(cells: Tensor, request: Request) -> Tensor:
    """Return ``[b n i j]`` for all query heads, from what groups of them share."""
    own = cells.shape[1]
    return (
        cells
        if own in (1, request.num_heads)
        else cells.repeat_interleave(request.num_heads // own, 1)
    )


register(Reference())
