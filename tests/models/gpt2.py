"""GPT-2 on packed documents: causal in each document, positions that start again in each.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
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
        self.tokens, self.places = nn.Embedding(11, 16), nn.Embedding(12, 16)
        layers = [ak.MultiHeadAttention(16, 4, bias=True) for _ in range(2)]
        self.blocks = nn.ModuleList(plain.Block(16, layer) for layer in layers)

    def attend(self, layer, x: Tensor, documents: Tensor, cache=None) -> Tensor:
        mask = masks.Documents.from_ids(documents) & masks.Causal()
        return layer(x, mask=mask, cache=cache)

    def forward(self, ids: Tensor, documents: Tensor, caches=(None, None), start=0) -> Tensor:
        same = documents[:, :, None] == documents[:, None]
        place = (same.tril().sum(-1) - 1)[:, start : start + ids.shape[1]]
        x = self.tokens(ids) + self.places(place)
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, self.attend, documents, cache)
        return x @ self.tokens.weight.T


class Twin(Model):
    def attend(self, layer, x: Tensor, documents: Tensor, cache=None) -> Tensor:
        ids, size = documents.tolist(), x.shape[1]
        seen = plain.cells(lambda b, h, i, j: j <= i and ids[b][i] == ids[b][j], 2, 1, size, size)
        return plain.layer(layer, x, seen)


def inputs() -> list[tuple[Tensor, ...]]:
    documents = torch.tensor([[0] * 5 + [1] * 7, [4] * 3 + [5] * 1 + [6] * 8])
    return [(torch.arange(24).view(2, 12) % 11, documents)]


def stepwise(model: Model, ids: Tensor, documents: Tensor) -> Tensor:
    caches = [ak.KVCache() for _ in model.blocks]
    steps = [model(ids[:, i : i + 1], documents, caches, i) for i in range(ids.shape[1])]
    return torch.cat(steps, 1)
