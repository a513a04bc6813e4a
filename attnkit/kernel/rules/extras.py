"""Rules about dropout, sink, statistics, and what differs between op versions and products."""

from __future__ import annotations

import torch

from attnkit.kernel.call import KernelCall
from attnkit.kernel.dropout import dropout_bytes
from attnkit.kernel.legality import Found, Target, rule
from attnkit.kernel.versions import OP_VERSIONS

__all__: list[str] = []


def _has_dropout(call: KernelCall) -> bool:
    return 0 < call.keep_prob < 1


@rule(layer="torch", remedy="Pass the share that survives, 1 - dropout.")
def keep_prob_range(call: KernelCall, on: Target) -> Found:
    """A keep_prob lies in (0, 1]; MindSpeed's binding also takes 0."""
    low_fits = call.keep_prob >= 0 if on.version == "mindspeed" else call.keep_prob > 0
    if not (low_fits and call.keep_prob <= 1):
        yield f"keep_prob={call.keep_prob}"


@rule(layer="silent", remedy="Pass the factor of the scores, usually 1 / sqrt(head size).")
def scale_finite(call: KernelCall, on: Target) -> Found:
    """The scale is a finite number of float32; with inf or NaN scores are NaN."""
    if not abs(call.scale) <= torch.finfo(torch.float32).max:
        yield f"scale={call.scale}"


@rule(
    layer="documented",
    remedy="Pass None; hide padding with atten_mask, or pack the sequences (TND).",
)
def padding_mask(call: KernelCall, on: Target) -> Found:
    """The argument padding_mask is reserved."""
    if call.padding_mask is not None:
        yield f"padding_mask={call.padding_mask}"


@rule(layer="documented", remedy="Pass 0 or 2; other values are accepted and ignored.")
def inner_precise(call: KernelCall, on: Target) -> Found:
    """The values of inner_precise are 0, 1 (both reserved) and 2 (rows without a key become 0)."""
    if call.inner_precise not in (0, 1, 2):
        yield f"inner_precise={call.inner_precise}"


@rule(layer="torch", remedy="Leave it out: dense statistics are [B, N, Sq, 8] in every layout.")
def softmax_layout(call: KernelCall, on: Target) -> Found:
    """A softmax_layout is '' or, in layout TND, 'TND'."""
    if call.softmax_layout not in (("", "TND") if call.is_packed else ("",)):
        yield f"softmax_layout={call.softmax_layout!r} in layout {call.layout}"


@rule(
    layer="silent", source="binding", remedy="Use v1, or read the statistics in the default order."
)
def softmax_layout_ignored(call: KernelCall, on: Target) -> Found:
    """Op v2 passes softmax_layout on only together with sink (before Ascend 950)."""
    if call.softmax_layout and on.version == "v2" and on.product != "950" and call.sink is None:
        yield f"softmax_layout={call.softmax_layout!r}"


@rule(layer="torch", remedy="Pass a tensor of shape [N].")
def sink_shape(call: KernelCall, on: Target) -> Found:
    """A sink has one logit per query head, [N]."""
    if call.sink is not None and call.sink.shape != (call.num_heads,):
        yield f"sink of shape {list(call.sink.shape)} for {call.num_heads} heads"


@rule(layer="torch", remedy="Keep the sink parameter in float32.", type_error=True)
def sink_dtype(call: KernelCall, on: Target) -> Found:
    """A sink is float32."""
    if call.sink is not None and call.sink.dtype not in (torch.float32, call.stats.dtype):
        yield f"sink {call.sink}"


@rule(layer="documented", remedy="Leave it out there.")
def sink_product(call: KernelCall, on: Target) -> Found:
    """A sink is reserved on Ascend 950."""
    if call.sink is not None and on.product == "950":
        yield "sink on Ascend 950"


@rule(
    layer="documented",
    remedy="Generate it with attnkit.kernel.dropout_mask or torch_npu._npu_dropout_gen_mask.",
)
def dropout_mask(call: KernelCall, on: Target) -> Found:
    """A dropout_mask is uint8 with ceil(numels / 128) * 16 bytes, one bit per cell, 1 = keep."""
    mask = call.dropout_mask
    if mask is None or (mask.dtype == torch.uint8 and mask.shape == (dropout_bytes(call.numels),)):
        return
    yield f"dropout_mask {mask} for {call.numels} decisions"


@rule(layer="silent", source="binding", remedy="Pass keep_prob, or no mask.")
def dropout_mask_unused(call: KernelCall, on: Target) -> Found:
    """A dropout_mask is not read when keep_prob is 1."""
    if call.dropout_mask is not None and call.keep_prob >= 1:
        yield f"dropout_mask with keep_prob={call.keep_prob}"


@rule(
    layer="silent",
    source="binding",
    remedy="Let the op draw the mask, or call the grad op with the right numels.",
)
def dropout_mask_numels(call: KernelCall, on: Target) -> Found:
    """With a dropout_mask in a dense layout the op returns numels uninitialised.

    The backward reads it.
    """
    if call.dropout_mask is not None and on.training and _has_dropout(call) and not call.is_packed:
        yield f"dropout_mask in dense layout {call.layout}"


@rule(layer="tiling", remedy="End both lists in zeros or neither, and let them never decrease.")
def dropout_count(call: KernelCall, on: Target) -> Found:
    """The lists of a packed call must not give fewer dropout decisions than it has cells.

    The decisions are counted from consecutive differences of the lists.
    """
    cells = call.num_heads * sum(q * kv for q, kv in call.sequences)
    if call.is_packed and _has_dropout(call) and call.numels < cells:
        yield f"numels = {call.numels} for {cells} cells"


@rule(
    layer="silent",
    source="binding",
    remedy="Seed torch's generator, or pass the mask generated from this seed.",
)
def seed_overwritten(call: KernelCall, on: Target) -> Found:
    """The device's generator overwrites seed and offset, when 0 < keep_prob < 1.

    Not with a dropout_mask.
    """
    drawn_in_kernel = on.product == "950" and on.version == "v2"
    if call.dropout_mask is not None or not _has_dropout(call) or drawn_in_kernel:
        return
    if call.seed or call.offset:
        yield f"seed={call.seed}, offset={call.offset} with keep_prob={call.keep_prob}"


@rule(layer="silent", source="MindSpeed", remedy="Use torch_npu's op for calls with dropout.")
def mindspeed_dropout(call: KernelCall, on: Target) -> Found:
    """MindSpeed's binding takes every keep_prob as no dropout in the forward.

    Its backward then fails.
    """
    if on.version == "mindspeed" and not call.keep_prob >= 1:
        yield f"keep_prob={call.keep_prob} through MindSpeed's binding"


@rule(layer="torch", remedy="Choose a version that has it (attnkit.kernel.expressing_versions).")
def version_cannot_express(call: KernelCall, on: Target) -> Found:
    """Every argument that is not a default exists in the chosen version of the op."""
    missing = call.inexpressible(on.version)
    if missing is not None:
        yield missing


@rule(
    layer="documented",
    remedy="Choose another version: v1 and v2 exist on every product, v3 and MindSpeed's before "
    "950.",
)
def version_product(call: KernelCall, on: Target) -> Found:
    """The chosen version of the op exists for the product."""
    version = OP_VERSIONS[on.version]
    if on.product not in (*version.products, "emulator"):
        yield f"{version.op} on {on.product}"
