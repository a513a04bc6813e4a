"""attnkit: attention as a value, lowered onto fused kernels with a proof."""

from attnkit import layouts, masks, pse
from attnkit.attention import Attention, attention, plan
from attnkit.backends import AttentionOutput, Stats
from attnkit.cache import KVCache
from attnkit.config import AttentionConfig, MultiHeadAttentionConfig
from attnkit.errors import (
    AttnkitError,
    BackendRefused,
    CompositionError,
    ConfigError,
    KernelContractError,
    Refusal,
)
from attnkit.kernel import fusion_attention, fusion_attention_grad
from attnkit.layouts import SeqLens
from attnkit.modules import MultiHeadAttention
from attnkit.planner import Plan
from attnkit.rotary import Rotary

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionOutput",
    "AttnkitError",
    "BackendRefused",
    "CompositionError",
    "ConfigError",
    "KVCache",
    "KernelContractError",
    "MultiHeadAttention",
    "MultiHeadAttentionConfig",
    "Plan",
    "Refusal",
    "Rotary",
    "SeqLens",
    "Stats",
    "attention",
    "fusion_attention",
    "fusion_attention_grad",
    "layouts",
    "masks",
    "plan",
    "pse",
]
