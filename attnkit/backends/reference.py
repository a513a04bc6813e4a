"""The reference backend: what every composition means, in einops. Runs anything, anywhere.

    score = scale * q.k + bias;  score = c * tanh(score / c) with a soft-cap;  masked: -inf
    output = softmax(score) @ v, over the allowed keys (and the sink, which has no value)

A row without any allowed key gives 0. Low precision is computed in float32.
"""

from __future__ import annotations

import torch
from einops import einsum, rearrange
from torch import Tensor

from attnkit.backends.base import AttentionOutput, Backend, Operands, Stats, register, stats_dtype
from attnkit.errors import Refusal
from attnkit.geometry import Region
from attnkit.planner import Plan, Request
from attnkit.planner.matrices import matrices

__all__ = ["Reference"]


class Reference(Backend):
    """The definition: one dense score matrix per batch element and head."""

    name = "reference"

    def refusals(self, request: Request) -> list[Refusal]:
        """Return nothing: the definition runs everything."""
        return []

    def run(self, plan: Plan, operands: Operands) -> AttentionOutput:
        """Attend with full score matrices, one packed sequence after the other."""
        request, layout = plan.request, plan.request.layout_of
        counts = (request.num_heads, request.num_kv_heads, request.num_kv_heads)
        tensors = (operands.query, operands.key, operands.value)
        if not layout.packed:
            q, k, v = (layout.to_bnsd(t, n) for t, n in zip(tensors, counts, strict=True))
            output, stats = _attend(request, operands, None, q, k, v)
            return AttentionOutput(layout.from_bnsd(output), stats)
        q_lens, kv_lens = zip(*request.sequences, strict=True)
        lengths = (q_lens, kv_lens, kv_lens)
        parts = [
            _attend(request, operands, b, q, k, v)
            for b, (q, k, v) in enumerate(
                zip(*map(layout.split, tensors, lengths, counts), strict=True)
            )
        ]
        maxima, sums = (
            torch.cat([rearrange(part, "1 n s -> s n") for part in column])
            for column in zip(*((stats.max, stats.sum) for _, stats in parts), strict=True)
        )
        return AttentionOutput(layout.join([out for out, _ in parts]), Stats(maxima, sums))


def _attend(
    request: Request, operands: Operands, sequence: int | None, q: Tensor, k: Tensor, v: Tensor
) -> AttentionOutput:
    """Attend [b n s d] tensors; `sequence` says which one of a packed batch they are."""
    wide, q_len, kv_len = stats_dtype(q.dtype), q.shape[2], k.shape[2]
    sizes = {"n": request.num_kv_heads}
    scores = request.scale * einsum(
        rearrange(q.to(wide), "b (n g) i d -> b n g i d", **sizes),
        k.to(wide),
        "b n g i d, b n j d -> b n g i j",
    )
    scores = rearrange(scores, "b n g i j -> b (n g) i j")
    if operands.pse is not None:
        scores = scores + operands.pse.term(
            q_len, kv_len, scale=request.scale, batch_index=sequence, dtype=wide, device=q.device
        )
    if request.softcap is not None:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    allowed = _allowed(request, sequence, q_len, kv_len, q.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    weights, stats = _softmax(scores, operands.sink)
    if request.dropout:
        kept = torch.rand_like(weights) >= request.dropout
        weights = weights * kept / (1.0 - request.dropout)
    output = einsum(
        rearrange(weights, "b (n g) i j -> b n g i j", **sizes),
        v.to(wide),
        "b n g i j, b n j d -> b n g i d",
    )
    return AttentionOutput(rearrange(output, "b n g i d -> b (n g) i d").to(q.dtype), stats)


def _softmax(scores: Tensor, sink: Tensor | None) -> tuple[Tensor, Stats]:
    """Return weights and statistics; rows without any term have weights 0."""
    columns = scores
    if sink is not None:
        logits = sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        columns = torch.cat([scores, logits], dim=-1)
    if columns.shape[-1] == 0:
        nothing = scores.detach().sum(-1)
        return scores, Stats(nothing - torch.inf, nothing)
    peak = columns.detach().amax(-1, keepdim=True)
    exponentials = torch.exp(columns - peak.masked_fill(peak == -torch.inf, 0.0))
    total = exponentials.sum(-1, keepdim=True)
    weights = exponentials[..., : scores.shape[-1]] / total.masked_fill(total == 0, 1.0)
    return weights, Stats(peak.squeeze(-1), total.detach().squeeze(-1))


def _allowed(
    request: Request, sequence: int | None, q_len: int, kv_len: int, device: torch.device
) -> Tensor | None:
    """Return the allowed cells [b or 1, n or 1, i, j]; None where everything is allowed."""
    known = matrices(request)
    full = Region.full(q_len, kv_len)
    if known.exact and all(
        (plane[sequence].inner == full)
        if sequence is not None
        else all(e.inner == full for e in set(plane))
        for plane in known.planes
    ):
        return None
    mask, heads = request.mask, request.mask.heads or 1
    if sequence is None:
        return mask.materialize(q_len, kv_len, mask.batches or 1, heads, device)
    planes = [
        mask._plane(q_len, kv_len, sequence if mask.batches else 0, h, device) for h in range(heads)
    ]
    return torch.stack(planes)[None]


register(Reference())
