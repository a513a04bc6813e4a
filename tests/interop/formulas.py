"""Attention by the formulas that other libraries print in their documentation, in float64.

Nothing of attnkit is used: what is tested against it must not be made of it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    before_scale: bool = False,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``b n s d`` and log-sum-exp of heads ``b n s d``; key heads repeat by blocks.

    Rows without an allowed key give 0 and -inf.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("bnsd,bntd->bnst", q, k)
    if bias is not None and before_scale:
        scores = scores + bias
    scores = scale * scores
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None and not before_scale:
        scores = scores + bias
    scores = scores.masked_fill(~allowed, -torch.inf)
    if sink is not None:
        extra = sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        lse = torch.cat((scores, extra), -1).logsumexp(-1)
    else:
        lse = scores.logsumexp(-1)
    empty = ~allowed.any(-1, keepdim=True)
    weights = torch.exp(scores - lse[..., None].masked_fill(empty & (sink is None), 0.0))
    return torch.einsum("bnst,bntd->bnsd", weights.masked_fill(empty, 0.0), v), lse


def near(found: Tensor, meant: Tensor, bound: float = 1e-10) -> None:
    """Assert equal shapes and numbers; infinities in the same places."""
    assert found.shape == meant.shape, (found.shape, meant.shape)
    torch.testing.assert_close(found.double(), meant.double(), rtol=bound, atol=bound)
