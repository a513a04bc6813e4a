"""Tiny models of transformers, one of each kind, with inputs; built from configurations alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

transformers.logging.set_verbosity_error()

TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {k: TEXT[k] for k in TEXT if k not in ("num_key_value_heads", "head_dim")}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


class Case(NamedTuple):
    """A model, its inputs, and how often a forward calls attention."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    calls: int


def ids(batch: int = 2, length: int = 10) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 64, (batch, length))}


def padded(side: str = "right") -> dict[str, Tensor]:
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, slice(7, None) if side == "right" else slice(None, 3)] = 0
    return {**ids(), "attention_mask": mask}


def _pixels(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _decoder(name: str, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{name}TextConfig", None)
        config = config or getattr(transformers, f"{name}Config")
        return getattr(transformers, f"{name}ForCausalLM")(config(**TEXT, **more))

    return build


def _of(name: str, config: str, **how: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**how))


def _mixed(*kinds: str) -> dict[str, Any]:
    return {"layer_types": [f"{kind}_attention" for kind in kinds], "sliding_window": 4}


_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_SWIN = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4]}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
_WHISPER = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def _seq2seq() -> dict[str, Any]:
    return {**padded(), "decoder_input_ids": ids(2, 6)["input_ids"]}


def _whisper() -> dict[str, Any]:
    return {
        "input_features": torch.randn(2, 8, 24),
        "decoder_input_ids": ids(2, 6)["input_ids"],
    }


CASES = {
    "llama": Case(_decoder("Llama"), padded, 2),
    "qwen3": Case(_decoder("Qwen3"), lambda: padded("left"), 2),
    "mistral": Case(_decoder("Mistral", sliding_window=4), padded, 2),
    "gemma2": Case(_decoder("Gemma2", sliding_window=4, attn_logit_softcapping=2.0), ids, 2),
    "gemma3": Case(_decoder("Gemma3", **_mixed("sliding", "full")), padded, 2),
    "gpt_oss": Case(
        _decoder("GptOss", num_local_experts=2, num_experts_per_tok=1, **_mixed("sliding", "full")),
        padded,
        2,
    ),
    "deepseek_v3": Case(
        _of(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            **{k: TEXT[k] for k in TEXT if k not in ("head_dim", "num_key_value_heads")},
            **_MLA,
        ),
        padded,
        2,
    ),
    "llama4": Case(
        _decoder(
            "Llama4",
            attention_chunk_size=4,
            layer_types=["chunked_attention", "full_attention"],
            num_local_experts=2,
            intermediate_size_mlp=48,
        ),
        lambda: padded("left"),
        2,
    ),
    "modernbert": Case(
        _of(
            "ModernBertModel",
            "ModernBertConfig",
            **BERT,
            local_attention=4,
            global_attn_every_n_layers=2,
        ),
        padded,
        2,
    ),
    "bert": Case(_of("BertModel", "BertConfig", **BERT), padded, 2),
    "t5": Case(_of("T5Model", "T5Config", **_T5), _seq2seq, 6),
    "umt5": Case(_of("UMT5Model", "UMT5Config", **_T5), _seq2seq, 6),
    "whisper": Case(_of("WhisperModel", "WhisperConfig", **_WHISPER), _whisper, 3),
    "vit": Case(_of("ViTModel", "ViTConfig", **VISION), _pixels, 2),
    "siglip": Case(_of("SiglipVisionModel", "SiglipVisionConfig", **VISION), _pixels, 2),
    "swin": Case(_of("SwinModel", "SwinConfig", window_size=4, **_SWIN), _pixels, 3),
}


def pair(name: str, seed: int = 0) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Return a model that runs eager attention, a copy of it, and inputs."""
    torch.manual_seed(seed)
    case = CASES[name]
    model = case.build().eval()
    for parameter in model.parameters():
        # Tables and sinks begin at 0, where they would prove nothing.
        nn.init.normal_(parameter, std=0.2) if parameter.std() < 1e-6 else None
    _eager(model)
    return model, copy.deepcopy(model), case.inputs()


def _eager(model: nn.Module) -> None:
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = "eager"
