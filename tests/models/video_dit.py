"""A video DiT: within a frame, then through time at one place, text (padded) in every one's sight.

Sources: Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023); joint tokens of
text as in Esser et al. (arXiv:2403.03206); space and time in turn as in Ma et al., "Latte".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from tests.models import plain

FRAMES, FRAME, TEXT = 3, 4, 5
VIDEO = FRAMES * FRAME


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)
        self.q_norm, self.k_norm = nn.RMSNorm(8), nn.RMSNorm(8)

    def heads(self, x: Tensor) -> list[Tensor]:
        q, k, v = (plain.split(t, 2) for t in self.qkv(x).chunk(3, -1))
        return [self.q_norm(q), self.k_norm(k), v]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(plain.Block(16, Layer()) for _ in range(2))
        self.modulation = nn.Linear(16, 32)

    def attend(self, layer: Layer, x: Tensor, exists: Tensor, space: bool) -> Tensor:
        window = masks.Chunked(FRAME) if space else masks.Dilated(FRAME)
        mask = (window | masks.Columns(VIDEO) | masks.Rows(VIDEO)) & masks.Padding.of(exists)
        return layer.o(ak.attention(*layer.heads(x), mask=mask).flatten(-2))

    def forward(self, video: Tensor, text: Tensor, time: Tensor, text_mask: Tensor) -> Tensor:
        shift, scale = self.modulation(time)[:, None].chunk(2, -1)
        x = torch.cat([video * (1 + scale) + shift, text], 1)
        exists = torch.cat([text_mask.new_ones(len(x), VIDEO), text_mask], 1)
        for space, block in zip((True, False), self.blocks, strict=True):
            x = block(x, self.attend, exists, space)
        return x[:, :VIDEO]


class Twin(Model):
    def attend(self, layer: Layer, x: Tensor, exists: Tensor, space: bool) -> Tensor:
        there = exists.tolist()

        def seen(b: int, h: int, i: int, j: int) -> bool:
            if i >= VIDEO or j >= VIDEO:
                return there[b][j]
            return i // FRAME == j // FRAME if space else i % FRAME == j % FRAME

        allowed = plain.cells(seen, len(x), 1, x.shape[1], x.shape[1])
        return layer.o(plain.attend(*layer.heads(x), allowed).flatten(-2))


def inputs() -> list[tuple[Tensor, ...]]:
    text_mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    return [(torch.randn(2, VIDEO, 16), torch.randn(2, TEXT, 16), torch.randn(2, 16), text_mask)]
