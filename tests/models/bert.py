"""BERT from what a tokenizer returns: padding on the right, on the left, and in between.

Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers" (NAACL 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from tests.models import plain


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(13, 16), nn.Embedding(10, 16)
        layers = [ak.MultiHeadAttention(16, 4, bias=True) for _ in range(2)]
        self.blocks = nn.ModuleList(plain.Block(16, layer) for layer in layers)

    def attend(self, layer, x: Tensor, attention_mask: Tensor) -> Tensor:
        return layer(x, mask=masks.Padding.of(attention_mask))

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight
        for block in self.blocks:
            x = block(x, self.attend, attention_mask)
        return x


class Twin(Model):
    def attend(self, layer, x: Tensor, attention_mask: Tensor) -> Tensor:
        return plain.layer(layer, x, attention_mask.bool()[:, None, None, :])


def inputs() -> list[tuple[Tensor, ...]]:
    right = torch.tensor([[1] * 10, [1] * 6 + [0] * 4, [1] + [0] * 9])
    holes = torch.tensor([[1, 1, 0, 0, 1, 1, 1, 0, 1, 0], [0] * 4 + [1] * 6, [1, 0] * 5])
    ids = torch.arange(30).view(3, 10) % 13
    return [(ids, right), (ids, right.flip(1)), (ids, holes), (ids, right.bool())]
