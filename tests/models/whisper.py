"""Whisper: an encoder of sound, a causal decoder of text, cross attention that keeps its keys.

Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022).
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
        self.sound = nn.Conv1d(6, 16, 3, stride=2, padding=1)
        self.tokens, self.places = nn.Embedding(11, 16), nn.Embedding(8, 16)
        layers = [ak.MultiHeadAttention(16, 4, bias={"q", "v", "out"}) for _ in range(3)]
        self.encoder, self.decoder, self.cross = (plain.Block(16, layer) for layer in layers)

    def attend(self, layer, x: Tensor, context: Tensor | None = None, cache=None) -> Tensor:
        mask = masks.Causal() if layer is self.decoder.attn else None
        return layer(x, context, mask=mask, cache=cache)

    def encode(self, sound: Tensor) -> Tensor:
        return self.encoder(nn.functional.gelu(self.sound(sound)).mT, self.attend)

    def decode(self, ids: Tensor, memory: Tensor, start: int = 0, caches=(None, None)) -> Tensor:
        x = self.tokens(ids) + self.places.weight[start : start + ids.shape[1]]
        x = self.decoder(x, self.attend, None, caches[0])
        return self.cross(x, self.attend, memory, caches[1]) @ self.tokens.weight.T

    def forward(self, sound: Tensor, ids: Tensor) -> Tensor:
        return self.decode(ids, self.encode(sound))


class Twin(Model):
    def attend(self, layer, x: Tensor, context: Tensor | None = None, cache=None) -> Tensor:
        size, seen = x.shape[1], None
        if layer is self.decoder.attn:
            seen = plain.cells(lambda b, h, i, j: j <= i, 1, 1, size, size)
        return plain.layer(layer, x, seen, context)


def inputs() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(2, 6, 20), torch.arange(14).view(2, 7) % 11)]


def stepwise(model: Model, sound: Tensor, ids: Tensor) -> Tensor:
    memory, caches = model.encode(sound), (ak.KVCache(), ak.KVCache())
    steps = [model.decode(ids[:, i : i + 1], memory, i, caches) for i in range(ids.shape[1])]
    return torch.cat(steps, 1)
