"""Perceiver: a few latents attend to many (padded) inputs, then to each other.

Source: Jaegle et al., "Perceiver: General Perception with Iterative Attention" (ICML 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from tests.models import plain


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, 5, 16))
        layers = [ak.MultiHeadAttention(16, 4, kv_dim=kv_dim) for kv_dim in (6, 16)]
        self.cross, self.own = (plain.Block(16, layer) for layer in layers)

    def attend(self, layer, x: Tensor, context=None, exists=None) -> Tensor:
        return layer(x, context, mask=None if exists is None else masks.Padding.of(exists))

    def forward(self, given: Tensor, exists: Tensor) -> Tensor:
        x = self.latents.expand(len(given), 5, 16)
        for _ in range(2):  # the weights are shared
            x = self.own(self.cross(x, self.attend, given, exists), self.attend)
        return x


class Twin(Model):
    def attend(self, layer, x: Tensor, context=None, exists=None) -> Tensor:
        allowed = None if exists is None else exists.bool()[:, None, None]
        return plain.layer(layer, x, allowed, context)


def inputs() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(2, 20, 6), torch.arange(20) < torch.tensor([[20], [11]]))]
