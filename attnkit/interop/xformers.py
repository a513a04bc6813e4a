"""xFormers' `memory_efficient_attention`, by its own name, arguments and bias classes.

    from attnkit.interop import xformers as xops      # was: import xformers.ops as xops

``LowerTriangularMask`` is causal from the top-left corner, ``...FromBottomRightMask`` from the
other; a window of W keeps W keys, one of (left, right) counts distances; what is added to the
scores comes after the scale. Rows that see no key are 0. xFormers itself is not needed: its bias
objects are read by `masks.from_xformers`.

Source: xformers/ops/fmha/__init__.py of version 0.0.35. What differs from it: any device and
floating dtype; fewer key heads than query heads may be given as such; the log-sum-exp of blocks
is packed, and partial results have gradients. Dropout of 1 is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from attnkit.arguments import check_bool, check_float_dtype, check_number
from attnkit.backends import Stats
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.functional import attention
from attnkit.interop.torch.reading import terms_of
from attnkit.layouts import SeqLens
from attnkit.masks import Causal, Mask, from_xformers
from attnkit.masks.foreign.xformers import BIASED, KeyBlocks, key_blocks, xformers_class
from attnkit.pse import Pse

__all__ = [
    "memory_efficient_attention",
    "memory_efficient_attention_backward",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
    "memory_efficient_attention_partial",
    "merge_attentions",
]


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attend: ``softmax(scale * q.k + attn_bias) @ v``, dropout `p` on the weights.

    query ``b s n d``, key ``b t n d``, value ``b t n e``; with five axes ``b s g h d``, where key
    and value may be expanded along h; with three ``b s d``. `scale` None is ``d ** -0.5``.
    `attn_bias` is None, a tensor of all cells ``b n s t`` (``b g h s t``, ``b s t``) in which -inf
    is masked, or an object of `xformers.ops.fmha.attn_bias`, blocks with a batch of 1. `op`, which
    picks one of xFormers' kernels, must be None. `output_dtype` wider than the query's is
    computed in.

    Raises `CompositionError` for shapes and biases that do not fit, and for a `op`.

    >>> q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 4, 8)
    >>> memory_efficient_attention(q, k, k, p=0.0, scale=0.5).shape
    torch.Size([2, 3, 4, 8])
    """
    return _attend(
        _EfficientCall.of(query, key, value, attn_bias, p, scale, op, output_dtype), False
    )[0]


def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attend as `memory_efficient_attention` does.

    >>> q = torch.randn(2, 3, 4, 8)
    >>> memory_efficient_attention_forward(q, q, q).shape
    torch.Size([2, 3, 4, 8])
    """
    return memory_efficient_attention(
        query, key, value, attn_bias, p, scale, op=op, output_dtype=output_dtype
    )


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend as `memory_efficient_attention` does, and return the log-sum-exp too.

    It is ``b n s``, ``b g h s``, and for blocks ``1 n t``. As in the library, without dropout.

    >>> q = torch.randn(2, 3, 4, 8)
    >>> out, lse = memory_efficient_attention_forward_requires_grad(q, q, q)
    >>> lse.shape
    torch.Size([2, 4, 3])
    """
    _without_dropout(p)
    return _attend(
        _EfficientCall.of(query, key, value, attn_bias, p, scale, op, output_dtype), True
    )


def memory_efficient_attention_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, from an output and a log-sum-exp given to it.

    These may be of more keys than those given here, as where parts of a ring were merged:
    ``P = exp(scores - lse)``, ``dS = P * (grad . v - sum(grad * output))``. The shape of `lse` is
    that which `memory_efficient_attention_forward_requires_grad` returns.

    >>> q, g = torch.randn(2, 3, 4, 8), torch.ones(2, 3, 4, 8)
    >>> out, lse = memory_efficient_attention_forward_requires_grad(q, q, q)
    >>> [d.shape for d in memory_efficient_attention_backward(g, out, lse, q, q, q)][0]
    torch.Size([2, 3, 4, 8])
    """
    _without_dropout(p)
    leaves = q, k, v = [t.detach().requires_grad_() for t in (query, key, value)]
    with torch.enable_grad():
        call = _EfficientCall.of(q, k, v, attn_bias, p, scale, op, None)
        own_output, own = _attend(call, True)
    if grad.shape != own_output.shape or output.shape != grad.shape or lse.shape != own.shape:
        raise CompositionError(
            f"memory_efficient_attention_backward: grad {shown(grad)}, output {shown(output)}, lse "
            f"{shown(lse)}; give them in the shapes {list(own_output.shape)} and {list(own.shape)}"
        )
    # The weights of these keys among all are their own, each row by the share of it they have.
    # So the gradient is that of what is computed here, with one for its log-sum-exp beside it.
    share = (own.detach() - lse).exp().masked_fill(own.detach() == -torch.inf, 0.0)
    by_row = share.movedim(-1, 1).reshape(grad.shape[:-1])
    wide = grad.to(share.dtype)
    beside = by_row * (wide * (own_output.detach() - output)).sum(-1)
    heads = share.shape[1:-1]
    beside = beside.reshape(len(grad), share.shape[-1], *heads).movedim(1, -1)
    upstream = (by_row[..., None] * wide).to(own_output.dtype), beside
    dq, dk, dv = torch.autograd.grad((own_output, own), leaves, upstream)
    return dq, dk, dv


def memory_efficient_attention_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: None = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to some of the keys: (output, log-sum-exp) for `merge_attentions`.

    The output is float32 (float64 for float64) where nothing else is asked for.

    >>> q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 6, 4, 8)
    >>> parts = [memory_efficient_attention_partial(q, some, some) for some in k.split(3, dim=1)]
    >>> merged, _ = merge_attentions(*zip(*parts))
    >>> torch.allclose(merged, memory_efficient_attention(q, k, k), atol=1e-5)
    True
    """
    _without_dropout(p)
    if output_dtype is None and query.dtype != torch.float64:
        output_dtype = torch.float32
    return _attend(
        _EfficientCall.of(query, key, value, attn_bias, p, scale, op, output_dtype), True
    )


