"""Packed sequences: one call for all images of a vision tower, by running totals of lengths."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from attnkit.attend import Asked
from attnkit.errors import CompositionError
from attnkit.interop.transformers.kept import read_once
from attnkit.interop.transformers.site import Site
from attnkit.layouts import SeqLens
from attnkit.masks import Band, Causal, Documents, Mask, SlidingWindow

__all__ = ["attend_packed", "documents"]


def attend_packed(
    site: Site,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: tuple[float | None, float, int | None],
    found: dict[str, Any],
) -> Tensor:
    """Attend in each packed sequence by itself; the output is ``b s n d``.

    `terms` are the scale, the share of dropout and the window.
    """
    rest = found.keys() - {"cu_seq_lens_q", "cu_seq_lens_k", "is_causal", "softcap", "s_aux"}
    if rest:
        raise CompositionError(
            f"{type(module).__name__} packs sequences and passes {', '.join(sorted(rest))}; this "
            "is not known for packed sequences: give the layer an attention_mask instead"
        )
    causal = found.get("is_causal", getattr(module, "is_causal", True))
    scaling, dropout, window = terms
    asked = Asked(
        (None, _mask(causal, window)), (None, None), "TND", scaling, dropout, found.get("softcap")
    )
    q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
    made = site.run(asked, q, k, v, found.get("s_aux"), _lengths(found)).output
    return made.view(query.shape[0], query.shape[2], *made.shape[1:])


def documents(found: dict[str, Any], query: Tensor, key: Tensor) -> Mask:
    """Return packed sequences as a mask of a batch of one."""
    lengths = _lengths(found)
    if query.shape[0] != 1 or (lengths.total_q, lengths.total_kv) != (query.shape[2], key.shape[2]):
        raise CompositionError(
            f"cu_seq_lens_q and cu_seq_lens_k hold {lengths.total_q} queries and "
            f"{lengths.total_kv} keys, and the layer has {query.shape[2]} and {key.shape[2]} in a "
            f"batch of {query.shape[0]}; packed sequences are one batch element"
        )
    return Documents(lengths.q, lengths.kv)


def _mask(causal: bool, window: int | None) -> Mask | None:
    if window is None:
        return Causal() if causal else None
    return SlidingWindow(window) if causal else Band(window - 1, window - 1)


def _lengths(found: dict[str, Any]) -> SeqLens:
    """Return the lengths; running totals are read from the device once for all layers."""
    queries, keys = found["cu_seq_lens_q"], found.get("cu_seq_lens_k")
    if keys is None:
        raise CompositionError("cu_seq_lens_q comes without cu_seq_lens_k; packed keys need theirs")
    if queries is keys:
        return read_once(queries, "lengths", lambda: SeqLens.from_cu_seqlens(queries.tolist()))
    return SeqLens.from_cu_seqlens(
        *(read_once(one, "totals", one.tolist) for one in (queries, keys))
    )
