"""Softmax statistics: the op's own shapes and data order, and attnkit's plain ones.

The op returns the row maximum and the row sum as float32, eight equal copies per row:
[B, N, Sq, 8] for every dense layout, and the shape [T, N, 8] for TND, where the data is the
concatenation over the sequences of contiguous [N, Sq_b, 8] blocks unless
``softmax_layout="TND"`` asks for the order that the shape suggests.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from attnkit.arguments import check_tensor
from attnkit.errors import KernelContractError, KernelContractTypeError, contract, shown
from attnkit.kernel.call import KernelCall
from attnkit.kernel.scores import MASKED

__all__ = ["COPIES", "log_sum_exp", "merge_partials", "pack_stats", "unpack_stats"]

COPIES = 8


def _by_sequence(
    call: KernelCall, rows: torch.Tensor, turned: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Turn the rows of each packed sequence, where the op stores them sequence by sequence."""
    if not call.is_packed or call.softmax_layout:
        return rows
    out, start = rows.clone(), 0
    for q_len, _ in call.sequences:
        block = slice(start, start + q_len)
        out[block] = turned(rows[block])
        start += q_len
    return out


def pack_stats(call: KernelCall, rows: torch.Tensor) -> torch.Tensor:
    """Return statistics in the op's shape and order from [B, N, Sq] (TND: [T, N]) ones.

    >>> from attnkit.kernel import KernelCall, TensorSpec
    >>> spec = TensorSpec((3, 2, 4), torch.float32)
    >>> call = KernelCall(spec, spec, spec, head_num=2, input_layout="TND",
    ...                   actual_seq_qlen=(2, 3), actual_seq_kvlen=(2, 3))
    >>> by_token = torch.tensor([[0., 10.], [1., 11.], [2., 12.]])      # [T, N]
    >>> pack_stats(call, by_token)[..., 0].flatten().tolist()
    [0.0, 1.0, 10.0, 11.0, 2.0, 12.0]
    """
    stored = _by_sequence(call, rows, lambda block: block.T.reshape(block.shape))
    return stored.unsqueeze(-1).repeat_interleave(COPIES, -1)


def unpack_stats(call: KernelCall, stats: torch.Tensor) -> torch.Tensor:
    """Return [B, N, Sq] (TND: [T, N]) statistics from the op's; the inverse of `pack_stats`.

    >>> from attnkit.kernel import KernelCall, TensorSpec
    >>> spec = TensorSpec((1, 3, 2, 16), torch.float32)
    >>> call = KernelCall(spec, spec, spec, head_num=2, input_layout="BSND")
    >>> rows = torch.arange(6.0).view(1, 2, 3)
    >>> torch.equal(unpack_stats(call, pack_stats(call, rows)), rows)
    True
    """
    if tuple(stats.shape) != call.stats.shape:
        raise KernelContractError(
            f"softmax statistics of shape {tuple(stats.shape)} were given; this call's are "
            f"{call.stats.shape}, eight equal copies per row",
            ["stats-shape"],
        )
    return _by_sequence(call, stats[..., 0], lambda block: block.reshape(block.T.shape).T)


def log_sum_exp(softmax_max: torch.Tensor, softmax_sum: torch.Tensor) -> torch.Tensor:
    """Return ``max + log(sum)`` per row, and -inf for rows that have no allowed key.

    The kernel marks such rows by max = -FLT_MAX, or by sum = 0 where a packed sequence has no
    keys at all.

    >>> log_sum_exp(torch.tensor([0., MASKED]), torch.tensor([1., -MASKED])).tolist()
    [0.0, -inf]
    """
    with contract("argument-type"):
        check_tensor("log_sum_exp: softmax_max", softmax_max)
        check_tensor("log_sum_exp: softmax_sum", softmax_sum)
    empty = (softmax_max <= MASKED) | (softmax_sum == 0)
    return (softmax_max + softmax_sum.log()).masked_fill(empty, float("-inf"))


def merge_partials(
    outputs: list[torch.Tensor], maxima: list[torch.Tensor], sums: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge the results of calls that saw different keys of the same rows.

    With ``m = max(m_c)`` and ``w_c = l_c * exp(m_c - m)``: the merged sum is ``l = sum w_c``
    and the merged output ``sum o_c * w_c / l``. Outputs are [..., d] and statistics [...].
    A part in which a row has no key (max = -FLT_MAX, or sum = 0) takes no part in that row;
    rows that have none anywhere give 0 and keep max = -FLT_MAX, sum = FLT_MAX.

    The op's statistics carry no gradient, so that of the merged output would lack what flows
    through the weights. Outputs that ask for a gradient beside statistics that do not are refused.

    >>> zero, one = torch.zeros(1), torch.ones(1)
    >>> merge_partials([torch.zeros(1, 1), torch.ones(1, 1)], [zero, zero], [one, 3 * one])
    (tensor([[0.7500]]), tensor([0.]), tensor([4.]))
    """
    for name, listed in (("outputs", outputs), ("maxima", maxima), ("sums", sums)):
        if not isinstance(listed, list | tuple):
            raise KernelContractTypeError(
                f"merge_partials got {name}={shown(listed)}; it takes a list of tensors",
                ["argument-type"],
            )
        with contract("argument-type"):
            for k, tensor in enumerate(listed):
                check_tensor(f"merge_partials: {name}[{k}]", tensor)
    if not outputs or not len(outputs) == len(maxima) == len(sums):
        raise KernelContractError(
            f"merge_partials got {len(outputs)} outputs, {len(maxima)} maxima and {len(sums)} "
            "sums; it needs one of each per call, and at least one call"
        )
    weighed = all(a.requires_grad or b.requires_grad for a, b in zip(maxima, sums, strict=True))
    if torch.is_grad_enabled() and any(out.requires_grad for out in outputs) and not weighed:
        raise KernelContractError(
            "merge_partials: an output asks for a gradient and its statistics carry none, so the "
            "gradient would lack what flows through the weights of the parts. Merge under "
            "torch.no_grad(), and give the merged max, sum and output to fusion_attention_grad, "
            "part by part; or let ak.attention plan the whole",
            ["merge-gradient"],
        )
    parts, peaks = torch.stack(outputs), torch.stack(maxima)
    totals = torch.stack(sums)
    empty = (peaks <= MASKED) | (totals == 0)
    peaks = peaks.masked_fill(empty, MASKED)
    peak = peaks.amax(0)
    weights = (totals * (peaks - peak).exp()).masked_fill(empty, 0.0)
    total = weights.sum(0)
    none = empty.all(0)
    total = total.masked_fill(none, -MASKED)
    merged = (parts.to(weights.dtype) * (weights / total).unsqueeze(-1)).sum(0)
    return merged.to(outputs[0].dtype), peak, total
