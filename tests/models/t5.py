"""T5: an encoder and a decoder with relative biases (one table for all layers), and no scale.

Source: Raffel et al., "Exploring the Limits of Transfer Learning" (JMLR 2020).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from tests.models import plain

BUCKETS, FARTHEST = 8, 10


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [ak.MultiHeadAttention(16, 2, scale=1.0) for _ in range(5)]
        self.blocks = nn.ModuleList(plain.Block(16, layer) for layer in layers)
        self.tables = nn.ParameterList(torch.zeros(BUCKETS, 2) for _ in range(2))

    def parts(self, attention_mask: Tensor) -> tuple:
        kinds = ((True, self.tables[0]), (False, self.tables[1]))
        near = [pse.T5Relative(2, BUCKETS, FARTHEST, both, table=table) for both, table in kinds]
        return (masks.Padding.of(attention_mask), near[0]), (masks.Causal(), near[1])

    def attend(self, layer, x: Tensor, mask, bias=None, context=None, cache=None) -> Tensor:
        return layer(x, context, mask=mask, pse=bias, cache=cache)

    def encode(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        own = self.parts(attention_mask)[0]
        return self.blocks[1](self.blocks[0](x, self.attend, *own), self.attend, *own)

    def decode(self, y: Tensor, memory: Tensor, attention_mask: Tensor, caches) -> Tensor:
        (padding, _), own = self.parts(attention_mask)
        y = self.blocks[2](y, self.attend, *own, None, caches[0])
        y = self.blocks[3](y, self.attend, padding, None, memory, caches[1])
        return self.blocks[4](y, self.attend, *own, None, caches[2])

    def forward(self, x: Tensor, y: Tensor, attention_mask: Tensor) -> Tensor:
        return self.decode(y, self.encode(x, attention_mask), attention_mask, [None] * 3)


class Twin(Model):
    def parts(self, attention_mask: Tensor) -> tuple:
        exists, size = attention_mask.bool()[:, None, None], 10
        biases = []
        for table, both in zip(self.tables, (True, False), strict=True):
            rows = [bucket(j - i, both) for i in range(size) for j in range(size)]
            biases.append(table[rows].view(1, size, size, 2).movedim(-1, 1))
        causal = plain.cells(lambda b, h, i, j: j <= i, 1, 1, size, size)
        return (exists, biases[0]), (causal, biases[1])

    def attend(self, layer, x: Tensor, mask, bias=None, context=None, cache=None) -> Tensor:
        bias = 0.0 if bias is None else bias[..., : x.shape[1], : x.shape[1]]
        mask = mask[..., : x.shape[1], : x.shape[1]] if context is None else mask
        return plain.layer(layer, x, mask, context, scale=1.0, bias=bias)


def bucket(distance: int, both: bool) -> int:
    count, base = (BUCKETS // 2, BUCKETS // 2 * (distance > 0)) if both else (BUCKETS, 0)
    far, exact = abs(distance) if both else max(-distance, 0), count // 2
    grown = math.log(max(far, 1) / exact) / math.log(FARTHEST / exact) * (count - exact)
    return base + (far if far < exact else min(exact + int(grown), count - 1))


def inputs() -> list[tuple[Tensor, ...]]:
    exists = torch.arange(10) < torch.tensor([[10], [7]])
    return [(torch.randn(2, 10, 16), torch.randn(2, 8, 16), exists)]


def stepwise(model: Model, x: Tensor, y: Tensor, attention_mask: Tensor) -> Tensor:
    memory, caches = model.encode(x, attention_mask), [ak.KVCache() for _ in range(3)]
    return torch.cat([model.decode(t, memory, attention_mask, caches) for t in y.split(1, 1)], 1)
