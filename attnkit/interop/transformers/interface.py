"""The attention function that transformers calls, once in each layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnkit.attend import Asked
from attnkit.errors import CompositionError
from attnkit.interop.transformers.chosen import chosen_blocks, chosen_keys
from attnkit.interop.transformers.given import bias_of, mask_of
from attnkit.interop.transformers.keywords import read_keywords
from attnkit.interop.transformers.packed import attend_packed, documents
from attnkit.interop.transformers.site import Site, site_of
from attnkit.interop.transformers.weights import attention_weights
from attnkit.masks import Causal, Mask
from attnkit.pse import Pse

__all__ = ["attend"]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend: the interface of transformers' attention registry.

    `query` ``b n s d``, `key` and `value` ``b m j d``, as the model's projections give them; the
    output is ``b s n d``. `attention_mask` is what `make_mask` made, a mask of the user's, or None
    (everything is seen, as in eager attention).
    """
    site = site_of(module)
    found = read_keywords(module, keywords) if keywords else {}
    if key.shape[0] != query.shape[0]:
        query, key, value = _one_batch(query, key, value)
    if not module.training:
        dropout = 0.0
    if "cu_seq_lens_q" in found and attention_mask is None:
        window = keywords.get("sliding_window")
        terms = (scaling, dropout, window)
        return attend_packed(site, module, query, key, value, terms, found), None
    mask, bias = mask_of(site, attention_mask, query, key)
    if not found:
        asked = Asked((None, mask), (None, bias), "BSND", scaling, dropout)
        each = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return site.run(asked, *each).output.contiguous(), None
    return _attend_with(site, module, query, key, value, mask, bias, scaling, dropout, found)


def _attend_with(
    site: Site,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask | None,
    bias: Pse | None,
    scaling: float | None,
    dropout: float,
    found: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attend with keywords that change what is computed."""
    _check_cache(found)
    mask = _with_masks(module, mask, found, query, key)
    added = bias_of(site, module, found.get("position_bias"))
    both = added if bias is None else bias if added is None else bias + added
    sink = _sink(found.get("s_aux"), query)
    asked = Asked(
        (None, mask),
        (None, both),
        "BSND",
        scaling,
        dropout,
        found.get("softcap"),
        deterministic=bool(found.get("deterministic", False)),
    )
    each = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    result = site.run(asked, *each, sink)
    output, sinks = result.output, found.get("sinks")
    if sinks is not None:
        # A sink of each query: one term more in its denominator.
        lse = result.stats.lse
        share = torch.sigmoid(lse - sinks.view(lse.shape).to(lse.dtype))
        output = output * share.transpose(1, 2)[..., None].to(output.dtype)
    weights = None
    if found.get("output_attentions"):
        site.notes["attention weights computed apart, with all scores at once"] += 1
        weights = attention_weights(asked, query, key, sink if sinks is None else sinks)
    return output.contiguous(), weights


def _with_masks(
    module: nn.Module, mask: Mask | None, found: dict[str, Any], query: Tensor, key: Tensor
) -> Mask | None:
    """Return the mask with what keywords say of it."""
    if "cu_seq_lens_q" in found:
        packed = documents(found, query, key)
        mask = packed if mask is None else mask & packed
    if mask is None:
        mask = _by_flags(module, found, query.shape[2], key.shape[2])
    for name, choose in (("indices", chosen_keys), ("block_indices", chosen_blocks)):
        if name in found:
            chosen = choose(module, found[name], query, key)
            mask = chosen if mask is None else mask & chosen
    return mask


def _by_flags(module: nn.Module, found: dict[str, Any], q_len: int, kv_len: int) -> Mask | None:
    """Return the mask of a call without one: everything, unless it is said to be causal."""
    if found.get("is_causal") is not True or q_len == 1:
        return None
    if q_len != kv_len:
        raise CompositionError(
            f"{type(module).__name__} calls attention without a mask, with is_causal=True, {q_len} "
            f"queries and {kv_len} keys; this does not say which keys a query sees: give the layer "
            "an attention_mask"
        )
    return Causal()


def _check_cache(found: dict[str, Any]) -> None:
    if "cache" in found:
        raise CompositionError(
            "continuous batching gives attention a paged cache, which attnkit.interop.transformers "
            "does not read; use model.generate, or attn_implementation='sdpa' for it"
        )


def _sink(logits: Tensor | None, query: Tensor) -> Tensor | None:
    """Return the sink per head ``[n]``."""
    if logits is None:
        return None
    if logits.numel() != query.shape[1]:
        raise CompositionError(
            f"s_aux has shape {list(logits.shape)}, and there are {query.shape[1]} query heads; it "
            "is one logit per head"
        )
    return logits.reshape(-1)


def _one_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Broadcast a batch of one, as a product does: learned queries, or keys that all share."""
    batch = max(query.shape[0], key.shape[0])
    if {query.shape[0], key.shape[0], value.shape[0]} - {1, batch}:
        raise CompositionError(
            f"query {list(query.shape)} and key {list(key.shape)} have other batch elements, and "
            "neither has one for all"
        )
    return tuple(one.expand(batch, -1, -1, -1) for one in (query, key, value))  # type: ignore[return-value]
