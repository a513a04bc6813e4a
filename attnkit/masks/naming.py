"""The simplest named composition with given cells, found by search and proven by equality.

Every composition tried has the form ``frame & (fill | fill ...)`` or ``frame - (fill | ...)``:
a frame is an intersection of masks that hold all cells, a fill is a mask that, inside the
frame, holds no other cell. `masks.hulls` reads their parameters off the cells. Nothing is named
unless its region equals the target's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import chain, combinations, compress, product
from typing import NamedTuple

from attnkit.geometry import Region
from attnkit.masks import hulls
from attnkit.masks.algebra import And, Not, Or
from attnkit.masks.base import Full, Mask
from attnkit.masks.causal import Band
from attnkit.masks.composite import all_but_one, leaves
from attnkit.masks.documents import Documents
from attnkit.masks.hulls import Cells
from attnkit.masks.proposals import wholes
from attnkit.progress import pulse

__all__ = ["complexity", "name"]

_PARTS = 3  # masks in a frame, and fills in a union, at most
_MANY_SLICES = 300  # the larger a region, the fewer frames it is completed in
_FEW_FRAMES = 4


class _Named(NamedTuple):
    """A mask with its cells."""

    mask: Mask
    cells: Cells


@dataclass(frozen=True, eq=False)
class _Meeting:
    """An intersection of masks; its cells are joined where they are asked for."""

    mask: Mask
    parts: tuple[_Named, ...]
    everything: Cells

    @cached_property
    def cells(self) -> Cells:
        """The cells that all parts have."""
        found = [one.cells for one in self.parts] or [self.everything]
        return reduce(Cells.meet, found)


def name(regions: tuple[Region, ...], q_len: int, kv_len: int) -> Mask | None:
    """Return the simplest named mask found with these cells (one region per batch element).

    None when no composition that is tried has them.
    """
    target = Cells(regions if len(set(regions)) > 1 else regions[:1], q_len, kv_len)
    everything = target.of(Full())
    if target == everything:
        return Full()
    if not target:
        return ~Full()
    frames = _frames(target, everything)
    best = next((frame.mask for frame in frames if frame.cells == target), None)
    if best is not None and complexity(best)[0] <= 2:
        return best
    for frame in frames[: max(_FEW_FRAMES, _MANY_SLICES // _size(target))]:
        if best is not None and complexity(frame.mask)[0] >= complexity(best)[0]:
            break  # frames come from the simplest on: with a fill, the others cannot win
        for found in _complete(target, frame, everything):
            if best is None or complexity(found) < complexity(best):
                best = found
    if best is None or complexity(best)[0] > _PARTS:
        best = next((mask for mask in wholes(target) if target.of(mask) == target), best)
    return best


def complexity(mask: Mask) -> tuple[int, int]:
    """Return a measure to choose the simplest of equal masks by: parts, then text.

    A `Band` that has another name is longer to read than its text is.
    """
    parts = list(leaves(mask))
    return len(parts), len(str(mask)) + sum(map(_detour, parts))


def _detour(part: Mask) -> int:
    if not isinstance(part, Band):
        return 0
    beside = any(end is not None and end < 0 for end in (part.left, part.right))
    return 70 if beside else 30


def _frames(target: Cells, everything: Cells) -> list[_Meeting]:
    """Return intersections of named masks that hold all cells, from the simplest on."""
    groups = [
        hulls.bands(target),
        (*hulls.documents(target), *hulls.chunks(target)),
        hulls.key_ranges(target),
        hulls.row_ranges(target),
    ]
    known = [[(), *((one,) for one in _distinct(group, target, holds=True))] for group in groups]
    chosen = (list(chain(*choice)) for choice in product(*known))
    frames = [
        _Meeting(_join(And, [one.mask for one in choice]), tuple(choice), everything)
        for choice in chosen
        if len(choice) <= _PARTS
    ]
    return sorted(frames, key=lambda frame: complexity(frame.mask))


def _distinct(masks: Iterable[Mask], target: Cells, *, holds: bool) -> list[_Named]:
    """Return the masks that hold the target (or lie inside it), one for each set of cells."""
    found: dict[tuple[Region, ...], _Named] = {}
    for mask in masks:
        pulse()
        cells = target.of(mask)
        if not (target.inside(cells) if holds else cells.inside(target)):
            continue
        other = found.get(cells.regions)
        if other is None or complexity(mask) < complexity(other.mask):
            found[cells.regions] = _Named(mask, cells)
    return sorted(found.values(), key=lambda one: complexity(one.mask))


def _join(kind: type[And | Or], parts: list[Mask]) -> Mask:
    return kind.of(*parts) if parts else Full()


def _complete(target: Cells, frame: _Meeting, everything: Cells) -> Iterator[Mask]:
    """Propose equal masks that have this frame."""
    whole = frame.cells == everything
    fills = _fill(target, frame, everything)
    if fills is not None:
        yield fills if whole else frame.mask & fills
    if _size(target) <= _MANY_SLICES:
        holes = _fill(frame.cells.without(target), frame, everything)
        if holes is not None:
            yield Not(holes) if whole else frame.mask & Not(holes)


def _size(cells: Cells) -> int:
    return sum(len(runs) for region in cells.regions for _, _, runs in region.strips)


def _fill(target: Cells, frame: _Meeting, everything: Cells) -> Mask | None:
    """Return a union that is the target inside the frame; what it holds outside is free."""
    allowed = target.join(everything.without(frame.cells))
    found = _distinct(_fills(target, allowed, frame), allowed, holds=False)
    # A fill counts for the cells of the target it brings; of equals the simplest is first.
    useful: dict[tuple[Region, ...], _Named] = {}
    for one in found:
        brings = one.cells.meet(target)
        if brings:
            useful.setdefault(brings.regions, _Named(one.mask, brings))
    parts = list(useful.values())
    if not parts or _union(parts) != target:
        return None
    choice = {id(one) for one in _cover(target, parts)}
    return Or.of(*(one.mask for one in parts if id(one) in choice))


def _fills(target: Cells, allowed: Cells, frame: _Meeting) -> Iterator[Mask]:
    straight = list(hulls.lines(allowed))
    yield from straight
    yield from hulls.full_bands(allowed, frame.cells)
    yield from hulls.chunks(target)
    covered = [cells for cells in map(target.of, straight) if cells.inside(allowed)]
    rest = reduce(Cells.without, covered, target)
    banded = [target.of(mask) for mask in hulls.full_bands(allowed, frame.cells)]
    corner = reduce(Cells.without, (one for one in banded if one.inside(allowed)), rest)
    for remains in {id(one): one for one in (target, rest, corner) if one}.values():
        hull = [one for one in hulls.documents(remains, square=True) if not _scattered(one)]
        yield from hull
        yield from hulls.rectangles(remains)
        for one, band in product(hull, hulls.bands(remains)):
            yield one & band
    yield from hulls.bands(rest)


def _scattered(documents: Documents) -> bool:
    """Whether most documents are single tokens, so that another name says it better."""
    lengths = documents.lengths[0] if documents.batches else documents.lengths
    return isinstance(lengths, tuple) and 2 * lengths.count(1) > len(lengths) > 8


def _cover(target: Cells, parts: list[_Named]) -> list[_Named]:
    """Return the fewest parts that make up the target; all that are needed, if many are."""
    if len(parts) == 1:
        return parts
    rests = all_but_one([one.cells for one in parts], Cells.join)
    spare = [rest == target for rest in rests]
    needed = [one for one, without in zip(parts, spare, strict=True) if not without]
    free = list(compress(parts, spare))
    if needed and _union(needed) == target:
        return needed
    for count in range(1, _PARTS - len(needed) + 1):
        options = [[*needed, *choice] for choice in combinations(free[:12], count)]
        options.sort(key=lambda choice: complexity(_join(Or, [one.mask for one in choice])))
        for option in options:
            if _union(option) == target:
                return option
    for one in free[::-1]:  # drop the most complex first
        others = [other for other in parts if other is not one]
        if _union(others) == target:
            parts = others
    return parts


def _union(parts: list[_Named]) -> Cells:
    return reduce(Cells.join, (one.cells for one in parts))
