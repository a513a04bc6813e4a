"""The fused attention kernel: its calls as values, what they compute, and an emulator.

Only this package and `attnkit.backends` see the kernel's own mask polarity (True = masked).
"""

from __future__ import annotations

from attnkit.kernel.atten_mask import AttenMask
from attnkit.kernel.call import UNBOUNDED, KernelCall, TensorSpec
from attnkit.kernel.dropout import dropout_bytes, dropout_mask
from attnkit.kernel.emulator import Gradients, emulate, emulate_grad
from attnkit.kernel.fusion_attention import (
    FusionOutput,
    fusion_attention,
    fusion_attention_grad,
)
from attnkit.kernel.rules import RULES, MaskFacts, Rule, Violation
from attnkit.kernel.stats import log_sum_exp, merge_partials, pack_stats, unpack_stats
from attnkit.kernel.versions import OP_VERSIONS, OpVersion, arguments_for, expressing_versions

__all__ = [
    "OP_VERSIONS",
    "RULES",
    "UNBOUNDED",
    "AttenMask",
    "FusionOutput",
    "Gradients",
    "KernelCall",
    "MaskFacts",
    "OpVersion",
    "Rule",
    "TensorSpec",
    "Violation",
    "arguments_for",
    "dropout_bytes",
    "dropout_mask",
    "emulate",
    "emulate_grad",
    "expressing_versions",
    "fusion_attention",
    "fusion_attention_grad",
    "log_sum_exp",
    "merge_partials",
    "pack_stats",
    "unpack_stats",
]
