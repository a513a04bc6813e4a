"""The weights of attention, computed apart where a model is asked for them."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.attend import Asked

__all__ = ["attention_weights"]


def attention_weights(asked: Asked, query: Tensor, key: Tensor, sink: Tensor | None) -> Tensor:
    """Return the softmax of all scores, ``b n s_q s_kv``, before dropout.

    `query` ``b n s d``, `key` ``b m j d``; `sink` ``[n]`` or ``[b, n, s_q, 1]``. Slow, and as
    large as the scores: for looking at small inputs.
    """
    batch, heads, q_len, dim = query.shape
    kv_len = key.shape[2]
    scale = dim**-0.5 if asked.scale is None else asked.scale
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    each = key.repeat_interleave(heads // key.shape[1], 1)
    scores = query.to(wide) @ each.to(wide).mT * scale
    if asked.softcap is not None:
        scores = asked.softcap * torch.tanh(scores / asked.softcap)
    if asked.pse is not None:
        bias = asked.pse.materialize(q_len, kv_len, dtype=wide, device=query.device)
        scores = scores + bias
    kept = asked.mask.materialize(q_len, kv_len, batch, heads, query.device)
    scores = scores.masked_fill(~kept, -torch.inf)
    if sink is not None:
        logits = sink.view(1, -1, 1, 1) if sink.dim() == 1 else sink
        logits = logits.to(wide).expand(batch, heads, q_len, 1)
        scores = torch.cat([scores, logits], -1)
    weights = torch.softmax(scores, -1)[..., :kv_len]
    return weights.masked_fill(~kept, 0.0).to(query.dtype)
