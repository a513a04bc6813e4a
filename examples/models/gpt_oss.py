"""gpt-oss: a learned sink per head, a window in every other layer, experts.

Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (arXiv:2508.10925).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from models.parts import load, rotary, through

RENAMED = {"model.": "", "o_proj": "out_proj", "self_attn.sinks": "self_attn.attention.sink"}


class Experts(nn.Module):
    """The best few experts of each token, weighed by the softmax of their scores."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        count, dim, hidden = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.best, self.limit = config.num_experts_per_tok, config.swiglu_limit
        self.router = nn.Linear(dim, count)
        self.experts = nn.ParameterDict(
            {
                "gate_up_proj": torch.zeros(count, dim, 2 * hidden),
                "gate_up_proj_bias": torch.zeros(count, 2 * hidden),
                "down_proj": torch.zeros(count, hidden, dim),
                "down_proj_bias": torch.zeros(count, dim),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[b s d] -> [b s d]``."""
        scores, chosen = self.router(x).topk(self.best, dim=-1)
        weights, out = scores.softmax(-1), torch.zeros_like(x)
        for n in range(len(self.experts["down_proj"])):
            where = (chosen == n).any(-1)
            weight = (weights * (chosen == n))[where].sum(-1, keepdim=True)
            out[where] = out[where] + weight * self._one(n, x[where])
        return out

    def _one(self, n: int, x: Tensor) -> Tensor:
        own = {name: tensor[n] for name, tensor in self.experts.items()}
        both = x @ own["gate_up_proj"] + own["gate_up_proj_bias"]
        gate, up = both[..., ::2].clamp(max=self.limit), both[..., 1::2]
        hidden = gate * torch.sigmoid(1.702 * gate) * (up.clamp(-self.limit, self.limit) + 1)
        out: Tensor = hidden @ own["down_proj"] + own["down_proj_bias"]
        return out


class Block(nn.Module):
    """One layer, ``[b s d] -> [b s d]``."""

    def __init__(self, config: Any, kind: str) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        local = kind == "sliding_attention"
        self.self_attn = ak.MultiHeadAttention(
            dim,
            config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            bias=True,
            sink=True,
            rotary=rotary(config.rope_parameters),
            mask=masks.SlidingWindow(config.sliding_window) if local else masks.Causal(),
        )
        self.mlp = Experts(config)
        self.input_layernorm = nn.RMSNorm(dim, eps)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps)

    def forward(self, x: Tensor, cache: ak.KVCache | None) -> Tensor:
        """``[b s d] -> [b s d]``."""
        x = x + self.self_attn(self.input_layernorm(x), cache=cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class GptOss(nn.Module):
    """``ids [b s] -> logits [b s v]``, of a `transformers.GptOssConfig`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layer_types)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: Tensor, caches: Sequence[ak.KVCache] | None = None) -> Tensor:
        """Return the logits; with `caches`, one for each layer, `ids` are the next tokens."""
        x = self.embed_tokens(ids)
        x = through(self.layers, x, caches)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


def from_checkpoint(config: Any, state: Mapping[str, Tensor]) -> GptOss:
    """Return the model with the weights of `transformers.GptOssForCausalLM`."""
    return load(GptOss(config), state, RENAMED)
