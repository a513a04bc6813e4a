"""Gemma 3: five layers with a window to one without; an image's tokens see each other in all.

Source: Gemma Team, "Gemma 3 Technical Report" (arXiv:2503.19786).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from tests.models import plain

WINDOW, LOCAL = 4, (True, True, True, True, True, False)


def base(local: bool) -> float:
    return 1e4 if local else 1e6


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        how = {"num_kv_heads": 1, "head_dim": 8, "qk_norm": "rms"}
        layers = [ak.MultiHeadAttention(16, 2, rotary=ak.Rotary(base(one)), **how) for one in LOCAL]
        self.blocks = nn.ModuleList(plain.Block(16, layer) for layer in layers)

    def attend(self, layer, x: Tensor, images: Tensor, local: bool) -> Tensor:
        causal = masks.SlidingWindow(WINDOW) if local else masks.Causal()
        return layer(x, mask=causal | masks.Spans.of(images))

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        for local, block in zip(LOCAL, self.blocks, strict=True):
            x = block(x, self.attend, images, local)
        return x


class Twin(Model):
    def attend(self, layer, x: Tensor, images: Tensor, local: bool) -> Tensor:
        size, ids, near = x.shape[1], images.tolist(), WINDOW if local else x.shape[1]
        places, turns = torch.arange(size), base(local) ** (-torch.arange(4, dtype=x.dtype) / 4)

        def seen(b: int, h: int, i: int, j: int) -> bool:
            return i - near < j <= i or 0 != ids[b][i] == ids[b][j]

        allowed = plain.cells(seen, 2, 1, size, size)
        return plain.layer(layer, x, allowed, turn=lambda x: plain.rotated(x, places, turns))


def inputs() -> list[tuple[Tensor, ...]]:
    """Two texts with one image and two; 0 is text."""
    images = [[0, 0] + [1] * 6 + [0] * 8, [1] * 3 + [0] * 2 + [2] * 7 + [0] * 4]
    return [(torch.randn(2, 16, 16), torch.tensor(images))]
