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

from typing import Any, NamedTuple, cast

import torch

from attnkit import layouts
from attnkit.first_order import first_order
from attnkit.kernel.call import KernelCall
from attnkit.kernel.call_tensors import (
    CallTensors,
    MatrixGroup,
    check_tensors,
    matrix_groups,
)
from attnkit.kernel.scores import MASKED, kept, score_tile, visited_columns
from attnkit.kernel.sizes import TensorSpec
from attnkit.kernel.stats import pack_stats, unpack_stats

__all__ = ["Gradients", "emulate", "emulate_grad"]

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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


def _stacked(rows: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """Return [b, n_kv, group * h, d] from [b, n, h, d], so that keys need not repeat."""
    return rows.to(dtype).reshape(rows.shape[0], kv_heads, -1, rows.shape[-1])


def _drop(weights: torch.Tensor, keep: torch.Tensor, keep_prob: float) -> torch.Tensor:
    return weights.mul_(keep.to(weights.dtype).div_(keep_prob or 1.0))


# -- forward -----------------------------------------------------------------------------


def _forward_rows(given: CallTensors, group: MatrixGroup, rows: tuple[int, int]) -> Three:
    """Run the online softmax over the tiles of some rows; returns output, max and sum."""
    call, dtype, stored = given.call, given.accumulate, given.query.dtype
    q = group.rows(given.query, rows)
    keys, values = group.keys(given.key), group.keys(given.value)
    batch, heads, height = q.shape[:3]
    stacked = _stacked(q, keys.shape[1], dtype)
    if given.sink is not None:
        sink = given.sink[group.heads].to(dtype)[:, None, None]
        peak = sink.expand(batch, heads, height, 1)
        total = torch.ones_like(peak)
    else:
        peak = q.new_full((batch, heads, height, 1), MASKED, dtype=dtype)
        total = torch.zeros_like(peak)
    out = q.new_zeros((batch, heads, height, values.shape[-1]), dtype=dtype)
    for cells in group.cell_ranges(rows, visited_columns(call, group, rows)):
        key = keys[:, :, cells.j0 : cells.j1].to(dtype)
        weights = score_tile(given, group, cells, stacked, key)
        higher = torch.maximum(peak, weights.amax(-1, keepdim=True))
        weights = weights.sub_(higher).exp_()
        fade = (peak - higher).exp_()
        total = total * fade + weights.sum(-1, keepdim=True)
        keep = kept(given, group, cells)
        if keep is not None:
            weights = _drop(weights, keep, call.keep_prob)
        weights = weights.to(stored).to(dtype).view(batch, keys.shape[1], -1, cells.width)
        value = values[:, :, cells.j0 : cells.j1].to(dtype)
        out = out * fade + (weights @ value).view(out.shape)
        peak = higher
    if call.invalid_line:
        empty = peak == MASKED
        total = total.masked_fill(empty, -MASKED)
        out = out.masked_fill(empty, 0.0)
    # No visited tile at all: only calls that the tiling rejects get here.
    return out / total.masked_fill(total == 0, 1.0), peak.squeeze(-1), total.squeeze(-1)


def _forward(given: CallTensors) -> Three:
    """Return output in the op's layout, and max and sum as [B, N, Sq] (TND: [T, N])."""
    call = given.call
    out = given.query.new_zeros(call.output.shape)
    out_view = layouts.get(call.layout).view(out, call.num_heads)
    peak = given.query.new_zeros(out_view.shape[:3], dtype=given.accumulate)
    total = torch.zeros_like(peak)
    for group in matrix_groups(call):
        for rows in group.row_ranges():
            results = _forward_rows(given, group, rows)
            for target, result in zip((out_view, peak, total), results, strict=True):
                group.rows(target, rows).copy_(result)
    if call.is_packed:
        peak, total = peak[0].T, total[0].T
        used = call.total_lengths[0]
        if used < len(out) and not (call.actual_seq_qlen and call.actual_seq_qlen[-1] == 0):
            for tensor in (out, peak, total):
                tensor[used:] = float("nan")
    return out, peak, total


# -- backward ----------------------------------------------------------------------------


class _Results(NamedTuple):
    """What a forward left and its backward reads: dy, output, max and sum of each row."""

    grad: torch.Tensor
    output: torch.Tensor
    peak: torch.Tensor
    total: torch.Tensor


def _backward_rows(
    given: CallTensors,
    group: MatrixGroup,
    rows: tuple[int, int],
    results: _Results,
    sums: Gradients,
) -> None:
    """Add some rows' part to the gradients, recomputing weights from the given stats."""
    call, dtype, stored = given.call, given.accumulate, given.query.dtype
    keys, values = group.keys(given.key), group.keys(given.value)
    kv_heads = keys.shape[1]
    query = _stacked(group.rows(given.query, rows), kv_heads, dtype)
    dy, output, peak, total = (group.rows(tensor, rows) for tensor in results)
    grad = _stacked(dy, kv_heads, dtype)
    delta = (dy.to(dtype) * output.to(dtype)).sum(-1, keepdim=True)
    peak, total = peak.unsqueeze(-1), total.unsqueeze(-1)
    if given.sink is not None and sums.sink is not None:
        weight = (given.sink[group.heads].to(dtype)[:, None, None] - peak).exp() / total
        sums.sink[group.heads] -= (weight * delta).sum((0, 2, 3))
    grad_query = torch.zeros_like(query)
    key_sums, value_sums = group.keys(sums.key), group.keys(sums.value)
    for cells in group.cell_ranges(rows, visited_columns(call, group, rows)):
        columns = slice(cells.j0, cells.j1)
        key, value = keys[:, :, columns].to(dtype), values[:, :, columns].to(dtype)
        weights = score_tile(given, group, cells, query, key)
        weights = weights.sub_(peak).exp_().div_(total)
        grad_weights = (grad @ value.transpose(-1, -2)).view(weights.shape)
        dropped = weights
        keep = kept(given, group, cells)
        if keep is not None:
            grad_weights = _drop(grad_weights, keep, call.keep_prob)
            dropped = _drop(weights.clone(), keep, call.keep_prob)
        scores = grad_weights.sub_(delta).mul_(weights).to(stored).to(dtype)
        scores = scores.view(*query.shape[:3], cells.width)
        dropped = dropped.to(stored).to(dtype).view(scores.shape)
        grad_query += scores @ key
        key_sums[:, :, columns] += scores.transpose(-1, -2) @ query * call.scale
        value_sums[:, :, columns] += dropped.transpose(-1, -2) @ grad
    target = group.rows(sums.query, rows)
    target.copy_((grad_query * call.scale).view(target.shape))


def _backward(given: CallTensors, results: _Results) -> Gradients:
    """Run the grad kernel; `results` are in the op's layout, their stats [B, N, Sq] or [T, N]."""
    call, dtype = given.call, given.accumulate
    dy, output, *stats = results
    by_row = [layouts.get(call.layout).view(t, call.num_heads) for t in (dy, output)]
    by_row += [t.T.unsqueeze(0) for t in stats] if call.is_packed else stats
    specs = (call.query, call.key, call.value)
    query, key, value = (given.query.new_zeros(spec.shape, dtype=dtype) for spec in specs)
    sink = None if given.sink is None else torch.zeros_like(given.sink, dtype=dtype)
    views = CallTensors.of(call, query, key, value)
    sums = Gradients(views.query, views.key, views.value, None, sink)
    for group in matrix_groups(call):
        for rows in group.row_ranges():
            _backward_rows(given, group, rows, _Results(*by_row), sums)
    pse = given.pse
    if pse is not None:
        # Never written by the device; one NaN seen from everywhere takes no memory.
        pse = pse.new_full((), float("nan")).expand(pse.shape)
    if sink is not None and given.sink is not None:
        sink = sink.to(given.sink.dtype)
    stored = given.query.dtype
    return Gradients(query.to(stored), key.to(stored), value.to(stored), pse, sink)


# -- the differentiable whole ------------------------------------------------------------


class _Differentiable(torch.autograd.Function):
    """The forward, whose backward recomputes tiles from the saved statistics."""

    @staticmethod
    def forward(ctx: Any, call: KernelCall, *tensors: torch.Tensor | None) -> Three:
        query, key, value, atten_mask, *others = tensors
        out, peak, total = _forward(CallTensors.of(call, *tensors))
        ctx.call, ctx.atten_mask = call, atten_mask
        ctx.save_for_backward(query, key, value, *others, out, peak, total)
        packed = pack_stats(call, peak), pack_stats(call, total)
        # The op's own backward ignores gradients of the statistics; asking for one is an error.
        ctx.mark_non_differentiable(*packed)
        return out, packed[0], packed[1]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
        *operands, pse, sink, dropout_mask, out, peak, total = ctx.saved_tensors
        given = CallTensors.of(ctx.call, *operands, ctx.atten_mask, pse, sink, dropout_mask)
        results = _Results(grad, out, peak, total)
        grads = first_order(lambda: _backward(given, results), grad, *operands, pse, sink)
        return (None, *grads[:3], None, *grads[3:], None)


_NAMES = ("query", "key", "value", "atten_mask", "pse", "sink", "dropout_mask")


def _checked(call: KernelCall, *tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Check every tensor against the call, and build the mask when it was left out."""
    given = dict(zip(_NAMES, tensors, strict=True))
    expected = {name: getattr(call, name) for name in given}
    mask = call.atten_mask
    if mask is not None:
        expected["atten_mask"] = TensorSpec(mask.shape, mask.dtype)
        if given["atten_mask"] is None and tensors[0] is not None:
            given["atten_mask"] = mask.build(tensors[0].device)
    check_tensors(given, expected)
    return tuple(given.values())


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
    tensors = _checked(call, query, key, value, atten_mask, pse, sink, dropout_mask)
    return cast(Three, _Differentiable.apply(call, *tensors))  # type: ignore[no-untyped-call]


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
    tensors = _checked(call, query, key, value, atten_mask, pse, sink, dropout_mask)
    left = {"dy": dy, "attention_in": attention_in}
    check_tensors(
        {"query": query, **left}, {"query": call.query, **dict.fromkeys(left, call.output)}
    )
    stats = (unpack_stats(call, softmax_max), unpack_stats(call, softmax_sum))
    with torch.no_grad():
        return _backward(CallTensors.of(call, *tensors), _Results(dy, attention_in, *stats))
