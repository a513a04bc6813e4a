"""The rows of `models.py` that decode: loops of steps, each with one more key than the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from random import Random
from typing import Any

import _forms as forms
import torch
from _model_rows import Row, Sides, Way
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.functional import scaled_dot_product_attention as sdpa

import attnkit as ak
from attnkit import masks

Loop = Callable[[Tensor, Tensor, Tensor], Tensor]

# Twice what the processors' caches hold.
CACHED = 64 << 20


def reading(held: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Callable[[int], object]]:
    """Return ways to read keys and values ``[b n s d]`` of layers, in turns, up to a length."""
    room, turns = torch.empty_like(held[0][0]).flatten(), cycle(held)

    def copied(length: int) -> None:
        for one in next(turns):
            part = one[:, :, :length]
            room[: part.numel()].view(part.shape).copy_(part)

    def reduced(how: Callable[[Tensor], Tensor]) -> Callable[[int], object]:
        return lambda length: [how(one[:, :, :length]) for one in next(turns)]

    return {"sum": reduced(torch.sum), "max": reduced(torch.amax), "copy": copied}


def caches(dtype: torch.dtype, b: int, n: int, length: int, d: int) -> tuple[Tensor, Tensor]:
    """Return keys and values with room for a length."""
    return torch.randn(b, n, length, d).to(dtype), torch.randn(b, n, length, d).to(dtype)


def decode(
    batch: int, length: int, heads: int = 32, kv_heads: int = 8, dim: int = 128
) -> Callable[[torch.dtype], Sides]:
    """Steps of one token each; a step's length comes back after hundreds of others.

    A step goes through the layers of a model, each with its keys and values: so many that they
    are not in the processor's caches when a step comes back to them.
    """

    def make(dtype: torch.dtype) -> Sides:
        size = 2 * batch * kv_heads * length * dim * dtype.itemsize
        layers, span = max(1, min(12, CACHED // size)), min(256, length // 4)
        steps = max(1, min(16, 4 * CACHED // (size * layers)))
        held = [caches(dtype, batch, kv_heads, length + steps, dim) for _ in range(layers)]
        queries = torch.randn(steps, batch, heads, 1, dim).to(dtype)
        ours = [
            ak.Attention(heads, dim, num_kv_heads=kv_heads, mask=masks.Causal(), layout="BNSD")
            for _ in range(layers)
        ]

        def loop(each: Sequence[Loop]) -> Way:
            def run(start: int) -> Tensor:
                for k, query in enumerate(queries):
                    stop = start + k + 1
                    for step, (keys, values) in zip(each, held, strict=True):
                        found = step(query, keys[:, :, :stop], values[:, :, :stop])
                return found

            return run

        ways: dict[str, Loop] = {
            "plain": sdpa,
            "enable_gqa": lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
            "rows of groups": forms.by_groups,
            "rows of groups, written out": forms.by_groups_eager,
        }
        if heads == kv_heads:
            ways = {"plain": sdpa, "written out": forms.eager}
        else:
            del ways["plain"]
        return Sides(
            [],
            loop([one.eval() for one in ours]),
            {name: loop([step] * layers) for name, step in ways.items()},
            lambda rng: length - rng.randrange(span),
            steps=steps * layers,
            reads=reading(held),
        )

    return make


def tree(dtype: torch.dtype) -> Sides:
    """A speculative step: 25 drafted tokens, each of which sees the text and its ancestors.

    All layers of a model take the same step, and both sides make its mask once.
    """
    count, steps, layers = 25, 8, 4
    draw = Random(0)
    ancestors = torch.eye(count, dtype=torch.bool)
    for k in range(1, count):
        ancestors[k] |= ancestors[draw.randrange(k)]
    held = [caches(dtype, 1, 8, 2048 + 5 * steps + count, 128) for _ in range(layers)]
    queries = torch.randn(steps, 1, 32, count, 128).to(dtype)
    ours = [ak.Attention(32, 128, num_kv_heads=8, layout="BNSD").eval() for _ in held]

    def loop(made: Callable[[Tensor], Any], each: Sequence[Callable[..., Tensor]]) -> Way:
        def run(start: int) -> Tensor:
            for k, query in enumerate(queries):
                text = start + 5 * k  # as many drafts are taken
                stop = text + count
                mask = made(torch.cat([torch.ones(count, text, dtype=torch.bool), ancestors], 1))
                for step, (keys, values) in zip(each, held, strict=True):
                    found = step(query, keys[:, :, :stop], values[:, :, :stop], mask)
            return found

        return run

    def as_floats(allowed: Tensor) -> Tensor:
        return forms.floats(allowed, dtype)

    def by_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)

    def by_ours(one: ak.Attention) -> Callable[..., Tensor]:
        return lambda q, k, v, mask: one(q, k, v, mask=mask)

    return Sides(
        [],
        loop(masks.Dense.keep, [by_ours(one) for one in ours]),
        {
            "float mask, enable_gqa": loop(as_floats, [by_torch] * layers),
            "rows of groups": loop(as_floats, [forms.by_groups] * layers),
            "rows of groups, written out": loop(as_floats, [forms.by_groups_eager] * layers),
        },
        lambda rng: 2048 - rng.randrange(256),
        steps=steps * layers,
        reads=reading(held),
    )


def unequal(dtype: torch.dtype) -> Sides:
    """Eight texts of their own lengths, padded on the right in one cache."""
    batch, steps, most = 8, 8, 4096
    keys, values = caches(dtype, batch, 8, most + steps, 128)
    queries = torch.randn(steps, batch, 32, 1, 128).to(dtype)
    ours = ak.Attention(32, 128, num_kv_heads=8, layout="BNSD").eval()

    def loop(step: Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]) -> Way:
        def run(lengths: list[int]) -> Tensor:
            for k, query in enumerate(queries):
                now = [n + k + 1 for n in lengths]
                stop = max(now)
                found = step(query, keys[:, :, :stop], values[:, :, :stop], now)
            return found

        return run

    def exists(k: Tensor, now: list[int]) -> Tensor:
        return torch.arange(k.shape[2]) < torch.tensor(now)[:, None, None, None]

    def each(q: Tensor, k: Tensor, v: Tensor, now: list[int]) -> Tensor:
        parts = [
            forms.by_groups(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
            for b, n in enumerate(now)
        ]
        return torch.cat(parts)

    def read(lengths: list[int]) -> None:
        for one in (keys, values):
            for b, n in enumerate(lengths):
                one[b, :, :n].sum()

    return Sides(
        [],
        loop(lambda q, k, v, now: ours(q, k, v, mask=masks.Padding(now))),
        {
            "bool mask, enable_gqa": loop(
                lambda q, k, v, now: sdpa(q, k, v, attn_mask=exists(k, now), enable_gqa=True)
            ),
            "rows of groups": loop(
                lambda q, k, v, now: forms.by_groups(q, k, v, forms.floats(exists(k, now), dtype))
            ),
            "a call per text, rows of groups": loop(each),
        },
        lambda rng: [rng.randint(512, 4000) for _ in range(batch)],
        steps=steps,
        reads={"sum": read},
    )


def whole_layers(dtype: torch.dtype) -> Sides:
    """Steps of `MultiHeadAttention` with its caches, and of hand-written layers with the same."""
    dim, heads, length, steps, count = 512, 8, 512, 16, 12
    ours = [
        ak.MultiHeadAttention(dim, heads, mask=masks.Causal(), dtype=dtype).eval()
        for _ in range(count)
    ]
    weights = [
        [p.weight for p in (one.q_proj, one.k_proj, one.v_proj, one.out_proj)]  # type: ignore[union-attr]
        for one in ours
    ]
    text = torch.randn(1, length + steps, dim).to(dtype)
    kept = [ak.KVCache(capacity=length + steps) for _ in ours]
    held = [caches(dtype, 1, heads, length + steps, dim // heads) for _ in ours]
    with torch.no_grad():
        for one, cache, pair in zip(ours, kept, held, strict=True):
            one(text, cache=cache)
            for tensor, found in zip(pair, cache.read(), strict=True):
                tensor.copy_(found.transpose(1, 2))

    starts = cycle(range(length - 8 * steps, length + 1, steps))

    def layers(start: int) -> Tensor:
        for one, cache in zip(ours, kept, strict=True):
            if cache.length < start:  # a turn that ours did not take part in
                one(text[:, cache.length : start], cache=cache)
            cache.truncate(start)
        for p in range(start, start + steps):
            for one, cache in zip(ours, kept, strict=True):
                found = one(text[:, p : p + 1], cache=cache)
        return found

    def split(x: Tensor) -> Tensor:
        return x.view(1, 1, heads, dim // heads).transpose(1, 2)

    def by_hand(start: int) -> Tensor:
        for p in range(start, start + steps):
            x = text[:, p : p + 1]
            for (q, k, v, out), (keys, values) in zip(weights, held, strict=True):
                keys[:, :, p : p + 1] = split(linear(x, k))
                values[:, :, p : p + 1] = split(linear(x, v))
                found = sdpa(split(linear(x, q)), keys[:, :, : p + 1], values[:, :, : p + 1])
                found = linear(found.transpose(1, 2).reshape(1, 1, dim), out)
        return found

    return Sides(
        [],
        layers,
        {"by hand, the same projections": by_hand},
        lambda _: next(starts),
        steps=steps * count,
    )


DECODING = (
    *(
        Row(
            f"decode: {count} sequence{'s'[: count > 1]}, {length:,} keys, 32/8 heads of 128",
            decode(count, length),
            sixteen=(count, length) == (1, 4096),
            trains=False,
        )
        for count in (1, 8)
        for length in (1024, 4096, 32768)
    ),
    Row("decode: 512 keys, 8 heads of 64", decode(1, 512, 8, 8, 64), trains=False),
    Row("decode: 512 keys, 8 heads of 64, MultiHeadAttention", whole_layers, trains=False),
    Row("decode: 8 sequences of unequal lengths to 4,096", unequal, trains=False),
    Row("speculative: a tree of 25 tokens on 2,048", tree, trains=False),
)
