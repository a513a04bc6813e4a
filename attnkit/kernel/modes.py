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
    "diagonals",
    "mode_region",
    "prefix_causal",
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


def prefix_causal(q_len: int, kv_len: int, length: int) -> Region:
    """Modes 5 (by intent) and 6: ``j <= i + shift`` or ``j < length``.

    >>> prefix_causal(2, 4, 4) == Region.full(2, 4)
    True
    """
    causal = Slice(0, q_len, 0, kv_len, hi=kv_len - q_len)
    return Region.of(causal, Slice(0, q_len, 0, min(length, kv_len)))


def diagonals(
    mode: int, ends: tuple[int, int], shift: int, *, cut: bool = False
) -> tuple[int | None, int]:
    """Return the bounds ``low <= j - i <= high`` of a mode with a compressed mask.

    `ends` are pre_tokens and next_tokens. Modes 2 and 8 are anchored top-left, the others
    bottom-right. `cut` marks the one sequence that modes 7 (the last with queries) and 8 (the
    first) treat apart: it ends at `next`, and `pre` is never applied there; a legal call has
    ``pre_tokens >= kv_len``. Mode 4 keeps both ends, inclusive.

    >>> diagonals(4, (1, 0), 0)  # pre = 1 covers two keys
    (-1, 0)
    """
    if mode not in COMPRESSED_MODES:
        raise KernelContractError(
            f"sparse_mode={mode} is not one whose set follows from sizes, {COMPRESSED_MODES}: in "
            f"modes {MASK_DECIDES} the mask tensor decides",
            ["sparse-mode-range"],
        )
    if mode == 4 or cut:
        return shift - ends[0] if mode == 4 else None, shift + ends[1]
    return None, 0 if mode in (2, 8) else shift


def mode_region(
    mode: int, ends: tuple[int, int], q_len: int, kv_len: int, prefix: int = 0, cut: bool = False
) -> Region:
    """Return what a mode with a compressed mask computes for one score matrix.

    >>> mode_region(2, (0, 0), 2, 3).area  # j <= i
    3
    """
    if mode == 6:
        return prefix_causal(q_len, kv_len, prefix)
    low, high = diagonals(mode, ends, kv_len - q_len, cut=cut)
    return Region.of(Slice(0, q_len, 0, kv_len, lo=low, hi=high))
