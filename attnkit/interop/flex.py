"""FlexAttention's call, by its own name and signature: `flex_attention`.

    from attnkit.interop.flex import flex_attention   # was: from torch.nn.attention.flex_attention

A `BlockMask` is read as a set (`masks.from_flex`), once; a `score_mod` as soft-cap and biases where
it is these, so that fused kernels compute it, and else called for each score (`score_fn`).

Source: torch/nn/attention/flex_attention.py of torch 2.13.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from inspect import get_annotations
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as theirs

from attnkit.arguments import check_bool, check_number, check_tensor, describe
from attnkit.backends import AttentionOutput
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.functional import attention
from attnkit.interop.flex_scores import ScoreCall, Scores, read_scores
from attnkit.masks import Full, Mask, from_flex
from attnkit.masks.foreign.flex import is_block_mask
from attnkit.planner.scoring import ScoreFunction, check_score_fn

__all__ = ["flex_attention", "lift_score_mod"]

T = TypeVar("T")

_READ: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
_MOST = 8  # readings of one BlockMask or function: at other lengths, or of changed tensors

# Hints to FlexAttention's kernels, of which none changes a number.
_OPTIONS = frozenset(get_annotations(theirs.FlexKernelOptions))


@torch.compiler.disable(  # type: ignore[untyped-decorator, no-untyped-call]
    reason="functions of FlexAttention are read outside of graphs; in one graph, give the mask and "
    "the bias that masks.from_flex and lift_score_mod found to ak.Attention"
)
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: ScoreFunction | None = None,
    block_mask: object | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: Any | None = None,
) -> Any:
    """Attend: query ``b n s d``, key and value ``b m t d``; returns ``b n s e``.

    ``softmax(score_mod(scale * q.k, b, h, i, j))`` over the keys that `block_mask` allows; a row
    that sees none is 0. `scale` None is ``d ** -0.5``. n and m differ with `enable_gqa` only;
    query head h reads key head ``h // (n / m)``. A batch of one key is for all, with a
    `block_mask`. With `return_lse`: (out, log-sum-exp ``b n s``, natural); with `return_aux` an
    `AuxRequest`: (out, `AuxOutput`). `kernel_options` are hints that change no number.

    What differs: of a `BlockMask` the blocks count, as in compiled FlexAttention (its eager path
    asks `mask_mod` alone); gradients, float64 and any head size on the CPU too. Functions are
    read once, and again when a tensor that they look at was changed in place. Nothing has to be
    compiled; inside of a compiled function the call stands between two graphs.

    Raises `CompositionError` for arguments that contradict each other.

    >>> q = torch.randn(1, 2, 16, 8)
    >>> def causal(b, h, q_idx, kv_idx): return q_idx >= kv_idx
    >>> blocks = theirs.create_block_mask(causal, None, None, 16, 16, device="cpu")
    >>> flex_attention(q, q, q, block_mask=blocks).shape
    torch.Size([1, 2, 16, 8])
    """
    key, value = _checked(query, key, value, block_mask, enable_gqa)
    check_bool("return_lse", return_lse)
    _check_options(kernel_options)
    if return_lse and return_aux is not None:
        raise CompositionError(
            "flex_attention got return_lse and return_aux; give return_aux=AuxRequest(lse=True)"
        )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    check_number("scale", scale, math.isfinite, "finite, or None")
    mask, scores = _mask(block_mask, query, key), _scores(score_mod, query, key)
    if scores.mask is not None:
        mask = scores.mask if mask is None else mask & scores.mask
    result = attention(
        query,
        key,
        value,
        mask=mask,
        pse=scores.bias,
        layout="BNSD",
        scale=scale * scores.factor,
        softcap=scores.softcap,
        score_fn=scores.score_fn,
        return_stats=True,
    )
    return _returned(result, return_lse, return_aux)


def lift_score_mod(
    score_mod: ScoreFunction, q_len: int, kv_len: int, *, batch: int = 1, heads: int = 1
) -> Scores:
    """Return what a `score_mod` was recognised as, which `print` tells.

    >>> def mod(score, b, h, i, j): return 30.0 * torch.tanh(score / 30.0)
    >>> print(lift_score_mod(mod, 128, 128))
    mod: soft-cap 30
    >>> print(lift_score_mod(lambda s, b, h, i, j: s * s, 8, 8))
    <lambda>: no named form; it is called for each score
    """
    check_score_fn(score_mod)
    return read_scores(score_mod, ScoreCall(q_len, kv_len, batch, heads, torch.device("cpu")))


def _checked(
    query: Tensor, key: Tensor, value: Tensor, block_mask: object, enable_gqa: bool
) -> tuple[Tensor, Tensor]:
    """Return key and value for the batch of the query."""
    check_bool("enable_gqa", enable_gqa)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(f"flex_attention: {name}", tensor)
        if tensor.dim() != 4:
            raise CompositionError(
                f"flex_attention: {name} has shape {tuple(tensor.shape)}; it is [b, n, s, d]"
            )
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads != kv_heads and not enable_gqa:
        raise CompositionError(
            f"flex_attention got {heads} query heads and {kv_heads} key heads; that needs "
            "enable_gqa=True"
        )
    if len(query) == len(key):
        return key, value
    if len(key) != 1 or block_mask is None:
        raise CompositionError(
            f"flex_attention got a batch of {len(query)} queries and of {len(key)} keys; they are "
            "alike, or that of keys is 1 and there is a block_mask"
        )
    return key.expand(len(query), -1, -1, -1), value.expand(len(query), -1, -1, -1)


def _check_options(options: object) -> None:
    if options is None:
        return
    if not isinstance(options, Mapping):
        raise CompositionTypeError(f"kernel_options is a dict, got {describe(options)}")
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown and _OPTIONS:
        raise CompositionError(
            f"kernel_options has {shown(unknown)}, which FlexAttention does not document; known "
            f"hints, none of which changes a number here: {', '.join(sorted(_OPTIONS))}"
        )


# -- what is read once -------------------------------------------------------------------


def _mask(block_mask: object, query: Tensor, key: Tensor) -> Mask | None:
    if block_mask is None:
        return None
    if not is_block_mask(block_mask):
        raise CompositionTypeError(
            f"flex_attention takes a BlockMask, got {describe(block_mask)}; create_block_mask "
            "makes one of a mask_mod"
        )
    given: Any = block_mask
    sizes = query.shape[2], key.shape[2], query.shape[0], query.shape[1]
    asked = (sizes, given.mask_mod, _tensors_of(given.mask_mod))

    def read() -> Mask:
        q_len, kv_len, batch, heads = sizes
        return from_flex(given, q_len, kv_len, batch=batch, heads=heads).mask

    mask = _kept(block_mask, asked, read)
    return None if mask == Full() else mask


def _scores(score_mod: ScoreFunction | None, query: Tensor, key: Tensor) -> Scores:
    if score_mod is None:
        return Scores()
    check_score_fn(score_mod)
    batch, heads, q_len, _ = query.shape
    call = ScoreCall(q_len, key.shape[2], batch, heads, query.device)
    known = _tensors_of(score_mod)
    if not any(one[2] for one in known):
        return _kept(score_mod, (call, known), lambda: read_scores(score_mod, call))
    # What trains is read in each call, for gradients flow through what is read; compared once.
    named = _kept(score_mod, call, lambda: read_scores(score_mod, call).score_fn is None)
    return read_scores(score_mod, call, check=False) if named else Scores(score_fn=score_mod)


def _kept(owner: Any, key: Any, make: Callable[[], T]) -> T:
    """Return what was made before for a BlockMask or function, while it lives."""
    try:
        own = _READ.setdefault(owner, {})
    except TypeError:  # what has no weak reference is read each time
        return make()
    if key not in own:
        made = make()
        if len(own) >= _MOST:
            own.clear()
        own[key] = made
    result: T = own[key]
    return result


def _tensors_of(fn: Any, depth: int = 4) -> tuple[tuple[int, int, bool], ...]:
    """Return the tensors that a function looks at: which, how often written to, whether trained."""
    found: list[tuple[int, int, bool]] = []
    values = [cell.cell_contents for cell in getattr(fn, "__closure__", None) or ()]
    names = getattr(getattr(fn, "__code__", None), "co_names", ())
    spread = getattr(fn, "__globals__", {})
    values += [spread[name] for name in names if name in spread]
    for value in values:
        parts = value if isinstance(value, tuple | list) else (value,)
        for one in parts:
            if isinstance(one, Tensor):
                found.append((id(one), one._version, one.requires_grad))
            elif depth and callable(one) and hasattr(one, "__code__") and one is not fn:
                found += _tensors_of(one, depth - 1)
    return tuple(found)


def _returned(result: AttentionOutput, return_lse: bool, return_aux: Any) -> Any:
    if return_aux is None:
        return (result.output, result.stats.lse) if return_lse else result.output
    try:
        wants = bool(return_aux.lse), bool(return_aux.max_scores)
    except AttributeError:
        raise CompositionTypeError(
            f"return_aux is an AuxRequest, got {describe(return_aux)}"
        ) from None
    return result.output, theirs.AuxOutput(
        lse=result.stats.lse if wants[0] else None,
        max_scores=result.stats.max if wants[1] else None,
    )
