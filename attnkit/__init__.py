"""attnkit: attention as a value, lowered onto fused kernels with a proof."""

from attnkit import layouts, masks, pse
from attnkit.attention import Attention, attention, plan
from attnkit.backends import AttentionOutput, Stats
from attnkit.errors import (
    AttnkitError,
    BackendRefused,
    CompositionError,
    ConfigError,
    KernelContractError,
    Refusal,
)
from attnkit.layouts import SeqLens
from attnkit.planner import Plan

__version__ = "0.1.0"

__all__ = [
    "Attention",
    "AttentionOutput",
    "AttnkitError",
    "BackendRefused",
    "CompositionError",
    "ConfigError",
    "KernelContractError",
    "Plan",
    "Refusal",
    "SeqLens",
    "Stats",
    "attention",
    "layouts",
    "masks",
    "plan",
    "pse",
]
