"""Transformer-XL: a memory of the segment before, and scores of relative places.

``score = ((q + u).k[j] + (q + v).r[i - j]) * scale``: the second half, which depends on the query,
is a bias that is added before the scale.

Source: Dai et al., "Transformer-XL" (ACL 2019), section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from tests.models import plain


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.r = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)
        self.u, self.v = nn.Parameter(torch.zeros(2, 8)), nn.Parameter(torch.zeros(2, 8))
        self.o = nn.Linear(16, 16)

    def heads(self, x: Tensor, memory: Tensor) -> list[Tensor]:
        """Queries, keys, values, and the relative places' keys for distances from the farthest."""
        whole = torch.cat([memory, x], 1)
        distance = torch.arange(whole.shape[1] - 1, -1, -1, dtype=x.dtype)[:, None]
        angle = distance / 10 ** torch.arange(8)
        r = self.r(torch.cat([angle.sin(), angle.cos()], -1))
        parts = [self.q(x), *self.kv(whole).chunk(2, -1), r[None]]
        return [plain.split(t, 2) for t in parts]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(plain.Block(16, Layer()) for _ in range(2))

    def attend(self, layer: Layer, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v, r = layer.heads(x, memory)
        by_place = torch.einsum("bind,jnd->bnij", q + layer.v, r[0])
        bias = pse.Dense(shifted(by_place), before_scale=True, validate=False)
        return layer.o(ak.attention(q + layer.u, k, v, mask=masks.Causal(), pse=bias).flatten(-2))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        for block in self.blocks:
            memory, x = x.detach(), block(x, self.attend, memory)
        return x


def shifted(by_place: Tensor) -> Tensor:
    """Row i moved left by ``rows - 1 - i``: the paper's trick; what wraps around is masked."""
    rows, keys = by_place.shape[-2:]
    flat = nn.functional.pad(by_place, (1, 0)).flatten(-2)[..., rows:]
    return flat.unflatten(-1, (rows, keys))


class Twin(Model):
    def attend(self, layer: Layer, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v, r = layer.heads(x, memory)
        rows, keys = q.shape[1], k.shape[1]
        distance = torch.arange(rows)[:, None] + (keys - rows) - torch.arange(keys)
        relative = r[0, (keys - 1 - distance).clamp(max=keys - 1)]
        bias = torch.einsum("bind,ijnd->bnij", q + layer.v, relative) * 8**-0.5
        return layer.o(plain.attend(q + layer.u, k, v, distance >= 0, bias=bias).flatten(-2))


def inputs() -> list[tuple[Tensor, ...]]:
    return [(torch.randn(2, 7, 16), torch.randn(2, 5, 16))]
