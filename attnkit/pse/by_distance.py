"""`ByDistance`: what biases share that depend on the distance ``j - i'`` and the head alone."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from attnkit.arguments import check_float_dtype
from attnkit.pse.base import Align, Pse, Range

__all__ = ["ByDistance"]


class ByDistance(Pse):
    """A bias ``bias[h, i, j] = f(h, j - i')`` with ``i' = i + offset``: a Toeplitz matrix per head.

    ``i' = i + (kv_len - q_len)`` for ``align="bottom_right"``, so that the last query stands on
    the last key; ``i' = i`` for ``"top_left"``. A family says what it is `at` distances; a whole
    matrix, a rectangle of it, or the vector of all distances follow, each at its own cost.

    >>> from attnkit.pse import ALiBi
    >>> ALiBi([1.0]).at(torch.tensor([-2, 0, 1]), torch.float32)
    tensor([[-2., -0., -1.]])
    """

    align: Align

    @abstractmethod
    def at(self, distance: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``f(h, d)`` for integer distances d of any shape: ``[n, *distance.shape]``.

        Gradients reach the tensors that the bias carries.
        """

    @property
    def toeplitz(self) -> bool:
        """True: only the distance between query and key matters."""
        return True

    def offset(self, q_len: int, kv_len: int) -> int:
        """Return the key position that query 0 stands on: ``i' - i``.

        >>> from attnkit import pse
        >>> pse.ALiBi(2).offset(2, 5), pse.ALiBi(2, align="top_left").offset(2, 5)
        (3, 0)
        """
        return kv_len - q_len if self.align == "bottom_right" else 0

    def _extends(self, shorter: int, longer: int) -> bool:
        """True: either anchor is the diagonal of a square matrix."""
        return True

    def materialize(
        self,
        q_len: int,
        kv_len: int,
        *,
        batch: int | None = None,
        heads: int | None = None,
        batch_index: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return ``f(h, j - i')`` as ``[1, n, q_len, kv_len]``."""
        return self.rectangle(
            (0, q_len),
            (0, kv_len),
            q_len=q_len,
            kv_len=kv_len,
            batch=batch,
            heads=heads,
            dtype=dtype,
            device=device,
        )

    def rectangle(
        self,
        q_range: Range,
        kv_range: Range,
        *,
        q_len: int,
        kv_len: int,
        batch: int | None = None,
        heads: int | None = None,
        batch_index: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return the cells of a rectangle; no other cell is made."""
        self.check(q_len, kv_len, batch, heads)
        check_float_dtype("dtype", dtype)
        where = self.tensors[0].device if self.tensors else device
        query = torch.arange(*q_range, device=where) + self.offset(q_len, kv_len)
        distance = torch.arange(*kv_range, device=where) - query[:, None]
        return self.at(distance, dtype)[None]
