"""The score matrices of a request, whole or a block at a time, and what holds for their cells."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from attnkit.backends.base import Operands
from attnkit.backends.dropout import Chances
from attnkit.backends.selected import selected_by
from attnkit.masks import Mask, Rectangle
from attnkit.masks.selection import Selection
from attnkit.masks.trace import blocks_around
from attnkit.planner import Request
from attnkit.pse import Pse

__all__ = ["CELLS", "Matrix", "matrix_of", "row_blocks"]

CELLS = 1 << 21
"""Scores that are held at a time, of all batch elements and heads."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """What one attention is made of: tensors ``[b n s d]``, and what holds for their cells.

    `sequence` says which one of a packed batch they are; None where the batch is theirs. The first
    cell is `corner`, row and key, of the score matrix that `mask` is of. Weights survive by
    `chances`, if any are dropped.
    """

    request: Request
    sequence: int | None
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    pse: Pse | None
    sink: Tensor | None
    chances: Chances | None
    corner: tuple[int, int] = (0, 0)

    def rectangle(self, rows: tuple[int, int], keys: tuple[int, int]) -> Matrix:
        """Return some rows over some keys, with the lengths of the whole in mind."""
        whole = {"q_len": self.query.shape[2], "kv_len": self.key.shape[2]}
        return replace(
            self,
            query=self.query[:, :, slice(*rows)],
            key=self.key[:, :, slice(*keys)],
            value=self.value[:, :, slice(*keys)],
            pse=None if self.pse is None else self.pse.cut(rows, keys, **whole),
            corner=(self.corner[0] + rows[0], self.corner[1] + keys[0]),
        )

    @property
    def place(self) -> Rectangle:
        """Where it lies in the score matrix of its sequence."""
        request, (row, key) = self.request, self.corner
        own = self.sequence is not None
        q_len, kv_len = (
            request.sequences[self.sequence or 0] if own else (request.q_len, request.kv_len)
        )
        rows, keys = (row, row + self.query.shape[2]), (key, key + self.key.shape[2])
        return Rectangle(rows, keys, q_len, kv_len)

    @property
    def first_token(self) -> tuple[int, int]:
        """Where its rows and keys begin on the axes of the batch's tensors."""
        starts = self.request.token_starts if self.sequence is not None else ((0,), (0,))
        row, key = (start[self.sequence or 0] for start in starts)
        return row + self.corner[0], key + self.corner[1]

    def rows_of(self, tensor: Tensor) -> Tensor:
        """Return its rows of a tensor ``[b n s ...]`` of the batch (packed: ``[1 n t ...]``)."""
        first, _ = self.first_token
        return tensor[:, :, first : first + self.query.shape[2]]

    def blocks(self) -> Iterator[Matrix]:
        """Yield blocks of rows, from the first on, over the keys that they may see.

        The scores of each are `CELLS` at most, or those of one row of each head.
        """
        batch, heads, q_len, _ = self.query.shape
        most, kv_len = CELLS // max(1, batch * heads), self.key.shape[2]
        if q_len * kv_len <= most:
            yield self
            return
        at, b = self.place, self.sequence
        own = slice(None) if b is None else slice(b, b + 1)
        known = {e.outer for plane in self.request.matrices.planes for e in plane[own]}
        outers = [outer.cut(at.rows, at.keys) for outer in known]
        for rows, keys in blocks_around(outers, q_len, kv_len, most):
            yield self.rectangle(rows, keys)


def matrix_of(
    request: Request, operands: Operands, sequence: int | None, chances: Chances | None
) -> Matrix:
    """Return the score matrices of a request: all of a dense batch, or one packed sequence's."""
    q, k, v = operands.by_head(request)
    if sequence is not None:
        rows, keys = (slice(cu[sequence], cu[sequence + 1]) for cu in request.token_starts)
        q, k, v = q[:, :, rows], k[:, :, keys], v[:, :, keys]
    mask = request.mask
    if isinstance(mask, Selection):
        mask = selected_by(request, operands)
    elif operands.given:
        mask = mask.bound(operands.given)
    return Matrix(request, sequence, q, k, v, mask, operands.pse, operands.sink, chances)


def row_blocks(
    request: Request, operands: Operands, chances: Chances | None = None
) -> Iterator[Matrix]:
    """Yield blocks of rows, each with the keys that it may see, one sequence after the other."""
    packed = request.seqlens is not None
    for b in range(request.batch) if packed else (None,):
        yield from matrix_of(request, operands, b, chances).blocks()