def merge_attentions(
    attn_split: Tensor | Sequence[Tensor],
    lse_split: Tensor | Sequence[Tensor],
    write_lse: bool = True,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Merge what one query got of disjoint keys: ``sum(out * exp(lse)) / sum(exp(lse))``.

    Outputs ``b s n d`` or ``b s g h d`` and log-sum-exps ``b n s`` or ``b g h s``, as lists or
    stacked along a first axis. Returns the output (in `output_dtype`, or that of the parts) and,
    with `write_lse`, ``log(sum(exp(lse)))``. A row that sees no key in any part is 0 and -inf.

    >>> one = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)
    >>> other = torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1), -torch.inf)
    >>> merge_attentions([one[0], other[0]], [one[1], other[1]])
    (tensor([[[[1., 1.]]]]), tensor([[[0.]]]))
    """
    outs, lses = list(attn_split), list(lse_split)
    check_bool("merge_attentions: write_lse", write_lse)
    shapes = {tuple(out.shape[:-1]) for out in outs}
    rows = {(lse.shape[0], lse.shape[-1], *lse.shape[1:-1]) for lse in lses}
    alike = len(outs) == len(lses) > 0 and len({out.shape for out in outs}) == 1
    if not alike or shapes != rows or outs[0].ndim not in (4, 5):
        raise CompositionError(
            f"merge_attentions: outputs {[list(o.shape) for o in outs[:4]]} and log-sum-exps "
            f"{[list(t.shape) for t in lses[:4]]}; give as many of each, [B, M, H, K] with "
            "[B, H, M], or [B, M, G, H, K] with [B, G, H, M]"
        )
    stacked = torch.stack(lses)
    peak = stacked.detach().amax(0)
    peak = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = torch.exp(stacked - peak)
    total = weights.sum(0)
    some = total.masked_fill(total == 0, 1.0)
    shares = (weights / some).movedim(-1, 2)[..., None]
    parts = torch.stack(outs)
    merged = (parts.to(shares.dtype) * shares).sum(0).to(output_dtype or parts.dtype)
    return merged, (peak + total.log()) if write_lse else None


@dataclass(frozen=True, eq=False)
class _EfficientCall:
    """What is asked for, with heads on one axis: query ``b s n d``, key and value ``b t m d``."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask | None
    pse: Pse | None
    blocks: KeyBlocks | None
    p: float
    scale: float | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_bias: Any,
        p: float,
        scale: float | None,
        op: object,
        output_dtype: torch.dtype | None,
    ) -> _EfficientCall:
        """Read the arguments; `CompositionError` for what they cannot be."""
        if op is not None:
            raise CompositionError(
                f"op={shown(op)} names one of xFormers' kernels, and none of them runs here; leave "
                "it at None (ak.attention picks a backend by name)"
            )
        check_number("p", p, lambda n: 0 <= n < 1, "at least 0 and below 1")
        if scale is not None:
            check_number("scale", scale, math.isfinite, "finite, or None")
        _check_shapes(query, key, value)
        dtype = query.dtype if output_dtype is None else output_dtype
        check_float_dtype("output_dtype", dtype)
        wide = torch.promote_types(query.dtype, dtype)
        heads = _heads(query.to(wide), key.to(wide), value.to(wide))
        shape = (*query.shape[:-1], value.shape[-1])
        found = _bias(attn_bias, query, heads[1].shape[1])
        return cls(*heads, *found, p, scale, shape, dtype)


