"""BD3-LM: noisy blocks see themselves and the clean blocks before them.

The twin is the paper's one mask over ``[noisy, clean]``; here each half asks for what it sees.

Source: Arriola et al., "Block Diffusion" (ICLR 2025, arXiv:2503.09573), figure 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from tests.models import plain

BLOCK = 3


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)

    def heads(self, x: Tensor) -> list[Tensor]:
        places = torch.arange(x.shape[1] // 2).repeat(2)
        q, k, v = (plain.split(t, 2) for t in self.qkv(x).chunk(3, -1))
        return [plain.rotated(q, places), plain.rotated(k, places), v]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(plain.Block(16, Layer()) for _ in range(2))

    def attend(self, layer: Layer, x: Tensor) -> Tensor:
        (nq, cq), (nk, ck), (nv, cv) = (t.chunk(2, 1) for t in layer.heads(x))
        before = masks.BlockCausal(BLOCK, "top_left") - masks.Chunked(BLOCK, "top_left")
        k, v = torch.cat([ck, nk], 1), torch.cat([cv, nv], 1)
        noisy = ak.attention(nq, k, v, mask=before | masks.Chunked(BLOCK))
        clean = ak.attention(cq, ck, cv, mask=masks.BlockCausal(BLOCK))
        return layer.o(torch.cat([noisy, clean], 1).flatten(-2))

    def forward(self, noisy: Tensor, clean: Tensor) -> Tensor:
        x = torch.cat([noisy, clean], 1)
        for block in self.blocks:
            x = block(x, self.attend)
        return x.chunk(2, 1)[0]


class Twin(Model):
    def attend(self, layer: Layer, x: Tensor) -> Tensor:
        size = x.shape[1] // 2

        def seen(b: int, h: int, i: int, j: int) -> bool:
            own, other = i % size // BLOCK, j % size // BLOCK
            if i < size:  # noisy
                return own == other if j < size else own > other
            return j >= size and own >= other

        found = plain.attend(*layer.heads(x), plain.cells(seen, 1, 1, 2 * size, 2 * size))
        return layer.o(found.flatten(-2))


def inputs() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(2, n, 16), torch.randn(2, n, 16)) for n in (12, 9)]
