"""Putting other tensors in the place of those that a bias was built with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from torch import Tensor

from attnkit.errors import CompositionError
from attnkit.pse import Pse

__all__ = ["rebound"]


def rebound(pse: Pse, tensors: Sequence[Tensor]) -> Pse:
    """Return the same bias with `tensors` in place of its own, in the order of ``pse.tensors``.

    Raises `CompositionError` for a bias that does not keep its tensors in its fields.

    >>> import torch
    >>> from attnkit.pse import ALiBi, Dense
    >>> bias = ALiBi(2) + Dense(torch.zeros(2, 3, 3))
    >>> rebound(bias, [torch.ones(2, 3, 3)]).tensors[0].sum()
    tensor(18.)
    """
    places = {id(old): new for old, new in zip(pse.tensors, tensors, strict=True)}
    found = _replaced(pse, places)
    if any(a is not b for a, b in zip(found.tensors, tensors, strict=True)):
        raise CompositionError(
            f"the tensors of {pse!r} were replaced (by moving, casting or loading its module), and "
            "it does not keep them in the fields of its dataclass; build it anew"
        )
    return found


def _replaced(pse: Pse, places: Mapping[int, Tensor]) -> Pse:
    twin = copy.copy(pse)
    for item in fields(cast(Any, pse)):
        value = getattr(pse, item.name)
        if isinstance(value, tuple) and any(isinstance(part, Pse) for part in value):
            value = tuple(_replaced(part, places) for part in value)
        elif isinstance(value, Pse):
            value = _replaced(value, places)
        else:
            value = places.get(id(value), value)
        object.__setattr__(twin, item.name, value)
    return twin
