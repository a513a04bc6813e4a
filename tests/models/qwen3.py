"""Qwen3: grouped heads, an RMS norm on every query and key head, rotary positions by YaRN.

Source: Qwen Team, "Qwen3 Technical Report" (arXiv:2505.09388); Peng et al., "YaRN" (2309.00071).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from tests.models import plain

FACTOR, TRAINED, BASE = 4.0, 16, 10000.0


def frequencies(half: int) -> Tensor:
    """Those that turn often in the trained length stay, those that turn seldom are stretched."""
    pure = BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    # The pair that turns 32 times (once) in the trained length: where the ramp begins (ends).
    at = [half * math.log(TRAINED / (turns * 2 * math.pi)) / math.log(BASE) for turns in (32, 1)]
    low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), 2 * half - 1)
    ramp = ((torch.arange(half) - low) / max(high - low, 0.001)).clamp(0, 1)
    return pure * (1 - ramp) + pure / FACTOR * ramp


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)
        self.kv = nn.Linear(16, 32, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(8), nn.RMSNorm(8)

    def heads(self, x: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        q, (k, v) = plain.split(self.q(x), 4), (plain.split(t, 2) for t in self.kv(x).chunk(2, -1))
        places = torch.arange(start, start + x.shape[1])
        turned = [self.q_norm(q), self.k_norm(k)]
        size = 0.1 * math.log(FACTOR) + 1
        return *(size * plain.rotated(t, places, frequencies(4)) for t in turned), v


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(plain.Block(16, Layer()) for _ in range(2))

    def attend(self, layer: Layer, x: Tensor, cache=None) -> Tensor:
        q, k, v = layer.heads(x, 0 if cache is None else cache.length)
        k, v = (k, v) if cache is None else cache.append(k, v)
        return layer.o(ak.attention(q, k, v, mask=masks.Causal()).flatten(-2))

    def forward(self, x: Tensor, caches=(None, None)) -> Tensor:
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, self.attend, cache)
        return x


class Twin(Model):
    def attend(self, layer: Layer, x: Tensor, cache=None) -> Tensor:
        seen = plain.cells(lambda b, h, i, j: j <= i, 1, 1, x.shape[1], x.shape[1])
        return layer.o(plain.attend(*layer.heads(x, 0), seen).flatten(-2))


def inputs() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(2, 24, 16),)]


def stepwise(model: Model, x: Tensor) -> Tensor:
    caches = [ak.KVCache() for _ in model.blocks]
    return torch.cat([model(token, caches) for token in x.split(1, 1)], 1)
