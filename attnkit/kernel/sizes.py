"""Layouts as the fused kernel sees them: which axis of a tensor is which.

Patterns are einops patterns. Merged head axes are written ``(n d)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from attnkit.errors import KernelContractError

__all__ = ["LAYOUTS", "LayoutSizes", "layout_sizes", "sequence_lengths"]

LAYOUTS: dict[str, str] = {
    "BSH": "b s (n d)",
    "SBH": "s b (n d)",
    "BSND": "b s n d",
    "BNSD": "b n s d",
    "TND": "t n d",
}
"""Input layouts of the kernel and the einops pattern of a query in each."""


@dataclass(frozen=True)
class LayoutSizes:
    """The extents of one operand. `length` counts tokens: S per sequence, or T when packed."""

    batch: int
    length: int
    heads: int
    head_dim: int


def layout_sizes(layout: str, shape: Sequence[int], heads: int | None, dim: int) -> LayoutSizes:
    """Read the extents of an operand from its shape.

    Where the layout merges heads, either `heads` is known (the query's), or the head size
    `dim` is (the key's).
    """
    pattern = LAYOUTS.get(layout)
    if pattern is None:
        raise KernelContractError(
            f"input_layout={layout!r} is not one of {', '.join(LAYOUTS)}", ["layout-unknown"]
        )
    merged = "(" in pattern
    axes = pattern.replace("(n d)", "h").split()
    if len(axes) != len(shape):
        raise KernelContractError(
            f"a tensor of shape {tuple(shape)} has rank {len(shape)}; layout {layout} "
            f"('{pattern}') has {len(axes)} axes",
            ["rank"],
        )
    size = dict(zip(axes, shape, strict=True))
    if merged:
        count = heads if heads is not None else (size["h"] // dim if dim else 0)
        size["n"], size["d"] = count, size["h"] // count if count else 0
    if "t" in size:
        return LayoutSizes(1, size["t"], size["n"], size["d"])
    return LayoutSizes(size["b"], size["s"], size["n"], size["d"])


def sequence_lengths(cumulative: Sequence[int]) -> tuple[int, ...]:
    """Return the lengths that the kernel derives from a cumulative list without leading 0.

    ``len[0] = cu[0]``, ``len[b] = max(0, cu[b] - cu[b - 1])``: a repeated value is an empty
    sequence, and so is a trailing zero.

    >>> sequence_lengths([3, 5, 5, 0])
    (3, 2, 0, 0)
    """
    before = (0, *cumulative[:-1]) if cumulative else ()
    return tuple(max(0, now - last) for last, now in zip_longest(before, cumulative, fillvalue=0))
