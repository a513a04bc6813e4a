"""A recording stand-in for ``torch.ops.npu``, made from the schemas of real releases.

It takes a call only as the schema spells it, records it, and answers as the op would.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from attnkit.kernel import fusion_attention, fusion_attention_grad

_V1 = (
    "(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., "
    "float keep_prob=1., int pre_tockens=2147483647, int next_tockens=2147483647, "
    "int inner_precise=0, int[]? prefix=None"
)
_V2 = (
    "(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, *, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, "
    "Tensor? query_rope=None, Tensor? key_rope=None, float scale=1., float keep_prob=1., "
    "int pre_tokens=2147483647, int next_tokens=2147483647, int inner_precise=0, "
    "int[]? prefix=None"
)
_LENGTHS = ", int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None"
_TAIL = ", int sparse_mode=0, bool gen_mask_parallel=True, bool sync=False"
_BIAS = ", int pse_type=1, int[]? q_start_idx=None, int[]? kv_start_idx=None"
_LAYOUT = ', str softmax_layout=""'
_SINK = ", Tensor? sink=None"
_RANDOM = ", Tensor? dropout_mask=None, int seed=0, int offset=0"
_OUT = ") -> (Tensor, Tensor, Tensor, Tensor, int, int, int)"

_GRAD = (
    "(Tensor query, Tensor key, Tensor value, Tensor dy, int head_num, str input_layout, *, "
    "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, "
    "Tensor? softmax_max=None, Tensor? softmax_sum=None, Tensor? softmax_in=None, "
    "Tensor? attention_in=None, float scale_value=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, "
    "int seed=0, int offset=0, int numels=0, int[]? prefix=None"
)
_GRAD_OUT = ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)"

RELEASES = {
    "5.0.0": {"npu_fusion_attention": _V1 + _TAIL + _OUT},
    "6.0.0": {"npu_fusion_attention": _V1 + _LENGTHS + _TAIL + _OUT},
    "7.1.0": {
        "npu_fusion_attention": _V1 + _LENGTHS + _TAIL + _OUT,
        "npu_fusion_attention_v2": _V2 + _LENGTHS + _TAIL + _BIAS + _OUT,
    },
    "26.0.0": {
        "npu_fusion_attention": _V1 + _LENGTHS + _TAIL + _LAYOUT + _SINK + _RANDOM + _OUT,
        "npu_fusion_attention_v2": _V2
        + _LENGTHS
        + _TAIL
        + _BIAS
        + _LAYOUT
        + _SINK
        + _RANDOM
        + _OUT,
        "npu_fusion_attention_grad": _GRAD + _LENGTHS + _TAIL + _LAYOUT + _SINK + _GRAD_OUT,
    },
}


class Ops:
    """``torch.ops.npu`` of a release; `calls` are the (op, arguments) it was given."""

    def __init__(self, release: str = "26.0.0") -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for name, text in RELEASES[release].items():
            setattr(self, name, _Op(name, text, self.calls))


class _Op:
    def __init__(self, name: str, text: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
        schema = torch._C.parse_schema(f"npu::{name}{text}")
        self.name, self.default = name, SimpleNamespace(_schema=schema)
        self._types = {a.name: str(a.type) for a in schema.arguments}
        self._calls = calls

    def __call__(self, **arguments: Any) -> tuple[Any, ...]:
        for name, value in arguments.items():
            kind = self._types[name]  # a KeyError is a misspelt argument
            if "int[]" in kind or "List[int]" in kind:
                assert type(value) is list, (name, value)
                assert all(type(n) is int for n in value)
            elif kind in ("int", "float", "str", "bool"):
                assert type(value) is {"int": int, "float": float, "str": str, "bool": bool}[kind]
        self._calls.append((self.name, arguments))
        same = {name.replace("tockens", "tokens"): value for name, value in arguments.items()}
        if not self.name.endswith("_grad"):
            return tuple(fusion_attention(**same))
        return tuple(fusion_attention_grad(scale=same.pop("scale_value", 1.0), **same))
