"""`scaled_dot_product_attention` with torch's signature, for call sites that are edited."""

from __future__ import annotations

from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from attnkit.arguments import check_bool
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.functional import attention
from attnkit.interop.torch.reading import terms_of
from attnkit.masks import Causal, Mask
from attnkit.pse import Pse
from attnkit.pse.additive import Additive

__all__ = ["scaled_dot_product_attention"]

_TOP_LEFT = Causal(align="top_left")

Three = tuple[Tensor, Tensor, Tensor]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, computed by attnkit.

    ``softmax(scale * query @ key.T + attn_mask) @ value`` with query ``[... n q_len d]``, key
    ``[... n kv_len d]`` and value ``[... n kv_len d_v]``: from two to any number of axes, which
    broadcast; three are ``[b q_len d]``. As in torch:

    - `attn_mask` broadcasts against ``[... n q_len kv_len]``: bool, True = allowed, or a float
      tensor that is added after the scale (float32, or the dtype of the query; it may train). It
      is read as a set (`masks.from_torch`, `pse.split_additive`), once for each tensor: causal,
      windows, padding and documents are planned as such. Also torch's `CausalBias`.
    - `is_causal` is the top-left corner, and excludes `attn_mask`: both together are an error by
      torch's page, and in some of its kernels.
    - `dropout_p` applies whenever it is above 0: there is no eval mode here.
    - `enable_gqa`: query head h reads key head ``h // (n / n_kv)``.

    Otherwise than in torch a row without an allowed key is 0 also where its mask is float and holds
    ``finfo.min`` in the whole row, a key that nobody sees may hold NaN, and no backend is
    chosen by ``torch.nn.attention.sdpa_kernel``. In a compiled graph a mask tensor breaks
    the graph, for it is read.

    Raises `CompositionError` for shapes that do not fit, `CompositionTypeError` for other dtypes
    and for nested tensors.

    >>> import torch
    >>> x = torch.randn(2, 4, 6, 8)
    >>> same = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    >>> found = scaled_dot_product_attention(x, x, x, is_causal=True)
    >>> torch.allclose(found, same, atol=1e-5)
    True
    """
    _check(query, key, value, attn_mask, is_causal, enable_gqa)
    most = max(query.ndim, key.ndim, value.ndim)
    if most == 3 and not enable_gqa:  # of three axes the first is the batch
        query, key, value = (t.unsqueeze(-3) for t in (query, key, value))
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unsqueeze(-3)
    lead = _lead(query, key, value)
    query, key, value = _heads_alike(*_batched(query, key, value, lead), enable_gqa)
    mask: Mask | None = _TOP_LEFT if is_causal else None
    bias: Pse | None = None
    if attn_mask is not None:
        mask, bias = _terms(attn_mask, query.dtype, (*lead, *query.shape[1:3], key.shape[2]))
    output = attention(
        query, key, value, mask=mask, pse=bias, layout="BNSD", scale=scale, dropout=dropout_p
    )
    if most == 4:
        return output
    return output.reshape(*lead, *output.shape[1:][-(most - len(lead)) :])


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: object,
    is_causal: object,
    enable_gqa: object,
) -> None:
    """Raise for what is no call of torch's function."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor) or tensor.is_nested:
            raise CompositionTypeError(
                f"{name}={shown(tensor)}; give a tensor [..., n, s, d] (texts of a nested tensor "
                "are packed: ak.attention(..., layout='TND', seqlens=))"
            )
        if tensor.ndim < 2:
            raise CompositionError(f"{name} {list(tensor.shape)}: give [..., n, s, d]")
    if not isinstance(attn_mask, Tensor | None):
        raise CompositionTypeError(
            f"attn_mask={shown(attn_mask)}; it is a bool tensor (True = allowed), or a float "
            "tensor that is added to the scores (a mask of attnkit goes to ak.attention)"
        )
    check_bool("is_causal", is_causal, "the corner is the top left; windows go to attn_mask")
    check_bool("enable_gqa", enable_gqa, "the numbers of heads are those of the tensors")
    if is_causal and attn_mask is not None:
        raise CompositionError(
            "is_causal=True and an attn_mask: torch takes one of them, and not all of its kernels "
            "say so; give the mask that is both"
        )


