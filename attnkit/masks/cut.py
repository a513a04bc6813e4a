"""`Cut`: the part of a mask inside a rectangle, as its own score matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks.base import MASKS, Enclosure, Mask, check_int

__all__ = ["Cut"]

Range = tuple[int, int | None]


@dataclass(frozen=True, repr=False)
class Cut(Mask):
    """Rows and keys of another mask: ``allowed(i, j) = mask.allowed(i + q0, j + kv0)``.

    `q_range` and `kv_range` are (start, stop), stop None = to the end. The whole score matrix
    that is cut has the lengths `q_len` x `kv_len`; where they are not given they follow from the
    mask (`extent`) or from a range that runs to the end. A mask anchored bottom-right whose whole
    lengths cannot be known is refused rather than guessed.

    >>> from attnkit import masks
    >>> masks.Causal()[4:, :].region(4, 8) == masks.Causal().region(4, 8)
    True
    """

    mask: Mask
    q_range: Range
    kv_range: Range
    q_len: int | None = None
    kv_len: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.mask, Mask):
            raise CompositionTypeError(f"Cut takes a mask, got {self.mask!r}")
        for axis in ("q", "kv"):
            start, stop = getattr(self, f"{axis}_range")
            check_int(f"{axis}_range start", start, 0)
            whole = getattr(self, f"{axis}_len")
            if stop is not None:
                check_int(f"{axis}_range stop", stop, start)
            if whole is not None:
                check_int(f"{axis}_len", whole, start if stop is None else stop)
            object.__setattr__(self, f"{axis}_range", (start, stop))

    def _whole(self, q_len: int, kv_len: int) -> tuple[int, int]:
        """Return the lengths of the score matrix that is cut, for a cut of these lengths."""
        whole = []
        for axis, part, known in zip(("q", "kv"), (q_len, kv_len), self.mask.extent, strict=True):
            start, stop = getattr(self, f"{axis}_range")
            said = getattr(self, f"{axis}_len")
            if said is None:
                said = known
            if said is None:
                if stop is not None and self.mask.anchored:
                    raise CompositionError(
                        f"{self!r} cuts a mask whose cells depend on the lengths of the whole "
                        f"score matrix, and {axis}_len is not known; say it: "
                        f"mask.cut({self.q_range}, {self.kv_range}, q_len=..., kv_len=...)"
                    )
                said = start + part if stop is None else stop
            whole.append(said)
        return whole[0], whole[1]

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The lengths of the cut, where they are known."""
        out = []
        for axis, known in zip(("q", "kv"), self.mask.extent, strict=True):
            start, stop = getattr(self, f"{axis}_range")
            whole = getattr(self, f"{axis}_len") or known
            end = stop if stop is not None else whole
            out.append(None if end is None else end - start)
        return out[0], out[1]

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Cut both bounds of the whole mask."""
        whole = self._whole(q_len, kv_len)
        self.mask.check(*whole)
        inner, outer = self.mask.enclosure(*whole, batch, head)
        rows = (self.q_range[0], self.q_range[0] + q_len)
        keys = (self.kv_range[0], self.kv_range[0] + kv_len)
        cut = inner.cut(rows, keys)
        return Enclosure(cut, cut if inner == outer else outer.cut(rows, keys))

    def _cells(
        self, q_len: int, kv_len: int, batch: int, head: int, device: torch.device | str | None
    ) -> torch.Tensor:
        if self.enclosure(q_len, kv_len, batch, head).exact:
            return super()._cells(q_len, kv_len, batch, head, device)
        i, j = self.q_range[0], self.kv_range[0]
        whole = self.mask._cells(*self._whole(q_len, kv_len), batch, head, device)
        return whole[i : i + q_len, j : j + kv_len]

    @property
    def batches(self) -> int | None:
        """As the mask that is cut."""
        return self.mask.batches

    @property
    def heads(self) -> int | None:
        """As the mask that is cut."""
        return self.mask.heads

    def __str__(self) -> str:
        return self._text(str(self.mask)) or super().__str__()

    def __repr__(self) -> str:
        return self._text(repr(self.mask)) or super().__repr__()

    def _text(self, mask: str) -> str | None:
        if self.q_len is not None or self.kv_len is not None:
            return None
        ranges = ", ".join(
            f"{start or ''}:{'' if stop is None else stop}"
            for start, stop in (self.q_range, self.kv_range)
        )
        return f"({mask})[{ranges}]" if any(sign in mask for sign in "&|~") else f"{mask}[{ranges}]"


MASKS.add("cut", Cut)
