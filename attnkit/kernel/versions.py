"""The op's versions as data: which argument exists where, how it is spelled, what comes back.

Sources: op-plugin's function schemas per release branch (5.0.0 to 26.1.0), its dispatch to
aclnn, and MindSpeed's fusion_attention_v2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from attnkit.errors import KernelContractError

__all__ = ["OP_VERSIONS", "FusionOutput", "OpVersion", "op_version"]

_GRADS = ("dq", "dk", "dv", "dpse")
_COMMON = (
    "query",
    "key",
    "value",
    "head_num",
    "input_layout",
    "pse",
    "padding_mask",
    "atten_mask",
    "scale",
    "keep_prob",
    "pre_tokens",
    "next_tokens",
    "inner_precise",
    "prefix",
    "actual_seq_qlen",
    "actual_seq_kvlen",
    "sparse_mode",
    "gen_mask_parallel",
    "sync",
)
_OLD_SPELLING = {"pre_tokens": "pre_tockens", "next_tokens": "next_tockens"}
_BIAS = ("pse_type", "q_start_idx", "kv_start_idx")
_STATS = ("softmax_layout", "sink")
_RANDOM = ("dropout_mask", "seed", "offset")
_SINCE = {**dict.fromkeys(_STATS, "7.3.0"), **dict.fromkeys(_RANDOM, "26.0.0")}


class FusionOutput(NamedTuple):
    """The op's seven outputs.

    >>> import torch
    >>> from attnkit import fusion_attention
    >>> x = torch.zeros(1, 2, 1, 16)
    >>> fusion_attention(x, x, x, 1, "BSND").softmax_max.shape  # eight equal copies per row
    torch.Size([1, 1, 2, 8])
    """

    attention_out: torch.Tensor
    softmax_max: torch.Tensor
    softmax_sum: torch.Tensor
    softmax_out: torch.Tensor
    seed: int
    offset: int
    numels: int


@dataclass(frozen=True)
class OpVersion:
    """One entry point of the fused kernel.

    `arguments` are the fields of a `KernelCall` that it takes, `beyond` arguments that no
    `KernelCall` has (they stay at None), `spelling` how some of them are called there, `since`
    the torch_npu op-plugin release that added an argument, and `grad_scale` the grad op's name for
    scale. `as_tensors` are lists that it takes as integer tensors on the host.

    >>> OP_VERSIONS["v1"].op
    'npu_fusion_attention'
    """

    name: str
    op: str
    grad_op: str
    arguments: tuple[str, ...]
    outputs: tuple[str, ...]
    grad_outputs: tuple[str, ...]
    products: tuple[str, ...]
    release: str
    spelling: dict[str, str] = field(default_factory=dict, hash=False)
    since: dict[str, str] = field(default_factory=dict, hash=False)
    grad_scale: str = "scale_value"
    beyond: tuple[str, ...] = ()
    as_tensors: frozenset[str] = frozenset()


OP_VERSIONS: dict[str, OpVersion] = {
    version.name: version
    for version in (
        OpVersion(
            "v1",
            "npu_fusion_attention",
            "npu_fusion_attention_grad",
            (*_COMMON, *_STATS, *_RANDOM),
            FusionOutput._fields,
            (*_GRADS, "dsink"),
            ("A2", "A3", "950"),
            "5.0.0",
            _OLD_SPELLING,
            dict.fromkeys(("actual_seq_qlen", "actual_seq_kvlen"), "6.0")
            | _SINCE
            | {"softmax_layout": "7.2.0"},
        ),
        OpVersion(
            "v2",
            "npu_fusion_attention_v2",
            "npu_fusion_attention_grad_v2",
            (*_COMMON, *_BIAS, *_STATS, *_RANDOM),
            FusionOutput._fields,
            (*_GRADS, "dq_rope", "dk_rope", "dsink"),
            ("A2", "A3", "950"),
            "7.1.0",
            {},
            _SINCE,
            beyond=("query_rope", "key_rope"),
        ),
        OpVersion(
            "v3",
            "npu_fusion_attention_v3",
            "npu_fusion_attention_grad_v3",
            (*_COMMON, *_STATS),
            FusionOutput._fields[:6],
            (*_GRADS, "dsink"),
            ("A2", "A3"),
            "26.0.0",
            _OLD_SPELLING,
            {},
            as_tensors=frozenset({"actual_seq_qlen", "actual_seq_kvlen"}),
        ),
        OpVersion(
            "mindspeed",
            "mindspeed.ops.fusion_attention_v2.npu_fusion_attention",
            "mindspeed.ops.fusion_attention_v2.npu_fusion_attention_grad",
            (*_COMMON, *_BIAS),
            FusionOutput._fields,
            _GRADS,
            ("A2", "A3"),
            "MindSpeed",
            {},
            {},
            "scale",
        ),
    )
}
"""The four entry points by name: v1, v2, v3 and mindspeed."""


def op_version(name: str) -> OpVersion:
    """Return a version by name; raises `KernelContractError` for an unknown one."""
    if name not in OP_VERSIONS:
        raise KernelContractError(
            f"version={name!r} is not one of {', '.join(OP_VERSIONS)}", ["version-unknown"]
        )
    return OP_VERSIONS[name]
