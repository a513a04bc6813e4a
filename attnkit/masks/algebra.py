"""Boolean algebra of masks: `And`, `Or`, `Not`; exact where their parts are."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.geometry import Region
from attnkit.masks.base import MASKS, Enclosure, Mask, describe, refuse_operand
from attnkit.masks.composite import Composite

__all__ = ["And", "Not", "Or"]


@dataclass(frozen=True, repr=False, eq=False)
class _Joined(Composite):
    """What `And` and `Or` share: parts, shown in the order given, compared as a set."""

    parts: tuple[Mask, ...]
    _sign: ClassVar[str]
    _combine: ClassVar[Callable[[Region, Region], Region]]
    _combine_cells: ClassVar[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not isinstance(self.parts, tuple | list):
            raise CompositionTypeError(f"{kind} takes a list of masks, got {describe(self.parts)}")
        for part in self.parts:
            if not isinstance(part, Mask):
                refuse_operand(part)
        parts = _flat(type(self), self.parts)
        if len(parts) < 2:
            raise CompositionError(
                f"{kind} joins two or more masks that differ, got {list(self.parts)!r}"
            )
        object.__setattr__(self, "parts", parts)
        self._check_members()

    @classmethod
    def of(cls, *masks: Mask) -> Mask:
        """Join masks; nested ones of the same kind are flattened, repeated ones dropped."""
        for mask in masks:
            if not isinstance(mask, Mask):
                refuse_operand(mask)
        flat = _flat(cls, masks)
        return cls(flat) if len(flat) != 1 else flat[0]

    @property
    def members(self) -> tuple[Mask, ...]:
        """The parts."""
        return self.parts

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Combine the enclosures of the parts; both operations are monotone."""
        known = [part.enclosure(q_len, kv_len, batch, head) for part in self.parts]
        combine = type(self)._combine
        inner = reduce(combine, (e.inner for e in known))
        if all(e.exact for e in known):
            return Enclosure(inner, inner)
        return Enclosure(inner, reduce(combine, (e.outer for e in known)))

    def _cells(
        self, q_len: int, kv_len: int, batch: int, head: int, device: torch.device | str | None
    ) -> torch.Tensor:
        cells = (part._plane(q_len, kv_len, batch, head, device) for part in self.parts)
        return reduce(type(self)._combine_cells, cells)

    def _value(self) -> Hashable:
        return frozenset(self.parts)

    def __str__(self) -> str:
        return self._text(str)

    def __repr__(self) -> str:
        return self._text(repr)

    def _text(self, show: Callable[[Mask], str]) -> str:
        # Python's `&` binds tighter than `|`; brackets spare the reader from knowing it.
        texts = (
            f"({show(part)})" if isinstance(part, _Joined) else show(part) for part in self.parts
        )
        return f" {self._sign} ".join(texts)


def _flat(kind: type[_Joined], masks: tuple[Mask, ...]) -> tuple[Mask, ...]:
    flat: dict[Mask, None] = {}
    for mask in masks:
        flat.update(dict.fromkeys(mask.parts if isinstance(mask, kind) else (mask,)))
    return tuple(flat)


@dataclass(frozen=True, repr=False, eq=False)
class And(_Joined):
    """Cells that every part allows: ``m1 & m2``."""

    _sign = "&"
    _combine = Region.__and__
    _combine_cells = torch.logical_and


@dataclass(frozen=True, repr=False, eq=False)
class Or(_Joined):
    """Cells that some part allows: ``m1 | m2``."""

    _sign = "|"
    _combine = Region.__or__
    _combine_cells = torch.logical_or


@dataclass(frozen=True, repr=False, eq=False)
class Not(Composite):
    """Cells that the part does not allow: ``~m``."""

    part: Mask

    def __post_init__(self) -> None:
        if not isinstance(self.part, Mask):
            raise CompositionTypeError(f"Not takes a mask, got {describe(self.part)}")

    @property
    def members(self) -> tuple[Mask, ...]:
        """The part."""
        return (self.part,)

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Complement both bounds; they trade places."""
        known = self.part.enclosure(q_len, kv_len, batch, head)
        turned = known.outer.complement(q_len, kv_len)
        return Enclosure(turned, turned if known.exact else known.inner.complement(q_len, kv_len))

    def _cells(
        self, q_len: int, kv_len: int, batch: int, head: int, device: torch.device | str | None
    ) -> torch.Tensor:
        return ~self.part._plane(q_len, kv_len, batch, head, device)

    def __str__(self) -> str:
        return self._text(str)

    def __repr__(self) -> str:
        return self._text(repr)

    def _text(self, show: Callable[[Mask], str]) -> str:
        if isinstance(self.part, Not):  # ``~~m`` would be read as m
            return f"Not({show(self.part)})"
        return f"~({show(self.part)})" if isinstance(self.part, _Joined) else f"~{show(self.part)}"


MASKS.add("and", And)
MASKS.add("or", Or)
MASKS.add("not", Not)
