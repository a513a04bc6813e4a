"""attnkit: attention as a value, lowered onto fused kernels with a proof."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from attnkit import layouts, masks, pse
from attnkit.attention import Attention
from attnkit.backends import AttentionOutput, Stats, merge
from attnkit.cache import KVCache
from attnkit.errors import (
    AttnkitError,
    BackendRefused,
    CompositionError,
    ConfigError,
    ExchangeError,
    KernelContractError,
    Refusal,
)
from attnkit.functional import attention, plan
from attnkit.kernel import fusion_attention, fusion_attention_grad
from attnkit.layouts import SeqLens
from attnkit.modules import MultiHeadAttention
from attnkit.pages import PagedCache
from attnkit.planner import Plan
from attnkit.reports import expect, report
from attnkit.rotary import Rotary
from attnkit.sharded_cache import ShardedCache
from attnkit.static import StaticCache

if TYPE_CHECKING:
    from attnkit.config import AttentionConfig, MultiHeadAttentionConfig

__version__ = "0.2.0"

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionOutput",
    "AttnkitError",
    "BackendRefused",
    "CompositionError",
    "ConfigError",
    "ExchangeError",
    "KVCache",
    "KernelContractError",
    "MultiHeadAttention",
    "MultiHeadAttentionConfig",
    "PagedCache",
    "Plan",
    "Refusal",
    "Rotary",
    "SeqLens",
    "ShardedCache",
    "StaticCache",
    "Stats",
    "attention",
    "expect",
    "fusion_attention",
    "fusion_attention_grad",
    "layouts",
    "masks",
    "merge",
    "plan",
    "pse",
    "report",
]

# pydantic and a YAML parser cost about as much to import as everything else here together, and
# who builds a model in Python needs neither.
_OF_CONFIG = ("AttentionConfig", "MultiHeadAttentionConfig")


def __getattr__(name: str) -> object:
    """Import the configurations when they are first asked for."""
    if name != "config" and name not in _OF_CONFIG:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    config = import_module("attnkit.config")
    return config if name == "config" else getattr(config, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "config"})
