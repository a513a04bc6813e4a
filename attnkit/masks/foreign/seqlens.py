"""Cumulative lengths of packed sequences, as flash-attention's varlen functions take them."""

from __future__ import annotations

import itertools

import torch

from attnkit.arguments import check_bool, check_int, check_ints
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, shown
from attnkit.masks.base import Mask
from attnkit.masks.causal import Band, Causal, SlidingWindow
from attnkit.masks.documents import Documents
from attnkit.masks.foreign.lifted import Lifted

__all__ = ["from_cu_seqlens"]


@untraced(MASK_IN_GRAPH)
def from_cu_seqlens(
    cu_q: torch.Tensor,
    cu_kv: torch.Tensor | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Lifted:
    """Return the mask of sequences packed into one row: each sees itself.

    `cu_q` are cumulative lengths ``[n + 1]``, from 0 on; `cu_kv` those of the keys, where they
    differ. `causal` and `window_size` are flash-attention's: counted from the last query and key
    of each sequence, ``(left, right)`` keys beside that of the query, -1 for no end. Reads the
    lengths, which waits for a device. Raises `CompositionError` for lengths that fall.

    To run packed tensors give the lengths (`SeqLens`) and ``Causal()`` itself: a mask of one long
    row is for tensors that have one.

    >>> import torch
    >>> print(from_cu_seqlens(torch.tensor([0, 3, 8]), causal=True))
    Documents((3, 5), inside=Causal()), of cu_seqlens of 2 sequences: causal in each
    >>> from_cu_seqlens([0, 3, 8], [0, 4, 9], window_size=(2, 0)).mask
    Documents((3, 5), (4, 5), inside=SlidingWindow(3))
    """
    check_bool("from_cu_seqlens causal", causal)
    rows = _lengths("cu_q", cu_q)
    keys = rows if cu_kv is None else _lengths("cu_kv", cu_kv)
    if len(rows) != len(keys):
        raise CompositionError(
            f"from_cu_seqlens got {len(rows)} sequences of queries and {len(keys)} of keys; each "
            "has both"
        )
    inside, said = _inside(causal, window_size)
    mask = Documents(rows, None if keys == rows else keys, inside=inside)
    return Lifted(mask, f"cu_seqlens of {len(rows)} sequences", (said,))


def _lengths(name: str, cumulative: object) -> tuple[int, ...]:
    ends = check_ints(f"from_cu_seqlens {name}", cumulative, 0)
    lengths = tuple(b - a for a, b in itertools.pairwise(ends))
    if ends[0] != 0 or not lengths or min(lengths) < 0:
        raise CompositionError(
            f"from_cu_seqlens got {name}={shown(ends)}; cumulative lengths begin with 0, never "
            "fall, and end with the number of tokens"
        )
    return lengths


def _inside(causal: bool, window_size: object) -> tuple[Mask | None, str]:
    if not isinstance(window_size, tuple | list) or len(window_size) != 2:
        raise CompositionError(
            f"from_cu_seqlens got window_size={shown(window_size)}; it is (left, right), -1 for "
            "no end"
        )
    ends = [check_int("from_cu_seqlens window_size", end, -1) for end in window_size]
    left, right = (None if end < 0 else end for end in ends)
    right = 0 if causal else right
    if left is None and right is None:
        return None, "each sequence sees itself"
    if right == 0:
        said = f"causal in each{'' if left is None else f', {left + 1} keys'}"
        return (Causal() if left is None else SlidingWindow(left + 1)), said
    return Band(left, right), f"a window of {ends[0]} and {ends[1]} keys in each"
