"""What a parallel plan costs its slowest rank: counted work, weighed by a chip and a link."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple

from attnkit.backends.base import stats_dtype
from attnkit.geometry import Region
from attnkit.planner.price import Chip, chip
from attnkit.progress import pulse
from attnkit.ranges import Ranges, total

if TYPE_CHECKING:
    from attnkit.parallel.plan import ParallelPlan

__all__ = ["BACKWARD", "Link", "ParallelPrice", "link", "price_of", "slowest"]

# Each pass over the results of a stage reads them and writes them: they are scaled, and added.
_PASSES = 4
# What a backward pass computes, of what its forward pass does: five products in place of two.
BACKWARD = 2.5
# Stages of which each is looked at; of more, the keys of others are taken to be spread evenly.
_MOST_STAGES = 8


@dataclass(frozen=True)
class Link:
    """The weights of what joins the ranks; `calibrated` says whether anybody measured them."""

    name: str
    calibrated: bool
    source: str
    bytes_per_ns: float
    message_ns: float

    def nanoseconds(self, moved: float, messages: int) -> float:
        """Return how long it takes to move so much in so many messages, by estimate."""
        return moved / self.bytes_per_ns + messages * self.message_ns


_LINKS = {
    name: Link(name=name, **weights)
    for name, weights in json.loads(
        files("attnkit.parallel").joinpath("links.json").read_text("utf-8")
    ).items()
}


def link(name: str = "roce200") -> Link:
    """Return the weights of a link from `links.json`."""
    return _LINKS[name]


@dataclass(frozen=True)
class ParallelPrice:
    """What a forward pass costs the slowest of some ranks, and a backward pass if there is one.

    `ranks` are those that were looked at: the ones with the most cells and the most keys to
    receive. `compute` and `exchange` are nanoseconds of the slowest of them, `rank`, and `total`
    counts what overlaps once: while a stage is computed, the keys of the next arrive. `held` are
    the most bytes of received keys and values at a time.
    """

    rank: int
    ranks: tuple[int, ...]
    compute: float
    exchange: float
    total: float
    received: int
    held: int

    def to_dict(self) -> dict[str, object]:
        """Return the items by name."""
        return asdict(self) | {"ranks": list(self.ranks)}


class _Stage(NamedTuple):
    """What a stage costs a rank: nanoseconds of computing, bytes and messages of either way."""

    compute: float
    moved: int
    back: int
    messages: int


def slowest(plan: ParallelPlan) -> tuple[int, ...]:
    """Return the ranks that are worth pricing: with the most cells, and the most keys of others.

    Of equal ones the first is returned.
    """
    along = range(plan.exchange.keys.size)
    regions = plan.regions(plan.heads(0))
    rows = [plan.rows(rank * plan.heads_ways) for rank in along]
    cells = [sum(r.cells(own) * count for r, count in regions.items()) for own in rows]
    keys = [total(some) for some in plan.exchange.wanted]
    most_heads = max(range(plan.heads_ways), key=lambda rank: len(plan.heads(rank)))
    found = {max(along, key=cells.__getitem__), max(along, key=keys.__getitem__)}
    return tuple(sorted(rank * plan.heads_ways + most_heads for rank in found))


def price_of(
    plan: ParallelPlan, weights: Chip | None = None, wire: Link | None = None
) -> ParallelPrice:
    """Price a plan by a few of its ranks; local plans are not made for it.

    Cells are counted in whole tiles of the chip.
    """
    weights, wire = weights or chip(), wire or link()
    ranks = slowest(plan)
    return max((_of_rank(plan, rank, ranks, weights, wire) for rank in ranks), key=_total)


def _total(price: ParallelPrice) -> float:
    return price.total


def _of_rank(
    plan: ParallelPlan, rank: int, ranks: tuple[int, ...], weights: Chip, wire: Link
) -> ParallelPrice:
    pulse()
    stages = list(_stages(plan, rank, weights))
    forward = [one.compute for one in stages]
    arrives = [wire.nanoseconds(one.moved, one.messages) for one in stages]
    turn = _turn(plan, rank, wire)
    took = turn + _overlapped(forward, arrives)
    compute, exchange = sum(forward), sum(arrives) + turn
    if plan.request.needs_grad:
        behind = [BACKWARD * one for one in forward]
        again = [0.0 if plan.keep else one for one in arrives]
        returns = [wire.nanoseconds(one.back, one.messages) for one in stages]
        # The gradients of a stage's keys go back while the next one is computed.
        both = [a + b for a, b in zip([*again, 0.0], [0.0, *returns], strict=True)]
        took += turn + _overlapped([*behind, 0.0], both)
        compute, exchange = compute + sum(behind), exchange + sum(again) + sum(returns) + turn
    moved = [one.moved for one in stages]
    most = max((a + b for a, b in zip(moved, [*moved[1:], 0], strict=True)), default=0)
    held = sum(moved) if plan.keep else most
    return ParallelPrice(rank, ranks, compute, exchange, took, sum(moved), held)


def _turn(plan: ParallelPlan, rank: int, wire: Link) -> float:
    """Return how long it takes to turn tokens to heads and back: both ways, nothing overlaps."""
    if plan.heads_ways == 1:
        return 0.0
    forward = plan.turn.transfers[0]
    moved = max(int(forward[rank].sum()), int(forward[:, rank].sum()))
    return wire.nanoseconds(moved, 2 * (plan.heads_ways - 1))


def _overlapped(compute: Sequence[float], arrives: Sequence[float]) -> float:
    """Return how long stages take, each of whose keys arrive while the one before is computed."""
    waits = sum(map(max, compute[:-1], arrives[1:]))
    return arrives[0] + waits + compute[-1]


def _stages(plan: ParallelPlan, rank: int, weights: Chip) -> Iterator[_Stage]:
    request, heads, rows = plan.request, plan.heads(rank), plan.rows(rank)
    regions = plan.regions(heads)
    wide = stats_dtype(request.dtype).itemsize
    numbers = plan.numbers(rank)
    results = len(heads) * request.value_dim * plan.copies * wide

    def compute(keys: Ranges, parts: int) -> float:
        cells = sum(
            _tile_cells(region, rows, keys, weights) * count for region, count in regions.items()
        )
        flops = 2 * cells * (request.head_dim + request.value_dim)
        moved = _PASSES * total(rows) * results * parts
        return weights.nanoseconds(flops, moved, parts, 2 * parts) if cells else 0.0

    stages = plan.stages(rank)
    yield _Stage(compute(stages[0].keys, 1), 0, 0, 0)
    remote = stages[1:]
    if len(remote) > _MOST_STAGES:
        keys = plan.exchange.wanted[rank // plan.heads_ways]
        busy = compute(keys, len(remote)) / len(remote)
    for one in remote:
        taken = busy if len(remote) > _MOST_STAGES else compute(one.keys, 1)
        count = numbers * max(
            sum(total(message.keys) for message in messages)
            for messages in (one.receives, one.sends)
        )
        messages = max(len(one.receives), len(one.sends))
        yield _Stage(taken, count * request.dtype.itemsize, count * wide, messages)


def _tile_cells(region: Region, rows: Ranges, keys: Ranges, weights: Chip) -> int:
    """Return how many cells are computed of some rows and keys, in whole tiles."""
    local, sizes = region.take(rows, keys), (total(rows), total(keys))
    if not local:
        return 0
    tiles = local.tiles(weights.tile_q, weights.tile_kv, *sizes)
    return (tiles.full + tiles.partial) * weights.tile_q * weights.tile_kv
