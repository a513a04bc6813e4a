"""`Neighborhood`: the nearest tokens of a grid, as NATTEN has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from attnkit.arguments import check_bool, check_int
from attnkit.errors import CompositionError
from attnkit.geometry import Region
from attnkit.masks.base import MASKS
from attnkit.masks.grid import GridMask, check_per_axis, check_shape, per_axis
from attnkit.strips import Canonical

__all__ = ["Neighborhood", "window_line"]


@MASKS.register("neighborhood")
@dataclass(frozen=True, repr=False, eq=False)
class Neighborhood(GridMask):
    """The `kernel` nearest tokens along each axis of a grid of `shape`; borders shift the window.

    Along an axis of n tokens, a query at u sees the key at v where both have one residue modulo
    the dilation d, and ``start <= v // d < start + kernel``, with ``start = min(max(u // d -
    kernel // 2, 0), length - kernel)`` and `length` the number of positions of that residue. So
    every query sees a whole kernel, at borders one that is shifted inside; an even kernel has one
    token more before the query than behind it. Along a causal axis it is ``max(0, u // d - kernel
    + 1) <= v // d <= u // d``: the window ends at the query, and the first ones see fewer. A query
    sees a key where it does so along every axis.

    This is neighborhood attention (Hassani et al., CVPR 2023; with dilation, arXiv 2209.15001; with
    causal axes, arXiv 2403.04690), border for border as the library NATTEN computes it. `shape` is
    (height, width), (frames, height, width) or a length, the last axis fastest; `kernel`,
    `dilation` and `causal` are one value, or one for each axis. A kernel of 1 is allowed here.

    Raises `CompositionError` where ``kernel * dilation`` is larger than an axis (NATTEN refuses
    it, too), and at lengths that are not the grid's. Other tokens beside the grid: `Placed`.

    Where the region would have more than 131,072 runs, the mask is known by its cells.

    >>> from attnkit import masks
    >>> print(masks.Neighborhood(6, 3).show(6, 6))
    ###...
    ###...
    .###..
    ..###.
    ...###
    ...###
    >>> print(masks.Neighborhood(6, 2, dilation=2, causal=True).show(6, 6))
    #.....
    .#....
    #.#...
    .#.#..
    ..#.#.
    ...#.#
    >>> masks.Neighborhood((14, 14), 7).region(196, 196).area == 196 * 49
    True
    """

    kernel: int | tuple[int, ...]
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(
            self,
            shape: int | Sequence[int],
            kernel: int | Sequence[int],
            dilation: int | Sequence[int] = 1,
            causal: bool | Sequence[bool] = False,
        ) -> None: ...

    def __post_init__(self) -> None:
        kept: dict[str, object] = {"shape": check_shape("Neighborhood", self.shape)}
        shape = cast(tuple[int, ...], kept["shape"])
        for name, check in (("kernel", _positive), ("dilation", _positive), ("causal", check_bool)):
            given = getattr(self, name)
            kept[name] = check_per_axis(f"Neighborhood {name}", given, shape, check)
        self.__dict__.update(kept)  # a frozen instance takes its values through its dict
        for axis, (size, kernel, dilation, _) in enumerate(self._lines):
            if kernel * dilation > size:
                raise CompositionError(
                    f"Neighborhood kernel={kernel} with dilation={dilation} does not fit axis "
                    f"{axis} of the grid {shape}: kernel * dilation is at most {size} there"
                )

    @property
    def _lines(self) -> tuple[tuple[int, int, int, bool], ...]:
        """The size, kernel, dilation and causality of each axis."""
        said = (per_axis(value, self.shape) for value in (self.kernel, self.dilation))
        return tuple(zip(self.shape, *said, per_axis(self.causal, self.shape), strict=True))

    @property
    def _axes(self) -> tuple[Region, ...]:
        """One line of windows for each axis."""
        return tuple(window_line(*line) for line in self._lines)

    @property
    def _parts(self) -> tuple[tuple[range, ...], ...]:
        """The positions of each residue, where there is more than one of them."""
        if all(dilation == 1 for _, _, dilation, _ in self._lines):
            return ()
        return tuple(
            tuple(range(residue, size, dilation) for residue in range(dilation))
            for size, _, dilation, _ in self._lines
        )


def _positive(name: str, value: object) -> int:
    return check_int(name, value, 1)


def window_line(size: int, kernel: int, dilation: int = 1, causal: bool = False) -> Region:
    """Return a neighborhood along one axis, made of strips.

    Rows of one step ``u // dilation`` have windows that move by one from row to row; so do those
    of all steps whose window no border shifts.
    """
    steps, longer = -(-size // dilation), size % dilation or dilation
    before = kernel - 1 if causal else kernel // 2
    behind = 0 if causal else kernel - 1 - before
    free = range(before, max(before, steps - 1 - behind))  # inside of the shortest residue
    out = Canonical()

    def add(row: int, stop: int, start: int, count: int) -> None:
        """Append rows, the first of which sees `count` keys, a dilation apart."""
        wide, runs = (count, 1) if dilation == 1 else (1, count)
        keys = range(start, start + runs * dilation, dilation)
        out.add(row, stop, tuple((key, 1, key + wide, 1) for key in keys))

    def bent(step: int) -> None:
        """Append the rows of one step; of some residues there may be one position less."""
        for first, last, length in ((0, longer, steps), (longer, dilation, steps - 1)):
            if first < last and step < length:
                begin = max(step - before, 0)
                end = step + 1 if causal else begin + kernel
                if not causal and end > length:
                    begin, end = length - kernel, length
                row = step * dilation
                add(row + first, row + last, begin * dilation + first, end - begin)

    for step in range(min(free.start, steps)):
        bent(step)
    if free:
        add(free.start * dilation, free.stop * dilation, 0, kernel)
    for step in range(free.stop, steps):
        bent(step)
    return Region(tuple(out.strips))