def _attend(call: _EfficientCall, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Return the output, and the log-sum-exp where it is asked for (else nothing of it)."""
    blocks = call.blocks
    how: dict[str, Any] = {"scale": call.scale, "dropout": call.p, "return_stats": True}
    stats: Stats
    if blocks is None:
        heads = call.query, call.key, call.value
        output, stats = attention(*heads, mask=call.mask, pse=call.pse, **how)
    else:
        places = _places(blocks, call.key.device)
        key, value = (t[0] if places is None else t[0, places] for t in (call.key, call.value))
        seqlens = SeqLens(blocks.q_lens, blocks.kv_lens)
        how |= {"layout": "TND", "seqlens": seqlens}
        output, stats = attention(call.query[0], key, value, mask=blocks.inside, **how)
    output = output.to(call.dtype).view(call.shape)
    if not with_lse:
        return output, output.new_empty(0)
    lse = stats.lse if blocks is None else stats.lse.T[None]
    return output, torch.unflatten(lse, 1, call.shape[2:4]) if len(call.shape) == 5 else lse


def _places(blocks: KeyBlocks, device: torch.device) -> Tensor | None:
    """Return where the keys of all blocks lie; None where they are all there is, in order."""
    if blocks.closed:
        return None
    counts = torch.tensor(blocks.kv_lens)
    block = torch.repeat_interleave(torch.arange(len(counts)), counts)
    before = torch.tensor(list(accumulate(blocks.kv_lens, initial=0))[:-1], dtype=torch.long)
    token = torch.arange(len(block)) - before[block] + torch.tensor(blocks.starts)[block]
    block, token = block.to(device, non_blocking=True), token.to(device, non_blocking=True)
    if blocks.table is None:
        return token
    return blocks.table.long()[block, token // blocks.page] * blocks.page + token % blocks.page


def _bias(
    attn_bias: Any, query: Tensor, kv_len: int
) -> tuple[Mask | None, Pse | None, KeyBlocks | None]:
    """Return what a bias is: a mask, a term, or blocks that are packed."""
    if attn_bias is None:
        return None, None, None
    if isinstance(attn_bias, Tensor):
        return *_split(attn_bias, query, kv_len), None
    if xformers_class(attn_bias) == BIASED:
        mask, pse = _split(attn_bias._bias, query, kv_len)
        return mask & Causal("top_left"), pse, None
    blocks = key_blocks(attn_bias)
    q_len = query.shape[1]
    if blocks is None:
        return from_xformers(attn_bias, q_len=q_len, kv_len=kv_len).mask, None, None
    rows = sum(blocks.q_lens)
    if len(query) != 1 or rows != q_len or blocks.kv_len not in (None, kv_len):
        raise CompositionError(
            f"attn_bias, a {type(attn_bias).__name__}, is for {rows} queries and "
            f"{'paged' if blocks.kv_len is None else blocks.kv_len} keys of a batch of 1; query is "
            f"{shown(query)}, with {kv_len} keys"
        )
    return None, None, blocks


def _split(tensor: Tensor, query: Tensor, kv_len: int) -> tuple[Mask, Pse | None]:
    """Return the cells that a tensor leaves, and what it adds to them."""
    heads = query.shape[2:-1]
    wanted = (query.shape[0], *heads, query.shape[1], kv_len)
    if tuple(tensor.shape) != wanted or not tensor.is_floating_point():
        raise CompositionError(
            f"attn_bias is {shown(tensor)}; for query {shown(query)} and {kv_len} keys it has the "
            f"shape {list(wanted)}, expanded where it is the same, and adds numbers and -inf"
        )
    four = tensor[:, None] if not heads else tensor.flatten(1, 2) if len(heads) == 2 else tensor
    found = terms_of(four, keep=True)
    return found.mask, found.bias


def _heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return them with one axis of heads; keys that are expanded along a group count once."""
    if query.ndim == 3:
        return query[:, :, None], key[:, :, None], value[:, :, None]
    if query.ndim == 4:
        return query, key, value
    if key.stride(3) == 0 == value.stride(3):
        return query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
    return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


def _check_shapes(query: object, key: object, value: object) -> None:
    given = {"query": query, "key": key, "value": value}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise CompositionTypeError(f"{name} is {shown(tensor)}; give a tensor")
    q, k, v = (t for t in given.values() if isinstance(t, Tensor))
    wanted = q.ndim in (3, 4, 5) and q.ndim == k.ndim == v.ndim and k.shape[:-1] == v.shape[:-1]
    grouped = q.ndim == 4 and wanted and q.shape[2] % k.shape[2] == 0
    if not wanted or q.shape[0] != k.shape[0] or not (grouped or q.shape[2:-1] == k.shape[2:-1]):
        raise CompositionError(
            f"query {shown(q)}, key {shown(k)}, value {shown(v)}: give [B, M, H, K], "
            "[B, M, G, H, K] (expand key and value to the query's heads) or [B, M, K]"
        )


def _without_dropout(p: float) -> None:
    if p:
        raise CompositionError(
            f"p={shown(p)}: statistics for a later merge or backward come without dropout; "
            "memory_efficient_attention takes it"
        )
