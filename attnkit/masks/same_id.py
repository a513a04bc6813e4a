"""`SameId`: tokens see those with the same number, wherever these are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch

from attnkit.arguments import LengthsLike, check_int, describe, tokens
from attnkit.eager import MASK_IN_GRAPH, untraced
from attnkit.errors import CompositionError, CompositionTypeError, shown
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS, Enclosure, Mask, Rectangle
from attnkit.masks.slices import is_list
from attnkit.strips import Canonical, Run

__all__ = ["SameId", "runs_of"]

IdRun = tuple[int | None, int]
IdRuns = tuple[IdRun, ...]
IdLists = IdRuns | tuple[IdRuns, ...]

if TYPE_CHECKING:
    IdListsLike = Sequence[IdRun] | Sequence[Sequence[IdRun]]


class _Place(NamedTuple):
    """Tokens ``start <= index < stop`` that have one number, or none."""

    start: int
    stop: int
    number: int | None


@MASKS.register("same_id")
@dataclass(frozen=True, repr=False, eq=False)
class SameId(Mask):
    """Cells whose query and key have the same number: ``q_id[i] == kv_id[j]``, not None.

    `runs` says the numbers of the queries as (number, how many tokens in a row); the number None
    sees nothing and is not seen. A number may come back later: its runs see each other. `kv_runs`
    are those of the keys, where they differ. One list serves every batch element, or each has its
    own. `SameId.of` reads numbers per token. Where documents are contiguous, `Documents` says it.

    Where numbers change so often that the region would have more than 64 + 4 * max(Sq, Skv)
    rectangles, the mask is known by its cells instead.

    Raises `CompositionError` for lengths below 1, and for batch elements of unlike lengths.

    >>> print(SameId([(7, 2), (None, 1), (7, 1)]).show(4, 4))
    ##.#
    ##.#
    ....
    ##.#
    """

    runs: IdLists
    kv_runs: IdLists | None = None

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(self, runs: IdListsLike, kv_runs: IdListsLike | None = None) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", _lists(self.runs))
        if self.kv_runs is not None:
            kept = _lists(self.kv_runs)
            object.__setattr__(self, "kv_runs", None if kept == self.runs else kept)
        counts = {len(lists) for lists in self._sides if len(lists) > 1}
        if len(counts) > 1:
            raise CompositionError(
                f"SameId got runs for {shown(sorted(counts))} batch elements; queries and keys "
                "have one list for each, or one for all"
            )
        for name, lists in zip(("queries", "keys"), self._sides, strict=True):
            sums = {sum(length for _, length in runs) for runs in lists}
            if len(sums) > 1:
                raise CompositionError(
                    f"SameId has {shown(sorted(sums))} {name} by batch element; the rows of one "
                    "batch have one length (the number of what is filled up is None)"
                )

    @classmethod
    @untraced(MASK_IN_GRAPH)
    def of(
        cls, q_ids: LengthsLike, kv_ids: LengthsLike | None = None, none: int | None = -1
    ) -> SameId:
        """Build from a number per token, [S] or [B, S]; tokens of the number `none` have none.

        Reads tensors on the host. `kv_ids` are the numbers of the keys, where they differ.

        >>> SameId.of([0, 0, -1, 1, 0])
        SameId(((0, 2), (None, 1), (1, 1), (0, 1)))
        """
        if none is not None:
            check_int("SameId none", none, None)
        sides = [_read(ids, none) for ids in (q_ids, kv_ids) if ids is not None]
        return cls(*sides)

    @property
    def _sides(self) -> tuple[tuple[IdRuns, ...], tuple[IdRuns, ...]]:
        """The lists of the queries and of the keys."""
        keys = self.runs if self.kv_runs is None else self.kv_runs
        return _many(self.runs), _many(keys)

    @property
    def batches(self) -> int | None:
        """One list per batch element, where they differ."""
        counts = [
            len(side) for side in (self.runs, self.kv_runs) if side is not None and _is_many(side)
        ]
        return max(counts) if counts else None

    @property
    def extent(self) -> tuple[int | None, int | None]:
        """The sums of the lengths."""
        rows, keys = (sum(length for _, length in side[0]) for side in self._sides)
        return rows, keys

    def _lines(self, batch: int) -> tuple[list[_Place], list[_Place]]:
        rows, keys = (_placed(side[batch if len(side) > 1 else 0]) for side in self._sides)
        return rows, keys

    @cached_property
    def _known(self) -> dict[int, Enclosure]:
        """What was asked for so far, by batch element; lives as long as the mask."""
        return {}

    def enclosure(self, q_len: int, kv_len: int, batch: int = 0, head: int = 0) -> Enclosure:
        """The rectangles; or, where there are too many, what lies around them."""
        batch = batch if self.batches is not None else 0
        if batch not in self._known:
            self._known[batch] = _enclosed(*self._lines(batch))
        known = self._known[batch]
        if known.outer.fits(q_len, kv_len):
            return known
        whole = Region.full(q_len, kv_len)  # a cut may ask for fewer rows or keys than there are
        return Enclosure(known.inner & whole, known.outer & whole)

    def _cells(self, at: Rectangle, device: torch.device | str | None) -> torch.Tensor:
        lines = self._lines(at.batch if self.batches is not None else 0)
        numbers: dict[int, int] = {}
        cut = zip(lines, (at.rows, at.keys), strict=True)
        found = [_numbered(places, numbers)[slice(*ends)] for places, ends in cut]
        device = torch.get_default_device() if device is None else device
        rows, keys = (torch.from_numpy(one).to(device) for one in found)
        return (rows[:, None] == keys) & (rows[:, None] >= 0)


def _enclosed(rows: list[_Place], keys: list[_Place]) -> Enclosure:
    places: dict[int, list[Run]] = {}
    for start, stop, number in keys:
        if number is not None:
            places.setdefault(number, []).append((start, 0, stop, 0))
    seen = [(row, places[row.number]) for row in rows if row.number in places]
    if sum(len(found) for _, found in seen) > 64 + 4 * max(rows[-1].stop, keys[-1].stop):
        ends = [run for _, found in seen for run in (found[0], found[-1])]
        first, last = min(run[0] for run in ends), max(run[2] for run in ends)
        around = Region.of(Slice(seen[0][0].start, seen[-1][0].stop, first, last))
        return Enclosure(Region.empty(), around)
    out = Canonical()
    for row, found in seen:
        out.add(row.start, row.stop, tuple(found))
    region = Region(tuple(out.strips))
    return Enclosure(region, region)


def _placed(runs: IdRuns) -> list[_Place]:
    stops = accumulate(length for _, length in runs)
    return [
        _Place(stop - length, stop, number)
        for stop, (number, length) in zip(stops, runs, strict=True)
    ]


def _numbered(places: list[_Place], numbers: dict[int, int]) -> np.ndarray[tuple[int], np.dtype]:
    """Return a small number per token, -1 for none; the same number for the same one."""
    each = [
        -1 if place.number is None else numbers.setdefault(place.number, len(numbers))
        for place in places
    ]
    return np.repeat(np.array(each, np.int64), [place.stop - place.start for place in places])


def _is_many(given: object) -> bool:
    return isinstance(given, tuple | list) and bool(given) and is_list(given[0])


def _many(lists: IdLists) -> tuple[IdRuns, ...]:
    return cast("tuple[IdRuns, ...]", lists) if _is_many(lists) else (cast(IdRuns, lists),)


def _lists(given: object) -> IdLists:
    if not isinstance(given, tuple | list):
        raise CompositionTypeError(
            f"SameId got {describe(given)}; it takes runs (number, how many tokens), or a list of "
            "these for each batch element (from a number per token: SameId.of)"
        )
    return tuple(map(_checked, given)) if _is_many(given) else _checked(given)


def _checked(runs: object) -> IdRuns:
    if not isinstance(runs, tuple | list) or not runs:
        raise CompositionTypeError(f"SameId got {describe(runs)} for the runs of a text")
    kept: list[IdRun] = []
    for run in runs:
        if not isinstance(run, tuple | list) or len(run) != 2:
            raise CompositionTypeError(
                f"SameId got {describe(run)}; a run is (number, how many tokens)"
            )
        number, length = run
        if number is not None:
            check_int("SameId number", number, None)
        check_int("SameId tokens of a run", length, 1)
        if kept and kept[-1][0] == number:
            kept[-1] = (number, kept[-1][1] + length)
        else:
            kept.append((number, length))
    return tuple(kept)


def _read(ids: LengthsLike, none: int | None) -> IdLists:
    rows = tokens("SameId.of", ids)
    each = tuple(
        tuple((None if number == none else number, length) for number, length in runs)
        for runs in runs_of(rows.cpu().numpy() if rows.dim() == 2 else rows[None].cpu().numpy())
    )
    return each if rows.dim() == 2 else each[0]


def runs_of(rows: np.ndarray[tuple[int, int], np.dtype]) -> list[list[tuple[int, int]]]:
    """Return of each row the values and how often in a row each comes.

    >>> runs_of(np.array([[7, 7, 3]]))
    [[(7, 2), (3, 1)]]
    """
    count, size = rows.shape
    last = np.ones((count, size), np.bool_)
    np.not_equal(rows[:, 1:], rows[:, :-1], out=last[:, :-1])
    at = np.flatnonzero(last)
    values, lengths = rows.reshape(-1)[at].tolist(), np.diff(at, prepend=-1).tolist()
    ends = np.searchsorted(at, np.arange(1, count + 1) * size).tolist()
    pairs = list(zip(values, lengths, strict=True))
    return [pairs[a:b] for a, b in pairwise([0, *ends])]
