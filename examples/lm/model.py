"""A decoder-only transformer over bytes, with attnkit's attention in the middle of each block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

import attnkit as ak
from attnkit.parallel import ContextParallel, Shards
from lm.config import ModelConfig
from lm.data import START, VOCABULARY, Batch
from lm.ranks import Ranks


class LanguageModel(nn.Module):
    """Scores for the next byte at every position of a packed batch."""

    def __init__(self, config: ModelConfig, attention: ak.AttentionConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.dim)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, START, bias=False)  # bytes only: START is never next
        self.apply(_initialise)

    def forward(
        self,
        tokens: Tensor,
        seqlens: ak.SeqLens | None = None,
        caches: Sequence[ak.KVCache] | None = None,
        shards: Shards | None = None,
    ) -> Tensor:
        """Return [t, 256] scores for packed tokens [t], or [b, s, 256] for [b, s] with caches.

        With `shards`, both are those of this process.
        """
        x = self.embedding(tokens)
        for index, block in enumerate(self.blocks):
            x = block(x, seqlens, caches[index] if caches else None, shards)
        scores: Tensor = self.head(self.norm(x))
        return scores

    def loss(
        self, batch: Batch, reduction: str = "mean", spread: ContextParallel | None = None
    ) -> Tensor:
        """Return the cross-entropy of the batch's targets in bits (per byte, if the mean).

        Where it is `spread` over processes, that is this one's share: they add up to it.
        """
        if spread is None:
            scores = self(batch.inputs, ak.SeqLens(batch.lengths))
            bits = functional.cross_entropy(scores, batch.targets, reduction=reduction)
        else:
            here = self.shards(batch, spread)
            scores = self(here.take(batch.inputs, dim=0), shards=here)
            # Targets were shifted before they are cut here.
            targets = here.take(batch.targets, dim=0)
            bits = functional.cross_entropy(scores, targets, reduction="sum")
            bits = bits / len(batch.targets) if reduction == "mean" else bits
        return bits / math.log(2)

    def shards(self, batch: Batch, spread: ContextParallel) -> Shards:
        """Return which tokens of a batch each process has: as even as the mask can be cut."""
        first: Block = self.blocks[0]  # type: ignore[assignment]
        return spread.shards(first.attention.attention.mask, seqlens=ak.SeqLens(batch.lengths))

    def explain_attention(self, batch: Batch, spread: ContextParallel | None = None) -> str:
        """Return the plan that every layer's attention follows for `batch`, and its reasons."""
        first: Block = self.blocks[0]  # type: ignore[assignment]
        if spread is None:
            x = self.embedding(batch.inputs)
            return first.attention.explain(x, seqlens=ak.SeqLens(batch.lengths))
        here = self.shards(batch, spread)
        return first.attention.explain(self.embedding(here.take(batch.inputs, dim=0)), shards=here)


class Block(nn.Module):
    """Attention between positions, then an MLP at each, both added to the residual stream."""

    def __init__(self, config: ModelConfig, attention: ak.AttentionConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.dim)
        self.attention = ak.MultiHeadAttention(
            config.dim,
            attention.num_heads,
            head_dim=attention.head_dim,
            num_kv_heads=attention.num_kv_heads,
            rotary=config.rotary,
            mask=attention.mask,
            pse=attention.pse,
            scale=attention.scale,
            dropout=attention.dropout,
            sink=attention.sink,
            softcap=attention.softcap,
            layout=attention.layout,
            backend=attention.backend,
        )
        self.norm2 = nn.RMSNorm(config.dim)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, 4 * config.dim, bias=False),
            nn.GELU(),
            nn.Linear(4 * config.dim, config.dim, bias=False),
        )

    def forward(
        self,
        x: Tensor,
        seqlens: ak.SeqLens | None,
        cache: ak.KVCache | None,
        shards: Shards | None = None,
    ) -> Tensor:
        """Return x with what this block adds to it."""
        x = x + self.attention(self.norm1(x), seqlens=seqlens, cache=cache, shards=shards)
        residual: Tensor = x + self.mlp(self.norm2(x))
        return residual


def _initialise(module: nn.Module) -> None:
    """Keep activations at unit size: embeddings as they are, linear maps by their fan-in."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight)


@torch.no_grad()
def bits_per_byte(model: LanguageModel, batches: Sequence[Batch], ranks: Ranks) -> float:
    """Return the mean cost of every target in `batches`, without dropout."""
    model.eval()
    total = sum(float(model.loss(batch, "sum", ranks.spread)) for batch in batches)
    model.train()
    (total,) = ranks.added(total)
    return total / sum(len(batch.targets) for batch in batches)


@torch.no_grad()
def write_on(
    model: LanguageModel, prompt: bytes, *, length: int, temperature: float, seed: int
) -> bytes:
    """Return `length` bytes that the model writes after `prompt`.

    The prompt is read once; after that each new byte attends to cached keys and values. The draws
    come from a generator of their own, so that writing a sample changes nothing about a run.
    """
    device = model.head.weight.device
    draws = torch.Generator().manual_seed(seed)
    caches = [ak.KVCache(1 + len(prompt) + length) for _ in model.blocks]
    unread = torch.tensor([[START, *prompt]], device=device)
    written = bytearray()
    model.eval()
    for _ in range(length):
        scores = model(unread, caches=caches)[0, -1].float().cpu()
        byte = torch.multinomial((scores / temperature).softmax(-1), 1, generator=draws)
        written.append(int(byte))
        unread = byte[None].to(device)
    model.train()
    return bytes(written)
