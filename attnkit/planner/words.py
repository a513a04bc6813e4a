"""Regions in words, for reports."""

from __future__ import annotations

from collections import Counter

from attnkit.geometry import Region, Slice
from attnkit.planner.calls import diagonal_blocks

__all__ = ["in_words"]


def in_words(region: Region, q_len: int, kv_len: int) -> str:
    """Say what a region is, by the name its author would use if there is one.

    >>> in_words(Region.of(Slice(0, 8, 0, 8, lo=-2, hi=0)), 8, 8)
    'causal window of 3 keys'
    """
    if not region:
        return "nothing"
    return (
        _band(region, q_len, kv_len)
        or _prefix(region, q_len, kv_len)
        or _blocks(region, q_len, kv_len)
        or f"{len(region.slices)} slices"
    )


def _band(region: Region, q_len: int, kv_len: int) -> str | None:
    bounds = region.bounds
    if bounds is None or region != Region.of(Slice(0, q_len, 0, kv_len, bounds.lo, bounds.hi)):
        return _rectangle(region, kv_len)
    low, high = bounds.lo > 1 - q_len, bounds.hi < kv_len - 1
    shift = kv_len - q_len
    anchor = {0: ", top-left", shift: ""}.get(bounds.hi)
    if not low and not high:
        return "every key"
    if high and not low and anchor is not None:
        return "causal" + (anchor or (", bottom-right" if shift else ""))
    if high and low and anchor is not None:
        return f"causal window of {bounds.hi - bounds.lo + 1} keys{anchor}"
    ends = (f"{bounds.lo} <= " if low else "", f" <= {bounds.hi}" if high else "")
    return f"band {ends[0]}j - i{ends[1]}"


def _rectangle(region: Region, kv_len: int) -> str | None:
    parts = region.slices
    if len(parts) != 1 or parts[0].area != (parts[0].i1 - parts[0].i0) * (
        parts[0].j1 - parts[0].j0
    ):
        return None
    one = parts[0]
    keys = "every key" if (one.j0, one.j1) == (0, kv_len) else f"keys {one.j0} to {one.j1 - 1}"
    return f"{keys} for queries {one.i0} to {one.i1 - 1}" if one.i0 else keys


def _prefix(region: Region, q_len: int, kv_len: int) -> str | None:
    first = region.row(0)
    if not first or first[0][0] != 0:
        return None
    length = first[0][1]
    causal = Region.of(Slice(0, q_len, 0, kv_len, hi=kv_len - q_len))
    prefix = Region.of(Slice(0, q_len, 0, length))
    return f"causal and the first {length} keys" if region == causal | prefix else None


def _blocks(region: Region, q_len: int, kv_len: int) -> str | None:
    chain = diagonal_blocks(region, q_len, kv_len, 0)
    cells = [k for k in chain if k.sizes[0] and k.sizes[1]]
    if len(cells) < 2:
        return None
    kinds = Counter(
        in_words(region.cut((k.i0, k.i1), (k.j0, k.j1)), *k.sizes) for k in cells
    ).most_common()
    if len(kinds) > 2:
        return f"{len(cells)} diagonal blocks"
    inside = " or ".join(kind for kind, _ in kinds)
    return f"{len(cells)} diagonal blocks, each {inside}"
