"""Whisper: an encoder of sound, a causal decoder of text, cross-attention that keeps its keys.

Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from models.parts import load

RENAMED = {"model.": "", "fc1": "mlp.0", "fc2": "mlp.2"}
Caches = Sequence[tuple[ak.KVCache, ak.KVCache]]


class Block(nn.Module):
    """One layer, ``[b s d] -> [b s d]``; the decoder's also look at the sound."""

    def __init__(self, dim: int, heads: int, hidden: int, decodes: bool) -> None:
        super().__init__()
        bias = {"q", "v", "out"}
        causal = masks.Causal() if decodes else None
        self.self_attn = ak.MultiHeadAttention(dim, heads, bias=bias, mask=causal)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        if decodes:
            self.encoder_attn = ak.MultiHeadAttention(dim, heads, bias=bias)
            self.encoder_attn_layer_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(
        self,
        x: Tensor,
        sound: Tensor | None = None,
        caches: tuple[ak.KVCache | None, ak.KVCache | None] = (None, None),
    ) -> Tensor:
        """``[b s d] -> [b s d]``."""
        own, across = caches
        x = x + self.self_attn(self.self_attn_layer_norm(x), cache=own)
        if sound is not None:
            x = x + self.encoder_attn(self.encoder_attn_layer_norm(x), sound, cache=across)
        out: Tensor = x + self.mlp(self.final_layer_norm(x))
        return out


class Encoder(nn.Module):
    """``sound [b mel t] -> [b t/2 d]``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, heads, hidden = config.d_model, config.encoder_attention_heads, config.encoder_ffn_dim
        self.conv1 = nn.Conv1d(config.num_mel_bins, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, dim)
        blocks = (Block(dim, heads, hidden, False) for _ in range(config.encoder_layers))
        self.layers, self.layer_norm = nn.ModuleList(blocks), nn.LayerNorm(dim)

    def forward(self, sound: Tensor) -> Tensor:
        """Return one vector for every second frame."""
        x = nn.functional.gelu(self.conv2(nn.functional.gelu(self.conv1(sound)))).mT
        x = x + self.embed_positions.weight[: x.shape[1]]
        for block in self.layers:
            x = block(x)
        out: Tensor = self.layer_norm(x)
        return out


class Decoder(nn.Module):
    """``ids [b s], sound [b t d] -> [b s d]``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, heads, hidden = config.d_model, config.decoder_attention_heads, config.decoder_ffn_dim
        self.embed_tokens = nn.Embedding(config.vocab_size, dim)
        self.embed_positions = nn.Embedding(config.max_target_positions, dim)
        blocks = (Block(dim, heads, hidden, True) for _ in range(config.decoder_layers))
        self.layers, self.layer_norm = nn.ModuleList(blocks), nn.LayerNorm(dim)

    def forward(self, ids: Tensor, sound: Tensor, caches: Caches | None = None) -> Tensor:
        """Return one vector for every token."""
        start = caches[0][0].length if caches else 0
        x = self.embed_tokens(ids) + self.embed_positions.weight[start : start + ids.shape[1]]
        none = [(None, None)] * len(self.layers)
        for block, kept in zip(self.layers, caches or none, strict=True):
            x = block(x, sound, kept)
        out: Tensor = self.layer_norm(x)
        return out


class Whisper(nn.Module):
    """``sound [b mel t], ids [b s] -> logits [b s v]``, of a `transformers.WhisperConfig`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.proj_out = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.proj_out.weight = self.decoder.embed_tokens.weight

    def forward(self, sound: Tensor, ids: Tensor) -> Tensor:
        """Return the logits of every token's next."""
        return self.decode(ids, self.encoder(sound))

    def decode(self, ids: Tensor, sound: Tensor, caches: Caches | None = None) -> Tensor:
        """Return the logits; with `caches`, two for each layer, `ids` are the next tokens."""
        logits: Tensor = self.proj_out(self.decoder(ids, sound, caches))
        return logits


def from_checkpoint(config: Any, state: Mapping[str, Tensor]) -> Whisper:
    """Return the model with the weights of `transformers.WhisperForConditionalGeneration`."""
    return load(Whisper(config), state, RENAMED)
