"""`Blocks`: a mask by blocks of queries and keys, from a table of which see which."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from attnkit.arguments import check_align, check_bool, check_int, check_readable, describe
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Align, Enclosure, Mask, Rectangle, anchor
from attnkit.masks.dense import packed_cells, unpacked_cells
from attnkit.masks.trace import MOST_RUNS
from attnkit.strips import Canonical

__all__ = ["Blocks"]

_DRAWN = 1 << 10
"""Cells of a table that is written as a picture; a larger one is packed."""

_Table = np.ndarray[Any, np.dtype[np.bool_]]


@MASKS.register("blocks")
@dataclass(frozen=True, repr=False, eq=False)
class Blocks(Mask):
    """Blocks of queries see blocks of keys: ``table[i // q_block, j // kv_block]``.

    `table` is a bool tensor or array, True = allowed: [q_blocks, kv_blocks], [heads, q_blocks,
    kv_blocks] or [batch or 1, heads or 1, q_blocks, kv_blocks]; or nested lists of bools; or a
    picture, rows of ``#`` (allowed) and ``.`` with white space between. It is copied. The last
    block of queries or of keys may be ragged: then `q_len` or `kv_len` says where it ends. With
    `causal`, a query sees no key ahead of its own position p, which cuts its own block along the
    diagonal: ``and j <= p``; `align` says where p is when the lengths differ.

    The form of block-sparse kernels (FlashInfer, MInference, XAttention, `BlockMask` of
    FlexAttention without its mask function). Chunks of one size that see each other are
    `Chunked`; those before, too, `BlockCausal`. Where the region would have more than 131,072
    runs, the mask is known by its cells.

    Raises `CompositionError` for a table that is not bool or not rectangular, for lengths that take
    another number of blocks than it has, and at other lengths than those.

    >>> import torch
    >>> mask = Blocks("#.. ##. #.#", 2, 2)
    >>> mask == Blocks(torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]) > 0, 2, 2)
    True
    >>> print(Blocks("#.. ##. #.#", 2, 2, causal=True, q_len=5, kv_len=5).show(5, 5))
    #....
    ##...
    ###..
    ####.
    ##..#
    """

    table: str | tuple[tuple[bool, ...], ...]
    q_block: int
    kv_block: int
    causal: bool = False
    align: Align = "bottom_right"
    q_len: int | None = None
    kv_len: int | None = None

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(
            self,
            table: torch.Tensor | _Table | Sequence[Any] | str,
            q_block: int,
            kv_block: int,
            causal: bool = False,
            align: Align = "bottom_right",
            q_len: int | None = None,
            kv_len: int | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        check_int("Blocks q_block", self.q_block, 1)
        check_int("Blocks kv_block", self.kv_block, 1)
        check_bool("Blocks causal", self.causal, "whether no query sees a key ahead of it")
        check_align("Blocks", self.align)
        object.__setattr__(self, "table", _written(_cells_of(self.table)))
        for name in ("q_len", "kv_len"):
            self._check_length(name)

    def _check_length(self, name: Literal["q_len", "kv_len"]) -> None:
        length = getattr(self, name)
        size, count = self._sides[name == "kv_len"]
        if length is None:
            return
        check_int(f"Blocks {name}", length, 1)
        if -(-length // size) != count:
            raise CompositionError(
                f"Blocks got {name}={shown(length)}, but {count} blocks of {size} in its table, "
                f"which reach to {(count - 1) * size + 1} at least and to {count * size} at most; "
                f"blocks that cover {name} are {-(-length // size)}"
            )
        if length == count * size:
            object.__setattr__(self, name, None)

    @property
    def _sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The size of blocks and how many there are, of queries and of keys."""
        rows, keys = self._content.shape[2:]
        return (self.q_block, rows), (self.kv_block, keys)

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """What the blocks cover, or as much of the last one as is said."""
        said = (self.q_len, self.kv_len)
        rows, keys = (
            size * count if own is None else own
            for own, (size, count) in zip(said, self._sides, strict=True)
        )
        return rows, keys

    @cached_property
    def _content(self) -> _Table:
        """The table with all four axes."""
        return _read_text(str(self.table))

    def _value(self) -> Hashable:
        # Not the text: another zlib packs the same cells differently.
        cells = self._content
        blocks, edge = (self.q_block, self.kv_block), (self.causal, self.align)
        return cells.shape, cells.tobytes(), *blocks, *edge, self.q_len, self.kv_len

    def _plane(self, batch: int, head: int) -> _Table:
        b, n = self._content.shape[:2]
        plane: _Table = self._content[batch if b > 1 else 0, head if n > 1 else 0]
        return plane

    @property
    def batches(self) -> int | None:
        """As the table's; 1 serves every batch element."""
        count = self._content.shape[0]
        return count if count > 1 else None

    @property
    def heads(self) -> int | None:
        """As the table's; 1 serves every head."""
        count = self._content.shape[1]
        return count if count > 1 else None

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """The blocks; where they are too many runs, what lies around them."""
        table = self._plane(batch, head)
        rows = _runs_by_row(table)
        band = Region.of(Slice(0, q_len, 0, kv_len, hi=self._edge(q_len, kv_len)))
        if sum(map(len, rows)) > MOST_RUNS:
            return Enclosure(Region.empty(), self._around(table, q_len, kv_len) & band)
        out, most = Canonical(), (kv_len - 1) // self.kv_block + 1
        for k, runs in enumerate(rows):
            ends = ((a, min(b, most)) for a, b in runs if a < most)
            size = self.kv_block
            keys = tuple((a * size, 0, min(b * size, kv_len), 0) for a, b in ends)
            out.add(min(k * self.q_block, q_len), min((k + 1) * self.q_block, q_len), keys)
        region = Region(tuple(out.strips))
        region = region & band if self.causal else region
        return Enclosure(region, region)

    def _around(self, table: _Table, q_len: int, kv_len: int) -> Region:
        rows, keys = (np.flatnonzero(table.any(axis)) for axis in (1, 0))
        return Region.of(
            Slice(
                int(rows[0]) * self.q_block,
                min((int(rows[-1]) + 1) * self.q_block, q_len),
                int(keys[0]) * self.kv_block,
                min((int(keys[-1]) + 1) * self.kv_block, kv_len),
            )
        )

    def _of_heads(self, start: int, stop: int) -> Mask:
        return replace(self, table=_written(torch.from_numpy(self._content[:, start:stop])))

    def _edge(self, q_len: int, kv_len: int) -> int | None:
        return anchor(self.align, q_len, kv_len) if self.causal else None

    def _read(self, at: Rectangle, device: torch.device | str | None = None) -> torch.Tensor:
        # The formula itself: it is faster than thousands of rectangles.
        return self._cells(at, device)

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        device = torch.get_default_device() if device is None else device
        table = torch.from_numpy(self._plane(at.batch, at.head)).to(device)
        i, j = (torch.arange(*ends, device=device) for ends in (at.rows, at.keys))
        cells = table[i // self.q_block][:, j // self.kv_block]
        edge = self._edge(at.q_len, at.kv_len)
        return cells if edge is None else cells & (j <= i[:, None] + edge)

    def __repr__(self) -> str:
        if "#" in self.table or "." in self.table:
            return super().__repr__()
        sizes = "x".join(map(str, self._content.shape))
        causal = ", causal" if self.causal else ""
        return (
            f"<masks.Blocks {sizes} of {self.q_block} x {self.kv_block}{causal}, "
            f"{int(self._content.sum())} allowed>"
        )


def _runs_by_row(table: _Table) -> list[list[tuple[int, int]]]:
    """Return the runs of allowed blocks in each row of blocks."""
    framed = np.zeros((len(table), table.shape[1] + 2), np.bool_)
    framed[:, 1:-1] = table
    rows, ends = np.nonzero(framed[:, 1:] != framed[:, :-1])
    cuts = np.searchsorted(rows, np.arange(1, len(table)))
    each = (one.tolist() for one in np.split(ends, cuts))
    return [list(zip(row[::2], row[1::2], strict=True)) for row in each]


# -- forms of a table ----------------------------------------------------------------------


def _cells_of(given: object) -> torch.Tensor:
    """Return a table as a bool tensor [batch or 1, heads or 1, q_blocks, kv_blocks]."""
    if isinstance(given, str):
        given = _read_text(given)
    if isinstance(given, np.ndarray) and given.dtype == np.bool_:
        given = torch.from_numpy(np.ascontiguousarray(given))
    if isinstance(given, list | tuple):
        given = _of_lists(given)
    if not isinstance(given, torch.Tensor) or given.dtype != torch.bool:
        raise CompositionTypeError(
            f"Blocks got the table {describe(given)}; it is a bool tensor or array, nested lists "
            "of bools, or a picture such as '#.. ##. .##' (numbers: compare first, t > 0)"
        )
    check_readable("Blocks table", given)
    if given.dim() not in (2, 3, 4) or 0 in given.shape:
        raise CompositionError(
            f"Blocks got a table of shape {tuple(given.shape)}; it is [q_blocks, kv_blocks], "
            "[heads, q_blocks, kv_blocks] or [batch or 1, heads or 1, q_blocks, kv_blocks], with "
            "one block at least"
        )
    return given.reshape((1, 1, *given.shape)[-4:])


def _of_lists(given: Sequence[object]) -> torch.Tensor:
    try:
        return torch.tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise CompositionTypeError(
            f"Blocks got the table {shown(given)}; nested lists hold bools, and rows that are as "
            "long as each other"
        ) from None


def _written(cells: torch.Tensor) -> str:
    """Return a small table as a picture, others packed."""
    if cells.shape[:2] == (1, 1) and cells.numel() <= _DRAWN:
        return " ".join("".join("#" if x else "." for x in row) for row in cells[0, 0].tolist())
    return packed_cells(cells, True)


def _read_text(text: str) -> _Table:
    rows = text.split()
    if ":" not in text:
        if not rows or set(text) - set("#. \n\t\r") or len({len(row) for row in rows}) > 1:
            raise CompositionError(
                f"Blocks got the table {shown(text)}; a picture has rows of # (allowed) and . that "
                "are as long as each other, with white space between: '#.. ##. .##'"
            )
        return np.array([[x == "#" for x in row] for row in rows])[None, None]
    shape, bits = unpacked_cells(text, "Blocks")
    count = int(np.prod(shape))
    cells = np.unpackbits(np.frombuffer(bits, np.uint8), count=count)
    return cells.astype(np.bool_).reshape(shape)
