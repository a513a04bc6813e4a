"""Llama and Qwen3: grouped heads, rotary positions that may be scaled, Qwen3 with norms of heads.

Sources: Touvron et al., "LLaMA" (arXiv:2302.13971); Qwen Team, "Qwen3 Technical Report"
(arXiv:2505.09388).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from models.parts import SwiGLU, load, rotary, through, tokens_of

RENAMED = {"model.": "", "o_proj": "out_proj"}


class Block(nn.Module):
    """One layer, ``[b s d] -> [b s d]``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = ak.MultiHeadAttention(
            dim,
            config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias={"q", "k", "v", "out"} if config.attention_bias else False,
            qk_norm=(lambda size: nn.RMSNorm(size, eps)) if config.model_type == "qwen3" else None,
            rotary=rotary(config.rope_parameters),
            mask=masks.Causal(),
        )
        self.mlp = SwiGLU(dim, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(dim, eps)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps)

    def forward(
        self,
        x: Tensor,
        mask: masks.Mask | None,
        positions: Tensor | None,
        cache: ak.KVCache | None,
    ) -> Tensor:
        """``[b s d] -> [b s d]``."""
        y = self.input_layernorm(x)
        x = x + self.self_attn(y, mask=mask, positions=positions, cache=cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """``ids [b s] -> logits [b s v]``, of a `transformers.LlamaConfig` or `Qwen3Config`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        caches: Sequence[ak.KVCache] | None = None,
    ) -> Tensor:
        """Return the logits; `attention_mask` ``[b t]`` is a tokenizer's, padded on either side.

        With `caches`, one for each layer, `ids` are the next tokens; the mask stays the prompt's.
        """
        mask = None if attention_mask is None else masks.Padding.of(attention_mask)
        places = tokens_of(attention_mask, ids, caches[0] if caches else None)
        x = self.embed_tokens(ids)
        x = through(self.layers, x, caches, mask, places)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


def from_checkpoint(config: Any, state: Mapping[str, Tensor]) -> Llama:
    """Return the model with the weights of `transformers.LlamaForCausalLM` or Qwen3's."""
    return load(Llama(config), state, RENAMED)
