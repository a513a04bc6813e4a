"""Swin: windows of an image, shifted in every other layer, with a bias by relative place.

The twin is the paper's: roll the image, cut it into windows, mask what the roll brought together,
roll back. As a set that is one line: who shares a window of the shifted grid sees each other.

Source: Liu et al., "Swin Transformer" (ICCV 2021).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from tests.models import plain

SIDE, WINDOW = 4, 2
REACH = 2 * WINDOW - 1
CUT = "b (r i) (c j) d -> (b r c) (i j) d"


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 16)
        self.table = nn.Parameter(torch.zeros(REACH * REACH, 2))

    def heads(self, x: Tensor) -> list[Tensor]:
        return [plain.split(t, 2) for t in self.qkv(x).chunk(3, -1)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(plain.Block(16, Layer()) for _ in range(2))

    def attend(self, layer: Layer, x: Tensor, shift: int) -> Tensor:
        places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
        window = (places - shift).div(WINDOW, rounding_mode="floor") @ torch.tensor([SIDE, 1])
        apart = (places[:, None] - places).clamp(1 - WINDOW, WINDOW - 1) + WINDOW - 1
        bias = pse.Dense(layer.table[apart @ torch.tensor([REACH, 1])].movedim(-1, 0))
        mask = masks.Dense.keep(window[:, None] == window)
        return layer.o(ak.attention(*layer.heads(x), mask=mask, pse=bias).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        for shift, block in zip((0, WINDOW // 2), self.blocks, strict=True):
            x = block(x, self.attend, shift)
        return x


class Twin(Model):
    def attend(self, layer: Layer, x: Tensor, shift: int) -> Tensor:
        sizes = {"i": WINDOW, "j": WINDOW, "c": SIDE // WINDOW}
        rolled = x.unflatten(1, (SIDE, SIDE)).roll((-shift, -shift), (1, 2))
        wrapped = (torch.arange(SIDE) >= SIDE - shift).long()  # from the other end
        part = rearrange((2 * wrapped[:, None] + wrapped)[None, ..., None], CUT, **sizes)
        seen = (part == part.mT)[:, None].repeat(len(x), 1, 1, 1)
        place = [(i, j) for i in range(WINDOW) for j in range(WINDOW)]
        apart = [(a - c + 1) * REACH + b - d + 1 for a, b in place for c, d in place]
        bias = layer.table[apart].view(WINDOW**2, WINDOW**2, 2).movedim(-1, 0)
        heads = layer.heads(rearrange(rolled, CUT, **sizes))
        out = layer.o(plain.attend(*heads, seen, bias=bias).flatten(-2))
        back = rearrange(out, " -> ".join(reversed(CUT.split(" -> "))), b=len(x), **sizes)
        return back.roll((shift, shift), (1, 2)).flatten(1, 2)


def inputs() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(2, SIDE * SIDE, 16),)]
