"""Parts of intersections and unions that may as well not be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

from attnkit.geometry import Region
from attnkit.masks.algebra import Not, _Joined
from attnkit.masks.base import Enclosure, Mask
from attnkit.masks.composite import all_but_one

__all__ = ["Path", "needless_parts", "without_part"]

Path = tuple[int, ...]
Bound = Callable[[Enclosure], Enclosure]


def needless_parts(
    mask: Mask,
    plane: tuple[int, int, int, int],
    target: Region,
    around: Bound = lambda bounds: bounds,
    path: Path = (),
) -> Iterator[Path]:
    """Yield the path to each part of intersections and unions that may as well not be there.

    `target` are the cells of the whole at ``plane`` (q_len, kv_len, batch, head); `around` makes
    the cells of the whole of those of this mask.
    """
    if isinstance(mask, Not):
        flip = partial(mask.flipped, q_len=plane[0], kv_len=plane[1])
        yield from needless_parts(
            mask.part, plane, target, partial(_after, around, flip), (*path, 0)
        )
    elif isinstance(mask, _Joined):
        each = [part.enclosure(*plane) for part in mask.parts]
        for k, rest in enumerate(all_but_one(each, mask.met)):
            found = around(rest)
            if found.exact and found.inner == target:
                yield (*path, k)
            beside = partial(mask.met, rest)
            yield from needless_parts(
                mask.parts[k], plane, target, partial(_after, around, beside), (*path, k)
            )


def _after(outer: Bound, inner: Bound, known: Enclosure) -> Enclosure:
    return outer(inner(known))


def without_part(mask: Mask, path: Path) -> tuple[Mask, Mask]:
    """Return the part at a path, and the mask without it."""
    k, *rest = path
    if isinstance(mask, Not):
        part, shorter = without_part(mask.part, tuple(rest))
        return part, ~shorter
    joined = cast(_Joined, mask)
    before, after = joined.parts[:k], joined.parts[k + 1 :]
    if not rest:
        return joined.parts[k], type(joined).of(*before, *after)
    part, shorter = without_part(joined.parts[k], tuple(rest))
    return part, type(joined).of(*before, shorter, *after)
