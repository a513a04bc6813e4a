"""GPT-2: learned positions, layer norm before each part, one projection for query, key and value.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from models.parts import load, through

RENAMED = {"transformer.": "", "attn.c_proj": "attn.out_proj", "mlp.c_fc": "mlp.0"}
RENAMED |= {"mlp.c_proj": "mlp.2"}


class Block(nn.Module):
    """One layer, ``[b s d] -> [b s d]``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, eps = config.n_embd, config.layer_norm_epsilon
        self.ln_1, self.ln_2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn = ak.MultiHeadAttention(dim, config.n_head, bias=True, mask=masks.Causal())
        hidden = config.n_inner or 4 * dim
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU("tanh"), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, mask: masks.Mask | None, cache: ak.KVCache | None) -> Tensor:
        """``[b s d] -> [b s d]``."""
        x = x + self.attn(self.ln_1(x), mask=mask, cache=cache)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT2(nn.Module):
    """``ids [b s] -> logits [b s v]``, of a `transformers.GPT2Config`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(
        self,
        ids: Tensor,
        documents: Tensor | None = None,
        caches: Sequence[ak.KVCache] | None = None,
    ) -> Tensor:
        """Return the logits; `documents` ``[b s]`` numbers the texts packed into each row.

        With `caches`, one for each layer, `ids` are the next tokens.
        """
        start = caches[0].length if caches else 0
        places = torch.arange(start, start + ids.shape[1], device=ids.device)
        mask = None
        if documents is not None:
            mask = masks.Documents.from_ids(documents)
            same = documents[:, :, None] == documents[:, None]
            places = same.tril().sum(-1)[:, start : start + ids.shape[1]] - 1
        x = self.wte(ids) + self.wpe(places)
        x = through(self.h, x, caches, mask)
        logits: Tensor = self.lm_head(self.ln_f(x))
        return logits


def from_checkpoint(config: Any, state: Mapping[str, Tensor]) -> GPT2:
    """Return the model with the weights of `transformers.GPT2LMHeadModel`.

    Its projections are stored as ``[in out]``, query, key and value in one.
    """
    parts: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(("c_attn.weight", "c_attn.bias", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T if tensor.dim() == 2 else tensor
        if "c_attn" in name:
            for which, part in zip("qkv", tensor.chunk(3), strict=True):
                parts[name.replace("c_attn", f"{which}_proj")] = part
        else:
            parts[name] = tensor
    return load(GPT2(config), parts, RENAMED)
