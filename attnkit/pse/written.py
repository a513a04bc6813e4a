"""Biases that are made inside of a compiled function: to its tracer, a handle and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnkit.eager import BIAS_IN_GRAPH
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.handles import told
from attnkit.pse.base import PSE, Pse, Rectangle
from attnkit.pse.composite import Sum
from attnkit.written import Writer

__all__ = ["WRITER", "BiasInGraph", "made", "real", "write"]


class BiasInGraph(Pse):
    """A bias that a graph makes when it runs. It adds to others, and is given to layers."""

    def __new__(cls, handle: Tensor, tensors: tuple[Tensor, ...]) -> BiasInGraph:
        """Make one, while a function is traced."""
        return object.__new__(cls)

    def __init__(self, handle: Tensor, tensors: tuple[Tensor, ...]) -> None:
        self._handle, self._tensors = handle, tensors

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of the biases that it is made of."""
        return self._tensors

    def _values(self, at: Rectangle, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        raise CompositionTypeError(
            "a bias that was made inside of a compiled function has no numbers there yet; add it "
            "to others and give it to a layer, or make it outside"
        )

    def __repr__(self) -> str:
        return "BiasInGraph()"


def _read(text: str, parts: Mapping[str, Callable[[], Any]]) -> Pse:
    made = PSE.parse(text, {"Sum": Sum, **parts})
    # A parameter that is new in each step would train nothing, and the graph does not know it.
    if len(made.tensors) != sum(len(part().tensors) for part in parts.values()):
        raise CompositionError(f"{made!r} in compiled code: {BIAS_IN_GRAPH}")
    return made


WRITER = Writer("bias", Pse, _read)


def made(name: str, given: tuple[Any, ...], named: dict[str, Any]) -> BiasInGraph:
    """Return the bias ``name(*given, **named)`` as one of the graph."""
    return BiasInGraph(WRITER.write(name, given, named), _tensors((*given, *named.values())))


def write(text: str) -> BiasInGraph:
    """Return the bias that a text writes, as one of the graph."""
    return BiasInGraph(WRITER.text(text), ())


def real(bias: Pse | None) -> Pse | None:
    """Return a bias that a graph made and gave back, as it is; any other one is that already."""
    if torch.compiler.is_dynamo_compiling() or not isinstance(bias, BiasInGraph):
        return bias
    found: Pse = told(bias._handle)
    return found


def _tensors(given: Sequence[Any]) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = ()
    for one in given:
        if isinstance(one, Pse):
            found += one.tensors
        elif isinstance(one, (tuple, list)):
            found += _tensors(one)
    return found
