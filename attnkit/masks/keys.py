"""`Keys`: the keys that exist, in runs with holes between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

from attnkit.arguments import check_int, describe
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region
from attnkit.masks.base import MASKS, Mask
from attnkit.masks.slices import is_list

__all__ = ["Keys"]

KeyRun = tuple[int, int | None]
KeyRuns = tuple[KeyRun, ...]


@MASKS.register("keys")
@dataclass(frozen=True, repr=False, eq=False)
class Keys(Mask):
    """The keys of some runs, for every query: ``any(start <= j < stop)``; stop None = to the end.

    `runs` is a list of (start, stop), the same for every batch element, or one such list for each.
    Runs are in order, with a gap between two. A text whose last run goes to the end keeps its
    mask as keys are added. From a tensor of 0 and 1, [b, s]: `Padding.of`.

    Raises `CompositionError` for runs that are empty, out of order or that touch.

    >>> print(Keys([(0, 1), (3, None)]).show(2, 5))
    #..##
    #..##
    >>> Keys([[(0, 2)], [(1, None)]]).region(4, 3, batch=1).area
    8
    """

    runs: KeyRuns | tuple[KeyRuns, ...]
    anchored = False

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(self, runs: Sequence[KeyRun] | Sequence[Sequence[KeyRun]]) -> None: ...

    def __post_init__(self) -> None:
        given: object = self.runs
        many = isinstance(given, tuple | list) and any(is_list(entry) for entry in given)
        kept = tuple(map(_checked, self.runs)) if many else _checked(given)
        object.__setattr__(self, "runs", kept)

    def _region(self, q_len: int, kv_len: int, batch: int, head: int) -> Region:
        runs = cast(KeyRuns, self.runs if self.batches is None else self.runs[batch])
        ends = ((a, kv_len if b is None else min(b, kv_len)) for a, b in runs)
        return Region.columns(q_len, ends)

    @property
    def batches(self) -> int | None:
        """One list per batch element, where they differ."""
        many = bool(self.runs) and is_list(self.runs[0])
        return len(self.runs) if many else None


def _checked(runs: object) -> KeyRuns:
    if not isinstance(runs, tuple | list):
        raise CompositionTypeError(
            f"Keys got {describe(runs)}; it takes a list of (start, stop), or one such list for "
            "each batch element (from a tensor of 0 and 1: Padding.of)"
        )
    for run in runs:
        if not isinstance(run, tuple | list) or len(run) != 2:
            raise CompositionTypeError(f"Keys got {describe(run)}; a run is (start, stop)")
        for end in run:
            if end is not None:
                check_int("Keys start and stop", end, 0)
    ends = [end for run in runs for end in run]
    last = ends[-1:] == [None]
    ends = ends[:-1] if last else ends
    if None in ends or any(a >= b for a, b in pairwise(ends)):
        raise CompositionError(
            f"Keys got {shown(runs)}; runs are (start, stop) with start < stop, in order, with a "
            "gap between two; the last may have stop None, to the end"
        )
    return tuple((start, stop) for start, stop in runs)
