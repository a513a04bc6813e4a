"""`masks.parse`: read a mask back from its text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, shown
from attnkit.masks.base import MASKS, Mask
from attnkit.masks.rectangles import PrefixLM
from attnkit.textform import evaluate

__all__ = ["parse"]


@untraced(MASK_IN_GRAPH)
def parse(text: str) -> Mask:
    """Return the mask that `text` writes, so that ``parse(str(mask)) == mask``.

    The text is an expression of mask families (registered ones of others included), ``& | ~ -``
    and cuts ``[a:b, c:d]``. Nothing but those constructors runs. A text has at most 262,144
    characters outside of quotes, and 4,194,304 in all; a longer one is refused unread.

    >>> parse("Causal() & SlidingWindow(64) | Columns(0, 4)")
    (Causal() & SlidingWindow(64)) | Columns(0, 4)
    >>> parse("Causal() & SlidngWindow(64)")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: cannot read the mask 'Causal() & SlidngWindow(64)': \
unknown mask SlidngWindow; did you mean 'SlidingWindow'? Known: ...
    """
    names: dict[str, Callable[..., Any]] = {"PrefixLM": PrefixLM}
    names.update({family.__name__: family for _, family in MASKS.items()})
    mask = evaluate(text, names, "mask")
    if not isinstance(mask, Mask):
        raise CompositionError(
            f"the text {shown(text)} gives {shown(mask)}, not a mask; write for instance "
            "'Causal() & SlidingWindow(64)'"
        )
    return mask
