"""Gemma 3: five layers with a window to one without; an image's tokens see each other in all.

Source: Gemma Team, "Gemma 3 Technical Report" (arXiv:2503.19786).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from tests.models import plain

WINDOW, GLOBAL_EVERY = 4, 6


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 32, bias=False), nn.Linear(16, 16, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(8), nn.RMSNorm(8)

    def heads(self, x: Tensor, base: float) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (-1, 8)) for t in self.qkv(x).split((16, 8, 8), -1))
        places, turns = torch.arange(x.shape[1]), base ** (-torch.arange(4, dtype=x.dtype) / 4)
        q, k = self.q_norm(q), self.k_norm(k)
        return plain.rotated(q, places, turns), plain.rotated(k, places, turns), v


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(plain.Block(16, Layer()) for _ in range(GLOBAL_EVERY))

    def attend(self, layer: Layer, x: Tensor, images: Tensor, local: bool) -> Tensor:
        q, k, v = layer.heads(x, 1e4 if local else 1e6)
        # A text token is a span of one: spans are numbered by where they begin.
        begins = (images == 0) | (images != images.roll(1, 1))
        spans = masks.Documents.from_ids(begins.cumsum(1))
        causal = masks.SlidingWindow(WINDOW) if local else masks.Causal()
        return layer.o(ak.attention(q, k, v, mask=causal | spans).flatten(-2))

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks, 1):
            x = block(x, self.attend, images, i % GLOBAL_EVERY != 0)
        return x


class Twin(Model):
    def attend(self, layer: Layer, x: Tensor, images: Tensor, local: bool) -> Tensor:
        size, ids, near = x.shape[1], images.tolist(), WINDOW if local else x.shape[1]

        def seen(b: int, h: int, i: int, j: int) -> bool:
            return i - near < j <= i or 0 != ids[b][i] == ids[b][j]

        q, k, v = layer.heads(x, 1e4 if local else 1e6)
        return layer.o(plain.attend(q, k, v, plain.cells(seen, 2, 1, size, size)).flatten(-2))


def inputs() -> list[tuple[Tensor, ...]]:
    """Two texts with one image and two; 0 is text."""
    images = [[0, 0] + [1] * 6 + [0] * 8, [1] * 3 + [0] * 2 + [2] * 7 + [0] * 4]
    return [(torch.randn(2, 16, 16), torch.tensor(images))]
