"""From a request to its `Job`: the schedule, and whatever else every call of a plan shares.

Batch elements, packed sequences and heads with equal regions share a lane; `items` says what the
rows of a lane do.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TypeVar

import torch

from attnkit.backends.base import stats_dtype
from attnkit.backends.numbers import masks_before_scale
from attnkit.backends.tiled.cells import TileCells
from attnkit.backends.tiled.columns import Known, Span, span_around
from attnkit.backends.tiled.items import Traits, items_of
from attnkit.backends.tiled.schedule import Lane, RowBlock, Schedule, Tile, Whole
from attnkit.backends.tiled.stacks import stacks
from attnkit.backends.tiled.whole import WholeCall, sole_call
from attnkit.geometry import Region
from attnkit.layouts import Layout
from attnkit.masks import Enclosure
from attnkit.planner import Request
from attnkit.pse import PerCell, PerKey
from attnkit.strips import seen_spans

__all__ = ["Job", "schedule"]

T = TypeVar("T")

# Measured on two AVX-512 cores, see benchmarks/attention.py: a score tile is at most this large,
# with repetitions of a block, whose operands are copied, at most that.
TILE_CELLS, REPEATED_CELLS = 1280 * 1024, 512 * 1024
# A bias that score matrices share is made whole up to this size, as few tiles as it is.
MADE_CELLS = 4 * 1024 * 1024
# On other devices every tile is a row of launches, and 64 MB of scores are not much. Not measured.
DEVICE_CELLS = 16 * 1024 * 1024
# From this scale on torch's fused kernel is left alone.
HUGE_SCALE = 1024.0
# Keys per row up to which blocks cast 16 bits in their tiles: a window of 1,024 and its edges.
FEW_KEYS = 1280


@dataclass(frozen=True, eq=False)
class Job:
    """What the calls of a plan have in common; each of its answers is made once, and kept here.

    Without `wholes` torch's fused kernel runs nothing; with `apart` every packed sequence has a
    lane, so that no tile holds keys of two.
    """

    request: Request
    wholes: bool = True
    apart: bool = False

    @classmethod
    def of(cls, request: Request, wholes: bool = True) -> Job:
        """Return a request's job: that of a share is in the dtype in which it is handed on."""
        if request.share is not None:
            request = replace(request, dtype=stats_dtype(request.dtype))
        return cls(request, wholes)

    @cached_property
    def schedule(self) -> Schedule:
        """Which blocks of rows meet which runs of keys, and how."""
        return schedule(self.request, self.wholes, self.apart)

    @cached_property
    def cells(self) -> TileCells:
        """What is known of the cells of a mask that is no region."""
        return TileCells(self.request.mask)

    @cached_property
    def wide(self) -> torch.dtype:
        """The dtype of scores and statistics."""
        return stats_dtype(self.request.dtype)

    @cached_property
    def sizes(self) -> tuple[int, int, int, int]:
        """Batch elements (1 if packed), query heads, rows, keys."""
        request = self.request
        batch = 1 if request.seqlens is not None else request.batch
        return batch, request.num_heads, request.q_len, request.kv_len

    @cached_property
    def one_bias(self) -> tuple[int, int] | None:
        """The lengths of the one bias that score matrices share and that is made whole, if any."""
        request = self.request
        if _form(request) != "made" or (request.batch < 2 and not self.schedule.fused):
            return None
        return request.sequences[0]

    @cached_property
    def reads_keys_once(self) -> bool:
        """Whether each step reads all keys of its score matrices, and no other step reads any."""
        lanes, keys = self.schedule.lanes, (0, self.request.kv_len, 0)
        whole = all(
            isinstance(item, RowBlock)
            and item.times == 1
            and item.tile.heads % self.group == 0
            and item.keys_read == (keys,)
            for lane in lanes
            for item in lane.items
        )
        even = all(
            len(lane.items) == 1
            and lane.lengths[1] == self.request.kv_len
            and lane.heads == (0, self.request.num_heads)
            for lane in lanes
        )
        return whole and even and bool(lanes)

    @cached_property
    def layout(self) -> Layout:
        """The layout of the tensors, which sees them as ``[b n s d]``."""
        return self.request.layout_of

    @cached_property
    def group(self) -> int:
        """How many query heads share a key head."""
        return self.request.num_heads // self.request.num_kv_heads

    @cached_property
    def sole(self) -> WholeCall | None:
        """The one call of torch's kernel that computes everything, if there is one."""
        return None if self.request.sink else sole_call(self.schedule, self.sizes, self.group)

    @cached_property
    def by_blocks(self) -> Job:
        """The same without torch's fused kernel."""
        return replace(self, wholes=False) if self.schedule.fused else self

    @cached_property
    def by_sequence(self) -> Job:
        """The same with a lane for each packed sequence."""
        return replace(self, apart=True)

    @cached_property
    def raised(self) -> Job | None:
        """The same in float32, where that is the better way to compute 16 bits.

        One call of torch's kernel is as good, and blocks that read few keys cast them tile
        by tile. Merges of torch's calls need float32, and many keys are worth casting once.
        """
        request = self.request
        if request.dtype.itemsize > 2 or self.sole is not None:
            return None
        other = replace(self, request=replace(request, dtype=torch.float32))
        batch, heads, rows, _ = self.sizes
        gained = other.schedule.fused - self.schedule.fused
        few = other.schedule.computed <= FEW_KEYS * batch * heads * rows
        return None if few and gained <= other.schedule.computed / 8 else other


