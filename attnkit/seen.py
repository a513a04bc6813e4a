"""What new rows of texts see of the keys that a cache holds of them, where these are a choice.

Keys of a text that a cache holds are runs of positions; texts may be of unlike lengths. Each
element of a batch then has its own rows and its own keys, and all of them stand in one score
matrix: as many rows as the most, as many keys as the most. What stands behind is masked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from attnkit.geometry import Region
from attnkit.masks import Enclosure, Mask, Rectangle
from attnkit.pse import Dense, Pse
from attnkit.texts import HeldText

__all__ = ["NewRows", "Seen", "bias_seen"]

Range = tuple[int, int]


class NewRows(NamedTuple):
    """The last `added` rows of a text, over the keys that are held of it.

    >>> NewRows(HeldText(9, ((0, 2), (7, 9))), 1).rows
    (8, 9)
    """

    text: HeldText
    added: int

    @property
    def rows(self) -> Range:
        """The positions of the rows."""
        return self.text.length - self.added, self.text.length

    def pieces(self, keys: Range) -> Iterator[tuple[int, Range]]:
        """Yield where some of the held keys begin and the positions of each stretch of them.

        >>> list(NewRows(HeldText(9, ((0, 2), (7, 9))), 1).pieces((1, 3)))
        [(1, (1, 2)), (2, (7, 8))]
        """
        for first, (start, stop) in zip(self.text.places, self.text.runs, strict=True):
            a, b = max(keys[0], first), min(keys[1], first + stop - start)
            if a < b:
                yield a, (start + a - first, start + b - first)


@dataclass(frozen=True, repr=False, eq=False)
class Seen(Mask):
    """Rows of texts over the keys that are held: ``mask.allowed(position of i, position of j)``.

    `texts` has one entry for each element of the batch, or one for all. The mask speaks of whole
    texts, of `length` tokens where that is known.

    >>> from attnkit import masks
    >>> text = NewRows(HeldText(9, ((0, 2), (6, 9))), 2)
    >>> print(Seen(masks.SlidingWindow(2) | masks.Columns(0, 1), (text,)).show(2, 5))
    #.##.
    #..##
    """

    mask: Mask
    texts: tuple[NewRows, ...]
    length: int | None = None
    anchored = False

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Put the stretches of both bounds side by side."""
        new, whole, number = self._at(batch)
        known = self.mask.enclosure(whole, whole, number, head)
        inner = _beside(known.inner, new)
        return Enclosure(inner, inner if known.exact else _beside(known.outer, new))

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> Tensor:
        new, whole, number = self._at(at.batch)
        found = torch.zeros(at.shape, dtype=torch.bool, device=device)
        first, (i0, i1) = new.rows[0], at.rows
        i1 = min(i1, new.added)
        for place, keys in new.pieces(at.keys) if i0 < i1 else ():
            rows, column = (first + i0, first + i1), place - at.keys[0]
            read = self.mask._read(Rectangle(rows, keys, whole, whole, number, at.head), device)
            found[: i1 - i0, column : column + read.shape[1]] = read
        return found

    def _at(self, batch: int) -> tuple[NewRows, int, int]:
        """Return an element's rows, the length of its text, and its number in the mask."""
        new = self.texts[batch if len(self.texts) > 1 else 0]
        number = batch if self.mask.batches is not None else 0
        return new, new.text.length if self.length is None else self.length, number

    @property
    def batches(self) -> int | None:
        """One entry for each text, where they differ."""
        return len(self.texts) if len(self.texts) > 1 else self.mask.batches

    @property
    def heads(self) -> int | None:
        """Those of the mask."""
        return self.mask.heads

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The most rows, and the most keys."""
        return max(new.added for new in self.texts), max(new.text.held for new in self.texts)

    @property
    def _nesting(self) -> tuple[int, int]:
        depth, count = self.mask._nesting
        return depth + 1, count + 1


def bias_seen(pse: Pse, texts: tuple[NewRows, ...], length: int | None, like: Tensor) -> Pse:
    """Return the same rows and keys of a bias, as a tensor of the device of `like`.

    >>> from attnkit import pse
    >>> text = NewRows(HeldText(9, ((0, 2), (6, 9))), 1)
    >>> bias_seen(pse.ALiBi([1.0]), (text,), None, torch.zeros(1)).materialize(1, 5)
    tensor([[[[-8., -7., -2., -1., -0.]]]])
    """
    shape = max(new.added for new in texts), max(new.text.held for new in texts)
    parts: list[Pse] = []
    for part in pse.parts:
        apart = range(len(texts)) if len(texts) > 1 else (None,)
        each = [
            _block(part, new, length, b, shape, like) for b, new in zip(apart, texts, strict=True)
        ]
        cells = torch.cat(each).detach()
        parts.append(Dense(cells, before_scale=part.before_scale, validate=False))
    return reduce(add, parts)


def _block(
    part: Pse, new: NewRows, length: int | None, batch: int | None, shape: Range, like: Tensor
) -> Tensor:
    """Return ``[1 | b, 1 | n, rows, keys]`` of a bias, zeros behind what there is of a text."""
    whole = new.text.length if length is None else length
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    read = [
        part.rectangle(
            new.rows,
            keys,
            q_len=whole,
            kv_len=whole,
            batch_index=batch,
            dtype=wide,
            device=like.device,
        )
        for keys in new.text.runs
    ]
    found = torch.cat(read, -1)
    rows, keys = (want - have for want, have in zip(shape, found.shape[-2:], strict=True))
    return torch.nn.functional.pad(found, (0, keys, 0, rows))


def _beside(region: Region, new: NewRows) -> Region:
    parts = new.pieces((0, new.text.held))
    return Region.union(region.cut(new.rows, keys).shift(0, first) for first, keys in parts)
