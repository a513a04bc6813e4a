"""The rows of `models.py` that train: attention in the shapes of real models, on both sides."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from random import Random
from typing import Any

import _forms as forms
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

import attnkit as ak
from attnkit import masks, pse
from attnkit.pse.t5_relative import t5_bucket

sys.path.insert(0, str(Path(__file__).parents[1]))
from docs.make import variants

Way = Callable[[Any], Tensor]
"""From what was drawn for this call (lengths, say) to the output."""


@dataclass(frozen=True)
class Sides:
    """Both sides of a row: ours, and the ways by hand.

    `draw` says what differs from call to call, as it does in life; each way makes its masks of
    it within its time. `counts` says which cells of the output count, where not all do.
    """

    tensors: list[Tensor]
    ours: Way
    by_hand: dict[str, Way]
    draw: Callable[[Random], Any] = lambda _: None
    counts: Callable[[Any], Tensor] | None = None
    steps: int = 1
    reads: dict[str, Callable[[Any], object]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """A model's attention; `make` gives its sides in a dtype. `sixteen`: in bfloat16 too."""

    name: str
    make: Callable[[torch.dtype], Sides]
    sixteen: bool = False
    trains: bool = True


def qkv(dtype: torch.dtype, b: int, n: int, s: int, d: int, kv: int | None = None) -> list[Tensor]:
    """Return query, key and value that train."""
    heads = n, kv or n, kv or n
    return [torch.randn(b, h, s, d).to(dtype).requires_grad_() for h in heads]


def layer(tensors: list[Tensor], mask: masks.Mask | None = None, **more: Any) -> ak.Attention:
    """Return our layer for tensors [b n s d]."""
    query, key = tensors[:2]
    return ak.Attention(
        query.shape[1],
        query.shape[3],
        num_kv_heads=key.shape[1],
        mask=mask,
        **{"layout": "BNSD", **more},
    )


# -- lengths that change ------------------------------------------------------------------------


def bert(dtype: torch.dtype) -> Sides:
    t = qkv(dtype, 16, 12, 512, 64)
    ours = layer(t)

    def exists(lengths: list[int]) -> Tensor:
        return torch.arange(512) < torch.tensor(lengths)[:, None, None, None]

    def texts(lengths: list[int]) -> masks.Mask:
        # Nobody reads the rows of padding: the best call by hand does not compute them either.
        return masks.PerBatch([masks.Rows(0, n) & masks.Columns(0, n) for n in lengths])

    return Sides(
        t,
        lambda lengths: ours(*t, mask=texts(lengths)),
        {
            "bool mask": lambda lengths: sdpa(*t, attn_mask=exists(lengths)),
            "float mask": lambda lengths: sdpa(*t, attn_mask=forms.floats(exists(lengths), dtype)),
            "a call per text": lambda lengths: forms.each_text(*t, lengths),
        },
        lambda rng: [512, *(rng.randint(32, 512) for _ in range(15))],
        lambda lengths: exists(lengths).mT.expand(-1, 12, -1, 64),
    )


def split(rng: Random, total: int, parts: int) -> list[int]:
    """Cut `total` tokens at random."""
    ends = [0, *sorted(rng.sample(range(1, total), parts - 1)), total]
    return [b - a for a, b in pairwise(ends)]


def packed(dtype: torch.dtype) -> Sides:
    """Documents end to end; nested tensors cannot be causal on the CPU in torch 2.13."""
    t = [torch.randn(4096, 8, 64).to(dtype).requires_grad_() for _ in range(3)]
    ours = ak.Attention(8, 64, mask=masks.Causal(), layout="TND")
    heads_first = [one.transpose(0, 1)[None] for one in t]

    def dense(lengths: list[int]) -> Tensor:
        found = sdpa(*heads_first, attn_mask=forms.documents(lengths))
        return found[0].transpose(0, 1)

    return Sides(
        t,
        lambda lengths: ours(*t, seqlens=ak.SeqLens(lengths)),
        {
            "bool mask": dense,
            "a call per document": lambda lengths: forms.each_document(*t, lengths),
            "padded": lambda lengths: forms.padded(*t, lengths),
        },
        lambda rng: split(rng, 4096, 25),
    )


