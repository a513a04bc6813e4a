"""The fused kernel in torch, on any device, tile by tile, from the call's arguments alone.

It does what the device does, bad parts included: it reads the mask tensor with the kernel's
addressing and replaces masked scores by -FLT_MAX, answers the mean of V where a row has no
key (unless the call is in invalid-line mode), ignores what the kernel ignores, casts the
weights to the input dtype before the second product, and never computes a bias gradient: a
bias that asks for one gets NaN, for the device leaves that memory uninitialised. So do
output rows beyond the last packed sequence. Sources: CANN flash_attention_score and
flash_attention_score_grad kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from attnkit.first_order import first_order
from attnkit.kernel.call import KernelCall, TensorSpec
from attnkit.kernel.operands import Operands, Piece, by_head, check_tensors, pieces
from attnkit.kernel.scores import MASKED, kept, score_tile, visited_columns
from attnkit.kernel.stats import pack_stats, unpack_stats

__all__ = ["Gradients", "emulate", "emulate_grad"]


class Gradients(NamedTuple):
    """What the grad op returns; `sink` is None when the call has no sink.

    >>> Gradients._fields
    ('query', 'key', 'value', 'pse', 'sink')
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    pse: torch.Tensor | None
    sink: torch.Tensor | None


@dataclass(frozen=True)
class _Views:
    """Query, key and value ordered [b, n, s, d], and the dtypes of the computation."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def of(cls, call: KernelCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> _Views:
        return cls(
            by_head(q, call.layout, call.num_heads),
            by_head(k, call.layout, call.num_kv_heads),
            by_head(v, call.layout, call.num_kv_heads),
        )

    @property
    def accumulate(self) -> torch.dtype:
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


def _stacked(rows: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Return [b, n_kv, group * h, d] from [b, n, h, d], so that keys need not repeat."""
    return rows.to(dtype).reshape(rows.shape[0], kv_heads, -1, rows.shape[-1])


# -- forward -----------------------------------------------------------------------------


