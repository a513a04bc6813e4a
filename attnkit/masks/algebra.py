"""Boolean algebra of masks: `And`, `Or`, `Not`; exact where their parts are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from operator import and_, or_
from typing import Any, ClassVar, cast

import torch

from attnkit.arguments import describe
from attnkit.errors import CompositionError, CompositionTypeError, clipped, shown
from attnkit.geometry import Region
from attnkit.masks.base import (
    LONGEST_REPR,
    MASKS,
    Enclosure,
    Mask,
    Rectangle,
)
from attnkit.masks.composite import Agreement, Composite, all_but_one, shared
from attnkit.masks.operators import refuse_operand
from attnkit.masks.order import Order

__all__ = ["And", "Not", "Or", "Path", "needless_parts", "without_part"]


@dataclass(frozen=True, repr=False, eq=False)
class _Joined(Composite):
    """What `And` and `Or` share: parts, shown in the order given, compared as a set."""

    parts: tuple[Mask, ...]
    _sign: ClassVar[str]
    _combine: ClassVar[Callable[[Any, Any], Any]]  # of regions, and of tensors of cells

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if not isinstance(self.parts, tuple | list):
            raise CompositionTypeError(f"{kind} takes a list of masks, got {describe(self.parts)}")
        given = tuple(self.parts)
        for part in given:
            if not isinstance(part, Mask):
                refuse_operand(part)
        # What the first mask knows of its parts is added to and not read again, so that a chain
        # ``a | b | c ...`` costs little more than its length.
        first = given[0] if given else None
        parts = () if first is None else self._parts_of(first)
        chain = first if isinstance(first, _Joined) and len(parts) > 1 else None
        seen = frozenset(parts) if chain is None else chain._part_set
        joining = (part for mask in given[1:] for part in self._parts_of(mask))
        added = tuple(dict.fromkeys(part for part in joining if part not in seen))
        if len(parts) + len(added) < 2:
            raise CompositionError(
                f"{kind} joins two or more masks that differ, got {shown(list(given))}"
            )
        object.__setattr__(self, "parts", parts + added)
        inside = [part._nesting for part in added]
        depth, count = given[0]._nesting
        if chain is None:
            depth, count = depth + 1, count + 1
        vars(self).update(
            _part_set=seen.union(added),
            _agreed=Agreement.of(given),
            _nesting=(max([depth, *(d + 1 for d, _ in inside)]), count + sum(n for _, n in inside)),
        )
        self._check_nesting()

    @classmethod
    def of(cls, *masks: Mask) -> Mask:
        """Join masks; nested ones of the same kind are flattened, repeated ones dropped."""
        for mask in masks:
            if not isinstance(mask, Mask):
                refuse_operand(mask)
        distinct = tuple(dict.fromkeys(masks))
        return cls(distinct) if len(distinct) != 1 else distinct[0]

    @classmethod
    def _parts_of(cls, mask: Mask) -> tuple[Mask, ...]:
        """Return what a mask adds to the parts: its own, where it joins in the same way."""
        return mask.parts if isinstance(mask, _Joined) and mask._sign == cls._sign else (mask,)

    @cached_property
    def _part_set(self) -> frozenset[Mask]:
        """The parts as a set."""
        return frozenset(self.parts)

    @property
    def members(self) -> tuple[Mask, ...]:
        """The parts."""
        return self.parts

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Combine the enclosures of the parts; both operations are monotone."""
        known = [part.enclosure(q_len, kv_len, batch, head) for part in self.parts]
        while len(known) > 1:  # two by two, so that n of them cost n log n
            pairs = zip(known[::2], known[1::2], strict=False)
            known = [self.met(a, b) for a, b in pairs] + known[len(known) & ~1 :]
        return known[0]

    def _each_enclosure(self, q_len: int, kv_len: int, batch: int, head: int) -> list[Enclosure]:
        """Combine the enclosures of the parts; those of a part that are alike are made once."""
        known = [part.enclosures(q_len, kv_len, batch, head) for part in self.parts]
        while len(known) > 1:
            pairs = zip(known[::2], known[1::2], strict=False)
            joined = [shared(self.met, zip(*pair, strict=True)) for pair in pairs]
            known = joined + known[len(known) & ~1 :]
        return known[0]

    def in_order(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Order | None:
        """The order that parts agree on, where all others are regions, and are so in it."""
        found = [part.in_order(q_len, kv_len, batch, head) for part in self.parts]
        orders = [order for order in found if order is not None]
        if not orders or not all(map(orders[0].alike, orders)):
            return None
        others = [part for part, order in zip(self.parts, found, strict=True) if order is None]
        known = [part.enclosure(q_len, kv_len, batch, head) for part in others]
        if not all(one.exact for one in known):
            return None
        whole = replace(orders[0], region=reduce(type(self)._combine, (o.region for o in orders)))
        if not known:
            return whole
        rest = reduce(type(self)._combine, (one.inner for one in known))
        return whole.meet(rest) if isinstance(self, And) else whole.join(rest)

    @classmethod
    def met(cls, a: Enclosure, b: Enclosure) -> Enclosure:
        """Return what is known of two masks joined."""
        inner = cls._combine(a.inner, b.inner)
        return Enclosure(inner, inner if a.exact and b.exact else cls._combine(a.outer, b.outer))

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        return reduce(type(self)._combine, (part._read(at, device) for part in self.parts))

    def _of_heads(self, start: int, stop: int) -> Mask:
        return self.of(*(part.for_heads(start, stop) for part in self.parts))

    def _value(self) -> Hashable:
        return self._part_set

    def _text(self, show: Callable[[Any], str]) -> str:
        whole = len(self.parts) > _CHAIN
        return super()._text(show) if whole else self._chain(show, self.parts)

    def __repr__(self) -> str:
        if len(self.parts) <= _CHAIN:
            return super().__repr__()
        text = clipped(self._chain(repr, self.parts[:4]), LONGEST_REPR)
        return f"{text} {self._sign} ... {len(self.parts)} in all"

    def _chain(self, show: Callable[[Mask], str], parts: tuple[Mask, ...]) -> str:
        # Python's `&` binds tighter than `|`; brackets spare the reader from knowing it.
        texts = (f"({show(part)})" if isinstance(part, _Joined) else show(part) for part in parts)
        return f" {self._sign} ".join(texts)


# A longer chain is written as a list: Python reads a chain by one level for each operator.
_CHAIN = 16


@dataclass(frozen=True, repr=False, eq=False)
class And(_Joined):
    """Cells that every part allows: ``m1 & m2``.

    ``allowed(i, j) = all(part.allowed(i, j))``; the parts are flat, each of them once. Raises
    `CompositionError` for parts of different lengths, batches or heads.

    >>> from attnkit import masks
    >>> And((masks.Causal(), masks.SlidingWindow(4) & masks.Columns(0, 9))).parts
    (Causal(), SlidingWindow(4), Columns(0, 9))
    """

    _sign = "&"
    _combine = and_


@dataclass(frozen=True, repr=False, eq=False)
class Or(_Joined):
    """Cells that some part allows: ``m1 | m2``.

    ``allowed(i, j) = any(part.allowed(i, j))``; the parts are flat, each of them once. Raises
    `CompositionError` for parts of different lengths, batches or heads.

    >>> from attnkit import masks
    >>> print((masks.SlidingWindow(1) | masks.Columns(0, 1)).show(3, 3))
    #..
    ##.
    #.#
    """

    _sign = "|"
    _combine = or_


@dataclass(frozen=True, repr=False, eq=False)
class Not(Composite):
    """Cells that the part does not allow: ``~m``.

    ``allowed(i, j) = not part.allowed(i, j)``; ``~~m`` is m.

    >>> from attnkit import masks
    >>> print((~masks.Causal()).show(2, 3))
    ..#
    ...
    >>> ~~masks.Causal()
    Causal()
    """

    part: Mask

    def __post_init__(self) -> None:
        if not isinstance(self.part, Mask):
            raise CompositionTypeError(f"Not takes a mask, got {describe(self.part)}")
        self._check_nesting()

    def __invert__(self) -> Mask:
        return self.part

    @property
    def members(self) -> tuple[Mask, ...]:
        """The part."""
        return (self.part,)

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """Complement both bounds; they trade places."""
        return self.flipped(self.part.enclosure(q_len, kv_len, batch, head), q_len, kv_len)

    def _each_enclosure(self, q_len: int, kv_len: int, batch: int, head: int) -> list[Enclosure]:
        """Complement each."""
        each = self.part.enclosures(q_len, kv_len, batch, head)
        return shared(lambda known: self.flipped(known, q_len, kv_len), zip(each))

    @staticmethod
    def flipped(known: Enclosure, q_len: int, kv_len: int) -> Enclosure:
        """Return what is known of the complement of a mask.

        >>> from attnkit import masks
        >>> known = masks.Causal().enclosure(4, 4)
        >>> Not.flipped(known, 4, 4).inner.area
        6
        """
        turned = known.outer.complement(q_len, kv_len)
        return Enclosure(turned, turned if known.exact else known.inner.complement(q_len, kv_len))

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        return ~self.part._read(at, device)

    def _of_heads(self, start: int, stop: int) -> Mask:
        return ~self.part.for_heads(start, stop)

    def _text(self, show: Callable[[Any], str]) -> str:
        if isinstance(self.part, Not):  # ``~~m`` would be read as m
            return f"Not({show(self.part)})"
        return f"~({show(self.part)})" if isinstance(self.part, _Joined) else f"~{show(self.part)}"


MASKS.add("and", And)
MASKS.add("or", Or)
MASKS.add("not", Not)


# -- parts that may as well not be there ----------------------------------------------------

Path = tuple[int, ...]
Bound = Callable[[Enclosure], Enclosure]


def needless_parts(
    mask: Mask,
    plane: tuple[int, int, int, int],
    target: Region,
    around: tuple[Bound, ...] = (),
    path: Path = (),
) -> Iterator[Path]:
    """Yield the path to each part of intersections and unions that may as well not be there.

    `target` are the cells of the whole at ``plane`` (q_len, kv_len, batch, head); what is
    `around` makes the cells of the whole of those of this mask, the first the innermost.
    """
    if isinstance(mask, Not):
        flip = partial(mask.flipped, q_len=plane[0], kv_len=plane[1])
        yield from needless_parts(mask.part, plane, target, (flip, *around), (*path, 0))
    elif isinstance(mask, _Joined):
        each = [part.enclosure(*plane) for part in mask.parts]
        for k, rest in enumerate(all_but_one(each, mask.met)):
            found = reduce(lambda known, outer: outer(known), around, rest)
            if found.exact and found.inner == target:
                yield (*path, k)
            beside = partial(mask.met, rest)
            yield from needless_parts(mask.parts[k], plane, target, (beside, *around), (*path, k))


def without_part(mask: Mask, path: Path) -> tuple[Mask, Mask]:
    """Return the part at a path, and the mask without it."""
    k, *rest = path
    if isinstance(mask, Not):
        part, shorter = without_part(mask.part, tuple(rest))
        return part, ~shorter
    joined = cast(_Joined, mask)
    before, after = joined.parts[:k], joined.parts[k + 1 :]
    if not rest:
        return joined.parts[k], type(joined).of(*before, *after)
    part, shorter = without_part(joined.parts[k], tuple(rest))
    return part, type(joined).of(*before, shorter, *after)
