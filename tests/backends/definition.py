"""Attention by its formula, one row at a time, over the allowed keys only; float64, plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.agreement import Results, slopes


def define(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cells: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    score_fn: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[b s n d]`` and lse ``[b n s]``; `cells` and `bias` are ``[b n i j]``.

    A key that a row does not see is not even read, and a score function is not asked for it.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[2] // key.shape[2]
    out, lse = [], []
    for b, h, i in torch.cartesian_prod(*map(torch.arange, cells.shape[:3])).tolist():
        keys = cells[b, h, i].nonzero()[:, 0]
        scores = scale * (key[b, keys, h // group] @ query[b, i, h])
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[b, h, i, keys]
        if score_fn is not None and len(keys):
            at = [torch.tensor(n) for n in (b, h, i)]
            cells_of_row = zip(scores, keys, strict=True)
            scores = torch.stack([score_fn(score, *at, j) for score, j in cells_of_row])
        out.append(scores.softmax(-1) @ value[b, keys, h // group])
        lse.append(scores.logsumexp(-1))
    batch, heads, rows = cells.shape[:3]
    return (
        torch.stack(out).view(batch, heads, rows, -1).transpose(1, 2),
        torch.stack(lse).view(batch, heads, rows),
    )


def meant(
    tensors: tuple[Tensor, ...], cells: Tensor, *, bias: Tensor | None = None, **how: Any
) -> Results:
    """Output, lse and gradients of the definition, in float64."""
    leaves = {
        name: t.detach().double().requires_grad_()
        for name, t in zip(("dq", "dk", "dv"), tensors, strict=True)
    }
    inputs, full = list(leaves.values()), None
    if bias is not None:
        leaves["dbias 0"] = bias.detach().double().requires_grad_()
        full = leaves["dbias 0"].expand(cells.shape)
    out, lse = define(*inputs, cells, bias=full, **how)
    grads = torch.autograd.grad(out, list(leaves.values()), slopes(out))
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, grads, strict=True))}


def tensors(
    *,
    batch: int = 2,
    lengths: tuple[int, int] = (20, 20),
    heads: tuple[int, int] = (4, 2),
    dim: int = 4,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, ``[b s n d]``."""
    generator = torch.Generator().manual_seed(lengths[0] * 31 + lengths[1])
    shapes = (
        (batch, lengths[0], heads[0], dim),
        (batch, lengths[1], heads[1], dim),
        (batch, lengths[1], heads[1], value_dim or dim),
    )
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return q, k, v
