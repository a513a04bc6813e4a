"""MindSpore's ``ops.speed_fusion_attention`` and ``ops.flash_attention_score``, on torch tensors.

    from attnkit.interop import mindspore as ops      # was: from mindspore import ops

Both are the fused kernel under other names of its arguments, and are read and planned as in
`attnkit.interop.npu`; MindSpore is not needed. True in a mask drops the cell, the default scale is
1.0, and a window of W tokens behind keeps W + 1 keys.

`flash_attention_score` has no ``pse_type``. Its page writes ``scale * q.k + pse``; the operator
that it calls (aclnnFlashAttentionScore, by its own page) computes ``scale * (q.k + pse)``, and so
does this. They differ where both a `real_shift` and a scale other than 1 are given; then this is
in a warning.

Source: the pages of mindspore.ops of releases 2.5 to 2.11.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from attnkit.errors import KernelContractError, shown
from attnkit.interop.npu import FusedResult, run_call
from attnkit.kernel.sizes import UNBOUNDED

__all__ = ["flash_attention_score", "speed_fusion_attention"]

Ints = Sequence[int] | Tensor


def speed_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    inner_precise: int = 0,
    prefix: Ints | None = None,
    actual_seq_qlen: Ints | None = None,
    actual_seq_kvlen: Ints | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    pse_type: int = 1,
    q_start_idx: Ints | None = None,
    kv_start_idx: Ints | None = None,
) -> FusedResult:
    """Attend as ``mindspore.ops.speed_fusion_attention`` does.

    Returns (attention_out, softmax_max, softmax_sum, softmax_out, seed, offset, numels). With
    `pse_type` 1, the default, ``softmax(scale * (q.k + pse)) @ v``, with 0 ``scale * q.k + pse``,
    with 2 and 3 slopes times a distance; of a distance as the kernel counts it:
    `kv_start_idx` moves its diagonal to smaller keys, where MindSpore's page says to later queries.

    Raises `KernelContractError` for what the op rejects or leaves undefined.

    >>> import torch
    >>> x = torch.randn(1, 6, 32)
    >>> speed_fusion_attention(x, x, x, 2, "BSH", scale=0.25)[0].shape
    torch.Size([1, 6, 32])
    """
    return run_call(locals(), "v2")


def flash_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    real_shift: Tensor | None = None,
    drop_mask: Tensor | None = None,
    padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    prefix: Ints | None = None,
    actual_seq_qlen: Ints | None = None,
    actual_seq_kvlen: Ints | None = None,
    keep_prob: float = 1.0,
    scalar_value: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    inner_precise: int = 0,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
) -> Tensor:
    """Attend as ``mindspore.ops.flash_attention_score`` does; returns attention_out alone.

    `keep_prob` below 1 needs `drop_mask` there, the decisions packed as bits: a planned call draws
    its own, so both are refused (`attnkit.fusion_attention` takes a ``dropout_mask``).

    Raises `KernelContractError` for what the op rejects or leaves undefined, and for dropout.

    >>> import torch
    >>> x = torch.randn(1, 6, 32)
    >>> flash_attention_score(x, x, x, 2, scalar_value=0.25).shape
    torch.Size([1, 6, 32])
    """
    if drop_mask is not None or keep_prob != 1.0:
        raise KernelContractError(
            f"drop_mask={shown(drop_mask)}, keep_prob={shown(keep_prob)}: here the caller draws "
            "what is dropped, and a planned call draws its own; use speed_fusion_attention or "
            "ak.attention(dropout=...), or attnkit.fusion_attention(dropout_mask=...)",
            ["dropout-mask"],
        )
    if real_shift is not None and scalar_value != 1.0:
        warnings.warn(
            f"flash_attention_score: computes scalar_value * (q.k + real_shift), with "
            f"scalar_value={shown(scalar_value)}, as the operator does; MindSpore's page writes "
            "scalar_value * q.k + real_shift, which is speed_fusion_attention with pse_type=0 "
            "[pse-is-scaled]",
            UserWarning,
            stacklevel=2,
        )
    given = {
        "query": query,
        "key": key,
        "value": value,
        "head_num": head_num,
        "input_layout": input_layout,
        "pse": real_shift,
        "padding_mask": padding_mask,
        "atten_mask": attn_mask,
        "scale": scalar_value,
        "keep_prob": 1.0,
        "pre_tokens": pre_tokens,
        "next_tokens": next_tokens,
        "inner_precise": inner_precise,
        "prefix": prefix,
        "actual_seq_qlen": actual_seq_qlen,
        "actual_seq_kvlen": actual_seq_kvlen,
        "sparse_mode": sparse_mode,
        "gen_mask_parallel": True,
        "sync": False,
    }
    return run_call(given, "v1").attention_out
