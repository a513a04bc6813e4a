"""A picture of a plan: the score matrix, with the cells of each call in its own colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from attnkit.display import COLOURS, Drawing, Layer, colour
from attnkit.errors import CompositionError, shown
from attnkit.fields import GRID
from attnkit.geometry import Region
from attnkit.masks import picture
from attnkit.masks.trace import RowReader, cells_of
from attnkit.planner.calls import Launch
from attnkit.planner.lower import lower
from attnkit.planner.orders import placed
from attnkit.planner.plan import Plan
from attnkit.planner.price import chip
from attnkit.planner.request import Request

if TYPE_CHECKING:
    from attnkit.display.figure import Figure

__all__ = ["Scene", "drawing", "images", "layers", "plot", "scene"]

_MASK = "the mask"
_MOST_READ = 1 << 20  # cells of a mask that is no region


def plot(plan: Plan, batch: int, head: int) -> Figure:
    """Return the figure that `Plan.plot` documents."""
    return picture.figure(drawing(plan, batch, head))


def drawing(
    plan: Plan, batch: int = 0, head: int = 0, grid: int = GRID, search: bool = True
) -> Drawing:
    """Return the picture of one score matrix, in at most `grid` x `grid` fields; see `scene`.

    >>> import torch
    >>> import attnkit as ak
    >>> x = torch.empty(1, 8, 2, 16, device="meta")
    >>> drawn = drawing(ak.plan(x, x, x, mask=ak.masks.Causal(), backend="emulated"))
    >>> drawn.fields, drawn.legend
    ((8, 8), (('#2f7ed8', 'call 1: mode 3'),))
    """
    seen = scene(plan, batch, head, search)
    sizes = (*seen.sizes, grid, grid)
    drawn = list(layers(seen.launches, seen.batch, seen.head))
    each = [
        Layer(picture.shares(region, *sizes).tolist(), colour(k), label)
        for k, (region, label) in enumerate(drawn)
    ]
    note = _measured(seen.known, *seen.sizes)
    if not each:  # no call has a set of cells that is known: drawn is the mask
        allowed, label = _allowed(plan.request, seen.known, batch, head)
        each = [Layer(picture.shares(allowed, *sizes).tolist(), colour(0), label)]
        note = note if label == _MASK else f"at most {note}"
    return Drawing(*seen.sizes, tuple(each), seen.title, note)


def _allowed(
    request: Request, known: Region, batch: int, head: int
) -> tuple[Region | RowReader, str]:
    """Return the cells of a mask, or those that it may allow where it is a while to read them."""
    matrices, (q_len, kv_len) = request.matrices, request.sequences[batch]
    own = matrices.planes[head if matrices.per_head else 0][batch]
    if own.exact:
        return known, _MASK
    if request.mask.comes_with_call or q_len * kv_len > _MOST_READ:
        return known, "cells that the mask may allow"
    return cells_of(request.mask, q_len, kv_len, batch, head), _MASK


class Scene(NamedTuple):
    """A score matrix as the calls of a plan see it.

    Where tokens are moved before the calls, `batch` and `head` are those of the moved request.
    `known` are its cells, `sizes` its rows and keys. There are no `launches` where none would do,
    or where the places are data of each call.
    """

    launches: tuple[Launch, ...]
    batch: int
    head: int
    known: Region
    sizes: tuple[int, int]
    title: str


def scene(plan: Plan, batch: int = 0, head: int = 0, search: bool = True) -> Scene:
    """Return what a picture of a plan shows of one score matrix.

    A backend without fused calls shows those that would compute the same on Ascend, if they are
    to be searched for.

    >>> import torch
    >>> import attnkit as ak
    >>> x = torch.empty(1, 8, 2, 16, device="meta")
    >>> seen = scene(ak.plan(x, x, x, mask=ak.masks.Causal(), backend="emulated"))
    >>> [label for _, label in layers(seen.launches, seen.batch, seen.head)]
    ['call 1: mode 3']
    """
    request = plan.request
    _check_index("batch", batch, request.batch)
    _check_index("head", head, request.num_heads)
    sizes = request.sequences[batch]
    calls = plan if plan.steps or not search else lower(request)
    # The places of such a mask are data: drawn is what may be asked for.
    launches = () if request.mask.comes_with_call else calls.steps
    drawn, title = request, f"{request.mask!r}"
    if calls.in_order is not None:
        drawn, batch, head = calls.in_order, *placed(calls.in_order, batch, head)
        title += ", positions sorted" if calls.positions is not None else ""
    return Scene(launches, batch, head, drawn.matrices.regions(head)[batch], sizes, title)


def _check_index(name: str, index: object, count: int) -> None:
    if isinstance(index, bool) or not isinstance(index, int) or index not in range(count):
        raise CompositionError(
            f"plot() got {name}={shown(index)[:80]}; the plan has {count}, so it is an int from 0 "
            f"to {count - 1}"
        )


def _measured(known: Region, q_len: int, kv_len: int) -> str:
    if not q_len or not kv_len:
        return f"no cells: {q_len} queries x {kv_len} keys"
    tiles = known.tiles(chip().tile_q, chip().tile_kv, q_len, kv_len)
    return (
        f"{100 * known.area / (q_len * kv_len):.1f} % of the cells; tiles: {tiles.full} full, "
        f"{tiles.partial} partial, {tiles.empty} skipped"
    )


def layers(launches: Sequence[Launch], batch: int, head: int) -> Iterator[tuple[Region, str]]:
    """Yield the cells that share a colour, and what they are: those of a call.

    The sequences of a single call that gathers take turns with the colours.
    """
    if sequences_take_turns(launches):
        each = list(images(launches[0], batch, head))
        turns = len(COLOURS)
        for k in range(min(turns, len(each))):
            own = range(k + 1, len(each) + 1, turns)
            told = ", ".join(map(str, own[:2])) + (f", ... {own[-1]}" if len(own) > 2 else "")
            yield Region.union(each[k::turns]), f"{launches[0].label}: sequence {told}"
        return
    for n, launch in enumerate(launches, start=1):
        cells = Region.union(images(launch, batch, head))
        if cells:
            yield cells, f"call {n}: {launch.label}"


def sequences_take_turns(launches: Sequence[Launch]) -> bool:
    """Whether the sequences of a call have a colour each, since it is the only one and gathers."""
    return len(launches) == 1 and not all(block.is_rectangle for block in launches[0].blocks)


def images(launch: Launch, batch: int, head: int) -> Iterator[Region]:
    """Yield the cells that each sequence of a call computes in one score matrix."""
    if launch.is_opaque or (launch.heads is not None and head not in launch.heads):
        return
    for block, region in zip(launch.blocks, launch.regions(head), strict=True):
        if block.batch == batch and region:
            yield block.image(region)
