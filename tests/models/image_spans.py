"""Images in a causal text: a prefix that sees itself (PaliGemma), padding on the left or right.

The first tokens, an image and a question, see each other; the answer is causal.

Source: Beyer et al., "PaliGemma: A versatile 3B VLM for transfer" (arXiv:2407.07726), figure 2.
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
        self.image = nn.Linear(6, 16)
        layers = [ak.MultiHeadAttention(16, 4, num_kv_heads=1, rotary=True) for _ in range(2)]
        self.blocks = nn.ModuleList(plain.Block(16, layer) for layer in layers)

    def attend(self, layer, x: Tensor, types: Tensor, exists: Tensor) -> Tensor:
        mask = masks.from_token_types(types, both_ways=0) & masks.Padding.of(exists)
        return layer(x, mask=mask)

    def forward(self, image: Tensor, text: Tensor, types: Tensor, exists: Tensor) -> Tensor:
        x = torch.cat([self.image(image), text], 1)
        for block in self.blocks:
            x = block(x, self.attend, types, exists)
        return x * exists[..., None]


class Twin(Model):
    def attend(self, layer, x: Tensor, types: Tensor, exists: Tensor) -> Tensor:
        kinds, there, size = types.tolist(), exists.tolist(), x.shape[1]

        def seen(b: int, h: int, i: int, j: int) -> bool:
            return there[b][j] and (j <= i or kinds[b][i] == kinds[b][j] == 0)

        places = torch.arange(size)
        allowed = plain.cells(seen, len(x), 1, size, size)
        return plain.layer(layer, x, allowed, turn=lambda x: plain.rotated(x, places))


def inputs() -> list[tuple[Tensor, ...]]:
    image, text = torch.randn(2, 4, 6), torch.randn(2, 10, 16)
    right = torch.arange(14) < torch.tensor([[14], [11]])
    answer = [(torch.arange(14) >= torch.tensor([[8], [n]])).long() for n in (6, 9)]
    return [(image, text, answer[0], right), (image, text, answer[1], right.flip(1))]
