"""Heads folded into the batch: a mask per head becomes a mask per batch element.

Masks that heads have of their own are otherwise calls of their own. Where the heads of a request
are batch elements (or packed sequences) of another one, all of them are sequences of one call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from attnkit.errors import Refusal
from attnkit.layouts import SeqLens
from attnkit.masks import Enclosure, Mask
from attnkit.planner.request import Request

__all__ = ["Folded", "folded"]


@dataclass(frozen=True, repr=False, eq=False)
class Folded(Mask):
    """A mask where heads count as batch elements: element n is ``(batch, head) = places[n]``.

    >>> from attnkit import masks
    >>> mixed = masks.PerHead([masks.Causal(), masks.SlidingWindow(2)])
    >>> heads = Folded(mixed, ((0, 0), (0, 1)))
    >>> [heads.region(4, 4, batch=n).area for n in (0, 1)]
    [10, 7]
    """

    mask: Mask
    places: tuple[tuple[int, int], ...]

    @property
    def batches(self) -> int | None:
        """One per place."""
        return len(self.places)

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """As the mask."""
        return self.mask.extent

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """As the mask at the element's place; what is alike is made once."""
        place, own = self.places[batch]
        key = (q_len, kv_len, place if self.mask.batches is not None else 0, own)
        if key not in self._known:
            self._known[key] = self.mask.enclosure(*key)
        return self._known[key]

    @cached_property
    def _known(self) -> dict[tuple[int, int, int, int], Enclosure]:
        return {}

    def __repr__(self) -> str:
        return f"{self.mask!r}, its heads as batch elements"


def folded(request: Request) -> Request | Refusal | None:
    """Return the request whose batch elements are the key heads of this one, each with its queries.

    Where the query heads of some key head have different masks, all query heads are elements, and
    keys are repeated. Dense tokens become ``(b n) s g d``, packed ones ``(n t) g d``: n elements of
    g query heads on one key head. None where all heads have one mask, a refusal where a bias
    tells heads apart: its values belong to a head's number.
    """
    known = request.matrices
    if not known.exact or not known.per_head or not known.allow_any:
        return None
    if request.bias:
        reason = "a bias has values for each head, and folded heads have no number"
        return Refusal("bias-per-head", reason, "heads folded")
    group = request.num_heads // request.num_kv_heads
    heads = range(request.num_heads)
    alike = all(known.planes[head] == known.planes[head - head % group] for head in heads)
    each = group if alike else 1
    firsts = heads[::each]
    batch = range(request.batch)
    packed = request.seqlens is not None
    places = (
        [(b, h) for h in firsts for b in batch]
        if packed
        else [(b, h) for b in batch for h in firsts]
    )
    lens = (
        None
        if request.seqlens is None
        else SeqLens(request.seqlens.q * len(firsts), request.seqlens.kv * len(firsts))
    )
    return replace(
        request,
        mask=Folded(request.mask, tuple(places)),
        layout="TND" if packed else "BSND",
        batch=len(places),
        q_len=request.q_len * len(firsts) if packed else request.q_len,
        kv_len=request.kv_len * len(firsts) if packed else request.kv_len,
        num_heads=each,
        num_kv_heads=1,
        seqlens=lens,
    )
