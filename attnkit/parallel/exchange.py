"""What is on its way while a rank computes: keys of the next stage, gradients that go home."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from attnkit.backends import Operands
from attnkit.backends.base import stats_dtype
from attnkit.parallel.course import Course, Leg, Move, Task
from attnkit.parallel.messages import Shape, message, packed, spread, taken
from attnkit.parallel.wires import Pending, Wires
from attnkit.ranges import Ranges

__all__ = ["Keys", "Sums", "stages"]

Keys = tuple[Tensor, Tensor]
"""Keys and values."""

Grads = tuple[Tensor | None, ...]


def stages(
    course: Course,
    wires: Wires,
    own: Keys,
    when: str,
    held: Sequence[Keys | None] | None = None,
) -> Iterator[tuple[Leg, Keys]]:
    """Yield the stages with their keys and values, those of the next already on their way.

    `held` has those of the remote stages, where they were kept: then nothing is exchanged.
    """
    coming: Callable[[], Keys] | None = None
    for k, leg in enumerate(course.legs):
        keys = own if coming is None else coming()
        if k + 1 < len(course.legs):
            known = None if held is None else held[k] or own  # none: there are no keys in it
            coming = _fetched(course, wires, own, course.legs[k + 1], when, known)
        yield leg, keys


def _fetched(
    course: Course, wires: Wires, own: Keys, leg: Leg, when: str, held: Keys | None
) -> Callable[[], Keys]:
    """Begin to fetch the keys and values of a stage; return what waits for them."""
    if held is not None:
        return lambda: held
    axis, dtype = course.plan.request.layout_of.length_axis, own[0].dtype
    sends = [(move.rank, _packed(own, move.places, axis)) for move in leg.sends]
    made = [message(_shapes(own, move, axis, dtype), own[0].device) for move in leg.receives]
    receives = [(move.rank, buffer) for move, (buffer, _) in zip(leg.receives, made, strict=True)]
    pending = wires.post(sends, receives, f"keys of stage {leg.number} ({when})")

    def arrived() -> Keys:
        pending.wait()
        if len(made) == 1 and leg.receives[0].places is None:
            key, value = made[0][1]
            return key, value
        found = [t.new_empty(_resized(t, axis, leg.size)) for t in own]
        for move, (_, parts) in zip(leg.receives, made, strict=True):
            for whole, part in zip(found, parts, strict=True):
                spread(whole, move.places, part, axis)
        return found[0], found[1]

    return arrived


def _packed(tensors: Sequence[Tensor], places: Ranges | None, axis: int) -> Tensor:
    return packed([taken(t, places, axis) for t in tensors])


def _shapes(
    own: Sequence[Tensor], move: Move, axis: int, dtype: torch.dtype
) -> list[tuple[Shape, torch.dtype]]:
    return [(_resized(one, axis, move.size), dtype) for one in own]


def _resized(tensor: Tensor, axis: int, length: int) -> Shape:
    return (*tensor.shape[:axis], length, *tensor.shape[axis + 1 :])


class WideSum:
    """A sum of tensors of places along an axis, in the order in which they come: wide."""

    def __init__(self, like: Tensor, axis: int) -> None:
        self.like, self.axis, self.dtype = like, axis, stats_dtype(like.dtype)
        self.found: Tensor | None = None

    def add(self, places: Ranges | None, part: Tensor | None) -> None:
        """Add what is at some places, None: at all of them. The part is ours now."""
        if part is None:
            return
        if self.found is None and places is None:
            self.found = part.to(self.dtype)
            return
        spread(self.total(), places, part, self.axis, add=True)

    def total(self) -> Tensor:
        """Return the sum so far, which may be changed."""
        if self.found is None:
            self.found = torch.zeros_like(self.like, dtype=self.dtype)
        return self.found


class Sums:
    """Gradients of the leaves of operands while they are added up; those of keys go home.

    A rank adds to the gradients of its own keys first what its own rows give, then what other
    ranks return, by stage and by rank: the same sum whoever is first.
    """

    def __init__(
        self, course: Course, wires: Wires, operands: Operands, wanted: Sequence[bool]
    ) -> None:
        self.wires, self.wanted = wires, wanted
        self.axis = course.plan.request.layout_of.length_axis
        self.query = WideSum(operands.query, self.axis)
        self.own = operands.key, operands.value
        self.mine = self._of(self.own)
        self.carried: list[Tensor | None] = [None] * len(wanted[4:])
        self.coming: tuple[Leg, Pending, list[list[Tensor]]] | None = None

    def _of(self, keys: Keys) -> tuple[WideSum, WideSum]:
        return WideSum(keys[0], self.axis), WideSum(keys[1], self.axis)

    def begin(self, leg: Leg, keys: Keys) -> tuple[WideSum, WideSum]:
        """Return the sums of a stage's keys and values: in the first one, the rank's own."""
        return self._of(keys) if leg.number else self.mine

    def add(self, task: Task, of_keys: tuple[WideSum, WideSum], slopes: Grads) -> None:
        """Add what a share gives."""
        self.query.add(task.rows, slopes[0])
        for one, slope in zip(of_keys, slopes[1:3], strict=True):
            one.add(task.keys, slope)
        for k, slope in enumerate(slopes[4:]):
            mine = self.carried[k]
            if slope is not None:
                self.carried[k] = slope if mine is None else mine + slope

    def end(self, leg: Leg, of_keys: tuple[WideSum, WideSum]) -> None:
        """Send the gradients of a stage's keys home, and take what came of the stage before."""
        if not (self.wanted[1] or self.wanted[2]):
            return
        whole = [one.total() for one in of_keys] if leg.receives else []
        sends = [(move.rank, _packed(whole, move.places, self.axis)) for move in leg.receives]
        dtype, device = self.mine[0].dtype, self.own[0].device
        made = [message(_shapes(self.own, move, self.axis, dtype), device) for move in leg.sends]
        receives = [(move.rank, buffer) for move, (buffer, _) in zip(leg.sends, made, strict=True)]
        pending = self.wires.post(sends, receives, f"gradients of stage {leg.number}")
        self._arrive()
        self.coming = leg, pending, [parts for _, parts in made]

    def _arrive(self) -> None:
        """Add the gradients of own keys that other ranks have computed."""
        if self.coming is None:
            return
        leg, pending, parts = self.coming
        pending.wait()
        for move, some in zip(leg.sends, parts, strict=True):  # in the order of ranks
            for mine, part in zip(self.mine, some, strict=True):
                mine.add(move.places, part)

    def found(self, sink: Tensor | None) -> Grads:
        """Return all gradients, in the order of the leaves; None where nobody asks."""
        self._arrive()
        three = zip((self.query, *self.mine), self.wanted, strict=False)
        return (*(one.total() if want else None for one, want in three), sink, *self.carried)
