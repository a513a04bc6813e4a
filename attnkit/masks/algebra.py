"""Boolean algebra of masks: `And`, `Or`, `Not`; exact where their parts are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch

from attnkit.errors import CompositionError, CompositionTypeError
from attnkit.geometry import Region
from attnkit.masks.base import MASKS, Enclosure, Mask

__all__ = ["And", "Not", "Or"]


def _agree(what: str, parts: tuple[Mask, ...], values: list[int | None]) -> int | None:
    """Return the one value that all parts which have one agree on."""
    known = {value for value in values if value is not None}
    if len(known) > 1:
        told = ", ".join(
            f"{part!r}: {v}" for part, v in zip(parts, values, strict=True) if v is not None
        )
        raise CompositionError(f"masks that are built for different {what} cannot combine: {told}")
    return known.pop() if known else None


@dataclass(frozen=True, repr=False, eq=False)
class _Combined(Mask):
    """What `And` and `Or` share: parts, in the order given, compared as a set."""

    parts: tuple[Mask, ...]
    _sign: ClassVar[str]
    _combine: ClassVar[Callable[[Region, Region], Region]]
    _combine_cells: ClassVar[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]

    def __post_init__(self) -> None:
        parts = tuple(self.parts)
        for part in parts:
            if not isinstance(part, Mask):
                raise CompositionTypeError(
                    f"cannot combine a mask with {part!r} ({type(part).__name__}); both sides of "
                    "&, | and - are masks (wrap a tensor: masks.Dense.keep(t))"
                )
        if len(parts) < 2:
            raise CompositionError(f"{type(self).__name__} joins two masks or more, got {parts!r}")
        object.__setattr__(self, "parts", parts)
        self.extent, self.batches, self.heads  # noqa: B018 -- disagreement is an error now

    @classmethod
    def of(cls, *masks: Mask) -> Mask:
        """Join masks; nested ones of the same kind are flattened, repeated ones dropped."""
        flat: dict[Mask, None] = {}
        for mask in masks:
            flat.update(dict.fromkeys(mask.parts if isinstance(mask, cls) else (mask,)))
        return cls(tuple(flat)) if len(flat) > 1 else next(iter(flat))

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
        if self.enclosure(q_len, kv_len, batch, head).exact:
            return super()._cells(q_len, kv_len, batch, head, device)
        cells = (part._cells(q_len, kv_len, batch, head, device) for part in self.parts)
        return reduce(type(self)._combine_cells, cells)

    @property
    def batches(self) -> int | None:
        """The count that the parts agree on."""
        return _agree("batch sizes", self.parts, [part.batches for part in self.parts])

    @property
    def heads(self) -> int | None:
        """The count that the parts agree on."""
        return _agree("head counts", self.parts, [part.heads for part in self.parts])

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The lengths that the parts agree on."""
        extents = [part.extent for part in self.parts]
        return (
            _agree("q_len", self.parts, [e[0] for e in extents]),
            _agree("kv_len", self.parts, [e[1] for e in extents]),
        )

    @property
    def anchored(self) -> bool:
        """Whether any part is anchored."""
        return any(part.anchored for part in self.parts)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return frozenset(self.parts) == frozenset(other.parts)

    def __hash__(self) -> int:
        return hash((type(self), frozenset(self.parts)))

    def __str__(self) -> str:
        return self._joined(str)

    def __repr__(self) -> str:
        return self._joined(repr)

    def _joined(self, show: Callable[[Mask], str]) -> str:
        # `|` binds looser than `&`, so only an Or inside an And needs brackets
        texts = (
            f"({show(part)})" if isinstance(part, _Combined) else show(part) for part in self.parts
        )
        return f" {self._sign} ".join(texts)


@dataclass(frozen=True, repr=False, eq=False)
class And(_Combined):
    """Cells that every part allows: ``m1 & m2``."""

    _sign = "&"
    _combine = Region.__and__
    _combine_cells = torch.logical_and


@dataclass(frozen=True, repr=False, eq=False)
class Or(_Combined):
    """Cells that some part allows: ``m1 | m2``."""

    _sign = "|"
    _combine = Region.__or__
    _combine_cells = torch.logical_or


@dataclass(frozen=True, repr=False)
class Not(Mask):
    """Cells that the part does not allow: ``~m``."""

    part: Mask

    def __post_init__(self) -> None:
        if not isinstance(self.part, Mask):
            raise CompositionTypeError(f"~ takes a mask, got {self.part!r}")

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Complement both bounds; they trade places."""
        inner, outer = self.part.enclosure(q_len, kv_len, batch, head)
        turned = outer.complement(q_len, kv_len)
        return Enclosure(turned, turned if inner == outer else inner.complement(q_len, kv_len))

    def _cells(
        self, q_len: int, kv_len: int, batch: int, head: int, device: torch.device | str | None
    ) -> torch.Tensor:
        return ~self.part._cells(q_len, kv_len, batch, head, device)

    @property
    def batches(self) -> int | None:
        """As the part."""
        return self.part.batches

    @property
    def heads(self) -> int | None:
        """As the part."""
        return self.part.heads

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """As the part."""
        return self.part.extent

    @property
    def anchored(self) -> bool:
        """As the part."""
        return self.part.anchored

    def __str__(self) -> str:
        return f"~({self.part})" if isinstance(self.part, _Combined) else f"~{self.part}"

    def __repr__(self) -> str:
        return f"~({self.part!r})" if isinstance(self.part, _Combined) else f"~{self.part!r}"


MASKS.add("and", And)
MASKS.add("or", Or)
MASKS.add("not", Not)
