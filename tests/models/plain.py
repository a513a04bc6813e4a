"""What the twins of the models are written in: plain torch, and every mask as a formula."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import attnkit as ak


class Block(nn.Module):
    """A pre-norm residual block around an attention layer."""

    def __init__(self, dim: int, attn: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), attn
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Tensor, attend: Callable[..., Tensor], *args: Any) -> Tensor:
        """``attend(layer, x, *args)`` is the model's; the rest is the same everywhere."""
        x = x + attend(self.attn, self.norm(x), *args)
        return x + self.mlp(x)


class Joined:
    """A cache through which gradients flow; `KVCache` has none."""

    kept: tuple[Tensor, ...] | None = None

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        old = self.kept or tuple(t[:, :0] for t in new)
        self.kept = tuple(torch.cat(both, 1) for both in zip(old, new, strict=True))
        return self.kept


def split(x: Tensor, count: int) -> Tensor:
    """``b s (n d)`` as ``b s n d``."""
    return x.unflatten(-1, (count, -1))


def cells(rule: Callable[[int, int, int, int], object], *shape: int) -> Tensor:
    """Return which cells are allowed, ``[b n i j]``: an if-formula, asked cell by cell."""
    found = [bool(rule(*at)) for at in product(*map(range, shape))]
    return torch.tensor(found).view(shape)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor | None = None,
    *,
    scale: float | None = None,
    bias: Tensor | float = 0.0,
    sink: Tensor | None = None,
) -> Tensor:
    """``softmax(scale * q.k + bias) @ v`` over the allowed cells; ``b s n d`` in and out."""
    group = query.shape[2] // key.shape[2]
    key, value = (t.repeat_interleave(group, 2) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * torch.einsum("bind,bjnd->bnij", query, key) + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if sink is not None:
        extra = sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, extra], -1)
    weights = scores.softmax(-1)[..., : key.shape[1]]
    return torch.einsum("bnij,bjnd->bind", weights, value)


def layer(
    mha: ak.MultiHeadAttention,
    x: Tensor,
    allowed: Tensor | None = None,
    context: Tensor | None = None,
    turn: Callable[[Tensor], Tensor] = lambda x: x,
    **how: Any,
) -> Tensor:
    """What a layer of multi-head attention computes, from its weights alone."""
    source, count = x if context is None else context, mha.attention.num_kv_heads
    query, key = split(mha.q_proj(x), mha.attention.num_heads), split(mha.k_proj(source), count)
    if mha.q_norm is not None:
        query, key = mha.q_norm(query), mha.k_norm(key)
    query, key, value = turn(query), turn(key), split(mha.v_proj(source), count)
    return mha.out_proj(attend(query, key, value, allowed, **how).flatten(-2))


def rotated(x: Tensor, places: Tensor, frequencies: Tensor | None = None) -> Tensor:
    """Turn dimensions c and c + d/2 of ``b s n d`` by ``place * frequency[c]``."""
    half = x.shape[-1] // 2
    if frequencies is None:
        frequencies = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = (places[..., None] * frequencies.to(x.dtype))[..., None, :]
    one, two = x[..., :half], x[..., half:]
    return torch.cat(
        [one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos()], -1
    )
