"""Qwen3: grouped heads, an RMS norm on every query and key head, rotary positions by YaRN.

Texts are padded on the left, as for decoding: a prompt in one call, then token by token.

Source: Qwen Team, "Qwen3 Technical Report" (arXiv:2505.09388); Peng et al., "YaRN" (2309.00071).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from attnkit.rotary import YaRN
from tests.models import plain

FACTOR, TRAINED, BASE, PROMPT = 4.0, 16, 1e4, 20


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        how = {"num_kv_heads": 2, "head_dim": 8, "qk_norm": "rms"}
        rotary = ak.Rotary(BASE, scaling=YaRN(FACTOR, original_max_position_embeddings=TRAINED))
        layers = [ak.MultiHeadAttention(16, 4, rotary=rotary, **how) for _ in range(2)]
        self.blocks = nn.ModuleList(plain.Block(16, layer) for layer in layers)

    def attend(self, layer, x: Tensor, exists: Tensor, places: Tensor, cache=None) -> Tensor:
        mask = masks.Causal() & masks.Padding.of(exists)
        return layer(x, mask=mask, positions=places, cache=cache)

    def forward(self, x: Tensor, exists: Tensor, places=None, caches=(None, None)) -> Tensor:
        places = (exists.cumsum(1) - 1).clamp(min=0) if places is None else places
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, self.attend, exists, places, cache)
        return x.masked_fill((~exists[:, : x.shape[1], None]) & (x.shape[1] > 1), 0.0)


class Twin(Model):
    def attend(self, layer, x: Tensor, exists: Tensor, places: Tensor, cache=None) -> Tensor:
        there, size = exists.tolist(), x.shape[1]
        seen = plain.cells(lambda b, h, i, j: j == i or (j < i and there[b][j]), 2, 1, size, size)
        return plain.layer(layer, x, seen, turn=lambda x: turned(x, places))


def turned(x: Tensor, places: Tensor) -> Tensor:
    """Pairs that turn often in the trained length stay, those that turn seldom are stretched."""
    half = x.shape[-1] // 2
    pure = BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    # The pair that turns 32 times (once) in the trained length: where the ramp begins (ends).
    at = [half * math.log(TRAINED / (turns * 2 * math.pi)) / math.log(BASE) for turns in (32, 1)]
    low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), 2 * half - 1)
    ramp = ((torch.arange(half) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequencies = pure * (1 - ramp) + pure / FACTOR * ramp
    return (0.1 * math.log(FACTOR) + 1) * plain.rotated(x, places, frequencies)


def inputs() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(2, 24, 16), torch.arange(24) >= torch.tensor([[0], [7]]))]


def stepwise(model: Model, x: Tensor, exists: Tensor) -> Tensor:
    caches, places = [ak.KVCache() for _ in model.blocks], (exists.cumsum(1) - 1).clamp(min=0)
    cuts, prompt = (PROMPT, *[1] * (x.shape[1] - PROMPT)), exists[:, :PROMPT]
    steps = zip(x.split(cuts, 1), places.split(cuts, 1), strict=True)
    return torch.cat([model(token, prompt, place, caches) for token, place in steps], 1)
