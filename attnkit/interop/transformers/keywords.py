"""What transformers' models pass to an attention function by keyword, and what each means here."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnkit.errors import CompositionError, shown

__all__ = ["HONOURED", "RESTATED", "read_keywords"]

HONOURED = {
    "softcap": "scores are bent, c * tanh(score / c)",
    "s_aux": "a sink per head: a logit that joins the denominator",
    "sinks": "a sink per head and query",
    "position_bias": "added to the scores after the scale",
    "indices": "the keys that each query sees, chosen by an indexer",
    "block_indices": "the blocks of keys that each query sees, per group of heads",
    "cu_seq_lens_q": "where packed sequences begin, for queries",
    "cu_seq_lens_k": "where packed sequences begin, for keys",
    "is_causal": "causal, where no mask says what is seen",
    "output_attentions": "the weights are computed apart",
    "deterministic": "the same bits in every run",
    "cache": "a paged cache, which is refused",
}
"""Keywords that change what is computed; each is honoured, or refused with its reason."""

RESTATED = frozenset(
    (
        "cache_position",
        "grid_thw",
        "input_ids",
        "layer_idx",
        "max_length_k",
        "max_length_q",
        "max_seqlen",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "local_size",
        "logits_to_keep",
        "position_ids",
        "return_dict",
        "seq_idx",
        "sliding_window",
        "use_cache",
    )
)
"""Keywords that say again what the tensors and the mask say, or that are about other layers.

A window is part of the mask: a layer that is given none on purpose sees everything, as in eager
attention. Packed sequences without a mask are the exception: there the window is honoured.
"""


def read_keywords(module: nn.Module, keywords: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords that change what is computed, without those that are None.

    Raises `CompositionError` for a keyword that is not known here: it may be part of what the
    model computes, and is not ignored.
    """
    found = {}
    for name, value in keywords.items():
        if value is None or name in RESTATED:
            continue
        if name not in HONOURED:
            _refuse(module, name, value)
        if value is not False or name == "is_causal":
            found[name] = value
    return found


def _refuse(module: nn.Module, name: str, value: object) -> None:
    raise CompositionError(
        f"{type(module).__name__} passes {name}={shown(value)} to its attention function, which "
        "attnkit.interop.transformers does not know; it may change what is computed, so it is not "
        "ignored. If the model was called with it by mistake, leave it out there. Known are "
        f"{', '.join(sorted((*HONOURED, *RESTATED)))}"
    )
