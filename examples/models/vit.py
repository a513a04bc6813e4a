"""ViT: patches of an image and one token for its class; every token sees every other.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021, arXiv:2010.11929).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import attnkit as ak
from models.parts import load

RENAMED = {"vit.": "", "o_proj": "out_proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
RENAMED |= {"patch_embeddings.projection": "projection", "embeddings.": ""}


class Block(nn.Module):
    """One layer, ``[b s d] -> [b s d]``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.attention = ak.MultiHeadAttention(dim, config.num_attention_heads, bias=True)
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(dim, eps) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[b s d] -> [b s d]``."""
        x = x + self.attention(self.layernorm_before(x))
        out: Tensor = x + self.mlp(self.layernorm_after(x))
        return out


class ViT(nn.Module):
    """``images [b c h w] -> logits [b classes]``, of a `transformers.ViTConfig`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, patch = config.hidden_size, config.patch_size
        count = (config.image_size // patch) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position_embeddings = nn.Parameter(torch.zeros(1, count, dim))
        self.projection = nn.Conv2d(config.num_channels, dim, patch, patch)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.layernorm = nn.LayerNorm(dim, config.layer_norm_eps)
        self.classifier = nn.Linear(dim, config.num_labels)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the classes."""
        patches = self.projection(images).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], 1)
        x = x + self.position_embeddings
        for block in self.layers:
            x = block(x)
        logits: Tensor = self.classifier(self.layernorm(x)[:, 0])
        return logits


def from_checkpoint(config: Any, state: Mapping[str, Tensor]) -> ViT:
    """Return the model with the weights of `transformers.ViTForImageClassification`."""
    return load(ViT(config), state, RENAMED)
