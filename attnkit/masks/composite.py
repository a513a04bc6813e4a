"""What masks that are made of other masks share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate
from typing import NamedTuple, TypeVar

from attnkit.errors import CompositionError
from attnkit.masks.base import Mask

__all__ = [
    "MAX_DEPTH",
    "MAX_PARTS",
    "Agreement",
    "Composite",
    "Nested",
    "agree",
    "all_but_one",
    "leaves",
]

T = TypeVar("T")

MAX_DEPTH = 64
"""How deep masks nest: everything that follows a mask's parts does it within Python's stack."""

MAX_PARTS = 1 << 16
"""How many parts a mask has, each counted as often as it is written: what text and time follow."""


def agree(
    what: str, parts: Sequence[Mask], values: Sequence[int | None], remedy: str
) -> int | None:
    """Return the one value that all parts which have one agree on."""
    known = {value for value in values if value is not None}
    if len(known) > 1:
        # One part for each value says it all, however many parts there are.
        first = {value: part for part, value in zip(parts[::-1], values[::-1], strict=True)}
        said = [value for value in dict.fromkeys(values) if value is not None]
        told = ", ".join(f"{first[value]!r}: {value}" for value in said[:4])
        raise CompositionError(
            f"masks that are built for different {what} cannot combine: {told}; {remedy}"
        )
    return known.pop() if known else None


class Agreement(NamedTuple):
    """What masks that are taken together agree on."""

    extent: tuple[int | None, int | None]
    batches: int | None
    heads: int | None
    anchored: bool

    @classmethod
    def of(cls, masks: Sequence[Mask]) -> Agreement:
        """Return what masks agree on; raise `CompositionError` where they disagree."""
        alone = next((mask for mask in masks if mask.comes_with_call), None)
        if alone is not None:
            raise CompositionError(
                f"{alone!r} comes with each call, so nothing is known that it could be combined "
                "with; give it alone, to a layer that has no other mask"
            )
        lengths = "build them for the same lengths, or cut one: mask[a:b, c:d]"
        batches, heads = [mask.batches for mask in masks], [mask.heads for mask in masks]
        return cls(
            (
                agree("q_len", masks, [mask.extent[0] for mask in masks], lengths),
                agree("kv_len", masks, [mask.extent[1] for mask in masks], lengths),
            ),
            agree("batch sizes", masks, batches, "give each one entry per batch element"),
            agree("head counts", masks, heads, "give each one entry per query head"),
            any(mask.anchored for mask in masks),
        )


@dataclass(frozen=True, repr=False, eq=False)
class Nested(Mask):
    """A mask made of others (`members`): it tells apart what they tell apart."""

    @property
    @abstractmethod
    def members(self) -> tuple[Mask, ...]:
        """The masks that this one is made of."""

    @cached_property
    def _agreed(self) -> Agreement:
        return Agreement.of(self.members)

    @cached_property
    def _nesting(self) -> tuple[int, int]:
        inside = [member._nesting for member in self.members]
        deepest = max((depth for depth, _ in inside), default=0)
        return deepest + 1, 1 + sum(parts for _, parts in inside)

    @property
    def _unread(self) -> int:
        return sum(member._unread for member in self.members)

    def _check_nesting(self) -> None:
        """Raise `CompositionError` for a mask that nests too deep or has too many parts."""
        depth, parts = self._nesting
        if depth > MAX_DEPTH:
            raise CompositionError(
                f"a mask of type {type(self).__name__} would nest {depth} deep, and masks nest at "
                f"most {MAX_DEPTH} deep; join many masks at once, And((a, b, ...)) or Or((a, b, "
                "...)), or write the cells down: Slices.of(mask.region(q_len, kv_len), q_len, "
                "kv_len)"
            )
        if parts > MAX_PARTS:
            raise CompositionError(
                f"a mask of type {type(self).__name__} would have {parts} parts, each counted as "
                f"often as it is written, and at most {MAX_PARTS} are taken; write the cells "
                "down: Slices.of(mask.region(q_len, kv_len), q_len, kv_len)"
            )

    @property
    def batches(self) -> int | None:
        """The count that the members agree on."""
        return self._agreed.batches

    @property
    def heads(self) -> int | None:
        """The count that the members agree on."""
        return self._agreed.heads

    @property
    def anchored(self) -> bool:
        """Whether any member is anchored."""
        return self._agreed.anchored


@dataclass(frozen=True, repr=False, eq=False)
class Composite(Nested):
    """A mask whose members lie in the same score matrix, cell by cell."""

    def check(
        self, q_len: int, kv_len: int, batch: int | None = None, heads: int | None = None
    ) -> None:
        """Check every member, so that the message names the one that does not fit."""
        for member in self.members:
            member.check(q_len, kv_len, batch, heads)
        super().check(q_len, kv_len, batch, heads)

    def _extends(self, shorter: int, longer: int, batch: int, head: int) -> bool:
        """Every member extends, or what they make together does."""
        alike = all(member._extends(shorter, longer, batch, head) for member in self.members)
        return alike or super()._extends(shorter, longer, batch, head)

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The lengths that the members agree on."""
        return self._agreed.extent


def leaves(mask: Mask) -> Iterator[Mask]:
    """Iterate over the masks that a composition is made of."""
    if isinstance(mask, Composite):
        for member in mask.members:
            yield from leaves(member)
    else:
        yield mask


def shared(make: Callable[..., T], each: Iterable[tuple[object, ...]]) -> list[T]:
    """Return what is made of each; of the same objects it is made once.

    >>> one, two = [1], [2]
    >>> shared(lambda x: x + [0], [(one,), (two,), (one,)])
    [[1, 0], [2, 0], [1, 0]]
    """
    given, known = list(each), dict[tuple[int, ...], T]()
    for values in given:
        key = tuple(map(id, values))
        if key not in known:
            known[key] = make(*values)
    return [known[tuple(map(id, values))] for values in given]


def all_but_one(values: Sequence[T], join: Callable[[T, T], T]) -> Iterator[T]:
    """Yield for each of two or more values what the others join to.

    >>> list(all_but_one([1, 2, 4], int.__or__))
    [6, 5, 3]
    """
    before = list(accumulate(values, join))
    after = list(accumulate(values[::-1], join))[::-1]
    for k in range(len(values)):
        yield reduce(join, [*(before[k - 1 : k] if k else ()), *after[k + 1 : k + 2]])