def schedule(request: Request, wholes: bool = True, apart: bool = False) -> Schedule:
    """Return the schedule of a request; see `Job` for what may be asked of it."""
    traits = Traits(
        alike=not (request.bias or request.dropout or request.score_fn),
        patterns=_form(request) != "view",
        wholes=wholes and _fused_fits(request),
        merges=request.dtype in (torch.float32, torch.float64),
        causal=masks_before_scale(request.scale, torch.float32),
    )
    most = (TILE_CELLS, REPEATED_CELLS)
    if request.device not in ("cpu", "meta"):
        most = (DEVICE_CELLS, DEVICE_CELLS)
    known: dict[tuple[object, ...], tuple[RowBlock | Whole, ...]] = {}
    lanes: list[Lane] = []
    chunks: Known = {}
    for lane, mask, seen in _lanes(request, apart):
        heads, batch = (b - a for a, b in (lane.heads, lane.batches))
        own = traits if mask.exact else traits._replace(wholes=False)
        own = own._replace(q_len=lane.lengths[0], seen=seen, matrices=heads * batch)
        key = (mask.outer.strips, own)
        if key not in known:
            known[key] = items_of(*key, chunks)
        tiled = (_shared(item, own, heads, batch, mask.exact, most) for item in known[key])
        if request.score_fn is not None:  # it may return -inf wherever it likes
            tiled = (_bare(item) for item in tiled)
        lanes.append(_judged(lane._replace(items=tuple(tiled)), request, mask, seen))
    return Schedule(tuple(_stacked(lanes, request, traits, most) or lanes))


def _stacked(
    lanes: list[Lane], request: Request, traits: Traits, most: tuple[int, int]
) -> list[Lane]:
    """Return lanes of small matrices side by side, where they are cheaper."""
    found, heads = stacks(lanes, request, traits), request.num_heads
    for k, lane in enumerate(found):
        count = lane.batches[1] - lane.batches[0]
        items = (_shared(item, traits, heads, count, True, most) for item in lane.items)
        found[k] = lane._replace(items=tuple(items))
    return found


def _fused_fits(request: Request) -> bool:
    """Whether torch's fused CPU kernel computes plain pieces of this request, and well."""
    if request.device not in ("cpu", "meta"):
        return False
    plain = not (request.dropout or request.softcap or request.score_fn)
    if request.bias:  # its sums of 16 bits are further off than those of blocks
        plain = plain and _form(request) != "tiles" and request.dtype.itemsize > 2
    even = request.head_dim == request.value_dim
    # Its products, which it scales before it adds them up, overflow at huge scales.
    tame = abs(request.scale) <= HUGE_SCALE
    return plain and even and tame and request.dtype != torch.float16  # a hundredfold slower there


def _form(request: Request) -> str:
    """Return how a bias is read: "made" as one for all score matrices, a "view", or "tiles"."""
    if not request.bias:
        return "none"
    shared = len(set(request.sequences)) == 1 and all(t.batch is None for t in request.bias)
    q_len, kv_len = request.sequences[0] if request.sequences else (0, 0)
    if shared and 0 < request.num_heads * q_len * kv_len <= MADE_CELLS:
        return "made"
    first, *others = request.bias
    given = isinstance(first.structure, PerCell | PerKey) and not (others or first.before_scale)
    return "view" if given and first.dtype == stats_dtype(request.dtype) else "tiles"


# -- lanes -------------------------------------------------------------------------------------


def _lanes(request: Request, apart: bool) -> Iterator[tuple[Lane, Enclosure, tuple[Span, ...]]]:
    """Yield lanes that have no items yet, their masks, and the keys that some row of them sees.

    A packed batch is one lane over all tokens; or one per sequence, where it is to be, or where
    something is counted from a sequence's corner.
    """
    planes, every = request.matrices.planes, (0, request.num_heads)
    for first, last in _equal_stretches(planes):
        heads, plane = every if len(planes) == 1 else (first, last), planes[first]
        if request.seqlens is None:
            for start, stop in _equal_stretches(plane):
                lane = Lane((start, stop), heads, start, (0, 0), request.sequences[0])
                yield lane, plane[start], tuple(seen_spans(plane[start].outer.strips))
            continue
        origins = list(zip(*request.token_starts, strict=True))[: request.batch]
        each = list(zip(origins, plane, strict=True))
        if apart or request.bias or request.score_fn or not all(mask.exact for mask in set(plane)):
            for b, (origin, mask) in enumerate(each):
                lane = Lane((0, 1), heads, b, origin, request.sequences[b])
                yield lane, mask, tuple(seen_spans(mask.outer.strips))
            continue
        regions = [mask.outer.shift(*origin) for origin, mask in each]
        joined = Region(tuple(strip for region in regions for strip in region.strips))
        # Not joined where sequences meet: runs do not grow into the next one.
        seen = tuple(span for region in regions for span in seen_spans(region.strips))
        lane = Lane((0, 1), heads, 0, (0, 0), (request.q_len, request.kv_len))
        yield lane, Enclosure(joined, joined), seen


