"""`Cut`: the part of a bias inside a rectangle, as the bias of its own score matrix."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.pse.base import Pse, Range, check_range

__all__ = ["Cut", "uncut"]


@dataclass(frozen=True, repr=False)
class Cut(Pse):
    """Rows and keys of another bias: ``bias[h, i, j] = part[h, i + q0, j + kv0]``.

    The whole score matrix has the lengths `q_len` x `kv_len`. Made by `Pse.cut` where a bias
    has no closer form; `Pse.rectangle` says what materialising it costs.

    Raises `CompositionError` for ranges outside the matrix, and at use for other lengths.

    >>> from attnkit.pse import ALiBi
    >>> part = ALiBi([1.0]).cut((0, 1), (0, 3), q_len=3, kv_len=4)
    >>> part
    ALiBi(slopes=(1.0,)).cut((0, 1), (0, 3), q_len=3, kv_len=4)
    >>> part.materialize(1, 3)
    tensor([[[[-1., -0., -1.]]]])
    """

    part: Pse
    q_range: Range
    kv_range: Range
    q_len: int
    kv_len: int

    def __post_init__(self) -> None:
        if not isinstance(self.part, Pse):
            raise CompositionTypeError(f"pse.Cut cuts a positional bias, not {shown(self.part)}")
        for name in ("q_range", "kv_range"):
            check_range(
                name, getattr(self, name), getattr(self, name.removesuffix("range") + "len")
            )
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.part, Cut):  # a cut of a cut is one cut, however often it is cut
            self._join(self.part)

    def _join(self, inner: Cut) -> None:
        if (self.q_len, self.kv_len) != inner.extent:
            raise CompositionError(
                f"pse.{inner} is for score matrices of {inner.extent[0]} x {inner.extent[1]}, but "
                f"is cut as one of {self.q_len} x {self.kv_len}"
            )
        q0, kv0 = inner.q_range[0], inner.kv_range[0]
        for name, value in (
            ("part", inner.part),
            ("q_range", (self.q_range[0] + q0, self.q_range[1] + q0)),
            ("kv_range", (self.kv_range[0] + kv0, self.kv_range[1] + kv0)),
            ("q_len", inner.q_len),
            ("kv_len", inner.kv_len),
        ):
            object.__setattr__(self, name, value)

    @property
    def before_scale(self) -> bool:
        """As the bias that is cut."""
        return self.part.before_scale

    @property
    def heads(self) -> int | None:
        """As the bias that is cut."""
        return self.part.heads

    @property
    def batch(self) -> int | None:
        """As the bias that is cut."""
        return self.part.batch

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """As the bias that is cut."""
        return self.part.tensors

    @property
    def toeplitz(self) -> bool:
        """As the bias that is cut: a shift leaves distances as they differ."""
        return self.part.toeplitz

    @property
    def extent(self) -> tuple[int, int]:
        """The lengths of the two ranges."""
        return self.q_range[1] - self.q_range[0], self.kv_range[1] - self.kv_range[0]

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Raise `CompositionError` unless the lengths are those of the cut."""
        self.part.check(self.q_len, self.kv_len, batch, heads)
        if (q_len, kv_len) != self.extent:
            raise CompositionError(
                f"pse.{self} is for score matrices of {self.extent[0]} x {self.extent[1]}, but "
                f"this one is {q_len} x {kv_len}; cut the bias for these lengths"
            )

    def key(self) -> Hashable:
        """Return the key of the bias that is cut, and where."""
        where = (self.q_range, self.kv_range, self.q_len, self.kv_len)
        return ("Cut", self.part.key(), *where)

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
        """Return the rectangle of the whole matrix."""
        self.check(q_len, kv_len, batch, heads)
        return self.part.rectangle(
            self.q_range,
            self.kv_range,
            q_len=self.q_len,
            kv_len=self.kv_len,
            batch=batch,
            heads=heads,
            batch_index=batch_index,
            dtype=dtype,
            device=device,
        )

    def __repr__(self) -> str:
        where = f"{self.q_range}, {self.kv_range}, q_len={self.q_len}, kv_len={self.kv_len}"
        return f"{self.part!r}.cut({where})"


def uncut(part: Pse) -> tuple[Pse, int, tuple[int, int] | None]:
    """Return the bias that a cut is of, how far ``j - i`` lies lower in it, and its lengths.

    A bias that is no cut is its own, of any lengths: (itself, 0, None).

    >>> from attnkit.pse import ALiBi
    >>> uncut(ALiBi([1.0]).cut((5, 6), (0, 3), q_len=7, kv_len=9))
    (ALiBi(slopes=(1.0,)), 5, (7, 9))
    """
    shift, lengths = 0, None
    while isinstance(part, Cut):
        shift += part.q_range[0] - part.kv_range[0]
        lengths = part.q_len, part.kv_len
        part = part.part
    return part, shift, lengths
