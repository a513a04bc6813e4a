"""`Cut`: the part of a mask inside a rectangle, as its own score matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from attnkit.arguments import check_int, describe
from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.masks.algebra import And, Not, Or
from attnkit.masks.base import MASKS, Enclosure, Mask, Rectangle
from attnkit.masks.composite import Nested

__all__ = ["Cut"]

Range = tuple[int, int | None]


class _Axis(NamedTuple):
    """One axis of a cut: ``start <= index < stop`` of `whole`, as far as these are known."""

    start: int
    stop: int | None
    whole: int | None

    @property
    def length(self) -> int | None:
        end = self.whole if self.stop is None else self.stop
        return None if end is None else end - self.start

    def whole_of(self, part: int) -> int:
        """Return a length of the whole that a cut of length `part` may come from."""
        return self.start + part if self.whole is None else self.whole


@dataclass(frozen=True, repr=False, eq=False)
class Cut(Nested):
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
            raise CompositionTypeError(f"Cut takes a mask, got {describe(self.mask)}")
        self._check_nesting()
        for name in ("q_range", "kv_range"):
            object.__setattr__(self, name, _range(name, getattr(self, name)))
        for name, said, known in zip(
            ("q", "kv"), (self.q_len, self.kv_len), self.mask.extent, strict=True
        ):
            if said is not None:
                check_int(f"{name}_len", said, 0)
                if known is not None and said != known:
                    raise CompositionError(
                        f"{self.mask!r} is built for {name}_len={known}, but the cut says "
                        f"{name}_len={said}; leave it out"
                    )
        for name, axis in zip(("q", "kv"), self._axes, strict=True):
            self._check_axis(name, axis)

    def _check_axis(self, name: str, axis: _Axis) -> None:
        start, stop, whole = axis
        if whole is None:
            if stop is not None and self.mask.anchored:
                raise CompositionError(
                    f"{self!r} cuts a mask whose cells depend on the lengths of the whole score "
                    f"matrix, and {name}_len is not known; say it: "
                    f"mask.cut({self.q_range}, {self.kv_range}, q_len=..., kv_len=...)"
                )
        elif max(start, stop or 0) > whole:
            raise CompositionError(
                f"{self!r} cuts {name}_range={start, stop} out of {name}_len={whole}; a range "
                "ends within the score matrix (nothing is clipped)"
            )

    @property
    def members(self) -> tuple[Mask, ...]:
        """The mask that is cut."""
        return (self.mask,)

    @property
    def _axes(self) -> tuple[_Axis, _Axis]:
        rows, keys = self.mask.extent
        return (
            _Axis(*self.q_range, self.q_len if rows is None else rows),
            _Axis(*self.kv_range, self.kv_len if keys is None else keys),
        )

    def _whole(self, q_len: int, kv_len: int) -> tuple[int, int]:
        """Return the lengths of the score matrix that is cut, for a cut of these lengths."""
        rows, keys = self._axes
        return rows.whole_of(q_len), keys.whole_of(kv_len)

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Also check the whole mask, where its lengths are known and not merely bounded below."""
        super().check(q_len, kv_len, batch, heads)
        if all(axis.whole is not None or axis.stop is None for axis in self._axes):
            self.mask.check(*self._whole(q_len, kv_len), batch, heads)

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The lengths of the cut, where they are known."""
        rows, keys = self._axes
        return rows.length, keys.length

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Cut both bounds of the whole mask."""
        known = self.mask.enclosure(*self._whole(q_len, kv_len), batch, head)
        rows = (self.q_range[0], self.q_range[0] + q_len)
        keys = (self.kv_range[0], self.kv_range[0] + kv_len)
        cut = known.inner.cut(rows, keys)
        return Enclosure(cut, cut if known.exact else known.outer.cut(rows, keys))

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        (i0, i1), (j0, j1), row, key = at.rows, at.keys, self.q_range[0], self.kv_range[0]
        rows, keys = (i0 + row, i1 + row), (j0 + key, j1 + key)
        whole = self._whole(at.q_len, at.kv_len)
        return self.mask._read(Rectangle(rows, keys, *whole, at.batch, at.head), device)

    def _of_heads(self, start: int, stop: int) -> Mask:
        return replace(self, mask=self.mask.for_heads(start, stop))

    def _text(self, show: Callable[[Any], str]) -> str:
        if self.q_len is not None or self.kv_len is not None:
            return super()._text(show)
        rows, keys = (
            f"{start or ''}:{'' if stop is None else stop}"
            for start, stop in (self.q_range, self.kv_range)
        )
        text = show(self.mask)
        if isinstance(self.mask, And | Or | Not):
            text = f"({text})"
        return f"{text}[{rows}, {keys}]"


def _range(name: str, given: object) -> Range:
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise CompositionTypeError(
            f"Cut got {name}={describe(given)}; a range is (start, stop), stop None = to the end"
        )
    start, stop = given
    check_int(f"{name} start", start, 0)
    if stop is not None:
        check_int(f"{name} stop", stop, 0)
        if stop < start:
            raise CompositionError(f"Cut got {name}={start, stop}; it keeps start <= index < stop")
    return start, stop


MASKS.add("cut", Cut)