def _equal_stretches(values: Sequence[T]) -> Iterator[tuple[int, int]]:
    """Yield the maximal ranges of neighbours that are equal."""
    starts = [k for k in range(len(values)) if k == 0 or values[k] != values[k - 1]]
    yield from pairwise([*starts, len(values)])


def _shared(
    item: RowBlock | Whole,
    traits: Traits,
    heads: int,
    batch: int,
    exact: bool,
    most: tuple[int, int],
) -> RowBlock | Whole:
    """Say what shares the products of a block; without an exact mask, its cells are asked for."""
    if isinstance(item, Whole):
        return item
    if not exact:
        chunks = tuple(c._replace(patches=(), bare=True) for c in item.chunks)
        item = item._replace(chunks=chunks)
    tile = _tile(item, heads, batch, most)
    return item._replace(tile=tile if traits.alike else tile._replace(repeats=1))


def _bare(item: RowBlock | Whole) -> RowBlock | Whole:
    """Say that any row may be without a key in any chunk."""
    if isinstance(item, Whole):
        return item
    return item._replace(chunks=tuple(chunk._replace(bare=True) for chunk in item.chunks))


def _tile(block: RowBlock, heads: int, batch: int, most: tuple[int, int]) -> Tile:
    """Share products between heads first, then batch elements, then repetitions of the block.

    Tiles are of so many cells at `most`, and those of repetitions of so many.
    """
    cells = block.rows * max(chunk.width for chunk in block.chunks)
    room = max(2, most[0] // cells)
    if room < heads:
        share = _even_share(heads, room)
        return Tile(1, 1, share + share % 2)  # matrices are dealt out to an even number of cores
    room //= heads
    if room < batch:
        return Tile(_even_share(batch, room), 1, heads)
    repeats = most[1] // (cells * heads * batch)
    return Tile(batch, min(block.times, max(1, repeats)), heads)


def _even_share(total: int, most: int) -> int:
    """Return the smallest size of equal shares that needs no more shares than `most` does."""
    return -(-total // -(-total // most))


# -- what its items reach ----------------------------------------------------------------------


def _judged(lane: Lane, request: Request, mask: Enclosure, seen: Sequence[Span]) -> Lane:
    """Say which rows of a lane see nothing, and which keys its items reach beside those seen."""
    packed = request.seqlens is not None and lane.lengths == (request.q_len, request.kv_len)
    return lane._replace(
        blank=mask.outer.empty_rows(lane.lengths[0]),
        opaque=not mask.exact,
        strays=not mask.exact or _strays(lane.items, seen),
        mixes=packed and _mixes(lane.items, request),
    )


def _strays(items: Iterable[RowBlock | Whole], seen: Sequence[Span]) -> bool:
    """Whether some item reads keys that no row sees."""
    spans: list[Span] = []
    for a, b in seen:  # those of neighbouring sequences are one range here
        if spans and spans[-1][1] == a:
            a = spans.pop()[0]
        spans.append((a, b))
    return any(
        not _lies_in(spans, a, b, step, item.times)
        for item in items
        for a, b, step in item.keys_read
    )


def _lies_in(spans: Sequence[Span], a: int, b: int, step: int, times: int) -> bool:
    """Whether a run of keys lies in one of the ranges, in each of its repetitions."""
    last = (times - 1) * step
    if b + last <= span_around(spans, a)[1] and a >= span_around(spans, a)[0]:
        return True
    return times > 1 and all(
        _lies_in(spans, a + move, b + move, 0, 1) for move in range(0, last + 1, step or 1)
    )


def _mixes(items: Iterable[RowBlock | Whole], request: Request) -> bool:
    """Whether some item of a packed batch reads keys of a sequence that is not its rows'."""
    rows, keys = request.token_starts
    for item in items:
        for repeat in range(item.times):
            row = item.row + repeat * item.step
            own = bisect_right(rows, row) - 1
            if row + item.rows > rows[own + 1]:
                return True
            for a, b, step in item.keys_read:
                if a + repeat * step < keys[own] or b + repeat * step > keys[own + 1]:
                    return True
    return False
