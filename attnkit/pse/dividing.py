"""What is cut and taken of a bias: a rectangle, rows and keys of any ranges, some heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast, final

from attnkit.arguments import check_range
from attnkit.masks import Rectangle
from attnkit.masks.of_heads import check_heads
from attnkit.masks.taken import excerpt_of, length_of
from attnkit.ranges import Excerpt

if TYPE_CHECKING:
    from attnkit.pse.base import Pse

__all__ = ["Divisible", "Range"]

Range = tuple[int, int]


class Divisible:
    """What a bias is divided by: `cut`, `take`, `for_heads`. Its tensors stay whole.

    It knows of a bias what it was made for.
    """

    if TYPE_CHECKING:

        @property
        def heads(self) -> int | None: ...
        @property
        def extent(self) -> tuple[int | None, int | None]: ...
        @property
        def anchored(self) -> bool: ...

    @property
    def _undivided(self) -> Pse:
        return cast("Pse", self)

    def cut(
        self,
        q_range: Range,
        kv_range: Range,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
    ) -> Pse:
        """Return the part inside a rectangle ``[start, stop)``, renumbered from its corner.

        `q_len` and `kv_len` are the lengths of the whole score matrix; they may be left out
        where the bias knows them (`extent`) or does not depend on them.

        >>> from attnkit.pse import ALiBi
        >>> ALiBi(8, align="top_left").cut((4, 6), (0, 6), q_len=6, kv_len=6)
        ALiBi(8)
        """
        rows = check_range("q_range", q_range, length_of(self, 0, q_len))
        keys = check_range("kv_range", kv_range, length_of(self, 1, kv_len))
        (q0, q1), (kv0, kv1) = q_range, kv_range
        return self._bias_of(Rectangle((q0, q1), (kv0, kv1), rows, keys))

    def _bias_of(self, at: Rectangle) -> Pse:
        """Return the bias of a rectangle's cells; a family may know a closer form."""
        from attnkit.pse.composite import Cut

        return Cut(self._undivided, *at[:4])

    def take(
        self,
        rows: Sequence[range | Range],
        keys: Sequence[range | Range],
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
    ) -> Pse:
        """Return these rows and keys, in this order: ``(rows[u], keys[v])`` at (u, v).

        Both are ranges, or the ``(start, stop)`` of ranges, and no position is taken twice. Each
        number is what it is in the whole score matrix, whose lengths are `q_len` and `kv_len`; they
        may be left out where the bias knows them or does not depend on them. The tensors are those
        of this bias, the same objects in the same order.

        >>> from attnkit.pse import ALiBi
        >>> ALiBi(8).take([(2, 4)], [(0, 4)], q_len=4, kv_len=4)
        ALiBi(8)
        """
        one = excerpt_of(self, rows, keys, q_len, kv_len)
        return self._undivided if one.is_whole else self.take_excerpts((one,))

    def take_excerpts(self, excerpts: Sequence[Excerpt]) -> Pse:
        """Return rows and keys that are taken of it: of all batch elements, or of each.

        `take` is the same with one excerpt. A packed batch has one for each sequence that is
        taken, which says by `Excerpt.batch` whose it is. A family may know a closer form.

        >>> import torch
        >>> from attnkit.pse import KeyBias
        >>> second = Excerpt(4, 4, (range(2, 4),), (range(3),), batch=1)
        >>> KeyBias(torch.eye(2, 4)[:, None]).take_excerpts((second,)).materialize(2, 3)[0, 0, 0]
        tensor([0., 1., 0.])
        """
        from attnkit.pse.taken import Taken

        return Taken(self._undivided, tuple(excerpts))

    @final
    def for_heads(self, start: int, stop: int) -> Pse:
        """Return the bias of query heads ``start <= h < stop``, counted from 0 there.

        A bias that is the same for all heads is that itself. The tensors are those of this bias,
        the same objects in the same order.

        >>> from attnkit.pse import ALiBi
        >>> ALiBi(8).for_heads(2, 4)
        ALiBi(slopes=(0.125, 0.0625))
        """
        check_heads(self, self.heads, start, stop)
        known = self.heads in (None, stop - start)
        return self._undivided if known else self._of_heads(start, stop)

    def _of_heads(self, start: int, stop: int) -> Pse:
        """Return the bias of some of the heads; a family may know a closer form."""
        from attnkit.pse.of_heads import OfHeads

        return OfHeads(self._undivided, start, stop)
