"""Arguments of calls of the op that say nothing that could be computed."""

from __future__ import annotations

__all__ = ["TOLD"]

_AS_FORWARD = "Pass what the forward of the same call returned, unchanged."

TOLD = {
    "varlen-missing": (
        "Layout TND came without actual_seq_qlen and actual_seq_kvlen.",
        "Pass cumulative lengths without a leading 0, or use `ak.SeqLens` with `ak.attention`.",
    ),
    "version-unknown": (
        "There is no version of the op by that name.",
        "Use v1, v2, v3 or mindspeed (`attnkit.kernel.OP_VERSIONS`).",
    ),
    "old-spelling": (
        "pre_tockens and next_tockens are how some versions of the op spell the window.",
        "Write pre_tokens and next_tokens; attnkit spells them as the installed op does.",
    ),
    "given-twice": (
        "An argument was given by its old and its new name.",
        "Give one of them.",
    ),
    "mask-content-unknown": (
        "What the call computes depends on the cells of a mask whose content is not there.",
        "Give the mask itself, not one on the meta device; or describe it by "
        "`AttenMask.full(shape, regions)`.",
    ),
    "mask-scattered-packed": (
        "A mask of scattered cells serves packed sequences of unlike lengths.",
        "Read them in one call per length, or use a dense layout.",
    ),
    "slopes-packed": (
        "Slopes differ between packed sequences, which no bias here says.",
        "Give one row of slopes for all sequences, or make one call for each.",
    ),
    "start-packed": (
        "Start indices move the slopes of packed sequences of unlike lengths.",
        "Make one call per length.",
    ),
    "rope-shape": (
        "query_rope and key_rope do not fit query and key, or heads are merged in the layout.",
        "Give both, with all axes but the last as query and key have them, in BSND, BNSD or TND.",
    ),
    "merge-gradient": (
        "An output asks for a gradient and its statistics carry none, so one would be wrong.",
        "Merge under torch.no_grad() and call `fusion_attention_grad` part by part, or let "
        "`ak.attention` plan the whole.",
    ),
    "grad-numels": (
        "numels is not the number of dropout decisions that the forward made.",
        _AS_FORWARD,
    ),
    "grad-shape": ("A gradient or the output has another shape than the forward's.", _AS_FORWARD),
    "grad-dtype": ("A gradient or the output has another dtype than the forward's.", _AS_FORWARD),
    "stats-shape": (
        "Statistics have another shape than the call's: eight equal copies per row.",
        _AS_FORWARD,
    ),
    "stats-dtype": ("Statistics are float32 (float64 for float64).", _AS_FORWARD),
    "tensor-shape": (
        "A tensor has another shape than the `KernelCall` describes.",
        "Describe the tensors that the call is run with, or run it with those described.",
    ),
    "tensor-dtype": (
        "A tensor has another dtype than the `KernelCall` describes.",
        "Describe the tensors that the call is run with, or run it with those described.",
    ),
}
"""Codes to what they mean and what to do."""
