"""BD3-LM: a noisy copy of a text sees its own block and the clean blocks before it.

Training runs ``[noisy, clean]`` through the model at once. Its mask is one set over both halves;
here each half asks for what it sees, so that no cell between them is looked at.

Source: Arriola et al., "Block Diffusion" (ICLR 2025, arXiv:2503.09573), figure 3. Names of the
tensors are those of its checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from models.parts import load

RENAMED = {"backbone.": "", "vocab_embed.embedding": "vocab_embed.weight"}


class Block(nn.Module):
    """One layer, ``[b s d] -> [b s d]``, shifted, scaled and gated by the noise."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, self.heads, self.size = config.hidden_size, config.n_heads, config.block_size
        self.norm1, self.norm2 = (nn.LayerNorm(dim, bias=False) for _ in range(2))
        self.attn_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attn_out = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = nn.Linear(config.cond_dim, 6 * dim)
        self.rotary = ak.Rotary()

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """``[b s d] -> [b s d]``; the first half of the tokens is noisy."""
        parts = self.adaLN_modulation(noise)[:, None].chunk(6, -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        y = self.norm1(x) * (1 + scale) + shift
        x = x + gate * self.attn_out(self.attend(y).flatten(-2))
        y = self.norm2(x) * (1 + scale_mlp) + shift_mlp
        out: Tensor = x + gate_mlp * self.mlp(y)
        return out

    def attend(self, x: Tensor) -> Tensor:
        """``[b s d] -> [b s n e]``."""
        count = x.shape[1] // 2
        places = torch.arange(count, device=x.device).repeat(2)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.attn_qkv(x).chunk(3, -1))
        q, k = self.rotary.rotate(q, places), self.rotary.rotate(k, places)
        (noisy_q, q), (noisy_k, k), (noisy_v, v) = (t.chunk(2, 1) for t in (q, k, v))
        # Keys are the clean half and then the noisy one, whose blocks lie on the last diagonal.
        size = self.size
        past = masks.BlockCausal(size, "top_left") - masks.Chunked(size, "top_left")
        both = torch.cat([k, noisy_k], 1), torch.cat([v, noisy_v], 1)
        noisy = ak.attention(noisy_q, *both, mask=past | masks.Chunked(size))
        return torch.cat([noisy, ak.attention(q, k, v, mask=masks.BlockCausal(size))], 1)


class Last(nn.Module):
    """The logits, ``[b s d] -> [b s v]``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim = config.hidden_size
        self.norm_final = nn.LayerNorm(dim, bias=False)
        self.linear = nn.Linear(dim, config.vocab_size)
        self.adaLN_modulation = nn.Linear(config.cond_dim, 2 * dim)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """``[b s d] -> [b s v]``."""
        shift, scale = self.adaLN_modulation(noise)[:, None].chunk(2, -1)
        out: Tensor = self.linear(self.norm_final(x) * (1 + scale) + shift)
        return out


class BD3LM(nn.Module):
    """``noisy [b s], clean [b s] -> logits [b s v]``, of the checkpoint's configuration."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, cond = config.hidden_size, config.cond_dim
        self.block_size = config.block_size
        self.vocab_embed = nn.Embedding(config.vocab_size, dim)
        mlp = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))
        self.sigma_map = nn.ModuleDict({"mlp": mlp})
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
        self.output_layer = Last(config)

    def forward(self, noisy: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
        """Return the logits of the noisy tokens; `sigma` ``[b]`` is how noisy they are.

        Raises `ValueError` for a length that is no whole number of blocks.
        """
        if noisy.shape[1] % self.block_size:
            raise ValueError(f"{noisy.shape[1]} tokens are not blocks of {self.block_size}")
        x = self.vocab_embed(torch.cat([noisy, clean], 1))
        turns = torch.arange(128, device=x.device) / 128 * -math.log(10000.0)
        angles = sigma[:, None].float() * turns.exp()
        wave = torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
        noise = nn.functional.silu(self.sigma_map["mlp"](wave))
        for block in self.blocks:
            x = block(x, noise)
        out: Tensor = self.output_layer(x[:, : noisy.shape[1]], noise)
        return out


def from_checkpoint(config: Any, state: Mapping[str, Tensor]) -> BD3LM:
    """Return the model with the weights of a checkpoint, which also holds its rotary's angles."""
    held = {name: tensor for name, tensor in state.items() if not name.endswith("inv_freq")}
    return load(BD3LM(config), held, RENAMED)
