"""The operators of masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, NoReturn

import torch

from attnkit.arguments import describe
from attnkit.errors import CompositionError, CompositionTypeError, shown

if TYPE_CHECKING:
    from attnkit.masks.base import Mask

__all__ = ["Operators", "combined", "refuse_operand"]


def combined(kind: str, *given: object) -> Mask:
    """Make a mask of masks; its family, above this file, is found by its name."""
    from attnkit.masks import written
    from attnkit.masks.base import MASKS, Mask

    if torch.compiler.is_dynamo_compiling():
        return written.made("combined", (kind, *given), {})
    given = tuple(written.real(one) if isinstance(one, Mask) else one for one in given)
    family = MASKS[kind]
    node: Mask = getattr(family, "of", family)(*given)
    return node


def refuse_operand(other: object) -> NoReturn:
    """Raise the error for ``mask & other`` where `other` is not a mask."""
    raise CompositionTypeError(
        f"cannot combine a mask with {describe(other)}; both sides of &, | and - are masks (wrap "
        "a boolean tensor: masks.Dense.keep(t) or masks.Dense.drop(t))"
    )


def _listed(given: object) -> bool:
    return isinstance(given, (tuple, list))


def _ends(one: object) -> object:
    """Return a range as its ends, which can be written down."""
    return (one.start, one.stop) if isinstance(one, range) and abs(one.step) == 1 else one


class Operators:
    """What a mask is combined by: ``&``, ``|``, ``~``, ``-`` and ``[a:b, c:d]``."""

    # A mask has no end to iterate to; numpy leaves ``array & mask`` to `__rand__`, which explains.
    __iter__: ClassVar[None] = None
    __array_ufunc__: ClassVar[None] = None

    def __and__(self, other: Mask) -> Mask:
        return combined("and", self, other)

    def __or__(self, other: Mask) -> Mask:
        return combined("or", self, other)

    def __invert__(self) -> Mask:
        return combined("not", self)

    def __sub__(self, other: Mask) -> Mask:
        if not isinstance(other, Operators):
            refuse_operand(other)
        return self & combined("not", other)  # torch traces no `~` of objects

    def __rand__(self, other: object) -> NoReturn:
        refuse_operand(other)

    __ror__ = __rsub__ = __rand__

    def __getitem__(self, index: tuple[slice, slice]) -> Mask:
        if (
            not isinstance(index, tuple)
            or len(index) != 2
            or not all(isinstance(part, slice) and part.step in (None, 1) for part in index)
        ):
            raise CompositionTypeError(
                f"a mask is cut by two slices without a step, mask[a:b, c:d]; got [{shown(index)}]"
            )
        rows, keys = index
        for end in (rows.start, rows.stop, keys.start, keys.stop):
            if type(end) is int and end < 0:
                raise CompositionError(
                    f"a mask is cut from its first row and key on, got mask[{shown(rows)}, "
                    f"{shown(keys)}] with {shown(end)}; it knows no last one to count from, so "
                    f"write q_len - {shown(-end)} or kv_len - {shown(-end)}"
                )
        first, other = (0 if part.start is None else part.start for part in (rows, keys))
        return combined("cut", self, (first, rows.stop), (other, keys.stop))

    def cut(
        self,
        q_range: tuple[int, int | None],
        kv_range: tuple[int, int | None],
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
    ) -> Mask:
        """Return the part of the mask inside a rectangle, renumbered from its corner.

        `q_len` and `kv_len` are the lengths of the whole score matrix; a mask that is anchored
        bottom-right needs them unless the ranges run to the end.
        """
        return combined("cut", self, q_range, kv_range, q_len, kv_len)

    def take(
        self,
        rows: Sequence[range | tuple[int, int]],
        keys: Sequence[range | tuple[int, int]],
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
    ) -> Mask:
        """Return these rows and keys of the mask, in this order: ``(rows[u], keys[v])`` at (u, v).

        Both are ranges, or the ``(start, stop)`` of ranges, and no position is taken twice. Each
        cell is what it is in the whole score matrix, whose lengths are `q_len` and `kv_len`: a mask
        that depends on them needs them.

        >>> from attnkit import masks
        >>> own = masks.Causal().take([(0, 1), (3, 4)], [(0, 4)], q_len=4, kv_len=4)
        >>> print(own.show(2, 4))
        #...
        ####
        """
        ends = [tuple(map(_ends, one)) if _listed(one) else one for one in (rows, keys)]
        return combined("taken", self, *ends, q_len, kv_len)

    def for_heads(self, start: int, stop: int) -> Mask:
        """Return the mask of query heads ``start <= h < stop``, counted from 0 there.

        A mask that does not tell heads apart is that itself.

        >>> from attnkit import masks
        >>> masks.PerHead([masks.Full(), masks.Causal(), masks.Full()]).for_heads(1, 2)
        Causal()
        """
        return combined("of_heads", self, start, stop)

    def __bool__(self) -> bool:
        raise CompositionTypeError(
            f"the truth value of {self!r} is ambiguous: use `&`, `|`, `~` to combine masks, "
            "not `and`, `or`, `not`"
        )
