"""Decoded calls of the block-sparse op: judged by its contract, computed, and written."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch

from attnkit.geometry import Region, Slice
from attnkit.kernel import BlockSparseCall, KernelCall, TensorSpec
from attnkit.kernel.block_sparse_op import block_sparse_attention, block_sparse_attention_backward

__all__ = ["execute"]

Call = dict[str, Any]
Tensors = dict[str, torch.Tensor]

# What the binding fills in for arguments that CANN reserves.
RESERVED = {"mask_type": 0, "block_size": 0, "pre_tokens": 2147483647, "next_tokens": 2147483647}
NAMES = ("query", "key", "value", "block_sparse_mask")


def execute(
    record: Call,
    needed: Callable[[Call, str], torch.Tensor],
    write: Callable[[Call, str, torch.Tensor], None],
) -> None:
    """Compute a call, or say which rule it breaks."""
    training = record["op"].endswith("Grad")
    tensors = {name: needed(record, name) for name in NAMES}
    _judge(record, tensors, training)
    layout, heads = record["q_input_layout"], record["num_key_value_heads"]
    lengths = [record[f"actual_seq_lengths{side}"] or None for side in ("", "_kv")]
    if training:
        more = {name: needed(record, name) for name in ("d_out", "attention_out", "softmax_lse")}
        found = block_sparse_attention_backward(
            more["d_out"], *(tensors[name] for name in NAMES[:3]), more["attention_out"],
            more["softmax_lse"], tensors[NAMES[3]], record["block_shape"], *lengths,
            layout, record["kv_input_layout"], heads, record["scale_value"],
        )  # fmt: skip
        outputs: tuple[str, ...] = ("dq", "dk", "dv")
    else:
        found = block_sparse_attention(
            *tensors.values(),
            record["block_shape"],
            scale_value=record["scale_value"],
            actual_seq_lengths=lengths[0],
            actual_seq_lengths_kv=lengths[1],
        )
        outputs = ("attention_out", "softmax_lse")
    for name, result in zip(outputs, found, strict=True):
        write(record, name, result)


def _judge(record: Call, tensors: Tensors, training: bool) -> None:
    """Reject what CANN rejects, and what is not documented."""
    other = {
        name: record[name] for name, value in RESERVED.items() if record.get(name, value) != value
    }
    if record["atten_mask"] or record.get("block_table") or other:
        raise ValueError(f"{record['op']} was given what it does not take (161002): {other}")
    if not training and (record["softmax_lse_flag"], record["inner_precise"]) != (1, 0):
        raise ValueError(f"{record['op']}: no log-sum-exp, or a softmax in float16")
    if training and tensors["query"].shape[1] != tensors["key"].shape[1]:
        raise ValueError(f"{record['op']}: grouped heads, which CANN 9.0 does not take")
    if record["q_input_layout"] != record["kv_input_layout"]:
        raise ValueError(f"{record['op']}: two layouts (161002)")
    if any(not tensor.is_contiguous() for tensor in tensors.values()):
        raise ValueError(f"{record['op']}: tensors that are not contiguous")
    call = _described(record, tensors)
    if (
        tuple(tensors["block_sparse_mask"].shape[2:]) != call.grid
        or call.num_kv_heads != record["num_key_value_heads"]
    ):
        raise ValueError(f"{record['op']}: other blocks or heads than the tensors have (561002)")
    broken = call.violations(training=training)
    if broken:
        raise ValueError(f"{record['op']} breaks the contract: " + "; ".join(map(str, broken)))


def _described(record: Call, tensors: Tensors) -> BlockSparseCall:
    packed = record["q_input_layout"] == "TND"
    specs = [
        TensorSpec.of(tensors[name] if packed else tensors[name].transpose(1, 2))
        for name in NAMES[:3]
    ]
    ends = [tuple(accumulate(record[f"actual_seq_lengths{side}"] or ())) for side in ("", "_kv")]
    bits = tensors["block_sparse_mask"]
    if not torch.equal(bits, bits[:, :1].expand_as(bits)):
        raise ValueError("the blocks of heads differ")
    tables = [
        Region.of(*(Slice(i, i + 1, j, j + 1) for i, j in table.nonzero().tolist()))
        for table in bits[:, 0]
    ]
    bare = KernelCall(
        *specs,
        head_num=specs[0].shape[-2],
        input_layout="TND" if packed else "BSND",
        scale=record["scale_value"],
        actual_seq_qlen=ends[0] if packed else None,
        actual_seq_kvlen=ends[1] if packed else None,
    )
    rows, keys = record["block_shape"]
    return BlockSparseCall.of(bare, tuple(tables), (rows, keys))
