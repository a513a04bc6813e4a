"""`Sizes`: the extents of one tensor, whatever its layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attnkit.errors import CompositionTypeError, shown

__all__ = ["Sizes", "check_shape", "check_sizes"]

_MOST_AXES = 64  # what a tensor can have


@dataclass(frozen=True)
class Sizes:
    """The extents of one tensor, whatever its layout; a packed tensor counts as one batch row.

    >>> Sizes(batch=2, length=16, heads=4, dim=8)
    Sizes(batch=2, length=16, heads=4, dim=8)
    """

    batch: int
    length: int
    heads: int
    dim: int


def check_shape(shape: Sequence[int], what: str) -> None:
    """Raise `CompositionTypeError` for anything but a list of extents."""
    whole = isinstance(shape, Sequence) and not isinstance(shape, str | bytes)
    if (
        not whole
        or len(shape) > _MOST_AXES
        or any(type(extent) is not int or extent < 0 for extent in shape)
    ):
        raise CompositionTypeError(
            f"{what}: a shape is a list of ints that are 0 or more, got {shown(shape)}"
        )


def check_sizes(method: str, sizes: Sizes) -> None:
    """Raise `CompositionTypeError` for anything but `Sizes`."""
    if not isinstance(sizes, Sizes):
        raise CompositionTypeError(
            f"{method} takes Sizes(batch=, length=, heads=, dim=), not {shown(sizes)}"
        )
