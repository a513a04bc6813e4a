"""Tree decoding: drafts that share their beginnings are checked in one call, after a cached text.

Step by step means here: every path through the tree, as a text.
Sources: Miao et al., "SpecInfer" (arXiv:2305.09781); Cai et al., "Medusa" (arXiv:2401.10774).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from tests.models import plain

TEXT, PARENTS = 6, (-1, 0, 0, 1, 1, 2, 5)  # of each draft; -1 is the text, its last token


def path(node: int) -> list[int]:
    return [] if node < 0 else [*path(PARENTS[node]), node]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def heads(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (plain.split(t, 1) for t in self.kv(x).chunk(2, -1))
        return plain.rotated(plain.split(self.q(x), 2), places), plain.rotated(k, places), v


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(plain.Block(16, Layer()) for _ in range(2))

    def attend(self, layer: Layer, x: Tensor, places: Tensor, cache, tree=None) -> Tensor:
        q, k, v = layer.heads(x, places)
        mask = masks.Causal() if tree is None else masks.Prefix(TEXT) | masks.Dense.keep(tree)
        return layer.o(ak.attention(q, *cache.append(k, v), mask=mask).flatten(-2))

    def run(self, x: Tensor, places: Tensor, caches: list, tree=None) -> Tensor:
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, self.attend, places, cache, tree)
        return x

    def forward(self, text: Tensor, drafts: Tensor) -> Tensor:
        caches = [plain.Joined() for _ in self.blocks]
        self.run(text, torch.arange(TEXT), caches)
        paths, size = [path(node) for node in range(len(PARENTS))], TEXT + len(PARENTS)
        tree = torch.tensor([[j - TEXT in p for j in range(size)] for p in paths])
        return self.run(drafts, torch.tensor([TEXT - 1 + len(p) for p in paths]), caches, tree)


class Twin(Model):
    def attend(self, layer: Layer, x: Tensor, places: Tensor, cache, tree=None) -> Tensor:
        def seen(b: int, h: int, i: int, j: int) -> bool:
            return j <= i if tree is None else j < TEXT or j - TEXT in path(i)

        q, k, v = layer.heads(x, places)
        k, v = cache.append(k, v)
        allowed = plain.cells(seen, 1, 1, x.shape[1], k.shape[1])
        return layer.o(plain.attend(q, k, v, allowed).flatten(-2))


def inputs() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(2, TEXT, 16), torch.randn(2, len(PARENTS), 16))]


def stepwise(model: Model, text: Tensor, drafts: Tensor) -> Tensor:
    caches, ends = [ak.KVCache() for _ in model.blocks], []
    model.run(text, torch.arange(TEXT), caches)
    for node in range(len(PARENTS)):
        for place, step in enumerate(path(node), TEXT):
            end = model.run(drafts[:, step : step + 1], torch.tensor([place]), caches)
        ends.append(end)
        for cache in caches:
            cache.truncate(TEXT)
    return torch.cat(ends, 1)