def _lead(*tensors: Tensor) -> torch.Size:
    """Return the axes before heads, to which all broadcast."""
    sides = [tensor.shape[:-3] for tensor in tensors]
    if sides[0] == sides[1] == sides[2]:
        return sides[0]
    try:
        return cast("torch.Size", torch.broadcast_shapes(*sides))  # type: ignore[no-untyped-call]
    except RuntimeError:
        raise CompositionError(
            "query, key and value are "
            + ", ".join(str(list(tensor.shape)) for tensor in tensors)
            + "; the axes before the last three are alike, or 1"
        ) from None


def _batched(query: Tensor, key: Tensor, value: Tensor, lead: torch.Size) -> Three:
    """Return the tensors ``[b n s d]``."""
    if (
        len(lead) == 1
        and query.ndim == key.ndim == value.ndim == 4
        and (len(query) == len(key) == len(value))
    ):
        return query, key, value
    found = []
    for tensor in (query, key, value):
        tensor = tensor if tensor.ndim > 2 else tensor[None]
        whole = tensor.expand(*lead, *tensor.shape[-3:])
        found.append(whole.reshape(prod(lead), *tensor.shape[-3:]))
    return found[0], found[1], found[2]


def _heads_alike(query: Tensor, key: Tensor, value: Tensor, grouped: bool) -> Three:
    """Return the tensors with heads that attnkit pairs as torch does."""
    n, of_keys, of_values = query.shape[1], key.shape[1], value.shape[1]
    if n == of_keys == of_values:
        return query, key, value
    most = n if grouped else max(n, of_keys, of_values)
    fits = [of and most % of == 0 if grouped else of in (1, most) for of in (n, of_keys, of_values)]
    if not all(fits):
        raise CompositionError(
            f"{n} query heads, {of_keys} key heads and {of_values} value heads: they are alike, or "
            "1; with enable_gqa=True the first is a multiple of the others"
        )
    if n < most:
        query = query.expand(-1, most, -1, -1)
    if of_keys != of_values:
        key, value = (t.repeat_interleave(most // t.shape[1], 1) for t in (key, value))
    return query, key, value


def _terms(attn_mask: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Additive:
    """Return what a mask says about scores of a shape, ``[... n q_len kv_len]``."""
    if hasattr(attn_mask, "variant") and hasattr(attn_mask, "seq_len_q"):
        return Additive(_corner(attn_mask, shape), None)
    given = attn_mask.shape
    if attn_mask.dtype not in (torch.bool, torch.float32, dtype):
        raise CompositionTypeError(
            f"attn_mask is {attn_mask.dtype}, query is {dtype}; a mask is bool (True = allowed), "
            "or it is added to the scores: float32 or the dtype of the query"
        )
    fits = all(m in (1, s) for m, s in zip(given[::-1], shape[::-1], strict=False))
    if not 2 <= len(given) <= len(shape) or not fits:
        raise CompositionError(
            f"attn_mask={shown(attn_mask)} for scores {list(shape)}: it is a tensor of two axes or "
            "more, each as long as that of the scores, or 1"
        )
    if len(shape) > 4 and len(given) > 3:
        alike = all(size == 1 for size in given[:-3])
        whole = attn_mask if alike else attn_mask.expand(*shape[:-3], *given[-3:])
        attn_mask = whole.reshape(-1, *given[-3:])
    return terms_of(attn_mask, keep=True, kv_len=shape[-1])


def _corner(bias: Any, shape: tuple[int, ...]) -> Mask:
    """Return the mask of a `torch.nn.attention.bias.CausalBias`."""
    lengths = bias.seq_len_q, bias.seq_len_kv
    if lengths != shape[-2:]:
        raise CompositionError(
            f"attn_mask is a {type(bias).__name__} of {lengths[0]} x {lengths[1]}, the scores are "
            f"{shape[-2]} x {shape[-1]}; make one for these lengths"
        )
    return _TOP_LEFT if bias.variant.name == "UPPER_LEFT" else Causal()
