"""`Spans`: stretches of tokens that see each other both ways, as images in causal text do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

import torch

from attnkit.arguments import LengthsLike, check_align, check_int, describe, tokens
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Align, Mask, anchor
from attnkit.masks.causal import Causal
from attnkit.masks.slices import is_list

__all__ = ["Spans", "from_token_types"]

SpanList = tuple[tuple[int, int], ...]


@MASKS.register("spans")
@dataclass(frozen=True, repr=False, eq=False)
class Spans(Mask):
    """Cells inside of a span: ``start <= p < stop and start <= j < stop``, p the query's position.

    `spans` is a list of (start, stop), the same for every batch element, or one such list for each.
    Beside a causal mask, the tokens of a span see each other both ways, and text stays causal:
    ``Causal() | Spans(...)``.

    >>> print((Causal() | Spans([(1, 3)])).show(4, 4))
    #...
    ###.
    ###.
    ####
    """

    spans: SpanList | tuple[SpanList, ...]
    align: Align = "bottom_right"

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(
            self,
            spans: Sequence[tuple[int, int]] | Sequence[Sequence[tuple[int, int]]],
            align: Align = "bottom_right",
        ) -> None: ...

    def __post_init__(self) -> None:
        check_align("Spans", self.align)
        given: object = self.spans
        many = isinstance(given, tuple | list) and any(is_list(entry) for entry in given)
        kept = tuple(_checked(one) for one in self.spans) if many else _checked(given)
        object.__setattr__(self, "spans", kept)

    @classmethod
    @untraced(MASK_IN_GRAPH)
    def of(cls, ids: LengthsLike, align: Align = "bottom_right") -> Spans:
        """Build from a number per token, [S] or [B, S]: a run of one number is a span; 0 is none.

        >>> Spans.of([0, 1, 1, 0, 2, 2, 3])
        Spans(((1, 3), (4, 6), (6, 7)))
        """
        rows = tokens("Spans.of", ids)
        per_batch = tuple(_runs(row) for row in rows.view(-1, rows.shape[-1]))
        return cls(per_batch if rows.dim() == 2 else per_batch[0], align)

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        at = anchor(self.align, q_len, kv_len)
        spans = cast(SpanList, self.spans if self.batches is None else self.spans[batch])
        return Region.of(
            *(Slice(max(0, a - at), min(b - at, q_len), a, min(b, kv_len)) for a, b in spans)
        )

    @property
    def batches(self) -> int | None:
        """One list per batch element, where they differ."""
        many = bool(self.spans) and is_list(self.spans[0])
        return len(self.spans) if many else None


@untraced(MASK_IN_GRAPH)
def from_token_types(
    token_types: LengthsLike, both_ways: int | Sequence[int] = 1, align: Align = "bottom_right"
) -> Mask:
    """Return ``Causal() | Spans``: causal text, in which some types of tokens see each other.

    `token_types` is what a processor returns, [S] or [B, S]; each run of tokens of a type in
    `both_ways` is a span: an image of Gemma 3 (type 1), the prompt of PaliGemma (type 0, so that
    the mask is a prefix-LM's). Raises `CompositionError` for what are no integers.

    >>> from_token_types([0, 1, 1, 0])
    Causal() | Spans(((1, 3),))
    >>> from_token_types([0, 0, 1, 1], both_ways=0)
    Causal() | Spans(((0, 2),))
    """
    rows = tokens("from_token_types", token_types).long()
    types = (both_ways,) if isinstance(both_ways, int) else tuple(both_ways)
    for kind in types:
        check_int("from_token_types both_ways", kind, None)
    chosen = torch.isin(rows, torch.tensor(types, device=rows.device))
    return Causal(align) | Spans.of(torch.where(chosen, rows - rows.min() + 1, 0), align)


def _runs(row: torch.Tensor) -> SpanList:
    runs: Any = row.unique_consecutive
    numbers, counts = (found.tolist() for found in runs(return_counts=True))
    spans = zip(pairwise(accumulate(counts, initial=0)), numbers, strict=True)
    return tuple(span for span, number in spans if number)


def _checked(spans: object) -> SpanList:
    if not isinstance(spans, tuple | list):
        raise CompositionTypeError(
            f"Spans got {describe(spans)}; it takes a list of (start, stop), or one such list for "
            "each batch element (from a number per token: Spans.of)"
        )
    for span in spans:
        if not isinstance(span, tuple | list) or len(span) != 2:
            raise CompositionTypeError(f"Spans got {describe(span)}; a span is (start, stop)")
        start, stop = (check_int("Spans start and stop", end, 0) for end in span)
        if start >= stop:
            raise CompositionError(f"Spans got {shown(span)}; it keeps start <= index < stop")
    return tuple((start, stop) for start, stop in spans)