def prefix_lm(dtype: torch.dtype) -> Sides:
    t = qkv(dtype, 4, 8, 1024, 64)
    ours = layer(t)
    causal = torch.ones(1024, 1024, dtype=torch.bool).tril()

    def allowed(lengths: list[int]) -> Tensor:
        return (torch.arange(1024) < torch.tensor(lengths)[:, None, None, None]) | causal

    def two_calls(lengths: list[int]) -> Tensor:
        parts = []
        for b, n in enumerate(lengths):
            q, k, v = (one[b : b + 1] for one in t)
            first = sdpa(q[:, :, :n], k[:, :, :n], v[:, :, :n])
            rest = sdpa(q[:, :, n:], k, v, attn_mask=causal[n:])
            parts.append(torch.cat([first, rest], 2))
        return torch.cat(parts)

    return Sides(
        t,
        lambda lengths: ours(*t, mask=masks.Prefix(lengths) | masks.Causal()),
        {
            "bool mask": lambda lengths: sdpa(*t, attn_mask=allowed(lengths)),
            "float mask": lambda lengths: sdpa(*t, attn_mask=forms.floats(allowed(lengths), dtype)),
            "two calls per text": two_calls,
        },
        lambda rng: [rng.randint(64, 900) for _ in range(4)],
    )


# -- short --------------------------------------------------------------------------------------


def plain(b: int, n: int, s: int, d: int, causal: bool = False) -> Callable[[torch.dtype], Sides]:
    """Attention to the text itself, full or causal."""

    def make(dtype: torch.dtype) -> Sides:
        t = qkv(dtype, b, n, s, d)
        ours = layer(t, masks.Causal() if causal else None)
        name = "is_causal" if causal else "plain"
        return Sides(t, lambda _: ours(*t), {name: lambda _: sdpa(*t, is_causal=causal)})

    return make


def whisper_cross(dtype: torch.dtype) -> Sides:
    t = [torch.randn(1, 12, s, 64).to(dtype).requires_grad_() for s in (100, 1500, 1500)]
    ours = layer(t)
    return Sides(t, lambda _: ours(*t), {"plain": lambda _: sdpa(*t)})


def t5(causal: bool) -> Callable[[torch.dtype], Sides]:
    def make(dtype: torch.dtype) -> Sides:
        t = qkv(dtype, 8, 8, 512, 64)
        table = torch.randn(32, 8, requires_grad=True)
        bias = pse.T5Relative(8, bidirectional=not causal, table=table)
        ours = layer(t, masks.Causal() if causal else None, pse=bias, scale=1.0)
        places = torch.arange(512)
        buckets = t5_bucket(places - places[:, None], bidirectional=not causal)
        closed = forms.floats(torch.ones(512, 512, dtype=torch.bool).tril(), dtype)

        def added() -> Tensor:
            found = torch.nn.functional.embedding(buckets, table).permute(2, 0, 1)[None].to(dtype)
            return found + closed if causal else found

        return Sides(
            [*t, table],
            lambda _: ours(*t),
            {
                "float bias": lambda _: sdpa(*t, attn_mask=added(), scale=1.0),
                "written out": lambda _: forms.eager(*t, added(), 1.0),
            },
        )

    return make


