"""MagiAttention's slices as sets: ranges of queries and keys, and what is seen in each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from attnkit.arguments import check_int, check_readable, describe, holds_integers
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region, Slice
from attnkit.masks.foreign.lifted import Lifted
from attnkit.masks.recover import written_with

__all__ = ["from_magi"]

_TYPES: dict[str, Callable[[int, int, int, int], Slice]] = {
    # Causal counts from the last of each, inverse causal from the first.
    "full": lambda a, b, c, d: Slice(a, b, c, d),
    "causal": lambda a, b, c, d: Slice(a, b, c, d, hi=d - b),
    "inv_causal": lambda a, b, c, d: Slice(a, b, c, d, lo=c - a),
    "bi_causal": lambda a, b, c, d: Slice(a, b, c, d, lo=c - a, hi=d - b),
}
_NAMES = {name.replace("_", ""): name for name in _TYPES}


@untraced(MASK_IN_GRAPH)
def from_magi(
    q_ranges: object,
    k_ranges: object,
    attn_type_map: object = None,
    *,
    q_len: int | None = None,
    kv_len: int | None = None,
) -> Lifted:
    """Return the mask that slices of MagiAttention are: their union.

    `q_ranges` and `k_ranges` are integers ``[s, 2]``, a start and an end for each slice (tensors,
    lists, or its `AttnRanges`). `attn_type_map`, ``[s]``, says what is seen in a slice (None: all
    of each), of rows ``i0 <= i < i1`` and keys ``j0 <= j < j1``: 0 or "full"; 1 or "causal",
    ``j - j1 <= i - i1``, counted from the last of each; 2 or "inv_causal", ``j - j0 >= i - i0``,
    from the first of each; 3 or "bi_causal", both. `q_len` and `kv_len` are the greatest ends
    where they are not said.

    Slices that share a cell are refused: `flex_flash_attn_func` would count it twice.

    Source: the docstring of ``magi_attention.functional.flex_flash_attn_func``.

    >>> print(from_magi([(0, 4), (4, 8)], [(0, 4), (2, 8)], [1, 3]).mask.show(8, 8))
    #.......
    ##......
    ###.....
    ####....
    ..###...
    ...###..
    ....###.
    .....###
    """
    rows, keys = _ranges("q_ranges", q_ranges), _ranges("k_ranges", k_ranges)
    types = ["full"] * len(rows) if attn_type_map is None else _types(attn_type_map)
    if not len(rows) == len(keys) == len(types):
        raise CompositionError(
            f"from_magi got {len(rows)} q_ranges, {len(keys)} k_ranges and {len(types)} types; a "
            "slice is one of each"
        )
    lengths = _lengths(rows, keys, q_len, kv_len)
    slices = [_TYPES[kind](*i, *j) for i, j, kind in zip(rows, keys, types, strict=True)]
    region = Region.of(*slices)
    if region.area != sum(one.area for one in slices):
        raise CompositionError(
            "from_magi got slices that share cells; MagiAttention would count these twice, so "
            "each cell lies in one slice"
        )
    found = written_with(((region,),), *lengths, "slices")
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(types).items())
    return Lifted(found.mask, f"{len(rows)} slices of MagiAttention", (counts or "none",))


def _ranges(name: str, given: object) -> list[tuple[int, int]]:
    to_list = getattr(given, "to_naive_ranges", None)  # AttnRanges
    given = to_list() if callable(to_list) else given
    if isinstance(given, torch.Tensor):
        check_readable(f"from_magi {name}", given)
        given = given.tolist() if holds_integers(given) else given
    if not isinstance(given, list | tuple):
        raise CompositionTypeError(
            f"from_magi takes {name} as integers [s, 2], got {describe(given)}"
        )
    pairs = []
    for pair in given:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise CompositionTypeError(
                f"from_magi got {shown(pair)} in {name}; a range is (start, end)"
            )
        start, stop = (check_int(f"from_magi {name}", end, 0) for end in pair)
        if start > stop:
            raise CompositionError(f"from_magi got {shown(pair)} in {name}; start <= end")
        pairs.append((start, stop))
    return pairs


def _types(given: Any) -> list[str]:
    if isinstance(given, torch.Tensor):
        check_readable("from_magi attn_type_map", given)
        given = given.tolist()
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise CompositionTypeError(
            f"from_magi takes attn_type_map as integers [s], got {describe(given)}"
        )
    return [_type(one) for one in given]


def _type(given: Any) -> str:
    if type(given) is int and 0 <= given < len(_TYPES):
        return list(_TYPES)[given]
    word = str(getattr(given, "value", given)).lower().replace("_", "")  # AttnMaskType is an enum
    if word not in _NAMES:
        raise CompositionError(
            f"from_magi got the type {shown(given)}; it is 0 (full), 1 (causal), 2 (inv_causal) "
            "or 3 (bi_causal)"
        )
    return _NAMES[word]


def _lengths(
    rows: list[tuple[int, int]], keys: list[tuple[int, int]], q_len: int | None, kv_len: int | None
) -> tuple[int, int]:
    found = []
    for name, ranges, said in (("q_len", rows, q_len), ("kv_len", keys, kv_len)):
        end = max((stop for _, stop in ranges), default=0)
        length = end if said is None else check_int(f"from_magi {name}", said, 0)
        if length < end:
            raise CompositionError(f"from_magi got a range up to {end} and {name}={length}")
        found.append(length)
    return found[0], found[1]
