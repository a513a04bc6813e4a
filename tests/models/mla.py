"""MLA of DeepSeek-V2: keys and values from one small latent, a rotary part that heads share.

Query and key heads (8 + 4) are longer than value heads (6). A cache holds the latent and the
shared rotary key, and the heads are made of them anew.

Source: DeepSeek-AI, "DeepSeek-V2" (arXiv:2405.04434), section 2.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from tests.models import plain

HEADS, PLAIN, TURNED, VALUE, LATENT = 2, 8, 4, 6, 10


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, HEADS * (PLAIN + TURNED), bias=False)
        self.down, self.norm = nn.Linear(16, LATENT + TURNED, bias=False), nn.RMSNorm(LATENT)
        self.up = nn.Linear(LATENT, HEADS * (PLAIN + VALUE), bias=False)
        self.o = nn.Linear(HEADS * VALUE, 16, bias=False)

    def heads(self, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of `x`; keys and values of all tokens: those before, then `x`."""
        places = torch.arange(before.shape[1] + x.shape[1])
        latent, turned = self.down(torch.cat([before, x], 1)).split((LATENT, TURNED), -1)
        k, v = plain.split(self.up(self.norm(latent)), HEADS).split((PLAIN, VALUE), -1)
        turned = plain.rotated(turned[:, :, None], places).expand(-1, -1, HEADS, -1)
        q, q_turned = plain.split(self.q(x), HEADS).split((PLAIN, TURNED), -1)
        q_turned = plain.rotated(q_turned, places[before.shape[1] :])
        return torch.cat([q, q_turned], -1), torch.cat([k, turned], -1), v


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(plain.Block(16, Layer()) for _ in range(2))

    def attend(self, layer: Layer, x: Tensor, before: Tensor) -> Tensor:
        return layer.o(ak.attention(*layer.heads(x, before), mask=masks.Causal()).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.attend, x[:, :0])
        return x


class Twin(Model):
    def attend(self, layer: Layer, x: Tensor, before: Tensor) -> Tensor:
        seen = plain.cells(lambda b, h, i, j: j <= i, 1, 1, x.shape[1], x.shape[1])
        return layer.o(plain.attend(*layer.heads(x, before), seen).flatten(-2))


def inputs() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(2, 9, 16),)]


def stepwise(model: Model, x: Tensor) -> Tensor:
    before, steps = [x[:, :0] for _ in model.blocks], []
    for token in x.split(1, 1):
        for i, block in enumerate(model.blocks):
            normed = block.norm(token)
            token = block(token, model.attend, before[i])
            before[i] = torch.cat([before[i], normed], 1)
        steps.append(token)
    return torch.cat(steps, 1)
