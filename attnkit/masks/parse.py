"""`masks.parse`: read a mask back from its text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from attnkit.masks import written
from attnkit.masks.base import MASKS, Mask
from attnkit.masks.rectangles import PrefixLM

__all__ = ["as_mask", "parse"]


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
    if torch.compiler.is_dynamo_compiling():
        return written.write(text)
    return MASKS.parse(text, {"PrefixLM": PrefixLM})


def as_mask(given: object, name: str = "mask") -> Mask:
    """Return the mask that an argument is or writes; `CompositionTypeError` says how to make one.

    >>> as_mask("Causal() & SlidingWindow(64)")
    Causal() & SlidingWindow(64)
    >>> from attnkit import masks
    >>> as_mask(masks.Causal)
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionTypeError: mask=<class 'attnkit.masks.causal.Causal'> is the class; \
call it: mask=Causal(...)
    """
    return written.real(MASKS.value(name, given, parse, _how))


def _how(given: object) -> str:
    if isinstance(given, Tensor | np.ndarray):
        return (
            "True says two things in the field: masks.Dense.keep(t) if it means allowed, "
            "masks.Dense.drop(t) if not; a tokenizer's attention_mask is masks.Padding.of(t)"
        )
    if callable(given):
        return "a function fn(b, h, i, j) of cells is masks.Predicate(fn)"
    if isinstance(given, list | tuple):
        return "one mask per head is masks.PerHead([...]), one per text masks.PerBatch([...])"
    if isinstance(given, Mapping):
        return "mappings are what ak.AttentionConfig reads; here write the mask, or its text"
    return "it must be a mask of attnkit.masks, or the text of one"
