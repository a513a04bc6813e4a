"""Why one way to compute a request fell out, and what would bring it back."""

from __future__ import annotations

__all__ = ["TOLD"]

_PRICE = "Nothing: the cheaper way was taken. `plan.alternatives` has the prices of those proven."
_DENSE = "Use a dense layout, or say the mask by families that are regions."

TOLD = {
    # -- what is dearer ----------------------------------------------------------------------
    "dearer": ("It was estimated to cost more than another way.", _PRICE),
    "dearer-order": ("Sorting tokens around the calls would cost more than it saves.", _PRICE),
    "pieces-dearer": ("Pieces whose keys lie side by side cost more than gathered keys.", _PRICE),
    "pass-dearer": (
        "A pass of its own for the gradient of the bias would cost more than another way.",
        _PRICE,
    ),
    "full-mask-dearer": ("Calls without a mask of one entry per cell are cheaper.", _PRICE),
    "full-mask-not-needed": (
        "A call that reads no mask of one entry per cell computes the same.",
        _PRICE,
    ),
    "full-mask-size": (
        "A mask of one entry per cell would be too large to build in every step.",
        "Nothing while other calls are taken. If none is left, say the mask by families that are "
        "regions, or use tiled.",
    ),
    "as-before": (
        "A call of another length was planned before, and the same kind of call is proven for "
        "this one; others were not looked for.",
        "Nothing. `ak.plan` of the same tensors looks at all kinds.",
    ),
    "memory-limit": (
        "It would take more bytes than `memory_limit`.",
        "Raise `memory_limit`, or leave it out; the reason names the bytes.",
    ),
    # -- cells -------------------------------------------------------------------------------
    "wrong-cells": (
        "The call would compute other cells than the mask allows; the reason counts them.",
        "Nothing: this is the proof at work. Another mode or several calls were taken.",
    ),
    "mean-of-values": (
        "Some rows allow no key, and the kernel answers them with the mean of the values, not 0.",
        "Nothing while other calls are taken; a mask in which every row sees a key (add "
        "`Columns(0, 1)`, or drop padded rows) lets more calls through.",
    ),
    "cut-region": (
        "The mask is not a union of slices, so it cannot be cut into calls.",
        "Say it by families that are regions; `masks.recover` finds them for a dense mask.",
    ),
    "cut-windows": (
        "The pieces of the mask need too many different windows, each a call.",
        "Nothing while another way is taken; fewer kinds of pieces would bring it back.",
    ),
    "tile-runs": (
        "The rows of the mask have too many runs of keys for tiles to be looked for.",
        "Nothing while another way is taken; a mask of fewer runs would bring it back.",
    ),
    "mask-per-head": (
        "Heads have different masks, and a packed call has one for all.",
        "Use a dense layout for `PerHead`, or a layer for each group of heads. Asked of a call, "
        "name the head: `call.regions(head=0)`.",
    ),
    "mask-shared": (
        "One mask serves all sequences of a packed call, and those of the mask differ.",
        _DENSE,
    ),
    "mask-opaque-packed": (
        "The mask is not a union of slices, and a packed call has one for all sequences.",
        _DENSE,
    ),
    "empty-batch": (
        "The batch has no element, and the kernel needs one.",
        'Leave `backend` at "auto": others return empty tensors.',
    ),
    "sink-no-keys": (
        "The kernel leaves the sink out where a packed sequence has no keys.",
        "Drop sequences without keys, or use a dense layout.",
    ),
    # -- biases ------------------------------------------------------------------------------
    "bias-per-head": (
        "Heads that differ in their masks could become batch elements, but a bias has values for "
        "each head.",
        "Nothing while another way is taken; without the bias, or with one mask for all heads, "
        "it comes back.",
    ),
    "alibi-anchor": (
        "The kernel would count the slopes' distances from another key than was asked for.",
        "Nothing: another way adds the bias. With as many queries as keys both anchors agree.",
    ),
    "pse-anchor": (
        "The blocks of the call stand at different distances, and it reads one compressed bias.",
        "Nothing while another way is taken.",
    ),
    "pse-gathered": (
        "The kernel counts positions in its call, where gathered keys have others.",
        "Nothing while another way is taken.",
    ),
    "pse-packed": (
        "A packed call takes slopes or a compressed bias, not a matrix of all scores.",
        "Use ALiBi or another bias by distance, or a dense layout.",
    ),
    "pse-precision": (
        "The kernel reads a bias matrix in the query's dtype, which would round this one.",
        "Give the bias in the query's dtype, as one tensor (`a + b` of two is rounded once more).",
    ),
    "pse-gradient": (
        "The bias trains, and the kernel never writes its gradient.",
        "Nothing while another way is taken (channels of the heads, or a pass of its own). "
        "`pse.requires_grad_(False)` freezes it; tiled trains every bias.",
    ),
    "channels-positions": (
        "Positions are so large that slopes times positions lose more than a weight resolves.",
        "Freeze the bias, shorten the sequence, or use tiled.",
    ),
    "channels-scale": (
        "With such a scale a bias in channels, or its gradient, leaves the dtype.",
        "Use the default scale, or freeze the bias.",
    ),
    "channels-too-many": (
        "The bias needs more channels beside a head than the kernel takes.",
        "Use fewer biases at once or smaller heads, or freeze the bias.",
    ),
    "steps-twice": (
        "Two biases by steps of distance count it from different ends.",
        "Give both the same `align`.",
    ),
    # -- blocks ------------------------------------------------------------------------------
    "block-sparse": (
        "The block-sparse op has no bias, dropout or mask per head, or needs equal lengths.",
        "Nothing: calls of the fused op were taken.",
    ),
    "no-full-block": (
        "No block of the block-sparse op's size is allowed in full.",
        "Nothing: calls of the fused op were taken.",
    ),
    "no-edges": (
        "No calls compute what full blocks leave of the mask.",
        "Nothing: calls of the fused op were taken.",
    ),
    "selected-packed": (
        "Blocks were selected for a packed batch, and selections are for dense layouts.",
        "Pad the batch to one length, with `Padding`.",
    ),
    "selected-bias": (
        "A bias goes with selected blocks, whose positions are lost where keys are gathered.",
        'Leave out the bias, or use `backend="reference"`.',
    ),
    "selected-heads": (
        "The heads that select and those that have keys do not divide.",
        "Select for one head, for each key head, or for a divisor of them.",
    ),
    "selected-scale": (
        "The scale is too small (or 0) for the channel by which gates or counts join the scores.",
        "Use the default scale, or fold the factor into the queries.",
    ),
}
"""Codes to what they mean and what to do."""
