"""Masks by tiles of a grid: `SlidingTiles`, and `ShiftedWindows` as Swin has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from attnkit.arguments import check_int
from attnkit.errors import CompositionError
from attnkit.geometry import Region, Slice
from attnkit.masks.base import MASKS
from attnkit.masks.grid import GridMask, check_per_axis, check_shape, grid_product, per_axis
from attnkit.masks.neighborhood import window_line

__all__ = ["ShiftedWindows", "SlidingTiles"]


@MASKS.register("sliding_tiles")
@dataclass(frozen=True, repr=False, eq=False)
class SlidingTiles(GridMask):
    """Tiles of a grid see the nearest `window` tiles along each axis; borders shift the window.

    Along an axis of n tiles, a query in tile a sees the keys of the tiles b with ``start <= b <
    start + window`` and ``start = min(max(a - window // 2, 0), n - window)``: its own tile in the
    middle, at borders shifted inside. A query sees a key where it does so along every axis.

    This is sliding tile attention (STA, Zhang et al., ICML 2025, of FastVideo). `shape` is (frames,
    height, width), (height, width) or a length, the last axis fastest; `tile` is in tokens, and
    `window` counts tiles; both are one value, or one for each axis. A window per head is
    ``PerHead([SlidingTiles(...), ...])``; text beside the video is what `Placed` is for. Where the
    tokens stand tile by tile, as FastVideo arranges them, the mask is one of `Blocks`, see below.

    Raises `CompositionError` for tiles that do not divide the grid, windows that are even or larger
    than it (all tiles of an axis are a window, too), and at lengths that are not the grid's. Where
    the region would have more than 131,072 runs, the mask is known by its cells.

    >>> print(SlidingTiles(10, tile=2, window=3).show(10, 10))
    ######....
    ######....
    ######....
    ######....
    ..######..
    ..######..
    ....######
    ....######
    ....######
    ....######
    >>> from attnkit import masks
    >>> video = SlidingTiles((4, 8, 8), tile=(2, 4, 4), window=(1, 2, 2))
    >>> tiles = SlidingTiles((2, 2, 2), tile=1, window=(1, 2, 2)).materialize(8, 8)[0, 0]
    >>> by_tile = masks.Blocks(tiles, 2 * 4 * 4, 2 * 4 * 4)
    >>> video.region(256, 256).area == by_tile.region(256, 256).area
    True
    """

    tile: int | tuple[int, ...]
    window: int | tuple[int, ...]

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(
            self,
            shape: int | Sequence[int],
            tile: int | Sequence[int],
            window: int | Sequence[int],
        ) -> None: ...

    def __post_init__(self) -> None:
        _keep(self, {"tile": 1, "window": 1})
        for axis, (size, tile, window) in enumerate(self._lines):
            _check_divides("SlidingTiles tile", tile, size, axis)
            tiles = size // tile
            if window > tiles or (window % 2 == 0 and window < tiles):
                raise CompositionError(
                    f"SlidingTiles window={window} along axis {axis}, which has {tiles} tiles of "
                    f"{tile}: a window has its tile in the middle, so it is an odd number of tiles "
                    f"or all of them ({tiles})"
                )

    @property
    def _lines(self) -> tuple[tuple[int, int, int], ...]:
        """The size, tile and window of each axis."""
        said = (per_axis(value, self.shape) for value in (self.tile, self.window))
        return tuple(zip(self.shape, *said, strict=True))

    @property
    def _axes(self) -> tuple[Region, ...]:
        """Windows of tiles along each axis, every one of which is full."""
        return tuple(
            grid_product(
                (window_line(size // tile, window), Region.full(tile, tile)), (size // tile, tile)
            )
            for size, tile, window in self._lines
        )

    @property
    def _parts(self) -> tuple[tuple[range, ...], ...]:
        """The tiles of each axis."""
        return tuple(
            tuple(range(a, a + tile) for a in range(0, size, tile)) for size, tile, _ in self._lines
        )


@MASKS.register("shifted_windows")
@dataclass(frozen=True, repr=False, eq=False)
class ShiftedWindows(GridMask):
    """Windows of a grid, moved: ``(i - shift) // window == (j - shift) // window`` on each axis.

    With shift 0 these are plain windows; with another one, the first window of an axis has `shift`
    tokens and the last one ``window - shift``. A query sees a key where it does so along every
    axis.

    This is the attention of Swin (Liu et al., ICCV 2021): it rolls the image by `shift`, cuts it
    into windows, and masks what was not together before, at the border that was rolled round. The
    windows that are left are these ones, and no token moves. `shape` is (height, width), (frames,
    height, width) or a length, the last axis fastest; `window` and `shift` are one value, or one
    for each axis.

    Raises `CompositionError` for windows that do not divide the grid (Swin pads the image), for a
    shift that is not below the window or moves one that covers its axis (Swin leaves that one where
    it is: shift 0), and at lengths that are not the grid's. Where the region would have more than
    131,072 runs, the mask is known by its cells.

    >>> print(ShiftedWindows(8, window=4, shift=1).show(8, 8))
    #.......
    .####...
    .####...
    .####...
    .####...
    .....###
    .....###
    .....###
    >>> ShiftedWindows((8, 8), window=4).region(64, 64).area == 64 * 16
    True
    """

    window: int | tuple[int, ...]
    shift: int | tuple[int, ...] = 0

    if TYPE_CHECKING:  # more is taken than is kept

        def __init__(
            self,
            shape: int | Sequence[int],
            window: int | Sequence[int],
            shift: int | Sequence[int] = 0,
        ) -> None: ...

    def __post_init__(self) -> None:
        _keep(self, {"window": 1, "shift": 0})
        for axis, (size, window, shift) in enumerate(self._lines):
            _check_divides("ShiftedWindows window", window, size, axis)
            if shift >= window or (shift and window == size):
                raise CompositionError(
                    f"ShiftedWindows shift={shift} along axis {axis} of {size} tokens, which has "
                    f"windows of {window}: "
                    + (
                        "a window that covers its axis is not shifted; shift is 0 there"
                        if shift < window
                        else "a shift is 0 or more, and below the window (half of it in Swin)"
                    )
                )

    @property
    def _lines(self) -> tuple[tuple[int, int, int], ...]:
        """The size, window and shift of each axis."""
        said = (per_axis(value, self.shape) for value in (self.window, self.shift))
        return tuple(zip(self.shape, *said, strict=True))

    @property
    def _axes(self) -> tuple[Region, ...]:
        """The windows along each axis."""
        parts = self._parts
        return tuple(Region.of(*(Slice(*2 * (w.start, w.stop)) for w in axis)) for axis in parts)

    @property
    def _parts(self) -> tuple[tuple[range, ...], ...]:
        """The windows of each axis."""
        return tuple(tuple(_windows(*line)) for line in self._lines)


def _windows(size: int, window: int, shift: int) -> Iterator[range]:
    for k in range(-1 if shift else 0, size // window):
        start = shift + window * k
        yield range(max(start, 0), min(start + window, size))


# -- arguments -----------------------------------------------------------------------------

_Owner = SlidingTiles | ShiftedWindows


def _keep(mask: _Owner, least: dict[str, Literal[0, 1]]) -> None:
    """Keep the checked shape, and what is said for each axis: ints, and the least of each."""
    owner = type(mask).__name__
    shape = check_shape(owner, mask.shape)
    kept: dict[str, object] = {"shape": shape}
    for field, lowest in least.items():

        def check(name: str, value: object, lowest: int = lowest) -> int:
            return check_int(name, value, lowest)

        kept[field] = check_per_axis(f"{owner} {field}", getattr(mask, field), shape, check)
    vars(mask).update(kept)  # a frozen instance takes its values through its dict


def _check_divides(name: str, part: int, size: int, axis: int) -> None:
    if size % part:
        raise CompositionError(
            f"{name}={part} does not divide axis {axis} of the grid, which has {size} tokens; fill "
            "the grid up, and take the tokens away that are none: & Keys(...)"
        )
