"""What flash-attn's functions share: their options as a composition, and the call."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.arguments import check_bool, check_int, check_number
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.functional import attention
from attnkit.interop.host import on_host
from attnkit.layouts import SeqLens
from attnkit.masks import Band, Causal, Mask, SlidingWindow
from attnkit.pse import ALiBi

__all__ = ["FlashOptions", "WindowSize", "flash_attend", "window_mask"]

WindowSize = tuple[int, int]
Slopes = tuple[tuple[float, ...], ...]
Heads = tuple[Tensor, Tensor, Tensor]


class FlashOptions(NamedTuple):
    """Every option of flash-attn that changes a number."""

    dropout_p: float
    softmax_scale: float | None
    mask: Mask | None
    softcap: float | None
    slopes: Slopes | None
    deterministic: bool
    follows: bool
    """Whether queries stand one behind the other: a causal mask, or a window."""

    @classmethod
    def of(
        cls,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: WindowSize,
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
    ) -> FlashOptions:
        """Read the arguments; `CompositionError` for what they cannot be.

        >>> FlashOptions.of(0.0, None, True, (3, -1), 0.0, None, False).mask
        SlidingWindow(4)
        """
        check_number("dropout_p", dropout_p, lambda p: 0 <= p < 1, "at least 0 and below 1")
        if softmax_scale is not None:
            check_number("softmax_scale", softmax_scale, math.isfinite, "finite, or None")
        check_number("softcap", softcap, lambda c: 0 <= c < math.inf, "0 for none, or above")
        mask = window_mask(causal, window_size)
        return cls(
            dropout_p,
            softmax_scale,
            mask,
            softcap or None,
            None if alibi_slopes is None else _slopes(alibi_slopes),
            check_bool("deterministic", deterministic),
            causal or tuple(window_size) != (-1, -1),
        )


def window_mask(causal: bool, window_size: WindowSize) -> Mask | None:
    """Return the mask of flash-attn's `causal` and `window_size`; None where all keys are seen.

    >>> window_mask(False, (2, 1)), window_mask(True, (2, 1)), window_mask(True, (-1, -1))
    (Band(2, 1), SlidingWindow(3), Causal())
    """
    check_bool("causal", causal)
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise CompositionTypeError(
            f"window_size={shown(window_size)}; give (left, right), -1 for no bound on a side"
        )
    for end in window_size:
        check_int("window_size", end, -1)
    left, right = (None if end == -1 else end for end in window_size)
    if causal:
        right = 0
    if right == 0:
        return Causal() if left is None else SlidingWindow(left + 1)
    return None if left is None and right is None else Band(left, right)


def _slopes(given: Tensor) -> Slopes:
    """Return the slopes of each sequence, or one row for all that are alike."""
    if not isinstance(given, Tensor) or not given.is_floating_point() or given.ndim not in (1, 2):
        raise CompositionTypeError(
            f"alibi_slopes={shown(given)}; give a tensor (nheads,) or (batch_size, nheads) of "
            "float32"
        )
    if given.requires_grad and torch.is_grad_enabled():
        raise CompositionError(
            "alibi_slopes asks for a gradient, which flash-attn never gives it; detach it, or "
            "train slopes with pse.ALiBi(n, learnable=True) and ak.Attention"
        )
    rows = on_host("alibi_slopes", given)
    rows = [rows] if given.ndim == 1 else rows
    found = tuple(tuple(row) for row in rows)
    return found[:1] if len(set(found)) == 1 else found


def flash_attend(
    qkv: Heads, seqlens: SeqLens | None, how: FlashOptions, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the output, and the log-sum-exp ``b n s`` (packed: ``n t``) where it is asked for."""
    slopes = how.slopes
    if slopes is not None:
        count = qkv[0].shape[0] if seqlens is None else len(seqlens)
        heads = qkv[0].shape[-2]
        if len(slopes) not in (1, count) or any(len(row) != heads for row in slopes):
            raise CompositionError(
                f"alibi_slopes has {len(slopes)} x {len(slopes[0])} entries for {count} sequences "
                f"and {heads} heads; give (nheads,) or (batch_size, nheads)"
            )
    if slopes is None or len(slopes) == 1:
        return _one_call(qkv, seqlens, how, None if slopes is None else slopes[0], with_lse)
    if seqlens is None:
        return _heads_of_all(qkv, how, slopes, with_lse)
    return _one_by_one(qkv, seqlens, how, slopes, with_lse)


def _one_call(
    qkv: Heads,
    seqlens: SeqLens | None,
    how: FlashOptions,
    slopes: tuple[float, ...] | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    found = attention(
        *qkv,
        mask=how.mask,
        pse=None if slopes is None else ALiBi(slopes=slopes),
        layout="BSND" if seqlens is None else "TND",
        seqlens=seqlens,
        scale=how.softmax_scale,
        dropout=how.dropout_p,
        softcap=how.softcap,
        deterministic=how.deterministic,
        return_stats=True,
    )
    output, stats = found
    if not with_lse:
        return output, None
    return output, stats.lse if seqlens is None else stats.lse.T


def _heads_of_all(
    qkv: Heads, how: FlashOptions, slopes: Slopes, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Attend where each batch element has slopes of its own: all are heads of one element."""
    sizes = qkv[0].shape[0], qkv[0].shape[2]
    q, k, v = (t.transpose(0, 1).flatten(1, 2)[None] for t in qkv)
    every = tuple(slope for row in slopes for slope in row)
    out, lse = _one_call((q, k, v), None, how, every, with_lse)
    out = torch.unflatten(out[0], 1, sizes).transpose(0, 1)
    return out, None if lse is None else torch.unflatten(lse[0], 0, sizes)


def _one_by_one(
    qkv: Heads,
    seqlens: SeqLens,
    how: FlashOptions,
    slopes: Slopes,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attend where each packed sequence has slopes of its own: one call for each."""
    seqlens.check_totals(len(qkv[0]), len(qkv[1]))
    lengths = (seqlens.q, seqlens.kv, seqlens.kv)
    texts = zip(
        *(torch.split(t[None], list(n), 1) for t, n in zip(qkv, lengths, strict=True)), strict=True
    )
    parts = [
        _one_call(own, None, how, row, with_lse) for row, own in zip(slopes, texts, strict=True)
    ]
    out = torch.cat([part[0] for part, _ in parts])
    if not with_lse:
        return out, None
    return out, torch.cat([lse[0] for _, lse in parts if lse is not None], dim=1)
