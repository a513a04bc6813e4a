"""T5: encoder and decoder with biases by distance, learned once for all layers, and no scale.

Source: Raffel et al., "Exploring the Limits of Transfer Learning" (JMLR 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from models.parts import load

RENAMED = {
    "block.0.layer.0.SelfAttention.relative_attention_bias.weight": "table",
    "SelfAttention.o.": "attn.out_proj.",
    "EncDecAttention.o.": "attn.out_proj.",
    "DenseReluDense.wi.": "mlp.0.",
    "DenseReluDense.wo.": "mlp.2.",
    **{f"SelfAttention.{one}.": f"attn.{one}_proj." for one in "qkv"},
    **{f"EncDecAttention.{one}.": f"attn.{one}_proj." for one in "qkv"},
}
Caches = Sequence[tuple[ak.KVCache, ak.KVCache]]


class Part(nn.Module):
    """A norm and what comes after it: attention, or two projections."""

    def __init__(self, config: Any, attends: bool) -> None:
        super().__init__()
        dim, hidden = config.d_model, config.d_ff
        self.layer_norm = nn.RMSNorm(dim, config.layer_norm_epsilon)
        if attends:
            heads = config.num_heads
            self.attn = ak.MultiHeadAttention(dim, heads, head_dim=config.d_kv, scale=1.0)
        else:
            first, last = (nn.Linear(a, b, bias=False) for a, b in ((dim, hidden), (hidden, dim)))
            self.mlp = nn.Sequential(first, nn.ReLU(), last)


class Block(nn.Module):
    """One layer, ``[b s d] -> [b s d]``."""

    def __init__(self, config: Any, decodes: bool) -> None:
        super().__init__()
        attends = (True, True, False) if decodes else (True, False)
        self.layer = nn.ModuleList(Part(config, one) for one in attends)

    def forward(
        self,
        x: Tensor,
        own: tuple[masks.Mask, pse.Pse],
        context: Tensor | None = None,
        padding: masks.Mask | None = None,
        caches: tuple[ak.KVCache | None, ak.KVCache | None] = (None, None),
    ) -> Tensor:
        """``[b s d] -> [b s d]``."""
        mask, bias = own
        parts: list[Any] = list(self.layer)
        first, *across, last = parts
        x = x + first.attn(first.layer_norm(x), mask=mask, pse=bias, cache=caches[0])
        for part in across:
            x = x + part.attn(part.layer_norm(x), context, mask=padding, cache=caches[1])
        out: Tensor = x + last.mlp(last.layer_norm(x))
        return out


class Stack(nn.Module):
    """The encoder or the decoder, ``[b s d] -> [b s d]``; all its layers share one table."""

    def __init__(self, config: Any, embed_tokens: nn.Embedding, decodes: bool) -> None:
        super().__init__()
        count = config.num_decoder_layers if decodes else config.num_layers
        buckets, farthest = (
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        self.embed_tokens, self.sizes = embed_tokens, (config.num_heads, buckets, farthest)
        self.decodes = decodes
        self.table = nn.Parameter(torch.zeros(buckets, config.num_heads))
        self.block = nn.ModuleList(Block(config, decodes) for _ in range(count))
        self.final_layer_norm = nn.RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(
        self,
        ids: Tensor,
        padding: masks.Mask,
        context: Tensor | None = None,
        caches: Caches | None = None,
    ) -> Tensor:
        """Return one vector for every token."""
        bias = pse.T5Relative(*self.sizes, not self.decodes, table=self.table)
        own = (masks.Causal() if self.decodes else padding, bias)
        x = self.embed_tokens(ids)
        none = [(None, None)] * len(self.block)
        for block, kept in zip(self.block, caches or none, strict=True):
            x = block(x, own, context, padding, kept)
        out: Tensor = self.final_layer_norm(x)
        return out


class T5(nn.Module):
    """``ids [b s], targets [b t] -> logits [b t v]``, of a `transformers.T5Config`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder, self.decoder = (Stack(config, self.shared, one) for one in (False, True))
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.shrinks = config.scale_decoder_outputs
        if config.tie_word_embeddings:
            self.lm_head.weight = self.shared.weight

    def forward(self, ids: Tensor, targets: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits; `attention_mask` ``[b s]`` says which of `ids` exist."""
        padding = masks.Padding.of(attention_mask)
        return self.decode(targets, self.encoder(ids, padding), padding)

    def decode(
        self, ids: Tensor, context: Tensor, padding: masks.Mask, caches: Caches | None = None
    ) -> Tensor:
        """Return the logits; with `caches`, two for each layer, `ids` are the next tokens."""
        x = self.decoder(ids, padding, context, caches)
        logits: Tensor = self.lm_head(x * x.shape[-1] ** -0.5 if self.shrinks else x)
        return logits


def from_checkpoint(config: Any, state: Mapping[str, Tensor]) -> T5:
    """Return the model with the weights of `transformers.T5ForConditionalGeneration`."""
    return load(T5(config), state, RENAMED)
