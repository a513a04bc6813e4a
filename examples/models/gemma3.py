"""Gemma 3: layers with a window and some without; an image's tokens see each other in all.

Source: Gemma Team, "Gemma 3 Technical Report" (arXiv:2503.19786).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from models.parts import Shifted, SwiGLU, load, rotary, through

RENAMED = {"model.": "", "o_proj": "out_proj"}


class Block(nn.Module):
    """One layer, ``[b s d] -> [b s d]``; norms stand before and after each of its parts."""

    def __init__(self, config: Any, kind: str) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        local = kind == "sliding_attention"
        self.causal = masks.SlidingWindow(config.sliding_window) if local else masks.Causal()
        self.self_attn = ak.MultiHeadAttention(
            dim,
            config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            qk_norm=lambda size: Shifted(size, eps),
            rotary=rotary(config.rope_parameters[kind]),
            scale=config.query_pre_attn_scalar**-0.5,
            softcap=config.attn_logit_softcapping,
        )
        self.mlp = SwiGLU(dim, config.intermediate_size, nn.GELU("tanh"))
        self.input_layernorm = Shifted(dim, eps)
        self.post_attention_layernorm = Shifted(dim, eps)
        self.pre_feedforward_layernorm = Shifted(dim, eps)
        self.post_feedforward_layernorm = Shifted(dim, eps)

    def forward(self, x: Tensor, spans: masks.Mask | None, cache: ak.KVCache | None) -> Tensor:
        """``[b s d] -> [b s d]``."""
        mask = self.causal if spans is None else self.causal | spans
        y = self.self_attn(self.input_layernorm(x), mask=mask, cache=cache)
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        out: Tensor = x + self.post_feedforward_layernorm(y)
        return out


class Gemma3(nn.Module):
    """``ids [b s] -> logits [b s v]``, of a `transformers.Gemma3TextConfig`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layer_types)
        self.norm = Shifted(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        ids: Tensor,
        images: Tensor | None = None,
        caches: Sequence[ak.KVCache] | None = None,
    ) -> Tensor:
        """Return the logits; `images` ``[b s]`` numbers the tokens of each image, 0 is text."""
        spans = None if images is None else masks.Spans.of(images)
        x = self.embed_tokens(ids) * self.embed_tokens.embedding_dim**0.5
        x = through(self.layers, x, caches, spans)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


def from_checkpoint(config: Any, state: Mapping[str, Tensor]) -> Gemma3:
    """Return the model with the weights of `transformers.Gemma3ForCausalLM`."""
    return load(Gemma3(config), state, RENAMED)
