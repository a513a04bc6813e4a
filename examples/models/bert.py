"""BERT: both directions, padding, layer norm after each part.

Source: Devlin et al., "BERT" (NAACL 2019, arXiv:1810.04805).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from models.parts import load

RENAMED = {
    ".LayerNorm": ".norm",
    "bert.embeddings.": "",
    "bert.": "",
    "attention.self.query": "attention.q_proj",
    "attention.self.key": "attention.k_proj",
    "attention.self.value": "attention.v_proj",
    "attention.output.dense": "attention.out_proj",
    "attention.output.norm": "attention_norm",
    "intermediate.dense": "mlp.0",
    "output.dense": "mlp.2",
    "output.norm": "norm",
    "encoder.": "",
    "cls.predictions.transform.dense": "head.0",
    "cls.predictions.transform.norm": "head.2",
    "cls.predictions.decoder": "decoder",
    "cls.predictions.bias": "decoder.bias",
}


class Block(nn.Module):
    """One layer, ``[b s d] -> [b s d]``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.attention = ak.MultiHeadAttention(dim, config.num_attention_heads, bias=True)
        self.attention_norm = nn.LayerNorm(dim, eps)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor, mask: masks.Mask | None) -> Tensor:
        """``[b s d] -> [b s d]``."""
        x = self.attention_norm(x + self.attention(x, mask=mask))
        out: Tensor = self.norm(x + self.mlp(x))
        return out


class Bert(nn.Module):
    """``ids [b s] -> logits [b s v]``, of a `transformers.BertConfig`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.word_embeddings = nn.Embedding(config.vocab_size, dim)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, dim)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, dim)
        self.norm = nn.LayerNorm(dim, eps)
        self.layer = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, eps))
        self.decoder = nn.Linear(dim, config.vocab_size)
        self.decoder.weight = self.word_embeddings.weight

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """Return the logits; `attention_mask` ``[b s]`` is a tokenizer's."""
        mask = None if attention_mask is None else masks.Padding.of(attention_mask)
        types = torch.zeros_like(ids) if token_types is None else token_types
        x = self.word_embeddings(ids) + self.token_type_embeddings(types)
        x = self.norm(x + self.position_embeddings.weight[: ids.shape[1]])
        for block in self.layer:
            x = block(x, mask)
        logits: Tensor = self.decoder(self.head(x))
        return logits


def from_checkpoint(config: Any, state: Mapping[str, Tensor]) -> Bert:
    """Return the model with the weights of `transformers.BertForMaskedLM`."""
    return load(Bert(config), state, RENAMED)
