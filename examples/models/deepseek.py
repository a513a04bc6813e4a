"""DeepSeek-V3: keys and values from one small latent (MLA), a rotary part for all heads, experts.

A cache holds the latent and the shared rotary key; the heads are made of them anew.

Sources: DeepSeek-AI, "DeepSeek-V2" (arXiv:2405.04434), section 2.1, and "DeepSeek-V3 Technical
Report" (arXiv:2412.19437).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import attnkit as ak
from attnkit import masks
from models.parts import SwiGLU, load, rotary, stretch, through, tokens_of

RENAMED = {"model.": ""}


class Latent(nn.Module):
    """Multi-head latent attention, ``[b s d] -> [b s d]``."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, self.heads = config.hidden_size, config.num_attention_heads
        self.plain, self.turned = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent, self.value = config.kv_lora_rank, config.v_head_dim
        size, rank = self.plain + self.turned, config.q_lora_rank
        if rank is None:
            self.q_proj = nn.Linear(dim, self.heads * size, bias=False)
        else:
            self.q_a_proj = nn.Linear(dim, rank, bias=config.attention_bias)
            self.q_a_layernorm = nn.RMSNorm(rank, 1e-6)
            self.q_b_proj = nn.Linear(rank, self.heads * size, bias=False)
        width = self.latent + self.turned
        self.kv_a_proj_with_mqa = nn.Linear(dim, width, bias=config.attention_bias)
        self.kv_a_layernorm = nn.RMSNorm(self.latent, 1e-6)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.plain + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, dim, bias=config.attention_bias)
        pairing = "interleaved" if config.rope_interleave else "half"
        self.rotary = rotary(config.rope_parameters, pairing)
        scale = size**-0.5 * stretch(config.rope_parameters, "mscale_all_dim") ** 2
        self.attention = ak.Attention(self.heads, size, scale=scale, mask=masks.Causal())

    def forward(
        self,
        x: Tensor,
        mask: masks.Mask | None,
        positions: Tensor | None,
        cache: ak.KVCache | None,
    ) -> Tensor:
        """``[b s d] -> [b s d]``."""
        start = 0 if cache is None else cache.length
        if positions is None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        latent, turned = self.kv_a_proj_with_mqa(x).split((self.latent, self.turned), -1)
        turned = self.rotary.rotate(turned[:, :, None], positions)
        latent = self.kv_a_layernorm(latent)[:, :, None]
        if cache is not None:
            latent, turned = cache.append(latent, turned)
        both = self.kv_b_proj(latent[:, :, 0]).unflatten(-1, (self.heads, -1))
        key, value = both.split((self.plain, self.value), -1)
        key = torch.cat([key, turned.expand(-1, -1, self.heads, -1)], -1)
        own = self.attention(self._query(x, positions), key, value, mask=mask)
        out: Tensor = self.o_proj(own.flatten(-2))
        return out

    def _query(self, x: Tensor, positions: Tensor) -> Tensor:
        if hasattr(self, "q_proj"):
            flat = self.q_proj(x)
        else:
            flat = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query, turned = flat.unflatten(-1, (self.heads, -1)).split((self.plain, self.turned), -1)
        return torch.cat([query, self.rotary.rotate(turned, positions)], -1)


class Experts(nn.Module):
    """Some of many small networks for each token, chosen by groups, and one for all tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        count, dim = config.n_routed_experts, config.hidden_size
        hidden = config.moe_intermediate_size
        self.best, self.groups, self.open = (
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
        )
        self.sums_to_one, self.factor = config.norm_topk_prob, config.routed_scaling_factor
        self.gate = nn.Linear(dim, count, bias=False)
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(count))
        shapes = {"gate_up_proj": (2 * hidden, dim), "down_proj": (dim, hidden)}
        zeros = {name: torch.zeros(count, *shape) for name, shape in shapes.items()}
        self.experts = nn.ParameterDict(zeros)
        self.shared_experts = SwiGLU(dim, hidden * config.n_shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        """``[b s d] -> [b s d]``."""
        weights = self._weights(x)
        out: Tensor = self.shared_experts(x)
        for n in range(weights.shape[-1]):
            where = weights[..., n] != 0
            up, down = self.experts["gate_up_proj"][n], self.experts["down_proj"][n]
            gate, hidden = (x[where] @ up.mT).chunk(2, -1)
            own = (nn.functional.silu(gate) * hidden) @ down.mT
            out[where] = out[where] + weights[where][:, n, None] * own
        return out

    def _weights(self, x: Tensor) -> Tensor:
        """Return what each expert counts for each token ``[b s e]``, 0 for most."""
        scores = self.gate(x).sigmoid()
        grouped = (scores + self.gate.e_score_correction_bias).unflatten(-1, (self.groups, -1))
        allowed = grouped.topk(2, -1).values.sum(-1).topk(self.open, -1).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, allowed, False)
        chosen = grouped.masked_fill(closed[..., None], -torch.inf).flatten(-2).topk(self.best)
        weights = scores.gather(-1, chosen.indices)
        if self.sums_to_one:
            weights = weights / weights.sum(-1, keepdim=True)
        return torch.zeros_like(scores).scatter(-1, chosen.indices, weights * self.factor)


class Block(nn.Module):
    """One layer, ``[b s d] -> [b s d]``; the first few have no experts."""

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.rms_norm_eps
        dense = number < config.first_k_dense_replace
        self.self_attn = Latent(config)
        self.mlp = SwiGLU(dim, config.intermediate_size) if dense else Experts(config)
        self.input_layernorm = nn.RMSNorm(dim, eps)
        self.post_attention_layernorm = nn.RMSNorm(dim, eps)

    def forward(
        self,
        x: Tensor,
        mask: masks.Mask | None,
        positions: Tensor | None,
        cache: ak.KVCache | None,
    ) -> Tensor:
        """``[b s d] -> [b s d]``."""
        x = x + self.self_attn(self.input_layernorm(x), mask, positions, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class DeepSeek(nn.Module):
    """``ids [b s] -> logits [b s v]``, of a `transformers.DeepseekV3Config`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, n) for n in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        caches: Sequence[ak.KVCache] | None = None,
    ) -> Tensor:
        """Return the logits; `attention_mask` ``[b t]`` is a tokenizer's, padded on either side.

        With `caches`, one for each layer, `ids` are the next tokens; the mask speaks of all so far.
        """
        mask = None if attention_mask is None else masks.Padding.of(attention_mask)
        places = tokens_of(attention_mask, ids, caches[0] if caches else None)
        x = self.embed_tokens(ids)
        x = through(self.layers, x, caches, mask, places)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


def from_checkpoint(config: Any, state: Mapping[str, Tensor]) -> DeepSeek:
    """Return the model with the weights of `transformers.DeepseekV3ForCausalLM`."""
    return load(DeepSeek(config), state, RENAMED)
