"""What is in a message: parts of several tensors in one buffer, each contiguous."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from attnkit.layouts import Layout, Sizes
from attnkit.ranges import Ranges, total

__all__ = ["Shape", "message", "packed", "places_or_all", "room", "spread", "taken"]

Shape = tuple[int, ...]


def message(
    shapes: Sequence[tuple[Shape, torch.dtype]], device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """Return a buffer of bytes, and its parts as tensors of some shapes and dtypes.

    >>> buffer, (some, wide) = message(
    ...     [((3,), torch.float16), ((2, 1), torch.float32)], torch.device("cpu")
    ... )
    >>> buffer.shape, some.shape, wide.shape
    (torch.Size([14]), torch.Size([3]), torch.Size([2, 1]))
    """
    # The widest first: each begins at a multiple of its size.
    order = sorted(range(len(shapes)), key=lambda k: -shapes[k][1].itemsize)
    sizes = [prod(shapes[k][0]) * shapes[k][1].itemsize for k in order]
    ends = list(accumulate(sizes, initial=0))
    buffer = torch.empty(ends[-1], dtype=torch.uint8, device=device)
    parts: dict[int, Tensor] = {}
    for k, start, size in zip(order, ends, sizes, strict=False):
        shape, dtype = shapes[k]
        parts[k] = buffer.narrow(0, start, size).view(dtype).view(shape)
    return buffer, [parts[k] for k in range(len(shapes))]


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors in one message."""
    buffer, parts = message([(tuple(t.shape), t.dtype) for t in tensors], tensors[0].device)
    for part, tensor in zip(parts, tensors, strict=True):
        part.copy_(tensor)
    return buffer


def room(layout: Layout, sizes: Sizes, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a view ``[b n s d]`` of memory that lies as the layout says, in it nothing so far."""
    dtype = dtype or like.dtype
    if not sizes.heads:  # no layout tells how many there are of a merged axis of length 0
        return like.new_empty((sizes.batch, 0, sizes.length, sizes.dim), dtype=dtype)
    return layout.view(like.new_empty(layout.shape(sizes), dtype=dtype), sizes.heads)


def _slices(tensor: Tensor, places: Ranges, axis: int) -> Iterator[Tensor]:
    return (tensor.narrow(axis, one.start, len(one)) for one in places)


def taken(tensor: Tensor, places: Ranges | None, axis: int) -> Tensor:
    """Return what is at some places along an axis, None: all; a view where these are one range."""
    if places is None:
        return tensor
    parts = list(_slices(tensor, places, axis))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, axis) if parts else tensor.narrow(axis, 0, 0)


def spread(
    into: Tensor, there: Ranges | None, tensor: Tensor, axis: int, add: bool = False
) -> None:
    """Write a tensor to some places of another along an axis, None: all of it; or `add` it."""
    at = 0
    for part in _slices(into, there, axis) if there is not None else (into,):
        own = tensor.narrow(axis, at, part.shape[axis])
        if add:
            part += own
        else:
            part.copy_(own)
        at += part.shape[axis]


def places_or_all(places: Ranges, count: int) -> Ranges | None:
    """Return places, or None where these are all of so many.

    >>> places_or_all((range(4),), 4), places_or_all((range(1, 4),), 4)
    (None, (range(1, 4),))
    """
    return None if total(places) == count else places
