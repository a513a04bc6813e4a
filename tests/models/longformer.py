"""Longformer: a window per head, some of them dilated, and global tokens with their own weights.

Source: Beltagy et al., "Longformer: The Long-Document Transformer" (arXiv:2004.05150).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from tests.models import plain

REACH, STEP, FAR, GLOBAL = 2, 2, 4, 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.local, self.all = nn.Linear(16, 48), nn.Linear(16, 48)
        self.o = nn.Linear(16, 16)

    def heads(self, x: Tensor, weights: nn.Linear) -> list[Tensor]:
        return [plain.split(t, 2) for t in weights(x).chunk(3, -1)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(plain.Block(16, Layer()) for _ in range(2))

    def attend(self, layer: Layer, x: Tensor) -> Tensor:
        near, (q, k, v) = layer.heads(x, layer.local), layer.heads(x, layer.all)
        seen = masks.PerHead([masks.Band(REACH, REACH), masks.Band(FAR, FAR) & masks.Dilated(STEP)])
        rest = ak.attention(*near, mask=seen | masks.Columns(0, GLOBAL))[:, GLOBAL:]
        return layer.o(torch.cat([ak.attention(q[:, :GLOBAL], k, v), rest], 1).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.attend)
        return x


class Twin(Model):
    def attend(self, layer: Layer, x: Tensor) -> Tensor:
        def seen(b: int, h: int, i: int, j: int) -> bool:
            step = STEP if h == 1 else 1
            return j < GLOBAL or (abs(i - j) <= REACH * step and (i - j) % step == 0)

        size = x.shape[1]
        near = plain.attend(*layer.heads(x, layer.local), plain.cells(seen, 1, 2, size, size))
        whole = plain.attend(*layer.heads(x, layer.all))
        is_global = (torch.arange(size) < GLOBAL)[:, None, None]
        return layer.o(torch.where(is_global, whole, near).flatten(-2))


def inputs() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(2, 14, 16),)]
