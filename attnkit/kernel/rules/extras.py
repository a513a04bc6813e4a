"""Rules about dropout, sink, statistics, and what differs between op versions and products.

Sources: op-plugin (dispatch, dropout, schemas per release), MindSpeed's fusion_attention_v2
binding, and the operator's reference pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attnkit.kernel.dropout import dropout_bytes
from attnkit.kernel.rules.rule import Rule, Target
from attnkit.kernel.versions import OP_VERSIONS, inexpressible

if TYPE_CHECKING:
    from attnkit.kernel.call import KernelCall

__all__ = ["EXTRA_RULES"]


def _has_dropout(call: KernelCall) -> bool:
    return 0 < call.keep_prob < 1


def _keep_prob(call: KernelCall, on: Target) -> str | None:
    low_fits = call.keep_prob >= 0 if on.version == "mindspeed" else call.keep_prob > 0
    return None if low_fits and call.keep_prob <= 1 else f"keep_prob={call.keep_prob}"


def _scale_finite(call: KernelCall, on: Target) -> str | None:
    return None if abs(call.scale) <= torch.finfo(torch.float32).max else f"scale={call.scale}"


def _padding_mask(call: KernelCall, on: Target) -> str | None:
    return None if call.padding_mask is None else f"padding_mask={call.padding_mask}"


def _inner_precise(call: KernelCall, on: Target) -> str | None:
    return None if call.inner_precise in (0, 1, 2) else f"inner_precise={call.inner_precise}"


def _softmax_layout(call: KernelCall, on: Target) -> str | None:
    if call.softmax_layout == "" or (call.softmax_layout == "TND" and call.is_packed):
        return None
    return f"softmax_layout={call.softmax_layout!r} in layout {call.layout}"


def _softmax_layout_ignored(call: KernelCall, on: Target) -> str | None:
    ignored = on.version == "v2" and on.product != "950" and call.sink is None
    return f"softmax_layout={call.softmax_layout!r}" if call.softmax_layout and ignored else None


def _sink_shape(call: KernelCall, on: Target) -> str | None:
    if call.sink is None or call.sink.shape == (call.num_heads,):
        return None
    return f"sink of shape {list(call.sink.shape)} for {call.num_heads} heads"


def _sink_dtype(call: KernelCall, on: Target) -> str | None:
    if call.sink is None or call.sink.dtype == torch.float32 or call.sink.dtype == call.stats.dtype:
        return None
    return f"sink {call.sink}"


def _sink_product(call: KernelCall, on: Target) -> str | None:
    return "sink on Ascend 950" if call.sink is not None and on.product == "950" else None


def _dropout_mask(call: KernelCall, on: Target) -> str | None:
    mask = call.dropout_mask
    if mask is None or (mask.dtype == torch.uint8 and mask.shape == (dropout_bytes(call.numels),)):
        return None
    return f"dropout_mask {mask} for {call.numels} decisions"


def _dropout_mask_unused(call: KernelCall, on: Target) -> str | None:
    if call.dropout_mask is None or not call.keep_prob >= 1:
        return None
    return f"dropout_mask with keep_prob={call.keep_prob}"


def _dropout_numels(call: KernelCall, on: Target) -> str | None:
    if call.dropout_mask is None or call.is_packed or not on.training or not _has_dropout(call):
        return None
    return f"dropout_mask in dense layout {call.layout}"


def _dropout_count(call: KernelCall, on: Target) -> str | None:
    cells = call.num_heads * sum(q * kv for q, kv in call.sequences)
    if not call.is_packed or not _has_dropout(call) or call.numels >= cells:
        return None
    return f"numels = {call.numels} for {cells} cells"


def _seed_overwritten(call: KernelCall, on: Target) -> str | None:
    if not (call.seed or call.offset) or not _has_dropout(call) or call.dropout_mask is not None:
        return None
    if on.product == "950" and on.version == "v2":
        return None
    return f"seed={call.seed}, offset={call.offset} with keep_prob={call.keep_prob}"


def _mindspeed_dropout(call: KernelCall, on: Target) -> str | None:
    if on.version != "mindspeed" or call.keep_prob >= 1:
        return None
    return f"keep_prob={call.keep_prob} through MindSpeed's binding"


def _version(call: KernelCall, on: Target) -> str | None:
    return inexpressible(call, on.version)


def _product(call: KernelCall, on: Target) -> str | None:
    version = OP_VERSIONS[on.version]
    if on.product == "emulator" or on.product in version.products:
        return None
    return f"{version.op} on {on.product}"


EXTRA_RULES: tuple[Rule, ...] = (
    Rule(
        "keep-prob-range",
        "torch",
        "keep_prob lies in (0, 1]; MindSpeed's binding also takes 0",
        "keep_prob is the share that survives, 1 - dropout.",
        _keep_prob,
    ),
    Rule(
        "scale-finite",
        "silent",
        "scale is a finite number of float32; with inf or NaN scores are NaN",
        "Pass the factor of the scores, usually 1 / sqrt(head size).",
        _scale_finite,
    ),
    Rule(
        "padding-mask",
        "documented",
        "padding_mask is reserved",
        "Pass None; hide padding with atten_mask, or pack the sequences (TND).",
        _padding_mask,
    ),
    Rule(
        "inner-precise",
        "documented",
        "inner_precise is 0, 1 (both reserved) or 2 (rows without a key become 0)",
        "Pass 0 or 2; other values are accepted and ignored.",
        _inner_precise,
    ),
    Rule(
        "softmax-layout",
        "torch",
        "softmax_layout is '' or, in layout TND, 'TND'",
        "Leave it out: dense statistics are [B, N, Sq, 8] in every layout.",
        _softmax_layout,
    ),
    Rule(
        "softmax-layout-ignored",
        "silent",
        "op v2 passes softmax_layout on only together with sink (before Ascend 950)",
        "Use v1, or read the statistics in the default order.",
        _softmax_layout_ignored,
    ),
    Rule(
        "sink-shape",
        "torch",
        "sink has one logit per query head, [N]",
        "Pass a tensor of shape [N].",
        _sink_shape,
    ),
    Rule(
        "sink-dtype",
        "torch",
        "sink is float32",
        "Keep the sink parameter in float32.",
        _sink_dtype,
        type_error=True,
    ),
    Rule(
        "sink-product",
        "documented",
        "sink is reserved on Ascend 950",
        "Leave it out there.",
        _sink_product,
    ),
    Rule(
        "dropout-mask",
        "documented",
        "dropout_mask is uint8 with ceil(numels / 128) * 16 bytes, one bit per cell, 1 = keep",
        "Generate it with attnkit.kernel.dropout_mask or torch_npu._npu_dropout_gen_mask.",
        _dropout_mask,
    ),
    Rule(
        "dropout-mask-unused",
        "silent",
        "dropout_mask is not read when keep_prob is 1",
        "Pass keep_prob, or no mask.",
        _dropout_mask_unused,
    ),
    Rule(
        "dropout-mask-numels",
        "silent",
        "with an external dropout mask in a dense layout the op returns numels uninitialised, and "
        "the backward reads it",
        "Let the op draw the mask, or call the grad op with the right numels.",
        _dropout_numels,
    ),
    Rule(
        "dropout-count",
        "tiling",
        "the dropout decisions of a packed call are counted from consecutive differences of its "
        "lists, which must not give fewer than it has cells",
        "End both lists in zeros or neither, and let them never decrease.",
        _dropout_count,
    ),
    Rule(
        "seed-overwritten",
        "silent",
        "seed and offset are overwritten from the device's generator when 0 < keep_prob < 1 and no "
        "dropout_mask is given",
        "Seed torch's generator, or pass the mask generated from this seed.",
        _seed_overwritten,
    ),
    Rule(
        "mindspeed-dropout",
        "silent",
        "MindSpeed's binding takes every keep_prob as no dropout in the forward, and its backward "
        "then fails",
        "Use torch_npu's op for calls with dropout.",
        _mindspeed_dropout,
    ),
    Rule(
        "version-cannot-express",
        "torch",
        "every argument that is not a default exists in the chosen version of the op",
        "Choose a version that has it (attnkit.kernel.expressing_versions).",
        _version,
    ),
    Rule(
        "version-product",
        "documented",
        "the chosen version of the op exists for the product",
        "Choose another version: v1 and v2 exist on every product, v3 and MindSpeed's before 950.",
        _product,
    ),
)
