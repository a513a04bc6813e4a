"""`ByDistance`: what biases share that depend on the distance ``j - i'`` and the head alone."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from attnkit.masks.base import anchor
from attnkit.pse.base import Align, Pse, Rectangle
from attnkit.pse.structure import Structure, Toeplitz

__all__ = ["MOST_HEADS", "ByDistance"]

MOST_HEADS = 1 << 16
"""Heads that a bias by formula is made for, at most."""


class ByDistance(Pse):
    """A bias ``bias[h, i, j] = f(h, j - i')`` with ``i' = i + offset``: a Toeplitz matrix per head.

    ``i' = i + (kv_len - q_len)`` for ``align="bottom_right"``, so that the last query stands on
    the last key; ``i' = i`` for ``"top_left"``. A family says what it is `at` distances.

    >>> from attnkit.pse import ALiBi
    >>> ALiBi([1.0]).at(torch.tensor([-2, 0, 1]), torch.float32)
    tensor([[-2., -0., -1.]])
    """

    _cells_from = frozenset({"at", "curve", "offset"})
    align: Align

    @abstractmethod
    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``f(h, d)`` for integer distances d of any shape: ``[n, *distance.shape]``.

        Gradients reach the tensors that the bias carries.
        """

    @property
    def structure(self) -> Structure | None:
        """A number for each distance."""
        return Toeplitz(self.align)

    @property
    def anchored(self) -> bool:
        """Whether the last query stands on the last key, wherever that is."""
        return self.align == "bottom_right"

    def offset(self, q_len: int, kv_len: int) -> int:
        """Return the key position that query 0 stands on: ``i' - i``.

        >>> from attnkit import pse
        >>> pse.ALiBi(2).offset(2, 5), pse.ALiBi(2, align="top_left").offset(2, 5)
        (3, 0)
        """
        return anchor(self.align, q_len, kv_len)

    def diagonals(
        self, q_len: int, kv_len: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> Tensor:
        """Return ``f(h, d)`` for all distances of a score matrix, in one go."""
        where = self.tensors[0].device if self.tensors else device
        first = 1 - q_len - self.offset(q_len, kv_len)
        return self.at(torch.arange(first, first + q_len + kv_len - 1, device=where), dtype)

    def _values(self, at: Rectangle, dtype: torch.dtype, device: torch.device | None) -> Tensor:
        query = torch.arange(*at.rows, device=device) + self.offset(at.q_len, at.kv_len)
        return self.at(torch.arange(*at.keys, device=device) - query[:, None], dtype)
