"""What a kernel call costs: counted work, weighed by a chip's table of weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from math import prod

from attnkit.geometry import Region
from attnkit.kernel import KernelCall
from attnkit.kernel.modes import MASK_DECIDES
from attnkit.planner.request import Request

__all__ = [
    "Chip",
    "Price",
    "chip",
    "dearer",
    "heads_of",
    "least_with_full_mask",
    "price_call",
    "price_of_pass",
    "time_in_tiles",
    "time_of_definition",
]


@dataclass(frozen=True)
class Chip:
    """The weights of one chip; `calibrated` says whether anybody measured them."""

    name: str
    calibrated: bool
    source: str
    tile_q: int
    tile_kv: int
    flops_per_ns: float
    bytes_per_ns: float
    launch_ns: float
    small_launch_ns: float
    shares: Mapping[str, float] = field(default_factory=dict, hash=False)
    """What part of `flops_per_ns` an op gets, by its name; all of it where it is not named."""

    def nanoseconds(self, flops: int, moved: int, launches: int = 1, small: int = 0) -> float:
        """Return how long so much work takes, by estimate."""
        around = launches * self.launch_ns + small * self.small_launch_ns
        return flops / self.flops_per_ns + moved / self.bytes_per_ns + around


_TABLE = json.loads(files("attnkit.planner").joinpath("chips.json").read_text("utf-8"))
_CHIPS = {name: Chip(name=name, **weights) for name, weights in _TABLE.items()}


def chip(name: str = "ascend910b") -> Chip:
    """Return the weights of a chip from `chips.json`."""
    return _CHIPS[name]


@dataclass(frozen=True)
class Price:
    """Counted work of a forward pass over all batch elements and heads.

    And of the pass over tiles that a bias's own gradient takes, if there is one.

    `cells` are the allowed cells, `tile_cells` those computed after rounding to tiles;
    `mask_bytes` is the size of the mask tensor and `mask_traffic` what is written and read of
    it: a full mask is built for the plan and read in every tile, a compressed one exists
    already and is read in edge tiles only. `peak_bytes` is the memory beyond the inputs;
    `nanoseconds` is the weighed total, an estimate that orders candidates.
    """

    cells: int
    tile_cells: int
    flops: int
    mask_bytes: int
    mask_traffic: int
    bias_bytes: int
    copy_bytes: int
    launches: int
    small_launches: int
    peak_bytes: int
    nanoseconds: float

    @classmethod
    def total(cls, prices: Iterable[Price]) -> Price:
        """Return the sum of several prices."""
        rows = [list(price.to_dict().values()) for price in prices]
        return cls(*(sum(column) for column in zip(*rows, strict=True)))

    def to_dict(self) -> dict[str, float]:
        """Return the items by name."""
        return asdict(self)


def dearer(price: float, best: float) -> str:
    """Say how much more something costs than what was chosen.

    >>> dearer(110, 100), dearer(100, 100)
    ('+10 %', 'same price')
    """
    more = price / best - 1 if best else 0.0
    return "same price" if more < 0.0005 else f"{100 * more:+.3g} %"


def heads_of(call: KernelCall) -> Sequence[int | None]:
    """Return the heads to look at one by one, or a single None where they are all alike."""
    mask = call.atten_mask
    apart = mask is not None and len(mask.shape) == 4 and mask.shape[1] > 1
    return range(call.num_heads) if apart else (None,)


def price_call(
    call: KernelCall,
    copy_bytes: int = 0,
    small_launches: int = 0,
    weights: Chip | None = None,
) -> Price:
    """Price one call, with what surrounds it: bytes moved, by so many elementwise kernels."""
    weights = weights or chip()
    cells = tile_cells = edge_cells = 0
    for h in heads_of(call):
        share = 1 if h is not None else call.num_heads
        for (region, visited, sizes), count in Counter(_matrices(call, h)).items():
            cells += region.area * count * share
            computed, edges = _tile_cells(visited, sizes, weights)
            tile_cells += computed * count * share
            edge_cells += edges * count * share
    flops = 2 * tile_cells * (call.head_dim + call.value_dim)
    mask_bytes = call.atten_mask.cells if call.atten_mask is not None else 0
    bias_bytes = prod(call.pse.shape) * call.pse.dtype.itemsize if call.pse is not None else 0
    out_bytes = prod(call.output.shape) * call.dtype.itemsize
    stats_bytes = 2 * prod(call.stats.shape) * call.stats.dtype.itemsize
    traffic = edge_cells if call.atten_mask is not None else 0
    if call.atten_mask is not None and call.atten_mask.kind == "full":
        traffic = tile_cells + mask_bytes
    moved = traffic + bias_bytes + copy_bytes
    busy = round(flops / weights.shares.get(call.op, 1.0))
    return Price(
        cells=cells,
        tile_cells=tile_cells,
        flops=flops,
        mask_bytes=mask_bytes,
        mask_traffic=traffic,
        bias_bytes=bias_bytes,
        copy_bytes=copy_bytes,
        launches=1,
        small_launches=small_launches,
        # What is copied is read and written, and only the copy is more memory.
        peak_bytes=mask_bytes + bias_bytes + copy_bytes // 2 + out_bytes + stats_bytes,
        nanoseconds=weights.nanoseconds(busy, moved, 1, small_launches),
    )


def least_with_full_mask(request: Request, mask_cells: int, cells: int) -> float:
    """Return what a call that reads a mask of so many entries costs at least, in nanoseconds.

    It computes and reads the allowed cells, and whoever plans need not look closer where that
    is dearer than what is known.
    """
    flops = 2 * cells * (request.head_dim + request.value_dim)
    return chip().nanoseconds(flops, mask_cells + cells)


# What the definition does to a score matrix beside its two products: scale, bias, mask, maximum,
# difference, exponential, sum, quotient. Each reads and writes it, in float32.
_PASSES = 8


def time_of_definition(request: Request) -> float:
    """Return what the definition itself costs on the chip, in nanoseconds.

    It computes whole score matrices, one operator at a time, a packed batch by sequence.
    """
    runs = len(request.sequences) if request.seqlens is not None else 1
    cells = request.num_heads * sum(q_len * kv_len for q_len, kv_len in request.sequences)
    flops = 2 * cells * (request.head_dim + request.value_dim)
    return chip().nanoseconds(flops, 2 * _PASSES * 4 * cells, 2 * runs, _PASSES * runs)


def time_in_tiles(request: Request, cells: int, tiles: int) -> float:
    """Return what the same passes cost over so many cells in so many tiles, in nanoseconds."""
    flops = 2 * cells * (request.head_dim + request.value_dim)
    return chip().nanoseconds(flops, 2 * _PASSES * 4 * cells, 2 * tiles, _PASSES * tiles)


# Cells of a pass over tiles that are in memory at a time: as many as one tile of it may have.
_CELLS_AT_ONCE = 2**24
# The products, the exponential and the elementwise operators of one tile of such a pass.
_OPERATORS = 12


def price_of_pass(request: Request, weights: Chip | None = None) -> Price:
    """Price the pass over a request's tiles that makes the gradient of its bias.

    The scores, which a device makes three times to be sure of their sums, the gradients of the
    weights, and the definition's passes over them, operator by operator, on whole tiles.
    """
    weights = weights or chip()
    share, cells, tile_cells = request.num_heads // len(request.matrices.planes), 0, 0
    for plane in request.matrices.planes:
        for (mask, sizes), count in Counter(zip(plane, request.sequences, strict=True)).items():
            cells += mask.outer.area * count * share
            tile_cells += _tile_cells(mask.outer, sizes, weights)[0] * count * share
    flops = 2 * tile_cells * (3 * request.head_dim + request.value_dim)
    moved = 2 * _PASSES * 4 * tile_cells
    small = _OPERATORS * -(-tile_cells // _CELLS_AT_ONCE)
    return Price(
        cells=cells,
        tile_cells=tile_cells,
        flops=flops,
        mask_bytes=0,
        mask_traffic=0,
        bias_bytes=0,
        copy_bytes=moved,
        launches=0,
        small_launches=small,
        peak_bytes=2 * 4 * min(tile_cells, _CELLS_AT_ONCE),
        nanoseconds=weights.nanoseconds(flops, moved, 0, small),
    )


def _matrices(
    call: KernelCall, head: int | None
) -> Iterator[tuple[Region, Region, tuple[int, int]]]:
    """Yield each matrix's allowed cells, the cells whose tiles are computed, and its sizes."""
    reads = call.atten_mask is not None and call.sparse_mode in MASK_DECIDES
    opaque = call.atten_mask is not None and call.atten_mask.is_opaque
    visited = call.visited() if reads else call.regions(head)
    if visited is None:  # a full mask is read everywhere but where a window lets tiles be skipped
        visited = tuple(Region.full(*sizes) for sizes in call.sequences)
    allowed = visited if opaque else call.regions(head) if reads else visited
    yield from zip(allowed, visited, call.sequences, strict=True)


def _tile_cells(region: Region, sizes: tuple[int, int], chip: Chip) -> tuple[int, int]:
    """Return the cells of the tiles that are computed, and of those among them with an edge."""
    if not all(sizes):
        return 0, 0
    tiles = region.tiles(chip.tile_q, chip.tile_kv, *sizes)
    one = chip.tile_q * chip.tile_kv
    return (tiles.full + tiles.partial) * one, tiles.partial * one