def swin(dtype: torch.dtype) -> Sides:
    """Shifted windows of 7 x 7 in 56 x 56 tokens, 8 images, 3 heads of 32."""
    t = qkv(dtype, 512, 3, 49, 32)
    table = torch.randn(169, 3, requires_grad=True)
    at = torch.stack(torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")).flatten(1)
    apart = at[:, :, None] - at[:, None] + 6
    index = apart[0] * 13 + apart[1]
    side = torch.tensor([0] * 49 + [1] * 4 + [2] * 3)
    image = (3 * side[:, None] + side).view(8, 7, 8, 7).transpose(1, 2).reshape(64, 49)
    allowed = image[:, :, None] == image[:, None]
    known = {cells.numpy().tobytes(): masks.Dense.keep(cells) for cells in allowed}
    known[torch.ones(49, 49, dtype=torch.bool).numpy().tobytes()] = masks.Full()
    each = [known[cells.numpy().tobytes()] for cells in allowed]
    ours = layer(t, masks.PerBatch(each * 8))
    closed = forms.floats(allowed, dtype)[:, None]

    def bias() -> Tensor:
        return table[index].permute(2, 0, 1)[None].to(dtype)

    def as_heads(call: Callable[..., Tensor]) -> Tensor:
        q, k, v = (one.reshape(8, 192, 49, 32) for one in t)
        return call(q, k, v, (bias() + closed).reshape(1, 192, 49, 49)).reshape(512, 3, 49, 32)

    return Sides(
        [*t, table],
        lambda _: ours(*t, pse=pse.Dense(bias(), validate=False)),
        {
            "float bias": lambda _: sdpa(*t, attn_mask=(bias() + closed).repeat(8, 1, 1, 1)),
            "windows as heads": lambda _: as_heads(sdpa),
            "windows as heads, written out": lambda _: as_heads(forms.eager),
        },
    )


# -- long ---------------------------------------------------------------------------------------


def llama(dtype: torch.dtype) -> Sides:
    t = qkv(dtype, 1, 32, 2048, 128, 8)
    ours = layer(t, masks.Causal())
    return Sides(
        t,
        lambda _: ours(*t),
        {
            "is_causal, enable_gqa": lambda _: sdpa(*t, is_causal=True, enable_gqa=True),
            "is_causal, repeated": lambda _: sdpa(
                t[0], *(forms.repeated(one, 4) for one in t[1:]), is_causal=True
            ),
        },
    )


def window(dtype: torch.dtype) -> Sides:
    t = qkv(dtype, 1, 32, 4096, 128, 8)
    ours = layer(t, masks.SlidingWindow(1024))
    allowed = masks.SlidingWindow(1024).materialize(4096, 4096)
    added = forms.floats(allowed, dtype)
    return Sides(
        t,
        lambda _: ours(*t),
        {
            "float mask, enable_gqa": lambda _: sdpa(*t, attn_mask=added, enable_gqa=True),
            "unfolded, blocks of 1024": lambda _: forms.unfolded(*t, 1024, 1024),
            "unfolded, blocks of 512": lambda _: forms.unfolded(*t, 1024, 512),
        },
    )


def gpt_oss(dtype: torch.dtype) -> Sides:
    t = qkv(dtype, 1, 32, 2048, 64, 4)
    q, k, v = t
    ours = layer(t, masks.SlidingWindow(128), sink=True)
    sink = ours.get_parameter("sink")
    added = forms.floats(masks.SlidingWindow(128).materialize(2048, 2048), dtype)

    def whole(_: None) -> Tensor:
        return forms.eager(
            q, forms.repeated(k, 8), forms.repeated(v, 8), added, sink=sink.to(dtype)
        )

    return Sides(
        [*t, sink],
        lambda _: ours(*t),
        {
            "written out": whole,
            "unfolded, blocks of 128": lambda _: forms.unfolded(*t, 128, 128, sink.to(dtype)),
        },
    )


def longformer(dtype: torch.dtype) -> Sides:
    t = qkv(dtype, 1, 12, 4096, 64)
    mask = masks.Band(256, 256) | masks.Columns(0, 1) | masks.Rows(0, 1)
    ours = layer(t, mask)
    allowed = mask.materialize(4096, 4096)
    added = forms.floats(allowed, dtype)
    return Sides(
        t,
        lambda _: ours(*t),
        {
            "float mask": lambda _: sdpa(*t, attn_mask=added),
            "unfolded": lambda _: forms.longformer(*t, 256, 1),
        },
    )


def gemma(dtype: torch.dtype) -> Sides:
    t = qkv(dtype, 1, 8, 2048, 256, 4)
    q, k, v = t
    ours = layer(t, masks.Causal(), softcap=50.0)
    added = forms.floats(torch.ones(2048, 2048, dtype=torch.bool).tril(), dtype)

    def whole(_: None) -> Tensor:
        return forms.eager(q, forms.repeated(k, 2), forms.repeated(v, 2), added, softcap=50.0)

    return Sides(t, lambda _: ours(*t), {"written out": whole})


def alibi(dtype: torch.dtype) -> Sides:
    t = qkv(dtype, 4, 8, 1024, 64)
    ours = layer(t, masks.Causal(), pse=pse.ALiBi(8))
    hidden = ~torch.ones(1024, 1024, dtype=torch.bool).tril()
    added = pse.ALiBi(8).materialize(1024, 1024).masked_fill(hidden, -torch.inf).to(dtype)
    return Sides(t, lambda _: ours(*t), {"float bias": lambda _: sdpa(*t, attn_mask=added)})


def mla(dtype: torch.dtype) -> Sides:
    q, k, _ = qkv(dtype, 1, 16, 2048, 192)
    v = torch.randn(1, 16, 2048, 128).to(dtype).requires_grad_()
    t = [q, k, v]
    ours = layer(t, masks.Causal())
    return Sides(
        t,
        lambda _: ours(*t),
        {
            "is_causal": lambda _: sdpa(*t, is_causal=True),
            "is_causal, values padded": lambda _: sdpa(q, k, pad(v, (0, 64)), is_causal=True)[
                ..., :128
            ],
        },
    )


def block_diffusion(dtype: torch.dtype) -> Sides:
    t = qkv(dtype, 1, 8, 4096, 64)
    mask = variants.block_diffusion(4096, 64)
    ours = layer(t, mask)
    added = forms.floats(mask.materialize(4096, 4096)[0, 0], dtype)

    def two_calls(_: None) -> Tensor:
        halves = list(chain.from_iterable(one.split(2048, 2) for one in t))
        noisy, clean = halves[0], halves[1]
        first = sdpa(noisy, t[1], t[2], attn_mask=added[:2048])
        second = sdpa(clean, halves[3], halves[5], attn_mask=added[2048:, 2048:])
        return torch.cat([first, second], 2)

    return Sides(
        t,
        lambda _: ours(*t),
        {"float mask": lambda _: sdpa(*t, attn_mask=added), "two calls": two_calls},
    )


def chunk(dtype: torch.dtype) -> Sides:
    """The last chunk of a prompt: 512 new tokens on 3,584 cached ones."""
    t = [torch.randn(1, n, s, 128).to(dtype) for n, s in ((32, 512), (8, 4096), (8, 4096))]
    ours = layer(t, masks.Causal())
    allowed = torch.ones(512, 4096, dtype=torch.bool).tril(3584)
    added = forms.floats(allowed, dtype)
    return Sides(
        t,
        lambda _: ours(*t),
        {
            "bool mask, enable_gqa": lambda _: sdpa(*t, attn_mask=allowed, enable_gqa=True),
            "float mask, enable_gqa": lambda _: sdpa(*t, attn_mask=added, enable_gqa=True),
            "rows of groups, float mask": lambda _: forms.by_groups(*t, added),
        },
    )


ROWS = (
    Row("BERT, padding: batch 16, 512 tokens, new lengths", bert, sixteen=True),
    Row("packed pre-training: 25 documents, 4,096 tokens, new lengths", packed, sixteen=True),
    Row("PrefixLM: batch 4, 1,024 tokens, new prefixes", prefix_lm),
    Row("T5 encoder: batch 8, 512 tokens", t5(causal=False), sixteen=True),
    Row("T5 decoder: batch 8, 512 tokens", t5(causal=True)),
    Row("ViT: batch 32, 197 tokens", plain(32, 12, 197, 64), sixteen=True),
    Row("32 sentences of 128 tokens", plain(32, 12, 128, 64)),
    Row("32 sequences of 128 tokens, causal", plain(32, 8, 128, 64, causal=True)),
    Row("Swin: 512 shifted windows of 49 tokens", swin),
    Row("Whisper encoder: 1,500 frames", plain(1, 12, 1500, 64)),
    Row("Whisper cross-attention: 100 tokens, 1,500 frames", whisper_cross),
    Row("Llama: 2,048 tokens, 32/8 heads of 128, causal", llama, sixteen=True),
    Row("Mistral: window 1,024 in 4,096 tokens, 32/8 heads of 128", window, sixteen=True),
    Row("gpt-oss: sinks, window 128 in 2,048 tokens, 32/4 heads", gpt_oss),
    Row("Longformer: 256 to each side, one global token, 4,096 tokens", longformer),
    Row("Gemma-2: soft-cap, 2,048 tokens, 8/4 heads of 256, causal", gemma),
    Row("ALiBi: batch 4, 1,024 tokens, causal", alibi),
    Row("MLA: head sizes 192 and 128, 2,048 tokens, causal", mla),
    Row("block diffusion: blocks of 64, 4,096 tokens", block_diffusion),
    Row("prefill in chunks: 512 tokens on 3,584, 32/8 heads of 128", chunk, trains=False),
)
