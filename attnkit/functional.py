"""`attention` and `plan`: what `Attention` does, without a module."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from attnkit.attend import Asked, attend, plan_of, sharded_plan_of
from attnkit.attention import check_backend_name
from attnkit.backends import AttentionOutput
from attnkit.layouts import SeqLens
from attnkit.masks import Mask
from attnkit.masks.parse import as_mask
from attnkit.parallel.plan import ParallelPlan
from attnkit.parallel.shards import Shards, as_shards, telling
from attnkit.planner import Plan
from attnkit.planner.scoring import ScoreFunction
from attnkit.pse import Pse
from attnkit.pse.parse import as_pse

__all__ = ["attention", "plan"]


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = ...,
    pse: Pse | None = ...,
    layout: str = ...,
    seqlens: SeqLens | None = ...,
    shards: Shards | None = ...,
    num_heads: int | None = ...,
    num_kv_heads: int | None = ...,
    scale: float | None = ...,
    dropout: float = ...,
    sink: Tensor | None = ...,
    softcap: float | None = ...,
    score_fn: ScoreFunction | None = ...,
    deterministic: bool = ...,
    memory_limit: int | None = ...,
    backend: str = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = ...,
    pse: Pse | None = ...,
    layout: str = ...,
    seqlens: SeqLens | None = ...,
    shards: Shards | None = ...,
    num_heads: int | None = ...,
    num_kv_heads: int | None = ...,
    scale: float | None = ...,
    dropout: float = ...,
    sink: Tensor | None = ...,
    softcap: float | None = ...,
    score_fn: ScoreFunction | None = ...,
    deterministic: bool = ...,
    memory_limit: int | None = ...,
    backend: str = ...,
    return_stats: Literal[True],
) -> AttentionOutput: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    pse: Pse | None = None,
    layout: str = "BSND",
    seqlens: SeqLens | None = None,
    shards: Shards | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    sink: Tensor | None = None,
    softcap: float | None = None,
    score_fn: ScoreFunction | None = None,
    deterministic: bool = False,
    memory_limit: int | None = None,
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | AttentionOutput:
    """Attend without a module; the arguments are those of `Attention`.

    Layouts that merge heads (BSH, SBH) need `num_heads`, and `num_kv_heads` where it differs.
    `sink` is a tensor [n]. A `dropout` above 0 applies: there is no eval mode here. With `shards`
    (`attnkit.parallel`), tensors have the tokens of this process, and mask, bias and lengths are of
    the whole text.

    >>> import torch
    >>> from attnkit import masks
    >>> x = torch.randn(1, 16, 32)
    >>> attention(x, x, x, mask=masks.Causal(), layout="BSH", num_heads=4).shape
    torch.Size([1, 16, 32])
    """
    with telling(as_shards(shards)):
        check_backend_name(backend)
        asked = Asked(
            (None if mask is None else as_mask(mask), None),
            (as_pse(pse), None),
            layout,
            scale,
            dropout,
            softcap,
            num_heads,
            num_kv_heads,
            backend=backend,
            score_fn=score_fn,
            deterministic=deterministic,
            memory_limit=memory_limit,
        )
        result = attend(
            asked, query, key, value, sink, seqlens, return_stats=return_stats, shards=shards
        )
    return result if return_stats else result.output


@overload
def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = ...,
    pse: Pse | None = ...,
    layout: str = ...,
    seqlens: SeqLens | None = ...,
    shards: None = ...,
    num_heads: int | None = ...,
    num_kv_heads: int | None = ...,
    scale: float | None = ...,
    dropout: float = ...,
    sink: Tensor | None = ...,
    softcap: float | None = ...,
    score_fn: ScoreFunction | None = ...,
    deterministic: bool = ...,
    memory_limit: int | None = ...,
    backend: str = ...,
) -> Plan: ...


@overload
def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = ...,
    pse: Pse | None = ...,
    layout: str = ...,
    seqlens: SeqLens | None = ...,
    shards: Shards,
    num_heads: int | None = ...,
    num_kv_heads: int | None = ...,
    scale: float | None = ...,
    dropout: float = ...,
    sink: Tensor | None = ...,
    softcap: float | None = ...,
    score_fn: ScoreFunction | None = ...,
    deterministic: bool = ...,
    memory_limit: int | None = ...,
    backend: str = ...,
) -> ParallelPlan: ...


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Mask | None = None,
    pse: Pse | None = None,
    layout: str = "BSND",
    seqlens: SeqLens | None = None,
    shards: Shards | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    sink: Tensor | None = None,
    softcap: float | None = None,
    score_fn: ScoreFunction | None = None,
    deterministic: bool = False,
    memory_limit: int | None = None,
    backend: str = "auto",
) -> Plan | ParallelPlan:
    """Return the plan that `attention` would run; meta tensors will do.

    With `shards` it is that of all ranks; nothing is exchanged.

    >>> import torch
    >>> from attnkit import masks
    >>> x = torch.empty(1, 2048, 8, 64, device="meta")
    >>> found = plan(x, x, x, mask=masks.SlidingWindow(256), backend="emulated")
    >>> found.calls[0].sparse_mode, found.calls[0].pre_tokens
    (4, 255)
    """
    check_backend_name(backend)
    asked = Asked(
        (None if mask is None else as_mask(mask), None),
        (as_pse(pse), None),
        layout,
        scale,
        dropout,
        softcap,
        num_heads,
        num_kv_heads,
        backend=backend,
        score_fn=score_fn,
        deterministic=deterministic,
        memory_limit=memory_limit,
    )
    shards = as_shards(shards)
    if shards is None:
        return plan_of(asked, query, key, value, sink, seqlens)
    shards.lengths(seqlens)
    return sharded_plan_of(asked, query, key, value, sink, shards)
