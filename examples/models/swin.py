"""Swin: windows of an image, shifted in every other layer, with a bias by relative place.

Source: Liu et al., "Swin Transformer" (ICCV 2021, arXiv:2103.14030).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks, pse
from models.parts import load

RENAMED = {
    "swin.": "",
    "o_proj": "out_proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "attention.relative_position_bias.relative_position_bias_table": "table",
    "embeddings.patch_embeddings.projection": "projection",
    "embeddings.norm": "norm",
    "encoder.": "",
}
CUT = "b (r i) (c j) d -> (b r c) (i j) d"
BACK = "(b r c) (i j) d -> b (r i) (c j) d"


class Block(nn.Module):
    """One layer, ``[b h w d] -> [b h w d]``; its windows begin `shift` patches further."""

    def __init__(self, config: Any, side: int, dim: int, heads: int, shift: int) -> None:
        super().__init__()
        whole = side <= config.window_size  # a small image is one window
        self.size: int = side if whole else config.window_size
        self.shift = 0 if whole else shift
        reach, hidden = 2 * config.window_size - 1, int(config.mlp_ratio * dim)
        bias = {"q", "k", "v", "out"} if config.qkv_bias else {"out"}
        self.attention = ak.MultiHeadAttention(dim, heads, bias=bias)
        self.table = nn.Parameter(torch.zeros(reach * reach, heads))
        self.layernorm_before = nn.LayerNorm(dim, config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(dim, config.layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        place = torch.cartesian_prod(torch.arange(self.size), torch.arange(self.size))
        apart = place[:, None] - place + config.window_size - 1
        self.index = nn.Buffer(apart @ torch.tensor([reach, 1]), persistent=False)
        self.mask = self._mask(side)

    def _mask(self, side: int) -> masks.Mask | None:
        """Return who sees whom where a roll brought patches of both ends into one window."""
        if not self.shift:
            return None
        end = (torch.arange(side) >= side - self.shift).long()
        part = rearrange((2 * end[:, None] + end)[None, ..., None], CUT, i=self.size, j=self.size)
        return masks.PerBatch([masks.Dense.keep(one == one.mT) for one in part])

    def forward(self, x: Tensor) -> Tensor:
        """``[b h w d] -> [b h w d]``."""
        y = self.layernorm_before(x).roll((-self.shift, -self.shift), (1, 2))
        windows = rearrange(y, CUT, i=self.size, j=self.size)
        bias = pse.Dense(self.table[self.index].movedim(-1, 0))
        mask = self.mask
        if isinstance(mask, masks.PerBatch):
            mask = masks.PerBatch(mask.masks * len(x))
        y = self.attention(windows, mask=mask, pse=bias)
        sizes = {"b": len(x), "i": self.size, "j": self.size, "r": x.shape[1] // self.size}
        x = x + rearrange(y, BACK, **sizes).roll((self.shift, self.shift), (1, 2))
        out: Tensor = x + self.mlp(self.layernorm_after(x))
        return out


class Stage(nn.Module):
    """Layers of one resolution, then four patches become one: ``[b h w d] -> [b h/2 w/2 2d]``."""

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        side = config.image_size // config.patch_size >> number
        dim, heads = config.embed_dim << number, config.num_heads[number]
        shifts = (config.window_size // 2 * (n % 2) for n in range(config.depths[number]))
        self.blocks = nn.ModuleList(Block(config, side, dim, heads, shift) for shift in shifts)
        self.downsample = None
        if number + 1 < len(config.depths):
            parts = {
                "norm": nn.LayerNorm(4 * dim),
                "reduction": nn.Linear(4 * dim, 2 * dim, bias=False),
            }
            self.downsample = nn.ModuleDict(parts)

    def forward(self, x: Tensor) -> Tensor:
        """``[b h w d] -> [b h w d]``, or half of it."""
        for block in self.blocks:
            x = block(x)
        if self.downsample is not None:
            x = rearrange(x, "b (h i) (w j) d -> b h w (j i d)", i=2, j=2)
            x = self.downsample["reduction"](self.downsample["norm"](x))
        return x


class Swin(nn.Module):
    """``images [b c h w] -> logits [b classes]``, of a `transformers.SwinConfig`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        patch, last = config.patch_size, config.embed_dim << (len(config.depths) - 1)
        self.projection = nn.Conv2d(config.num_channels, config.embed_dim, patch, patch)
        self.norm = nn.LayerNorm(config.embed_dim)
        self.layers = nn.ModuleList(Stage(config, n) for n in range(len(config.depths)))
        self.layernorm = nn.LayerNorm(last, config.layer_norm_eps)
        self.classifier = nn.Linear(last, config.num_labels)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the classes."""
        x = self.norm(self.projection(images).movedim(1, -1))
        for stage in self.layers:
            x = stage(x)
        logits: Tensor = self.classifier(self.layernorm(x).mean((1, 2)))
        return logits


def from_checkpoint(config: Any, state: Mapping[str, Tensor]) -> Swin:
    """Return the model with the weights of `transformers.SwinForImageClassification`."""
    return load(Swin(config), state, RENAMED)
