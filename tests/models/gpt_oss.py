"""gpt-oss: a learned sink per head, and a sliding window in every other layer.

Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (arXiv:2508.10925), and its `model.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from tests.models import plain

WINDOW = 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        how = {"num_kv_heads": 2, "bias": True, "sink": True, "rotary": True}
        layers = [ak.MultiHeadAttention(32, 4, **how) for _ in range(2)]
        self.blocks = nn.ModuleList(plain.Block(32, layer) for layer in layers)

    def mask(self, window: int | None) -> masks.Mask:
        return masks.Causal() if window is None else masks.SlidingWindow(window)

    def attend(self, layer, x: Tensor, window: int | None, cache=None) -> Tensor:
        return layer(x, mask=self.mask(window), cache=cache)

    def forward(self, x: Tensor, caches=(None, None)) -> Tensor:
        for block, window, cache in zip(self.blocks, (WINDOW, None), caches, strict=True):
            x = block(x, self.attend, window, cache)
        return x


class Ready(Model):
    """With masks that are made once: one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.made = {window: Model.mask(self, window) for window in (WINDOW, None)}

    def mask(self, window: int | None) -> masks.Mask:
        return self.made[window]


class Twin(Model):
    def attend(self, layer, x: Tensor, window: int | None, cache=None) -> Tensor:
        size, places = x.shape[1], torch.arange(x.shape[1])
        near = size if window is None else window
        seen = plain.cells(lambda b, h, i, j: i - near < j <= i, 1, 1, size, size)
        sink = layer.attention.sink
        return plain.layer(layer, x, seen, turn=lambda x: plain.rotated(x, places), sink=sink)


def inputs() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(2, 12, 32),)]


def stepwise(model: Model, x: Tensor) -> Tensor:
    caches = [ak.KVCache() for _ in model.blocks]
    return torch.cat([model(token, caches) for token in x.split([5, *[1] * 7], 1)], 1)
