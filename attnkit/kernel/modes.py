"""What each sparse mode computes: one function from sizes to a `Region` per mode.

`i` counts query rows and `j` keys of one score matrix, ``shift = kv_len - q_len``. A mode
that reads a compressed mask computes its formula; modes 0, 1 and 5 compute what the mask
tensor allows, whatever the window or the prefix says. Without a mask tensor every mode
computes everything: sparse_mode, pre_tokens, next_tokens and prefix are then ignored.

Sources: CANN flash_attention_score tiling (sparse types and token conversion) and kernel
(mask addressing), and the sparse_mode page of the ops-transformer documentation.
"""

from __future__ import annotations

from attnkit.errors import KernelContractError
from attnkit.geometry import Region, Slice

__all__ = [
    "COMPRESSED_MODES",
    "MASK_DECIDES",
    "band",
    "band_sequence",
    "left_up_causal",
    "mode_region",
    "prefix_causal",
    "right_down_causal",
    "window",
]

COMPRESSED_MODES = (2, 3, 4, 6, 7, 8)
"""Modes whose set follows from sizes; they read a compressed mask."""

MASK_DECIDES = (0, 1, 5)
"""Modes whose set is the content of the mask tensor."""


def window(q_len: int, kv_len: int, pre: int, next_: int) -> Region:
    """Mode 0's declared window: ``i - pre <= j <= i + next``, anchored top-left.

    It only tells the kernel which tiles to skip: the mask must lie inside it.
    """
    return Region.of(Slice(0, q_len, 0, kv_len, lo=-pre, hi=next_))


def left_up_causal(q_len: int, kv_len: int) -> Region:
    """Mode 2: ``j <= i``, anchored top-left.

    >>> left_up_causal(2, 3).area
    3
    """
    return Region.of(Slice(0, q_len, 0, kv_len, hi=0))


def right_down_causal(q_len: int, kv_len: int) -> Region:
    """Mode 3: ``j <= i + shift``, anchored bottom-right.

    >>> right_down_causal(2, 3).area
    5
    """
    return Region.of(Slice(0, q_len, 0, kv_len, hi=kv_len - q_len))


def band(q_len: int, kv_len: int, pre: int, next_: int) -> Region:
    """Mode 4: ``i + shift - pre <= j <= i + shift + next``, both ends inclusive.

    >>> band(4, 4, pre=1, next_=0).row_counts()[-1].first     # pre=1 covers two keys
    2
    """
    shift = kv_len - q_len
    return Region.of(Slice(0, q_len, 0, kv_len, lo=shift - pre, hi=shift + next_))


def prefix_causal(q_len: int, kv_len: int, length: int) -> Region:
    """Modes 5 (by intent) and 6: ``j <= i + shift`` or ``j < length``.

    >>> prefix_causal(2, 4, 4) == Region.full(2, 4)
    True
    """
    return right_down_causal(q_len, kv_len) | Region.of(Slice(0, q_len, 0, min(length, kv_len)))


def band_sequence(q_len: int, kv_len: int, next_: int) -> Region:
    """Modes 7 and 8, the one sequence that was cut: ``j <= i + shift + next``.

    The `pre` bound is never applied; a legal call has ``pre_tokens >= kv_len`` there.
    """
    return Region.of(Slice(0, q_len, 0, kv_len, hi=kv_len - q_len + next_))


def mode_region(
    mode: int, ends: tuple[int, int], q_len: int, kv_len: int, prefix: int = 0, cut: bool = False
) -> Region:
    """Return what a mode with a compressed mask computes for one score matrix.

    `ends` are pre_tokens and next_tokens. `cut` marks the one sequence that modes 7 (the last
    with queries) and 8 (the first) treat apart.
    """
    sets = {
        2: lambda: left_up_causal(q_len, kv_len),
        3: lambda: right_down_causal(q_len, kv_len),
        4: lambda: band(q_len, kv_len, *ends),
        6: lambda: prefix_causal(q_len, kv_len, prefix),
        7: lambda: right_down_causal(q_len, kv_len),
        8: lambda: left_up_causal(q_len, kv_len),
    }
    if mode in (7, 8) and cut:
        return band_sequence(q_len, kv_len, ends[1])
    if mode in sets:
        return sets[mode]()
    raise KernelContractError(
        f"sparse_mode={mode} is not one whose set follows from sizes, {COMPRESSED_MODES}: in modes "
        f"{MASK_DECIDES} the mask tensor decides",
        ["sparse-mode-range"],
    )
