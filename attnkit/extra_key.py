"""A key and a value of the layer's own, which every query sees after those of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import dropout as dropped

from attnkit.backends import AttentionOutput, Stats
from attnkit.errors import CompositionError
from attnkit.parallel.shards import Shards

__all__ = ["with_extra_key"]


def with_extra_key(
    found: AttentionOutput,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropout: float,
    shards: Shards | None = None,
) -> AttentionOutput:
    """Return what attention is with one key more, from what it is without.

    ``softmax([scores, s]) @ [v, value]`` with ``s = scale * query . key``, which is
    ``output + sigmoid(s - lse) * (value - output)``: nothing is concatenated, and no mask knows
    of it. Query and output are ``[b s n d]`` or ``[t n d]``, the key ``[n_kv d]``, the value
    ``[n_kv d_v]``. Dropout is that of one more weight in each row; of `shards` it is drawn for the
    rows of all ranks, so that their generators stay in step.

    >>> import attnkit as ak
    >>> x = torch.randn(1, 5, 2, 8)
    >>> found = ak.attention(x, x[:, 1:], x[:, 1:], return_stats=True)
    >>> more = with_extra_key(found, x, x[0, 0], x[0, 0], 8**-0.5, 0.0)
    >>> torch.allclose(more.output, ak.attention(x, x, x), atol=1e-6)
    True
    """
    packed, dtype = query.ndim == 3, found.stats.lse.dtype

    def turned(stat: Tensor) -> Tensor:  # [b n s] and [b s n] into each other
        return stat if packed else stat.transpose(1, 2)

    lse = turned(found.stats.lse)
    group = query.shape[-2] // len(key)
    key, value = (one.repeat_interleave(group, 0).to(dtype) for one in (key, value))
    score = scale * (query.to(dtype) * key).sum(-1)
    # Of a row that sees no other key, lse is -inf and the weight 1.
    weight, rest = torch.sigmoid(score - lse), torch.sigmoid(lse - score)
    if dropout:
        weight = dropped(weight, dropout) if shards is None else _of_all(shards, weight, dropout)
    output = found.output * rest[..., None] + weight[..., None] * value
    stats = Stats(
        lambda: turned(torch.logaddexp(lse, score)),
        lambda: torch.maximum(found.stats.max, turned(score.detach())),
    )
    return AttentionOutput(output.to(found.output.dtype), stats)


def _of_all(shards: Shards, weight: Tensor, dropout: float) -> Tensor:
    """Return the weights ``[... s n]`` of this rank's rows, as dropout of all rows leaves them."""
    if torch.compiler.is_dynamo_compiling():
        raise CompositionError(
            "extra_key=True with dropout and shards inside of torch.compile: how many tokens all "
            "ranks have is not known there; leave one of them out"
        )
    shape = (*weight.shape[:-2], shards.sharding.length, weight.shape[-1])
    return weight * shards.take(dropped(weight.new_ones(shape), dropout), -2)
