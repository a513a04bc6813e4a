"""`Drawing`: a picture of a score matrix as numbers, before anybody draws it.

A renderer lays the layers over each other, each as opaque as its shares say: `display.svg` on
whatever background there is, `attnkit.masks.picture.figure` as a matplotlib figure on white.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

__all__ = ["COLOURS", "Drawing", "Layer", "Shares", "colour"]

Shares = Sequence[Sequence[float]]
"""How much of each field is coloured, from 0 to 1: rows of columns."""

COLOURS = (
    "#2f7ed8",  # blue
    "#d9661b",  # orange
    "#2f9150",  # green
    "#ab55a4",  # purple
    "#a8760f",  # ochre
    "#6b7c93",  # grey
    "#d9453f",  # red
    "#228e8e",  # teal
)
"""Colours that take turns; each stands out from a white page and from a black one."""


def colour(number: int) -> str:
    """Return the colour of the n-th thing.

    >>> colour(0), colour(8) == colour(0)
    ('#2f7ed8', True)
    """
    return COLOURS[number % len(COLOURS)]


class Layer(NamedTuple):
    """What of a picture has one colour, and what that means; without words it is in no legend."""

    shares: Shares
    colour: str
    label: str = ""


@dataclass(frozen=True)
class Drawing:
    """A score matrix of `q_len` x `kv_len` cells, in fields of one or more cells each.

    `title` says what it is, `note` what it measures; lines between `rows` and `columns` are at
    fields' borders.

    >>> drawing = Drawing(2, 2, (Layer([[1, 0], [1, 1]], colour(0), "allowed"),), "Causal()")
    >>> drawing.fields, drawing.legend
    ((2, 2), (('#2f7ed8', 'allowed'),))
    """

    q_len: int
    kv_len: int
    layers: tuple[Layer, ...]
    title: str = ""
    note: str = ""
    axes: tuple[str, str] = ("query i", "key j")

    @property
    def fields(self) -> tuple[int, int]:
        """How many rows and columns of fields there are."""
        shares = self.layers[0].shares if self.layers else ()
        return (len(shares), len(shares[0])) if len(shares) else (0, 0)

    @property
    def legend(self) -> tuple[tuple[str, str], ...]:
        """The colours that have a meaning, each once, and their meanings."""
        return tuple(dict.fromkeys((k.colour, k.label) for k in self.layers if k.label))

    def coarser(self) -> Drawing:
        """Return the drawing with half as many rows and columns of fields.

        >>> Drawing(2, 2, (Layer([[1, 0], [1, 1]], colour(0)),)).coarser().layers[0].shares
        [[0.75]]
        """
        halved = (layer._replace(shares=_halved(layer.shares)) for layer in self.layers)
        return replace(self, layers=tuple(halved))


def _halved(shares: Shares) -> Shares:
    """Return means of two by two; at the end, where the count is odd, of one."""
    rows = [[_mean(row[c : c + 2]) for c in range(0, len(row), 2)] for row in shares]
    pairs = (rows[r : r + 2] for r in range(0, len(rows), 2))
    return [[_mean(column) for column in zip(*pair, strict=True)] for pair in pairs]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
