"""What the tiled backend will do, as data: blocks of query rows and the key runs they need.

A `Schedule` is a pure function of the `Request` (see `attnkit.backends.tiled.job`). It names
row and key positions, never tensors; execution walks it and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from attnkit.strips import Run

__all__ = [
    "KeyChunk",
    "Lane",
    "Moving",
    "Patch",
    "Pattern",
    "Piece",
    "RowBlock",
    "Schedule",
    "Tile",
    "Whole",
]


class Piece(NamedTuple):
    """Rows ``[row, row + rows)`` of a pattern, whose allowed runs move as in a region's strip."""

    row: int
    rows: int
    runs: tuple[Run, ...]


class Pattern(NamedTuple):
    """Which cells of a ``rows x width`` rectangle are allowed; equal patterns share a patch.

    With `others`, each batch element of the lane has its own: this one, or the next of them,
    and so on from the first again.
    """

    rows: int
    width: int
    pieces: tuple[Piece, ...]
    others: tuple[Pattern, ...] = ()


class Patch(NamedTuple):
    """A pattern laid over the columns of a chunk from `column` on; elsewhere nothing is masked."""

    column: int
    pattern: Pattern


Moving = tuple[int, int, int]
"""A run of keys ``(start, stop, step)``, `step` keys further in each next repetition."""


class KeyChunk(NamedTuple):
    """Key runs that lie side by side in one score tile.

    `bare` says that some row finds no allowed key here.
    """

    runs: tuple[Moving, ...]
    width: int
    patches: tuple[Patch, ...]
    bare: bool


class Tile(NamedTuple):
    """How many batch elements, repetitions and query heads share one matrix product."""

    batch: int
    repeats: int
    heads: int


class RowBlock(NamedTuple):
    """Query rows ``[row, row + rows)``, repeated `times` times, `step` rows apart.

    The softmax runs over all chunks; rows meet their keys chunk by chunk.
    """

    row: int
    rows: int
    times: int
    step: int
    chunks: tuple[KeyChunk, ...]
    tile: Tile = Tile(1, 1, 1)

    @property
    def cells(self) -> int:
        """The cells of one repetition."""
        return self.rows * sum(chunk.width for chunk in self.chunks)

    @property
    def bare(self) -> bool:
        """Whether some row may find no allowed key in some chunk."""
        return any(chunk.bare for chunk in self.chunks)

    @property
    def keys_read(self) -> tuple[Moving, ...]:
        """The runs of keys that the first repetition reads."""
        return tuple(run for chunk in self.chunks for run in chunk.runs)


class Whole(NamedTuple):
    """A piece that torch's own fused kernel computes in one call, repeated `times` times.

    Rows and keys of one repetition and the next are `step` apart. The piece is a rectangle;
    `causal` makes it a square, causal from its corner; a `pattern` masks a small one. All rows
    see the `before` keys to the left of the piece as well: that takes a second call.
    """

    row: int
    rows: int
    key: int
    keys: int
    causal: bool = False
    pattern: Pattern | None = None
    before: int = 0
    times: int = 1
    step: int = 0

    @property
    def cells(self) -> int:
        """The cells of one repetition."""
        keys = self.keys / 2 if self.causal else self.keys
        return int(self.rows * (keys + self.before))

    @property
    def keys_read(self) -> tuple[Moving, ...]:
        """The run of keys that the first repetition reads."""
        return ((self.key - self.before, self.key + self.keys, self.step),)


class Lane(NamedTuple):
    """What a range of batch elements and query heads runs, in the order of its rows.

    Positions count from `origin`, where the score matrix of `lengths` begins: (0, 0), unless a
    packed sequence has a lane to itself. `matrix` is the number of its first score matrix.
    `blank` are the row ranges without any allowed key. With `opaque`, the mask itself is asked
    for its cells: the runs only enclose them. With `strays`, tiles may hold keys that no row of
    the lane sees; with `mixes`, rows of one packed sequence and masked keys of another.
    """

    batches: tuple[int, int]
    heads: tuple[int, int]
    matrix: int
    origin: tuple[int, int]
    lengths: tuple[int, int]
    items: tuple[RowBlock | Whole, ...] = ()
    blank: tuple[tuple[int, int], ...] = ()
    opaque: bool = False
    strays: bool = False
    mixes: bool = False


@dataclass(frozen=True)
class Schedule:
    """The lanes of a request."""

    lanes: tuple[Lane, ...]

    @cached_property
    def strays(self) -> bool:
        """Whether some tile may hold a key that no row sees."""
        return any(lane.strays for lane in self.lanes)

    @cached_property
    def mixes(self) -> bool:
        """Whether some tile holds keys of another packed sequence than that of its rows."""
        return any(lane.mixes for lane in self.lanes)

    @cached_property
    def fused(self) -> int:
        """How many cells torch's fused kernel computes."""
        return self._cells(Whole)

    @cached_property
    def computed(self) -> int:
        """The number of cells computed, masked ones inside the tiles included."""
        return self._cells(RowBlock) + self.fused

    def _cells(self, kind: type[RowBlock] | type[Whole]) -> int:
        total = 0
        for lane in self.lanes:
            matrices = (lane.batches[1] - lane.batches[0]) * (lane.heads[1] - lane.heads[0])
            items = (item for item in lane.items if isinstance(item, kind))
            total += matrices * sum(item.times * item.cells for item in items)
        return total
