"""Attention as a good user of torch writes it by hand: the forms that `models.py` races against.

All tensors are ``[b n s d]`` unless said; an allowed cell of a mask is True.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa


def floats(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as what is added to scores."""
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    added: Tensor | None = None,
    scale: float | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Softmax as models write it out; `added` holds the bias, and -inf where masked."""
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * factor) @ key.mT
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if added is not None:
        scores = scores + added
    if sink is None:
        return torch.softmax(scores, -1) @ value
    column = sink.view(-1, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.softmax(torch.cat([scores, column], -1), -1)
    return weights[..., :-1] @ value


def repeated(tensor: Tensor, times: int) -> Tensor:
    """Repeat key heads for their query heads."""
    return tensor.repeat_interleave(times, 1)


def folded(query: Tensor, kv_heads: int) -> Tensor:
    """Make the query heads of a group rows: ``[b g*n s d]`` to ``[b g n*s d]``."""
    return query.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def by_groups(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """SDPA on the rows of each group; the mask ``[.. s kv]`` is repeated for its heads."""
    heads, kv_heads = query.shape[1], key.shape[1]
    mask = None if allowed is None else torch.cat([allowed] * (heads // kv_heads), -2)
    found = sdpa(folded(query, kv_heads), key, value, attn_mask=mask)
    return found.unflatten(2, (heads // kv_heads, -1)).flatten(1, 2)


def by_groups_eager(
    query: Tensor, key: Tensor, value: Tensor, added: Tensor | None = None
) -> Tensor:
    """Write softmax out on the rows of each group."""
    heads, kv_heads = query.shape[1], key.shape[1]
    mask = None if added is None else torch.cat([added] * (heads // kv_heads), -2)
    found = eager(folded(query, kv_heads), key, value, mask)
    return found.unflatten(2, (heads // kv_heads, -1)).flatten(1, 2)


def each_text(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """One call per text of a padded batch; what is padding gives 0."""
    parts = []
    for b, n in enumerate(lengths):
        part = (slice(b, b + 1), slice(None), slice(0, n))
        found = sdpa(query[part], key[part], value[part])
        parts.append(pad(found, (0, 0, 0, query.shape[2] - n)))
    return torch.cat(parts)


def each_document(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """One causal call per document of a packed batch ``[t n d]``."""
    parts = []
    for a, b in pairwise(accumulate(lengths, initial=0)):
        one = (t[a:b].transpose(0, 1)[None] for t in (query, key, value))
        parts.append(sdpa(*one, is_causal=True)[0].transpose(0, 1))
    return torch.cat(parts)


def padded(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """One causal call on a packed batch ``[t n d]`` that is padded first."""
    counts = torch.tensor(lengths)
    exists = torch.arange(max(lengths)) < counts[:, None]
    q, k, v = (
        t.new_zeros(*exists.shape, *t.shape[1:]).index_put((exists,), t).transpose(1, 2)
        for t in (query, key, value)
    )
    return sdpa(q, k, v, is_causal=True).transpose(1, 2)[exists]


def numbers(lengths: Sequence[int]) -> Tensor:
    """Return the document of each token."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def documents(lengths: Sequence[int]) -> Tensor:
    """Return the dense causal mask of packed documents."""
    own = numbers(lengths)
    return (own[:, None] == own).tril_()


def unfolded(
    query: Tensor, key: Tensor, value: Tensor, window: int, block: int, sink: Tensor | None = None
) -> Tensor:
    """Attend in blocks of queries that see their own keys and a window before: local attention.

    Key heads are repeated first.
    """
    batch, heads, length, dim = query.shape
    key, value = (repeated(t, heads // key.shape[1]) for t in (key, value))
    before = -(-(window - 1) // block) * block
    k, v = (
        pad(t, (0, 0, before, 0)).unfold(2, before + block, block).movedim(-1, 3).flatten(0, 1)
        for t in (key, value)
    )
    q = query.unflatten(2, (-1, block)).flatten(0, 1)
    i, j = torch.arange(block)[:, None] + before, torch.arange(before + block)
    first = torch.arange(0, length, block)[:, None, None]
    allowed = (j <= i) & (j > i - window) & (j + first >= before)
    if sink is None:
        found = sdpa(q, k, v, attn_mask=allowed)
    else:
        logits = sink.repeat(batch).view(-1, 1, 1, 1)
        scores = q @ k.mT * dim**-0.5 + floats(allowed, query.dtype)
        column = logits.expand(*scores.shape[:-1], 1)
        found = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v
    return found.reshape(batch, heads, length, dim)


def longformer(query: Tensor, key: Tensor, value: Tensor, side: int, few: int) -> Tensor:
    """Attend in blocks with neighbours on both sides, and `few` global tokens in front."""
    batch, heads, length, dim = query.shape
    k, v = (
        pad(t, (0, 0, side, side)).unfold(2, 3 * side, side).movedim(-1, 3).flatten(0, 1)
        for t in (key, value)
    )
    blocks = length // side
    front = [t[:, :, None, :few].expand(-1, -1, blocks, -1, -1).flatten(0, 1) for t in (key, value)]
    k, v = (torch.cat(both, 2) for both in zip(front, (k, v), strict=True))
    q = query.unflatten(2, (-1, side)).flatten(0, 1)
    i, j = torch.arange(side)[:, None] + side, torch.arange(3 * side)
    at = j + torch.arange(0, length, side)[:, None, None] - side
    near = ((i - j).abs() <= side) & (at >= few) & (at < length)
    allowed = torch.cat([torch.ones(blocks, side, few, dtype=torch.bool), near], -1)
    found = sdpa(q, k, v, attn_mask=allowed).reshape(batch, heads, length, dim)
    whole = sdpa(query[:, :, :few], key, value)
    return torch.cat([whole, found[:, :, few:]], 2)
