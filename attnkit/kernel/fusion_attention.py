"""`fusion_attention` and its gradient: the op itself, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from attnkit.arguments import check_int
from attnkit.errors import KernelContractError, KernelContractTypeError, contract
from attnkit.kernel.arguments import as_python
from attnkit.kernel.emulator import Gradients, emulate, emulate_grad
from attnkit.kernel.given import checked_call
from attnkit.kernel.launch import launch, launch_grad
from attnkit.kernel.sizes import UNBOUNDED
from attnkit.kernel.versions import FusionOutput

__all__ = ["fusion_attention", "fusion_attention_grad"]

_SEEDS = 2**62


def _new_spelling(pre_tockens: int | None, next_tockens: int | None) -> None:
    for old, given in (("pre_tockens", pre_tockens), ("next_tockens", next_tockens)):
        if given is not None:
            new = old.replace("tockens", "tokens")
            raise KernelContractTypeError(
                f"{old}={given} is how versions 1 and 3 of the op spell it; here it is "
                f"{new}={given}",
                ["old-spelling"],
            )


def fusion_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    pse_type: int = 1,
    q_start_idx: Sequence[int] | None = None,
    kv_start_idx: Sequence[int] | None = None,
    softmax_layout: str = "",
    sink: torch.Tensor | None = None,
    dropout_mask: torch.Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
    allow_silent: bool = False,
    pre_tockens: int | None = None,
    next_tockens: int | None = None,
) -> FusionOutput:
    """Fused scaled dot-product attention: the op ``npu_fusion_attention``, on any device.

    On an NPU the installed op runs; anywhere else its emulator does, with the same results,
    the op's quirks included. Before anything is computed every rule of the op's contract is
    checked, and all broken ones are reported together.

    Formula, per score matrix (i counts queries, j keys, h heads)::

        S[i, j] = scale * (Q K^T + pse)[i, j]                        pse_type 1, the default
        S[i, j] = scale * (Q K^T)[i, j] + pse[i, j]                  pse_type 0
        S[i, j] = scale * (Q K^T)[i, j] - slope[h] * |j + kv_start - i - q_start|         2
        S[i, j] = scale * (Q K^T)[i, j] - slope[h] * sqrt|j + kv_start - i - q_start|     3
        S[i, j] = -FLT_MAX                                           where masked
        softmax_max[i] = max_j S[i, j]
        softmax_sum[i] = sum_j exp(S[i, j] - softmax_max[i])
        attention_out[i] = sum_j dropout(exp(S[i, j] - softmax_max[i])) V[j] / softmax_sum[i]

    A `sink` adds ``exp(sink[h] - softmax_max)`` to softmax_sum and takes part in the maximum.

    Layouts (query; key and value likewise with kv_heads and their own lengths):

    ======  =================  ===========================================================
    name    query              statistics
    ======  =================  ===========================================================
    BSH     ``b s (n d)``      ``b n s 8``
    SBH     ``s b (n d)``      ``b n s 8``
    BSND    ``b s n d``        ``b n s 8``
    BNSD    ``b n s d``        ``b n s 8``
    TND     ``t n d``          ``t n 8``, stored sequence after sequence as ``n s 8``
    ======  =================  ===========================================================

    Sparse modes, with ``shift = kv_len - q_len``; True in `atten_mask` means *masked*:

    ====  ==========================================  ==================================
    mode  keys of row i                               atten_mask
    ====  ==========================================  ==================================
    any   all                                         None; the mode is ignored
    0     what the mask allows, which must lie in     one entry per cell
          i - pre <= j <= i + next
    1     what the mask allows                        one entry per cell
    2     j <= i                                      [2048, 2048], triu(1)
    3     j <= i + shift                              [2048, 2048], triu(1)
    4     i + shift - pre <= j <= i + shift + next    [2048, 2048], triu(1)
    5     what the mask allows (a drawn prefix)       one entry per cell, dense layouts
    6     j <= i + shift or j < prefix[b]             [3072, 2048]
    7     as 3; last sequence with queries:           [2048, 2048], triu(1), TND
          j <= i + shift + next
    8     as 2; first sequence with queries:          [2048, 2048], triu(1), TND
          j <= i + shift + next
    ====  ==========================================  ==================================

    Args:
        query: float16, bfloat16 or float32 (off the device also float64), in the layout.
            Head size at most 768.
        key: dtype and head size of the query. Heads divide the query's: query head h reads
            key head ``h // (heads / kv_heads)``.
        value: as key, but its heads may be smaller.
        head_num: number of query heads, 1 to 256.
        input_layout: BSH, SBH, BSND, BNSD or TND.
        pse: bias or slopes. Types 0 and 1: dtype of the query, [1|B, N, Sq, Skv] or
            [1|B, N, 1, Skv], or the last 1024 rows [1|B, N, 1024, Skv] of a bias that depends
            on i - j only (causal modes, Sq = Skv). The only form in TND, where it is as wide as
            the longest sequence and read by distance: entries with r - c = (i - j) -
            (max Skv - 1024). Types 2 and 3: float32 [N] or [B, N]; Sq = Skv. Its gradient is
            never computed by the op.
        padding_mask: reserved; must be None.
        atten_mask: bool or uint8, True or 1 = masked. Modes 0, 1 and 5: [Sq, Skv],
            [1, 1, Sq, Skv], [B, 1, Sq, Skv] or [B, N, Sq, Skv]; TND: [max Sq, max Skv].
        scale: factor of the scores. The default 1.0 is the op's; 1/sqrt(d) is usual.
        keep_prob: share of weights that survive dropout, in (0, 1]; survivors are divided
            by it. Statistics exclude dropout.
        pre_tokens: how far back modes 0 and 4 look, inclusive: W covers W + 1 keys.
            Mode 0 is anchored top-left, mode 4 bottom-right. Modes 7 and 8 need at least
            kv_len of the cut sequence.
        next_tokens: how far ahead; also negative. The end of the cut sequence in 7 and 8.
        inner_precise: 2 makes rows without a key 0; without it they return the mean of V
            (the tiling turns it on by itself in some modes). 0 and 1 are reserved.
        prefix: modes 5 and 6: one length per batch element or sequence, in
            [max(0, shift), kv_len], at most 32 of them. Mode 5 skips tiles by it, no more.
        actual_seq_qlen: TND: cumulative query lengths without a leading 0, host integers.
            A repeated value is an empty sequence; zeros at the end mark unused rows, which
            become 0.
        actual_seq_kvlen: TND: cumulative key lengths, as many.
        sparse_mode: 0 to 6 in dense layouts, 0 to 4 and 6 to 8 in TND.
        gen_mask_parallel: generate dropout bits beside the computation. No effect on results.
        sync: wait for the generation. No effect on results.
        pse_type: 0 to 3, see the formula.
        q_start_idx: one integer: position of the first query for types 2 and 3. It moves the
            diagonal of distance 0 to larger j (right, up). Effective only together with
            kv_start_idx; in mode 8 for the first sequence only.
        kv_start_idx: one integer: position of the first key. It moves that diagonal to smaller
            j (left, down); MindSpore's page of speed_fusion_attention says up.
        softmax_layout: "TND" stores packed statistics as their shape [T, N, 8] suggests.
        sink: float32 [N], a learnable logit per head that joins the denominator.
        dropout_mask: packed decisions (uint8, least significant bit first, 1 = keep), see
            `attnkit.kernel.dropout_mask`. Without it they are drawn from torch's generator.
        seed: what `dropout_mask` was generated from; overwritten when there is none.
        offset: as seed.
        allow_silent: accept calls that break only rules which the stack does not enforce,
            and compute what the device would.
        pre_tockens: not accepted. Versions 1 and 3 of the op spell pre_tokens so; it is a
            parameter here only so that the error can say that.
        next_tockens: not accepted, likewise.

    Returns:
        A named tuple of seven. ``attention_out``: layout and dtype of the query, head size of
        the value. ``softmax_max``, ``softmax_sum``: float32 (float64 for float64), eight equal
        copies per row. ``softmax_out``: empty. ``seed``, ``offset``, ``numels``: what the
        backward regenerates the dropout decisions from. Differentiable in query, key, value
        and sink, through attention_out.

    Raises:
        KernelContractError: rules are broken; a ValueError. It lists each with its code, the
            layer that would reject it ("silent" = none), and the remedy.
        KernelContractTypeError: one of them is about a type or dtype; a TypeError as well.

    Full attention, grouped heads:

    >>> q = torch.randn(2, 8, 16, 32)
    >>> k = v = torch.randn(2, 2, 24, 32)
    >>> out = fusion_attention(q, k, v, 8, "BNSD", scale=32 ** -0.5)
    >>> out.attention_out.shape, out.softmax_max.shape, out.numels
    (torch.Size([2, 8, 16, 32]), torch.Size([2, 8, 16, 8]), 6144)

    Modes 2 and 3, causal from either corner, and mode 4, a window of the last four keys:

    >>> from attnkit.kernel import AttenMask
    >>> mask = AttenMask.causal().build()
    >>> for mode in (2, 3):
    ...     out = fusion_attention(q, k, v, 8, "BNSD", atten_mask=mask, sparse_mode=mode)
    >>> out = fusion_attention(q, k, v, 8, "BNSD", atten_mask=mask, sparse_mode=4,
    ...                        pre_tokens=3, next_tokens=0)

    Modes 0, 1 and 5 with a mask of one entry per cell, and mode 6, whose mask is compressed:

    >>> drawn = torch.ones(16, 24, dtype=torch.bool).triu(9)
    >>> for mode in (0, 1):
    ...     out = fusion_attention(q, k, v, 8, "BNSD", atten_mask=drawn, sparse_mode=mode)
    >>> per_batch = drawn.expand(2, 1, 16, 24)
    >>> out = fusion_attention(q, k, v, 8, "BNSD", atten_mask=per_batch, sparse_mode=5,
    ...                        prefix=[8, 9])
    >>> out = fusion_attention(q, k, v, 8, "BNSD", atten_mask=AttenMask.prefix().build(),
    ...                        sparse_mode=6, prefix=[10, 12])

    The other layouts; TND packs sequences of 5 and 11 tokens:

    >>> h = torch.randn(2, 16, 256)
    >>> out = fusion_attention(h, h, h, 8, "BSH", atten_mask=mask, sparse_mode=2)
    >>> s = h.transpose(0, 1)
    >>> out = fusion_attention(s, s, s, 8, "SBH", atten_mask=mask, sparse_mode=2)
    >>> n = h.unflatten(-1, (8, 32))
    >>> out = fusion_attention(n, n, n, 8, "BSND", atten_mask=mask, sparse_mode=2)
    >>> t = n[0]
    >>> out = fusion_attention(t, t, t, 8, "TND", atten_mask=mask, sparse_mode=3,
    ...                        actual_seq_qlen=[5, 16], actual_seq_kvlen=[5, 16])
    >>> out.softmax_sum.shape
    torch.Size([16, 8, 8])

    Modes 7 and 8, a batch whose last or first sequence was cut:

    >>> packed = dict(actual_seq_qlen=[5, 13], actual_seq_kvlen=[5, 16])
    >>> out = fusion_attention(t[:13], t, t, 8, "TND", atten_mask=mask, sparse_mode=7,
    ...                        next_tokens=-1, **packed)
    >>> out = fusion_attention(t, t, t, 8, "TND", atten_mask=mask, sparse_mode=8,
    ...                        next_tokens=0, actual_seq_qlen=[5, 16],
    ...                        actual_seq_kvlen=[5, 16])

    A bias after and before the scale, and ALiBi slopes, linear and square root:

    >>> bias = torch.randn(1, 8, 16, 16)
    >>> for kind in (0, 1):
    ...     out = fusion_attention(n, n, n, 8, "BSND", pse=bias, pse_type=kind, scale=0.2)
    >>> slopes = 2.0 ** -torch.arange(1, 9)
    >>> for kind in (2, 3):
    ...     out = fusion_attention(n, n, n, 8, "BSND", pse=slopes, pse_type=kind,
    ...                            q_start_idx=[4], kv_start_idx=[0])

    Dropout and a sink:

    >>> out = fusion_attention(n, n, n, 8, "BSND", keep_prob=0.9, sink=torch.zeros(8))

    A mistake, told before anything runs:

    >>> fusion_attention(n, n, n, 8, "BSND", sparse_mode=3)
    Traceback (most recent call last):
    ...
    attnkit.errors.KernelContractError: the fused kernel would not compute this call (1 rule
    broken):
      - sparse_mode=3 without atten_mask. Without atten_mask every mode computes full attention
        (silent). Pass the 2048 x 2048 mask (3072 x 2048 in mode 6), or say sparse_mode=0.
        [mode-without-mask]
    """
    given = dict(locals())  # every parameter by name; most are fields of a KernelCall
    _new_spelling(pre_tockens, next_tockens)
    call, tensors = checked_call(given)
    if query.device.type == "npu":
        return FusionOutput(*launch(call, tensors))
    if 0 < call.keep_prob < 1 and dropout_mask is None:
        call = replace(call, seed=int(torch.randint(_SEEDS, ())), offset=0)
    out, peak, total = emulate(call, **tensors)
    return FusionOutput(out, peak, total, query.new_empty(0), call.seed, call.offset, call.numels)


def fusion_attention_grad(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dy: torch.Tensor,
    head_num: int,
    input_layout: str,
    *,
    softmax_max: torch.Tensor,
    softmax_sum: torch.Tensor,
    attention_in: torch.Tensor,
    softmax_in: torch.Tensor | None = None,
    pse: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    atten_mask: torch.Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tokens: int = UNBOUNDED,
    next_tokens: int = UNBOUNDED,
    inner_precise: int = 0,
    seed: int = 0,
    offset: int = 0,
    numels: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    pse_type: int = 1,
    q_start_idx: Sequence[int] | None = None,
    kv_start_idx: Sequence[int] | None = None,
    softmax_layout: str = "",
    sink: torch.Tensor | None = None,
    allow_silent: bool = False,
) -> Gradients:
    """Gradients of `fusion_attention` from statistics and an output given to it.

    Formula, with S as in `fusion_attention`::

        P = exp(S - softmax_max) / softmax_sum        dP = dropout(dY V^T)
        dS = P * (dP - rowsum(dY * attention_in))
        dQ = scale * dS K      dK = scale * dS^T Q      dV = dropout(P)^T dY

    `softmax_max`, `softmax_sum` and `attention_in` may come from a softmax over more keys than
    this call sees: then the gradients of the calls that share it add up to the whole, as ring
    attention and plans of several calls need.

    Args:
        query: as in the forward; so are key, value, head_num, input_layout, and every
            argument that is not named here.
        dy: gradient of attention_out, in its shape.
        softmax_max: [B, N, Sq, 8] (TND [T, N, 8], in the forward's data order).
        softmax_sum: as softmax_max.
        attention_in: the forward's output, in its shape.
        softmax_in: reserved; the forward's empty softmax_out or None.
        scale: the op's grad calls it scale_value; here it is named as in the forward.
        seed: with keep_prob < 1, what the forward returned; so are offset and numels.

    Returns:
        A named tuple ``(query, key, value, pse, sink)`` of gradients. That of pse is NaN
        where a bias was given: the device leaves that memory unwritten.

    Raises:
        KernelContractError: a rule of the op's contract or of its grad op is broken, or
            `numels` is not the forward's.

    >>> q = torch.randn(1, 2, 6, 4)
    >>> out = fusion_attention(q, q, q, 2, "BNSD")
    >>> grads = fusion_attention_grad(
    ...     q, q, q, torch.ones_like(q), 2, "BNSD", softmax_max=out.softmax_max,
    ...     softmax_sum=out.softmax_sum, attention_in=out.attention_out)
    >>> grads.query.shape
    torch.Size([1, 2, 6, 4])
    """
    call, tensors = checked_call(dict(locals()))
    with contract("argument-type"):
        numels = check_int("numels", as_python("seed", numels), None)
    if call.keep_prob < 1 and numels != call.numels:
        raise KernelContractError(
            f"numels={numels} with keep_prob={keep_prob}; the forward of this call made "
            f"{call.numels} dropout decisions. Pass the seed, offset and numels it returned",
            ["grad-numels"],
        )
    stats = {"softmax_max": softmax_max, "softmax_sum": softmax_sum}
    left = {"dy": dy, **stats, "attention_in": attention_in}
    if query.device.type == "npu":
        seeds = {"seed": call.seed, "offset": call.offset, "numels": numels}
        return launch_grad(call, tensors, {**left, **seeds, "softmax_in": softmax_in})
    return emulate_grad(call, **tensors, **left)