def _forward_rows(
    call: KernelCall, operands: Operands, piece: Piece, views: _Views, rows: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the online softmax over the tiles of some rows; returns output, max and sum."""
    dtype, stored = views.accumulate, views.query.dtype
    q = piece.rows(views.query)[:, :, rows[0] : rows[1]]
    keys, values = piece.keys(views.key), piece.keys(views.value)
    batch, heads, height = q.shape[:3]
    stacked = _stacked(q, keys.shape[1], dtype)
    if operands.sink is not None:
        sink = operands.sink[piece.heads].to(dtype)[:, None, None]
        peak = sink.expand(batch, heads, height, 1)
        total = torch.ones_like(peak)
    else:
        peak = q.new_full((batch, heads, height, 1), MASKED, dtype=dtype)
        total = torch.zeros_like(peak)
    out = q.new_zeros((batch, heads, height, values.shape[-1]), dtype=dtype)
    for tile in piece.column_tiles(rows, visited_columns(call, piece, rows)):
        key = keys[:, :, tile.j0 : tile.j1].to(dtype)
        weights = score_tile(call, operands, piece, tile, stacked, key)
        higher = torch.maximum(peak, weights.amax(-1, keepdim=True))
        weights = weights.sub_(higher).exp_()
        fade = (peak - higher).exp_()
        total = total * fade + weights.sum(-1, keepdim=True)
        keep = kept(call, operands, piece, tile, q.device)
        if keep is not None:
            weights = _drop(weights, keep, call.keep_prob)
        weights = weights.to(stored).to(dtype).view(batch, keys.shape[1], -1, tile.width)
        value = values[:, :, tile.j0 : tile.j1].to(dtype)
        out = out * fade + (weights @ value).view(out.shape)
        peak = higher
    if call.invalid_line:
        empty = peak == MASKED
        total = total.masked_fill(empty, -MASKED)
        out = out.masked_fill(empty, 0.0)
    # No visited tile at all: only calls that the tiling rejects get here.
    return out / total.masked_fill(total == 0, 1.0), peak.squeeze(-1), total.squeeze(-1)


def _drop(weights: torch.Tensor, keep: torch.Tensor, keep_prob: float) -> torch.Tensor:
    return weights.mul_(keep.to(weights.dtype).div_(keep_prob or 1.0))


def _forward(
    call: KernelCall,
    operands: Operands,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return output in the op's layout, and max and sum as [B, N, Sq] (TND: [T, N])."""
    views = _Views.of(call, query, key, value)
    out = query.new_zeros(call.output.shape)
    out_view = by_head(out, call.layout, call.num_heads)
    peak = query.new_zeros(out_view.shape[:3], dtype=views.accumulate)
    total = torch.zeros_like(peak)
    for piece in pieces(call):
        targets = [piece.rows(t) for t in (out_view, peak, total)]
        for rows in piece.row_tiles():
            results = _forward_rows(call, operands, piece, views, rows)
            for target, result in zip(targets, results, strict=True):
                target[:, :, rows[0] : rows[1]] = result
    if call.is_packed:
        peak, total = peak[0].T, total[0].T
        used = sum(q_len for q_len, _ in call.sequences)
        if used < len(out) and not (call.actual_seq_qlen and call.actual_seq_qlen[-1] == 0):
            for tensor in (out, peak, total):
                tensor[used:] = float("nan")
    return out, peak, total


# -- backward ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sums:
    """The gradients while they are summed up, ordered [b, n, s, d]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sink: torch.Tensor | None


@dataclass(frozen=True)
class _RowInputs:
    """What the backward of some rows reads: the incoming gradient and the statistics."""

    grad: torch.Tensor
    output: torch.Tensor
    peak: torch.Tensor
    total: torch.Tensor

    def cut(self, piece: Piece, rows: tuple[int, int]) -> _RowInputs:
        parts = (self.grad, self.output, self.peak, self.total)
        return _RowInputs(*(piece.rows(t)[:, :, rows[0] : rows[1]] for t in parts))


def _backward_rows(
    call: KernelCall,
    operands: Operands,
    piece: Piece,
    views: _Views,
    rows: tuple[int, int],
    inputs: _RowInputs,
    sums: _Sums,
) -> None:
    """Add one row tile's part to the gradients, recomputing weights from the given stats."""
    dtype, stored = views.accumulate, views.query.dtype
    keys, values = piece.keys(views.key), piece.keys(views.value)
    kv_heads = keys.shape[1]
    query = _stacked(piece.rows(views.query)[:, :, rows[0] : rows[1]], kv_heads, dtype)
    inputs = inputs.cut(piece, rows)
    grad = _stacked(inputs.grad, kv_heads, dtype)
    delta = (inputs.grad.to(dtype) * inputs.output.to(dtype)).sum(-1, keepdim=True)
    peak, total = inputs.peak.unsqueeze(-1), inputs.total.unsqueeze(-1)
    if operands.sink is not None and sums.sink is not None:
        weight = (operands.sink[piece.heads].to(dtype)[:, None, None] - peak).exp() / total
        sums.sink[piece.heads] -= (weight * delta).sum((0, 2, 3))
    grad_query = torch.zeros_like(query)
    key_sums, value_sums = piece.keys(sums.key), piece.keys(sums.value)
    for tile in piece.column_tiles(rows, visited_columns(call, piece, rows)):
        columns = slice(tile.j0, tile.j1)
        key, value = keys[:, :, columns].to(dtype), values[:, :, columns].to(dtype)
        weights = score_tile(call, operands, piece, tile, query, key)
        weights = weights.sub_(peak).exp_().div_(total)
        grad_weights = (grad @ value.transpose(-1, -2)).view(weights.shape)
        dropped = weights
        keep = kept(call, operands, piece, tile, query.device)
        if keep is not None:
            grad_weights = _drop(grad_weights, keep, call.keep_prob)
            dropped = _drop(weights.clone(), keep, call.keep_prob)
        scores = grad_weights.sub_(delta).mul_(weights).to(stored).to(dtype)
        scores = scores.view(*query.shape[:3], tile.width)
        dropped = dropped.to(stored).to(dtype).view(scores.shape)
        grad_query += scores @ key
        key_sums[:, :, columns] += scores.transpose(-1, -2) @ query * call.scale
        value_sums[:, :, columns] += dropped.transpose(-1, -2) @ grad
    target = piece.rows(sums.query)[:, :, rows[0] : rows[1]]
    target.copy_((grad_query * call.scale).view(target.shape))


def _backward(
    call: KernelCall,
    operands: Operands,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    inputs: _RowInputs,
) -> Gradients:
    """Run the grad kernel; `inputs` are in the op's layout, its stats [B, N, Sq] or [T, N]."""
    views = _Views.of(call, query, key, value)
    dtype = views.accumulate
    peak, total = inputs.peak, inputs.total
    if call.is_packed:
        peak, total = peak.T.unsqueeze(0), total.T.unsqueeze(0)
    shaped = _RowInputs(
        by_head(inputs.grad, call.layout, call.num_heads),
        by_head(inputs.output, call.layout, call.num_heads),
        peak,
        total,
    )
    found = [torch.zeros_like(t, dtype=dtype) for t in (query, key, value)]
    sink = None if operands.sink is None else torch.zeros_like(operands.sink, dtype=dtype)
    summed = _Views.of(call, *found)
    sums = _Sums(summed.query, summed.key, summed.value, sink)
    for piece in pieces(call):
        for rows in piece.row_tiles():
            _backward_rows(call, operands, piece, views, rows, shaped, sums)
    pse = operands.pse
    if pse is not None:
        # Never written by the device; one NaN seen from everywhere takes no memory.
        pse = pse.new_full((), float("nan")).expand(pse.shape)
    if sink is not None and operands.sink is not None:
        sink = sink.to(operands.sink.dtype)
    grads = [t.to(query.dtype) for t in found]
    return Gradients(grads[0], grads[1], grads[2], pse, sink)


# -- the differentiable whole ------------------------------------------------------------


class _Emulated(torch.autograd.Function):
    """The forward, whose backward recomputes tiles from the saved statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        call: KernelCall,
        operands: Operands,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pse: torch.Tensor | None,
        sink: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out, peak, total = _forward(call, operands, query, key, value)
        ctx.call, ctx.atten_mask = call, operands.atten_mask
        ctx.save_for_backward(query, key, value, pse, sink, operands.dropout_mask, out, peak, total)
        packed = pack_stats(call, peak), pack_stats(call, total)
        # The op's own backward ignores gradients of the statistics; asking for one is an error.
        ctx.mark_non_differentiable(*packed)
        return out, *packed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
        query, key, value, pse, sink, dropout_mask, out, peak, total = ctx.saved_tensors
        operands = Operands(ctx.atten_mask, pse, sink, dropout_mask)
        inputs = _RowInputs(grad, out, peak, total)
        grads = first_order(
            lambda: _backward(ctx.call, operands, query, key, value, inputs),
            *(grad, query, key, value, pse, sink),
        )
        return (None, None, *grads)


def _operands(
    call: KernelCall,
    tensors: dict[str, torch.Tensor],
    pse: torch.Tensor | None,
    atten_mask: torch.Tensor | None,
    sink: torch.Tensor | None,
    dropout_mask: torch.Tensor | None,
) -> Operands:
    """Check every tensor against the call, and build the mask when it was left out."""
    query = tensors["query"]
    mask = call.atten_mask
    if atten_mask is None and mask is not None:
        atten_mask = mask.build(query.device)
    optional = {"pse": pse, "atten_mask": atten_mask, "sink": sink, "dropout_mask": dropout_mask}
    spec = None if mask is None else TensorSpec(mask.shape, mask.dtype)
    expected = {
        "query": call.query,
        "key": call.key,
        "value": call.value,
        "pse": call.pse,
        "atten_mask": spec,
        "sink": call.sink,
        "dropout_mask": call.dropout_mask,
    }
    check_tensors(call, {**tensors, **optional}, expected)
    return Operands(atten_mask, pse, sink, dropout_mask)


def emulate(
    call: KernelCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    pse: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    dropout_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Execute a kernel call; returns attention_out, softmax_max and softmax_sum.

    ``S = scale * (Q K^T + pse)`` (pse_type 1), masked cells replaced by -FLT_MAX;
    ``max = rowmax(S)``, ``P = exp(S - max)``, ``sum = rowsum(P)``, ``out = dropout(P) V / sum``.

    Tensors have the shapes of the call's layout; results have the op's own shapes (statistics
    [B, N, Sq, 8], TND [T, N, 8]). float16, bfloat16 and float32 accumulate in float32;
    float64 is computed and returned in float64. Differentiable in query, key, value and sink.

    `atten_mask` (True = masked) is read as given; left out, it is built from the call's
    record. With ``keep_prob < 1`` the decisions are the bits of `dropout_mask`, or are
    generated from the call's seed and offset.

    Nothing is checked beyond the tensors being the described ones: see
    `KernelCall.violations`. Raises `KernelContractError` when they are not.

    >>> q = torch.randn(1, 2, 5, 4)
    >>> spec = TensorSpec.of(q)
    >>> call = KernelCall(spec, spec, spec, head_num=2, input_layout="BNSD")
    >>> out, peak, total = emulate(call, q, q, q)
    >>> out.shape, peak.shape
    (torch.Size([1, 2, 5, 4]), torch.Size([1, 2, 5, 8]))
    """
    tensors = {"query": query, "key": key, "value": value}
    operands = _operands(call, tensors, pse, atten_mask, sink, dropout_mask)
    results = _Emulated.apply(call, operands, query, key, value, pse, sink)  # type: ignore[no-untyped-call]
    return cast("tuple[torch.Tensor, torch.Tensor, torch.Tensor]", results)


def emulate_grad(
    call: KernelCall,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dy: torch.Tensor,
    *,
    softmax_max: torch.Tensor,
    softmax_sum: torch.Tensor,
    attention_in: torch.Tensor,
    pse: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    dropout_mask: torch.Tensor | None = None,
) -> Gradients:
    """Execute the grad op of a kernel call from statistics and an output given to it.

    ``P = exp(S - max) / sum``, ``dP = dropout(dY V^T)``, ``dS = P * (dP - rowsum(dY * out))``,
    ``dQ = scale * dS K``, ``dK = scale * dS^T Q``, ``dV = dropout(P)^T dY``; heads that share
    a key head add up.

    `softmax_max` and `softmax_sum` are in the op's shapes; they and `attention_in` may be
    those of a softmax over more keys than this call sees, so the gradients of a set of calls
    merged by their statistics add up to the whole.

    >>> import torch
    >>> from attnkit.kernel import KernelCall, TensorSpec
    >>> x = torch.ones(1, 2, 1, 16)
    >>> spec = TensorSpec.of(x)
    >>> call = KernelCall(spec, spec, spec, head_num=1, input_layout="BSND")
    >>> out, peak, total = emulate(call, x, x, x)
    >>> grads = emulate_grad(
    ...     call, x, x, x, x, softmax_max=peak, softmax_sum=total, attention_in=out
    ... )
    >>> grads.value[0, :, 0, 0]
    tensor([1., 1.])
    """
    tensors = {"query": query, "key": key, "value": value}
    operands = _operands(call, tensors, pse, atten_mask, sink, dropout_mask)
    out = {"dy": dy, "attention_in": attention_in}
    check_tensors(
        call, {"query": query, **out}, {"query": call.query, **dict.fromkeys(out, call.output)}
    )
    stats = (unpack_stats(call, softmax_max), unpack_stats(call, softmax_sum))
    with torch.no_grad():
        return _backward(call, operands, query, key, value, _RowInputs(dy, attention_in, *stats))
