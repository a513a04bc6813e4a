"""`Table`: a bias that looks every cell up in a small table, by an index that is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.arguments import check_floats, check_tensor
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.pse.base import Pse, Rectangle
from attnkit.pse.structure import Indexed

__all__ = ["Table"]

_INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True, init=False, eq=False, repr=False)
class Table(Pse):
    """An entry of a table per cell: ``bias[b, h, i, j] = table[index[b, i, j], h]``.

    Shapes: table ``[entries, n]``, or ``[entries, 1]`` for all heads, of a floating dtype; index
    ``[q_len, kv_len]`` or ``[1 | b, q_len, kv_len]`` (in a packed batch ``b`` counts sequences),
    int64 or int32. Added after the scale. Both tensors are kept as they are, and no matrix is made
    where a backend can look cells up as it goes. The gradient of the table adds up its cells.

    Indexes must be entries of the table when the bias is made. Reading them makes the host wait
    for an accelerator; ``validate=False`` skips that, for an index that a model computes anew in
    every step.

    Equality compares content, as for `Dense`; the hash uses the shapes alone.

    Raises `CompositionTypeError` for tensors of another dtype, `CompositionError` for another rank
    and indexes outside of the table, and at use for sizes that do not fit.

    Source: the relative position bias of Liu et al., "Swin Transformer" (ICCV 2021), and of BEiT:
    their `relative_position_bias_table` and `relative_position_index` are these tensors.

    >>> table = torch.tensor([[0.0], [10.0], [20.0]])
    >>> bias = Table(table, torch.tensor([[0, 1], [2, 0]]))
    >>> bias
    Table(float32[3, 1], int64[2, 2])
    >>> bias.materialize(2, 2)
    tensor([[[[ 0., 10.],
              [20.,  0.]]]])
    >>> Table(table, torch.tensor([[0, 3]]))
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: pse.Table(float32[3, 1], int64[1, 2]) looks up the entries 0 \
to 3, and its table has 0 to 2
    """

    table: Tensor
    index: Tensor

    def __init__(self, table: Tensor, index: Tensor, *, validate: bool = True) -> None:
        check_floats("pse.Table: table", table)
        check_tensor("pse.Table: index", index)
        if index.dtype not in _INTEGERS:
            raise CompositionTypeError(
                f"pse.Table: index is of type {index.dtype}; give entries of the table, int64 or "
                "int32"
            )
        vars(self).update(table=table, index=index)
        if table.ndim != 2 or index.ndim not in (2, 3):
            raise CompositionError(
                f"pse.{self}: give a table [entries, n] and an index [q_len, kv_len] or "
                "[1 or b, q_len, kv_len]"
            )
        if validate:
            self._check_index()

    def _check_index(self) -> None:
        index = self.index
        traced = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
        if traced or index.is_meta or not index.numel():
            return  # there is nothing to read yet
        low, high = torch.stack(torch.aminmax(index)).tolist()
        if not 0 <= low <= high < len(self.table):
            raise CompositionError(
                f"pse.{self} looks up the entries {low} to {high}, and its table has 0 to "
                f"{len(self.table) - 1}"
            )

    @property
    def structure(self) -> Indexed:
        """An entry per cell, found by the index."""
        return Indexed()

    @property
    def heads(self) -> int | None:
        """A column of the table each; None where one column is for all."""
        return None if self.table.shape[1] == 1 else self.table.shape[1]

    @property
    def batch(self) -> int | None:
        """Its number of batch elements; None where all of them share the index."""
        index = self.index
        return len(index) if index.ndim == 3 and len(index) != 1 else None

    @property
    def extent(self) -> tuple[int, int]:
        """The lengths of the last two axes of the index."""
        return self.index.shape[-2], self.index.shape[-1]

    @property
    def anchored(self) -> bool:
        """False: an entry is where it is, whatever the lengths."""
        return False

    def _values(self, at: Rectangle, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        index = self.index[..., slice(*at.rows), slice(*at.keys)]
        # Not `table[index]`, whose gradient threads add up in any order.
        entries = self.table.to(dtype).index_select(0, index.flatten())
        return entries.view(*index.shape, self.table.shape[1]).movedim(-1, -3)

    def _bias_of(self, at: Rectangle) -> Table:
        """Return the bias of a view of the index, and the same table."""
        return Table(self.table, self.index[..., slice(*at.rows), slice(*at.keys)], validate=False)

    def __repr__(self) -> str:
        table, index = (
            f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
            for t in (self.table, self.index)
        )
        return f"Table({table}, {index}{', requires_grad' if self.table.requires_grad else ''})"
