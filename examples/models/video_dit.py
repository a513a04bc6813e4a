"""Wan, a DiT of videos: patches turn by time, height and width, and look at a padded text.

Sources: Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023); Wan Team,
"Wan: Open and Advanced Large-Scale Video Generative Models" (arXiv:2503.20314).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from models.parts import load

RENAMED = {
    "to_q.": "q_proj.",
    "to_k.": "k_proj.",
    "to_v.": "v_proj.",
    "to_out.0.": "out_proj.",
    "norm_q.": "q_norm.",
    "norm_k.": "k_norm.",
    "ffn.net.0.proj.": "ffn.0.",
    "ffn.net.2.": "ffn.2.",
    "condition_embedder.time_embedder.linear_1.": "time.0.",
    "condition_embedder.time_embedder.linear_2.": "time.2.",
    "condition_embedder.time_proj.": "time_proj.",
    "condition_embedder.text_embedder.linear_1.": "text.0.",
    "condition_embedder.text_embedder.linear_2.": "text.2.",
}


class Block(nn.Module):
    """One layer, ``[b s d] -> [b s d]``, shifted, scaled and gated by the time of the diffusion."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        heads, size = config.num_attention_heads, config.attention_head_dim
        dim, hidden = heads * size, config.ffn_dim
        side = size // 6  # of height and of width; time has the other pairs
        turns = ak.Rotary(
            sections=(size // 2 - 2 * side, side, side), order="axial", pairing="interleaved"
        )
        self.attn1 = ak.MultiHeadAttention(dim, heads, rotary=turns, bias=True, qk_norm="rms_whole")
        self.attn2 = ak.MultiHeadAttention(dim, heads, bias=True, qk_norm="rms_whole")
        self.norm1, self.norm3 = (nn.LayerNorm(dim, config.eps, False) for _ in range(2))
        crossed = config.cross_attn_norm
        self.norm2 = nn.LayerNorm(dim, config.eps) if crossed else nn.Identity()
        self.ffn = nn.Sequential(nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(
        self, x: Tensor, text: Tensor, time: Tensor, places: Tensor, padding: masks.Mask | None
    ) -> Tensor:
        """``[b s d] -> [b s d]``; `places` ``[3 s]`` are time, height and width of the patches."""
        parts = (self.scale_shift_table + time).chunk(6, 1)
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = parts
        y = self.norm1(x) * (1 + scale) + shift
        x = x + gate * self.attn1(y, positions=places)
        x = x + self.attn2(self.norm2(x), text, mask=padding)
        y = self.norm3(x) * (1 + scale_ffn) + shift_ffn
        out: Tensor = x + gate_ffn * self.ffn(y)
        return out


class VideoDiT(nn.Module):
    """``video [b c t h w], time [b], text [b s d] -> [b c t h w]``, of diffusers' Wan config."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim = config.num_attention_heads * config.attention_head_dim
        self.patch, self.waves = tuple(config.patch_size), config.freq_dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, self.patch, self.patch)
        self.time = nn.Sequential(nn.Linear(self.waves, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_proj = nn.Linear(dim, 6 * dim)
        text = nn.Linear(config.text_dim, dim)
        self.text = nn.Sequential(text, nn.GELU("tanh"), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = nn.LayerNorm(dim, config.eps, False)
        self.proj_out = nn.Linear(dim, config.out_channels * math.prod(self.patch))
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(
        self, video: Tensor, time: Tensor, text: Tensor, text_mask: Tensor | None = None
    ) -> Tensor:
        """Return the prediction; `text_mask` ``[b s]`` says which tokens of the text exist."""
        patches = self.patch_embedding(video)
        sizes = patches.shape[2:]
        places = torch.cartesian_prod(*(torch.arange(n, device=video.device) for n in sizes)).T
        x, text = patches.flatten(2).mT, self.text(text)
        now = self.time(self._wave(time).to(x.dtype))
        steps = self.time_proj(nn.functional.silu(now)).unflatten(1, (6, -1))
        padding = None if text_mask is None else masks.Padding.of(text_mask)
        for block in self.blocks:
            x = block(x, text, steps, places, padding)
        shift, scale = (self.scale_shift_table + now[:, None]).chunk(2, 1)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        names = dict(zip(("t", "h", "w", "i", "j", "k"), (*sizes, *self.patch), strict=True))
        out: Tensor = rearrange(x, "b (t h w) (i j k c) -> b c (t i) (h j) (w k)", **names)
        return out

    def _wave(self, time: Tensor) -> Tensor:
        """Return cosines and sines of a time, ``[b] -> [b f]``."""
        half = self.waves // 2
        turns = torch.arange(half, device=time.device, dtype=torch.float32) / half
        angles = time[:, None].float() * torch.exp(-math.log(10000.0) * turns)
        return torch.cat([angles.cos(), angles.sin()], -1)


def from_checkpoint(config: Any, state: Mapping[str, Tensor]) -> VideoDiT:
    """Return the model with the weights of `diffusers.WanTransformer3DModel`."""
    return load(VideoDiT(config), state, RENAMED)
