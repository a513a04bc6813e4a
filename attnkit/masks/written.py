"""Masks that are made inside of a compiled function: to its tracer, a handle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnkit.errors import CompositionTypeError
from attnkit.geometry import Region
from attnkit.handles import told
from attnkit.masks.base import MASKS, Mask
from attnkit.masks.operators import combined
from attnkit.masks.rectangles import PrefixLM
from attnkit.written import Writer

__all__ = ["WRITER", "MaskInGraph", "made", "real", "write"]


class MaskInGraph(Mask):
    """A mask that a graph makes when it runs. It combines with others, and is given to layers."""

    def __new__(cls, handle: Tensor) -> MaskInGraph:
        """Make one, while a function is traced."""
        return object.__new__(cls)

    def __init__(self, handle: Tensor) -> None:
        self._handle = handle

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        raise CompositionTypeError(
            "a mask that was made inside of a compiled function has no cells there yet; combine "
            "it and give it to a layer, or make it outside"
        )

    def __repr__(self) -> str:
        return "MaskInGraph()"


def _read(text: str, parts: Mapping[str, Callable[[], Any]]) -> Mask:
    return MASKS.parse(text, {"PrefixLM": PrefixLM, "combined": combined, **parts})


WRITER = Writer("mask", Mask, _read)


def made(name: str, given: tuple[Any, ...], named: dict[str, Any]) -> MaskInGraph:
    """Return the mask ``name(*given, **named)`` as one of the graph."""
    return MaskInGraph(WRITER.write(name, given, named))


def write(text: str) -> MaskInGraph:
    """Return the mask that a text writes, as one of the graph."""
    return MaskInGraph(WRITER.text(text))


def real(mask: Mask) -> Mask:
    """Return a mask that a graph made and gave back, as it is; any other one is that already."""
    if torch.compiler.is_dynamo_compiling() or not isinstance(mask, MaskInGraph):
        return mask
    found: Mask = told(mask._handle)
    return found
