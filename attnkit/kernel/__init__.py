"""The fused attention kernel: its calls as values, what they compute, and an emulator.

Only this package and `attnkit.backends` see the kernel's own mask polarity (True = masked).

For users of the op: `fusion_attention` and `fusion_attention_grad` with what they return
(`FusionOutput`, `Gradients`), `AttenMask` for the masks they take, `dropout_mask` and
`dropout_bytes`, and `merge_partials`, `log_sum_exp`, `pack_stats`, `unpack_stats` for their
statistics.

For those who extend attnkit, with a backend or a tool that asks about calls: `KernelCall` with
`TensorSpec` and `UNBOUNDED`, `emulate` and `emulate_grad` which run one, the rules (`RULES`,
`Rule`, `Violation`, `MaskFacts`), `BlockSparseCall` for calls of the block-sparse op beside it,
and the op's versions (`OP_VERSIONS`, `OpVersion`,
`arguments_for`, `expressing_versions`).
"""

from __future__ import annotations

from attnkit.kernel.atten_mask import AttenMask
from attnkit.kernel.block_sparse import BlockSparseCall
from attnkit.kernel.call import KernelCall
from attnkit.kernel.dropout import dropout_bytes, dropout_mask
from attnkit.kernel.emulator import Gradients, emulate, emulate_grad
from attnkit.kernel.fusion_attention import fusion_attention, fusion_attention_grad
from attnkit.kernel.launch import arguments_for, expressing_versions
from attnkit.kernel.legality import MaskFacts, Rule, Violation
from attnkit.kernel.rules import RULES
from attnkit.kernel.sizes import UNBOUNDED, TensorSpec
from attnkit.kernel.stats import log_sum_exp, merge_partials, pack_stats, unpack_stats
from attnkit.kernel.versions import OP_VERSIONS, FusionOutput, OpVersion

__all__ = [
    "OP_VERSIONS",
    "RULES",
    "UNBOUNDED",
    "AttenMask",
    "BlockSparseCall",
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
