"""`parse`: read back the text that ``str(bias)`` writes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from attnkit.pse import written
from attnkit.pse.base import PSE, Pse

__all__ = ["as_pse", "parse"]


def parse(text: str) -> Pse:
    """Return the bias that `text` describes: ``parse(str(p)) == p``.

    The language is sums of registered classes with literal arguments; nothing else is
    evaluated. `Dense` holds a tensor and has no text form.

    Raises `CompositionError` for anything else, repeating the text.

    >>> parse("ALiBi(2) + SqrtALiBi(slopes=(0.5, 0.25), align='top_left')").heads
    2
    >>> parse("ALiBy(8)")
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionError: cannot read the positional bias 'ALiBy(8)': unknown \
positional bias ALiBy; did you mean 'ALiBi'? Known: ALiBi, LearnableALiBi, SqrtALiBi, \
T5Relative
    """
    if torch.compiler.is_dynamo_compiling():
        return written.write(text)
    return PSE.parse(text, {})


def as_pse(given: object, name: str = "pse") -> Pse | None:
    """Return the bias that an argument is or writes, None for None; else say how to make one.

    >>> as_pse("ALiBi(8)").heads
    8
    >>> as_pse(torch.zeros(4, 4))
    Traceback (most recent call last):
    ...
    attnkit.errors.CompositionTypeError: pse=<tensor [4, 4] of torch.float32> is a Tensor; a \
tensor of biases is pse.Dense(t)
    """
    return None if given is None else written.real(PSE.value(name, given, parse, _how))


def _how(given: object) -> str:
    if isinstance(given, Tensor) and given.dtype == torch.bool:
        return "a boolean tensor is a mask: mask=masks.Dense.keep(t) or masks.Dense.drop(t)"
    if isinstance(given, Tensor | np.ndarray):
        return "a tensor of biases is pse.Dense(t)"
    if isinstance(given, list | tuple):
        return "slopes per head are pse.ALiBi(slopes=[...]), biases are added up: p1 + p2"
    if isinstance(given, Mapping):
        return "mappings are what ak.AttentionConfig reads; here write the bias, or its text"
    return "it must be a bias of attnkit.pse, or the text of one"
