"""ViT: patches and a class token, every one sees every other.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnkit as ak
from tests.models import plain


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.first, self.places = (nn.Parameter(torch.zeros(1, n, 16)) for n in (1, 17))
        layers = [ak.MultiHeadAttention(16, 4, bias=True) for _ in range(2)]
        self.blocks = nn.ModuleList(plain.Block(16, layer) for layer in layers)
        self.head = nn.Linear(16, 5)

    def attend(self, layer, x: Tensor) -> Tensor:
        return layer(x)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), 1, 16), x], 1) + self.places
        for block in self.blocks:
            x = block(x, self.attend)
        return self.head(x[:, 0])


Ready = Model  # there is no mask to make: one graph


class Twin(Model):
    def attend(self, layer, x: Tensor) -> Tensor:
        return plain.layer(layer, x)


def inputs() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(2, 3, 16, 16),)]
