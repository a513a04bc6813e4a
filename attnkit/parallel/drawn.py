"""What a rank keeps of its forward pass beside operands and answer, as a list of tensors.

First the keys and values of remote stages, if the plan keeps them; then what its shares have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnkit.errors import CompositionError
from attnkit.parallel.course import Course
from attnkit.parallel.exchange import Keys

__all__ = ["read", "tensors_of", "written"]


def tensors_of(random: object) -> Sequence[Tensor]:
    """Return what a share has drawn."""
    if random is None:
        return ()
    if isinstance(random, tuple) and all(isinstance(one, Tensor) for one in random):
        return random
    raise CompositionError(
        "of what it draws for a share, a backend may keep a tuple of tensors, nothing else"
    )


def written(drawn: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Return what shares have drawn as tensors: how many each of them has, on the host, first."""
    if not any(drawn):
        return ()
    counts = torch.tensor([len(one) for one in drawn], device="cpu")
    return (counts, *(tensor for one in drawn for tensor in one))


def read(
    course: Course, kept: Sequence[Tensor]
) -> tuple[list[Keys | None] | None, Iterator[object]]:
    """Return the keys of remote stages, if they were kept, and what each share has drawn."""
    held: list[Keys | None] | None = None
    rest = iter(kept)
    if course.plan.keep:
        held = [(next(rest), next(rest)) if leg.size else None for leg in course.legs[1:]]
    counts = next(rest, None)
    shares = sum(len(leg.tasks) for leg in course.legs)
    many = [0] * shares if counts is None else counts.tolist()
    return held, iter([tuple(next(rest) for _ in range(n)) or None for n in many])
